"""Networks that methods ask for beside the one that is trained: a teacher, for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data import LabelledData
from tenfold.data.preprocessing import Preprocessing
from tenfold.errors import UserError, unknown_name
from tenfold.imports import is_object_name
from tenfold.nn import models
from tenfold.tasks.classification import in_channels_last
from tenfold.tasks.loading import model_of, open_artifact
from tenfold.tasks.recipe import Recipe

__all__ = ["OtherNetwork", "open_network"]


@dataclass(frozen=True)
class OtherNetwork:
    """A network that a method asked for.

    Attributes:
        key: of the method.
        role: what it is to the method, such as `teacher`.
        network: in evaluation mode, frozen; with fresh weights if it is trained first.
        origin: where its weights come from, in words.
        recipe: by which it is trained first; None: its weights are there.
        run: an existing run or artifact that it was read from.
    """

    key: str
    role: str
    network: nn.Module
    origin: str
    recipe: Recipe | None = None
    run: Path | None = None

    def folder_beside(self, run: Path) -> Path:
        """Return where its own run lies: `runs/mine-teacher` beside `runs/mine`."""
        return run.with_name(f"{run.name}-{self.role}")


def open_network(
    key: str, role: str, given: Any, recipe: Recipe, data: LabelledData
) -> OtherNetwork:
    """Open or build what a recipe says of a network.

    Args:
        key: of the method that asks.
        role: what it is to the method.
        given: a run or an artifact; `timm/…` or `torchvision/…`, with its published weights; a
            name of our own networks or `file.py:function`, or a mapping of name and arguments,
            to be trained first.
        recipe: of the run; its data and training are those of a network that is trained first.
        data: the run's data.

    Raises:
        UserError: there is none of that name, or it doesn't fit the data.
    """
    what = f"methods.{key}.{role}"
    if isinstance(given, Mapping):
        if not isinstance(given.get("name"), str):
            raise UserError(f"{what}: expected a name, or a mapping with a name, got {given!r}")
        return _trained_first(key, role, dict(given), recipe, data)
    name = str(given)
    if Path(name).is_dir():
        return _from_run(key, role, Path(name), data, what)
    library = name.partition("/")[0]
    if library in ("timm", "torchvision"):
        network = _pretrained(name, data, what)
        return OtherNetwork(key, role, frozen(network), f"the published weights of {name}")
    if name in models.names() or is_object_name(name):
        return _trained_first(key, role, {"name": name}, recipe, data)
    if "/" in name or name.startswith("."):
        raise UserError(f"{what}: {name} does not exist: expected a run, an artifact or a model")
    known = [known for known in models.names() if "<" not in known]
    raise unknown_name(what, name, [*known, "timm/<name>", "torchvision/<name>"])


def _trained_first(
    key: str, role: str, model: dict[str, Any], recipe: Recipe, data: LabelledData
) -> OtherNetwork:
    own = Recipe(
        task=recipe.task,
        data=recipe.data,
        model=model["name"] if len(model) == 1 else model,
        train=recipe.train,
        trainer=recipe.trainer,
        seed=recipe.seed,
        name=f"{recipe.name}-{role}",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network, _ = models.build(
            own.model_name,
            num_classes=data.num_classes,
            channels=data.channels,
            size=data.size,
            frames=data.frames,
            options=own.model_options,
        )
    origin = f"{own.model_name}, trained first by the same recipe"
    return OtherNetwork(key, role, frozen(network), origin, recipe=own)


def _from_run(key: str, role: str, path: Path, data: LabelledData, what: str) -> OtherNetwork:
    run, found = open_artifact(path)
    facts = found.preprocessing or {}
    given = Preprocessing.from_dict(facts).shape if facts else data.shape
    if given != data.shape:
        raise UserError(
            f"{what}: {path} takes {data.key}s of {_shape(given)}, and {data.name} gives "
            f"{_shape(data.shape)}: give one that was trained at that size"
        )
    if found.classes is not None and list(found.classes) != data.classes:
        raise UserError(
            f"{what}: {path} knows the classes {_few(found.classes)}, and {data.name} has "
            f"{_few(data.classes)}: give one that was trained on the same classes"
        )
    network = frozen(model_of(run, found))
    if facts:
        renormalize(network, data, facts["mean"], facts["std"])
    return OtherNetwork(key, role, network, f"{path}", run=path)


def _pretrained(name: str, data: LabelledData, what: str) -> nn.Module:
    network, described = models.build(
        name,
        num_classes=data.num_classes,
        channels=data.channels,
        size=data.size,
        frames=data.frames,
    )
    fresh = models.load_pretrained(network, described)
    if fresh:
        raise UserError(
            f"{what}: the published weights of {name} lack {', '.join(fresh[:2])} for the "
            f"{data.num_classes} classes of {data.name}: train it on them first (init: "
            "pretrained), and give that run"
        )
    published: Any = getattr(
        network, "pretrained_cfg", None
    )  # timm's; torchvision's are ImageNet's
    facts = published if isinstance(published, Mapping) else {}
    mean = facts.get("mean", (0.485, 0.456, 0.406))
    renormalize(network, data, mean, facts.get("std", (0.229, 0.224, 0.225)))
    return network


def frozen(network: nn.Module) -> nn.Module:
    """Return a network in evaluation mode whose parameters want no gradients."""
    ready: nn.Module = network.eval().requires_grad_(False)
    return in_channels_last(ready)


def renormalize(
    network: nn.Module, data: LabelledData, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Have a network take samples normalised for the data, though it was trained on another scale.

    Args:
        network: gets a hook.
        data: whose mean and standard deviation the samples have been normalised by.
        mean: by channel, that the network expects.
        std: likewise.
    """
    ours = [torch.tensor(values) for values in (data.mean, data.std)]
    theirs = [torch.tensor(list(values)) for values in (mean, std)]
    if all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        return
    ones = (1,) * (len(data.shape) - 1)
    scale = (ours[1] / theirs[1]).reshape(-1, *ones)
    shift = ((ours[0] - theirs[0]) / theirs[1]).reshape(-1, *ones)

    def rescaled(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image = arguments[0]
        return (image * scale.to(image) + shift.to(image), *arguments[1:])

    network.register_forward_pre_hook(rescaled)


def _shape(lengths: Sequence[int]) -> str:
    return "x".join(str(length) for length in lengths)


def _few(classes: Sequence[str]) -> str:
    return f"{', '.join(list(classes)[:3])}{', …' if len(classes) > 3 else ''} ({len(classes)})"
