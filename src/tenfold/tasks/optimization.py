"""Optimizers and learning-rate schedules by name, from torch and timm; how long a run will be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError, unknown_name
from tenfold.methods import Method

if TYPE_CHECKING:
    from tenfold.tasks.recipe import Train

__all__ = ["SCHEDULES", "epoch_sizes", "make_optimizer", "make_schedule", "spared_of"]

_TORCH: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
SCHEDULES = ("cosine", "step", "linear", "constant")


def make_optimizer(
    optimizer: str | Mapping[str, Any],
    parameters: Iterable[nn.Parameter],
    lr: float | None = None,
    weight_decay: float | None = None,
    spared: Iterable[nn.Parameter] = (),
) -> Optimizer:
    """Build an optimizer by name.

    Weights with two or more axes decay; biases and norms don't.

    Args:
        optimizer: `sgd`, `adam`, `adamw`, a name of timm's, or a mapping of name and options.
        parameters: what to train.
        lr: peak learning rate; 0.1 for sgd, 0.001 for others.
        weight_decay: 0.0001 for sgd, 0.05 for others.
        spared: further parameters that don't decay, see `spared_of`.

    Raises:
        UserError: an unknown name, or options that it refuses.
    """
    options = {} if isinstance(optimizer, str) else dict(optimizer)
    name = optimizer if isinstance(optimizer, str) else str(options.pop("name", ""))
    sgd = name == "sgd"
    lr = (0.1 if sgd else 1e-3) if lr is None else lr
    decay = (1e-4 if sgd else 0.05) if weight_decay is None else weight_decay
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    left = {id(parameter) for parameter in spared}
    decaying = {id(p) for p in trained if p.ndim >= 2 and id(p) not in left}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in decaying], "weight_decay": decay},
        {"params": [p for p in trained if id(p) not in decaying], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the model has no parameters to train")
    try:
        if name in _TORCH:
            if sgd:
                options.setdefault("momentum", 0.9)
            return _TORCH[name](groups, lr=lr, weight_decay=decay, **options)  # type: ignore[call-arg]
        from timm.optim import (  # type: ignore[attr-defined]
            create_optimizer_v2,
            list_optimizers,
        )

        known = [str(key) for key in list_optimizers()]
        if name not in known:
            raise unknown_name("train.optimizer", name, [*_TORCH, *known])
        made: Optimizer = create_optimizer_v2(
            groups, opt=name, lr=lr, weight_decay=decay, **options
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"train.optimizer {name}: {error}") from error
    return made


def spared_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a network asks weight decay to leave alone.

    As timm's do by `no_weight_decay()`: tokens and position tables of vision transformers.
    """
    ask = getattr(model, "no_weight_decay", None)
    names = set(ask()) if callable(ask) else set()
    return [parameter for name, parameter in model.named_parameters() if name in names]


def make_schedule(
    name: str, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0
) -> LambdaLR:
    """Build a schedule that is stepped after every optimizer step.

    Args:
        name: `cosine` (to zero), `step` (a tenth at 1/2 and 3/4), `linear` (to zero), `constant`.
        optimizer: whose learning rate is scaled.
        total_steps: steps of the run.
        warmup_steps: steps in which it rises linearly, from 1 / (warmup_steps + 1) of the peak.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda u: 0.5 * (1 + math.cos(math.pi * u)),
        "step": lambda u: 0.1 ** ((u >= 0.5) + (u >= 0.75)),
        "linear": lambda u: 1 - u,
        "constant": lambda u: 1.0,
    }
    shape = shapes[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return shape(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)


def epoch_sizes(
    samples: int,
    train: Train,
    methods: Sequence[Method],
    world_size: int = 1,
    limit: float | int | None = None,
) -> list[int]:
    """Return the optimizer steps of every epoch, known ahead of the first.

    Args:
        samples: training images, of all ranks together.
        train: epochs, batch size and accumulation.
        methods: one may draw fewer samples.
        world_size: number of processes.
        limit: the Trainer's limit_train_batches: batches as an int, or a share as a float.
    """
    drawn = [samples] * train.epochs
    for method in methods:
        drawn = [
            min(ours, own)
            for ours, own in zip(drawn, method.epoch_samples(samples, train.epochs), strict=True)
        ]
    batches = [math.ceil(math.ceil(count / world_size) / train.batch_size) for count in drawn]
    if isinstance(limit, int):
        batches = [min(count, limit) for count in batches]
    elif limit is not None:
        batches = [int(count * limit) for count in batches]
    if min(batches) < 1:
        raise UserError(f"limit_train_batches={limit} leaves no batch: give more")
    return [math.ceil(count / train.accumulate) for count in batches]
