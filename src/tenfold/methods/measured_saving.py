"""Time training steps with and without what freezing leaves out of them, on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree

from tenfold.methods.base import Method

__all__ = ["Example", "MeasuredSaving", "measure_saving", "some_loss"]

_ROUNDING = 1e-5


@dataclass(frozen=True)
class MeasuredSaving:
    """Whole training steps, timed in turn.

    Attributes:
        saving_ms: median milliseconds of a step that leaves out what needs no gradient.
        dense_ms: the same of a step that computes everything.
        share: median, over the rounds, of the share of the step's time that is saved.
        gradient_difference: the largest difference between the gradients of both, relative to the
            largest gradient of the parameter, or of all where the parameter's are nothing but
            rounding: a bias ahead of a norm, say.
    """

    saving_ms: float
    dense_ms: float
    share: float
    gradient_difference: float


def measure_saving(
    method: Method,
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    switch: Callable[[Any, bool], None],
    *,
    rounds: int = 5,
) -> MeasuredSaving:
    """Time whole steps of a model under training with the saving on and off, in turn.

    Two copies are stepped at learning rate 0, so that nothing moves or freezes meanwhile. A step is
    forward and backward pass, the method's own work and that of SGD with momentum and weight decay.

    Args:
        method: attached to the model.
        model: under training; is not changed.
        loss_of: computes a loss with a model.
        switch: turns the saving of a method's copy on or off.
        rounds: pairs of steps to time, after one untimed.
    """
    steps, copies = [], []
    for saving in (True, False):
        twin, its_method = copy.deepcopy((model, method))
        its_method.driven_by_engine = True
        switch(its_method, saving)
        parameters = its_method.parameters_for(twin)
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
        copies.append(twin)
        steps.append(_step(its_method, twin, optimizer, loss_of))
    device = next(model.parameters()).device
    times: tuple[list[float], list[float]] = ([], [])
    with torch.random.fork_rng():
        for index in range(-1, rounds):
            for which in (0, 1) if index % 2 else (1, 0):
                torch.manual_seed(0)  # dropout alike
                seconds = _timed(steps[which], device)
                if index >= 0:
                    times[which].append(1000 * seconds)
    share = statistics.median(1 - on / off for on, off in zip(*times, strict=True))
    return MeasuredSaving(
        statistics.median(times[0]), statistics.median(times[1]), share, _difference(*copies)
    )


def _step(
    method: Method,
    model: nn.Module,
    optimizer: Optimizer,
    loss_of: Callable[[nn.Module], Tensor],
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        method.before_step(optimizer)
        optimizer.step()
        method.step()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _difference(saving: nn.Module, dense: nn.Module) -> float:
    """Compare gradients; where the saving one has none, the dense one's must be zero."""
    pairs = [
        (torch.zeros_like(theirs.grad) if ours.grad is None else ours.grad, theirs.grad)
        for ours, theirs in zip(saving.parameters(), dense.parameters(), strict=True)
        if theirs.grad is not None
    ]
    sizes = [float(theirs.abs().max()) for _, theirs in pairs]
    largest = max(sizes, default=0.0)
    worst = 0.0
    for (ours, theirs), size in zip(pairs, sizes, strict=True):
        difference = float((ours - theirs).abs().max())
        scale = size if size > _ROUNDING * largest else largest
        worst = max(worst, difference / scale if scale else difference)
    return worst


class Example:
    """Keeps the inputs of the first training step, to time steps with in the end."""

    def __init__(self) -> None:
        self.inputs: tuple[Any, ...] | None = None
        self._hook: Any = None

    def watch(self, model: nn.Module) -> None:
        """Wait for a model's first training step."""
        self._hook = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the arguments; the forward pre-hook itself."""
        if self.inputs is None and model.training and torch.is_grad_enabled():
            self.inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)

    def forget(self) -> None:
        """Let go of the inputs and the model."""
        self.inputs = None
        if self._hook is not None:
            self._hook.remove()

    def __deepcopy__(self, memo: Any) -> Example:
        return Example()  # copies need no batch of their own


def some_loss(result: object) -> Tensor:
    """Return a scalar that every output has a part in."""
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()
