"""Get a finished run's model back, whoever wrote its network."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tenfold.data import LabelledData, create
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.imports import is_object_name
from tenfold.nn import models
from tenfold.tasks.folder import RunFolder
from tenfold.tasks.recipe import Recipe

__all__ = ["finished_run", "fresh_network", "model_of", "open_artifact"]


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
    return found.model(fresh_network(recipe, create(recipe.data)))


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
