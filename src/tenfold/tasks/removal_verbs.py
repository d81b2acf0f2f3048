"""The verbs that come after training, for runs that remove shadows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data.registry import create_shadows
from tenfold.data.shadows import ShadowData
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.nn.shadow_remover import ShadowRemover
from tenfold.tasks.folder import RunFolder
from tenfold.tasks.loading import model_of, open_artifact
from tenfold.tasks.recipe import Recipe
from tenfold.tasks.removal_evaluation import RemovalEvaluation, evaluate_remover
from tenfold.tasks.removal_setup import build_remover, removal_example
from tenfold.tasks.shadow_verbs import is_shadow_removal, remover_of
from tenfold.tasks.translation_evaluation import in_evaluation

__all__ = [
    "compared_removers",
    "evaluate_removal",
    "remover_example",
]


def evaluate_removal(
    model: nn.Module | str | Path,
    data: ShadowData | str | dict[str, Any] | None = None,
    to: str | None = None,
) -> RemovalEvaluation | None:
    """Evaluate a remover on held-out photos; None where the model or the data is no such thing.

    A module is called with the plain photo, and what is outside the shadow is kept.

    Args:
        model: a network, or the path of a run, an artifact, an `.onnx` or an OpenVINO `.xml` file.
        data: the photos or their name; by default those that a run was trained on.
        to: `onnx` or `openvino`: a run's exported form.

    Raises:
        UserError: no data named, or nothing exported.
    """
    if isinstance(model, nn.Module):
        if not isinstance(data, ShadowData):
            return None
        if to not in (None, "torch"):
            raise UserError(f"to={to!r}: export the network, and evaluate the file")
        return _evaluated(ShadowRemover(model), data, "pytorch")
    path = Path(model)
    if path.suffix in (".onnx", ".xml"):
        return _exported(path, data, None, None)
    if not (path / "model.json").is_file() and not (path / "model" / "model.json").is_file():
        return None  # the error of a wrong path is others' to raise
    run, found = open_artifact(path)
    if not is_shadow_removal(found.recipe):
        return None
    recipe = found.recipe or {}
    file = run.export / {"onnx": "model.onnx", "openvino": "model.xml"}.get(to or "", "-")
    if file.is_file():
        return _exported(file, data or recipe["data"], found.preprocessing, recipe)
    if to not in (None, "torch"):
        raise UserError(f"{path} is not exported: run tenfold export {path} --to {to} first")
    remover = remover_of(model_of(run, found), found.preprocessing or {})
    return _evaluated(remover, data or recipe["data"], "pytorch")


def remover_example(found: artifact.Artifact) -> tuple[Tensor, Tensor]:
    """Return codes and a mask of the size that a remover's artifact names.

    Raises:
        UserError: it doesn't name one.
    """
    size = (found.preprocessing or {}).get("size")
    if not isinstance(size, list) or len(size) != 2:
        raise UserError(
            f"{found.path} doesn't say the size of its input: use the verb in Python, with "
            "example_inputs"
        )
    return removal_example((int(size[0]), int(size[1])))


def compared_removers(run: RunFolder, recipe: Recipe) -> dict[str, nn.Module]:
    """Return what a remover is timed against: its teacher, and itself ahead of weight methods.

    Args:
        run: finished.
        recipe: of the run.
    """
    compared: dict[str, nn.Module] = {}
    teacher = (recipe.methods.get("labnet") or {}).get("teacher")
    if teacher is not None and Path(str(teacher)).is_dir():
        other, stored = open_artifact(str(teacher))
        compared["teacher"] = model_of(other, stored)
    if set(recipe.methods) - {"labnet", "hqss"}:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            compared["dense"] = build_remover(recipe)[0]
    return compared


def _evaluated(
    remover: ShadowRemover, data: ShadowData | str | dict[str, Any], runtime: str
) -> RemovalEvaluation:
    photos = data if isinstance(data, ShadowData) else create_shadows(data)
    network: Any = remover.network
    if not isinstance(network, nn.Module):
        return evaluate_remover(remover, photos, runtime=runtime)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with in_evaluation(network):
        return evaluate_remover(remover, photos, device=device, runtime=runtime)


def _exported(
    path: Path,
    data: ShadowData | str | dict[str, Any] | None,
    facts: Mapping[str, Any] | None,
    recipe: Mapping[str, Any] | None,
) -> RemovalEvaluation | None:
    """Evaluate an exported file; None where it is no remover's."""
    from tenfold.measure import OnnxModel, OpenVinoModel

    runtime, kind = (
        ("openvino", OpenVinoModel) if path.suffix == ".xml" else ("onnxruntime", OnnxModel)
    )
    runner = kind(path)
    facts = facts or runner.metadata.get("preprocessing") or {}
    if not is_shadow_removal(facts):
        return None
    recipe = recipe or runner.metadata.get("recipe") or {}
    named = data or recipe.get("data")
    if named is None:
        raise UserError(f"{path} doesn't say which data it was trained on: give --data NAME")
    return _evaluated(remover_of(runner, facts), named, runtime)
