"""Get a finished run's model back, whoever wrote its network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data import LabelledData, create, create_translation
from tenfold.data.preprocessing import Preprocessing
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.imports import is_object_name
from tenfold.methods import Method
from tenfold.nn import models
from tenfold.nn.models import Network
from tenfold.tasks.folder import RunFolder
from tenfold.tasks.recipe import Recipe

__all__ = [
    "example_of",
    "finished_run",
    "fresh_network",
    "metadata_of",
    "model_of",
    "open_artifact",
    "refuse_synthesizer",
    "wrapped",
]


def finished_run(path: str | Path) -> RunFolder:
    """Open a finished run.

    Raises:
        UserError: no run there, or one that has not come to its end.
    """
    run = RunFolder(Path(path))
    if not run.is_run:
        raise UserError(f"{path} is no run: expected a folder that tenfold train made")
    if not run.is_finished:
        raise UserError(f"{path} is not finished: go on with tenfold train … --resume first")
    return run


def open_artifact(path: str | Path) -> tuple[RunFolder, artifact.Artifact]:
    """Open a finished run's artifact, or one that lies by itself.

    Raises:
        UserError: neither is there, or the run has not come to its end.
    """
    run = RunFolder(Path(path))
    if run.is_run:
        finished_run(path)
        return run, artifact.read(run.model)
    return run, artifact.read(path)


def refuse_synthesizer(found: artifact.Artifact) -> None:
    """Refuse what paints shadows to a verb that has no use for it.

    Raises:
        UserError: the artifact is of the task shadow_synthesis.
    """
    if (found.recipe or {}).get("task") == "shadow_synthesis":
        raise UserError(
            f"{found.path} paints shadows for others to learn from: use it by tenfold synthesize, "
            "or in a recipe of shadow_removal as methods.hqss.synthesizer"
        )


def model_of(run: RunFolder, found: artifact.Artifact) -> nn.Module:
    """Build a run's model. The user's own code is imported from where the run's recipe says.

    Raises:
        UserError: the artifact names no network, and no recipe says where its code is.
    """
    if found.network.name is not None:
        return found.model()
    recipe = run.recipe() if run.is_run else None
    if recipe is None or not is_object_name(recipe.model_name):
        raise UserError(
            f"{found.path} holds a network of your own code: in Python, load it by "
            "tenfold.load(path, model=…) and use tenfold.evaluate, export and bench on it"
        )
    if recipe.task == "translation":
        images = create_translation(recipe.data)
        generator, _ = models.build(
            recipe.model_name,
            channels=images.channels,
            outputs=images.target_channels,
            size=images.size,
            options=recipe.model_options,
        )
        return found.model(generator)
    if recipe.task == "shadow_removal":
        remover, _ = models.build(recipe.model_name, task=recipe.task, options=recipe.model_options)
        return found.model(remover)
    plain = fresh_network(recipe, create(recipe.data))
    return found.model(wrapped(plain, Network(None), recipe.make_methods(), recipe)[0])


def wrapped(
    model: nn.Module,
    network: Network,
    methods: Sequence[Method],
    recipe: Recipe,
    fresh: bool = True,
) -> tuple[nn.Module, Network]:
    """Return the network that methods train in place of the recipe's own.

    Args:
        model: as the recipe names it.
        network: how it was built.
        methods: some may wrap it.
        recipe: of the run; its seed is that of fresh weights.
        fresh: whether the network has fresh weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for method in methods:
            try:
                model, network = method.wrap(model, network, fresh)
            except UserError as error:
                raise UserError(f"methods.{method.key()}: {error}") from error
    return model, network


def fresh_network(recipe: Recipe, data: LabelledData) -> nn.Module:
    """Build a recipe's network with fresh weights."""
    return models.build(
        recipe.model_name,
        num_classes=data.num_classes,
        channels=data.channels,
        size=data.size,
        frames=data.frames,
        options=recipe.model_options,
    )[0]


def example_of(found: artifact.Artifact) -> Tensor:
    """Return one input of zeros, of the size that the artifact names."""
    facts = found.preprocessing or {}
    if not isinstance(facts.get("size"), list):
        raise UserError(
            f"{found.path} doesn't say the size of its input: use the verb in Python, with "
            "example_inputs"
        )
    return torch.zeros(1, *Preprocessing.from_dict(facts).shape)


def metadata_of(found: artifact.Artifact) -> dict[str, Any]:
    """Return what an exported file tells about itself."""
    recipe = found.recipe or {}
    told: dict[str, Any] = {"data": recipe.get("data")}
    if recipe.get("task") == "translation":
        told |= {"task": "translation", "gan": {"extractor": recipe["gan"].get("extractor")}}
    return {"classes": found.classes, "preprocessing": found.preprocessing, "recipe": told}
