"""The verbs that come after training, for runs that translate images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data import TranslationData, create_translation
from tenfold.data.photo import read_photo, write_photo
from tenfold.deploy import artifact
from tenfold.deploy.restore import default_tile, translate
from tenfold.errors import UserError
from tenfold.nn.generators import ResNetGenerator
from tenfold.tasks.extractors import open_extractor
from tenfold.tasks.folder import RunFolder
from tenfold.tasks.translation_evaluation import (
    Reference,
    TranslationEvaluation,
    evaluate_generator,
    in_evaluation,
)
from tenfold.tasks.translation_run import TEACHER

__all__ = [
    "Translated",
    "compared_models",
    "evaluate_translation",
    "is_translation",
    "translate_files",
]

PREDICTIONS = "predictions"  # below a run's folder, where nobody names another


@dataclass(frozen=True)
class Translated:
    """One photo that was read, and the one that was written."""

    file: str
    output: str


def is_translation(recipe: Mapping[str, Any] | None) -> bool:
    """Tell whether an artifact's recipe is of the task translation."""
    return (recipe or {}).get("task") == "translation"


def translate_files(
    network: nn.Module,
    files: Sequence[str | Path],
    out: Path,
    *,
    tile: int | None = None,
    overwrite: bool = False,
) -> list[Translated]:
    """Translate photos of any size, and write each under its own name into a folder.

    Args:
        network: a generator.
        files: photos of any kind that Pillow reads.
        out: the folder; made if missing.
        tile: side of the tiles of large photos, in pixels; by default only where one pass would
            take too much memory.
        overwrite: replace files that are there.

    Raises:
        UserError: a file can't be read or is there already; it is named.
    """
    targets = [out / f"{Path(file).stem}.png" for file in files]
    for target in targets:
        if targets.count(target) > 1:
            raise UserError(f"two of the files would be written to {target}: give other names")
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists: pass --overwrite, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    done = []
    multiple = int(getattr(network, "multiple", 1))
    for file, target in zip(files, targets, strict=True):
        photo, facts = read_photo(file)
        side = tile or default_tile(photo.shape[-2], photo.shape[-1])
        with in_evaluation(network):
            made = translate(network, photo, multiple=multiple, tile=side)
        write_photo(target, made, facts, overwrite=overwrite)
        done.append(Translated(str(file), str(target)))
    return done


def evaluate_translation(
    forward: Callable[[Tensor], Tensor] | nn.Module,
    data: TranslationData | str | dict[str, Any],
    extractor: str | dict[str, Any] | None = None,
    runtime: str = "pytorch",
) -> TranslationEvaluation:
    """Evaluate a generator on held-out images.

    Args:
        forward: a generator, or an exported one.
        data: the images, or their name.
        extractor: for FID and KID, see the recipe's `gan.extractor`.
        runtime: that `forward` runs in.
    """
    images = data if isinstance(data, TranslationData) else create_translation(data)
    reference = None
    if extractor is not None:
        reference = Reference(open_extractor(extractor, images.target_channels), images)
    if isinstance(forward, nn.Module):
        device = next((p.device for p in forward.parameters()), torch.device("cpu"))
        with in_evaluation(forward) as network:
            return evaluate_generator(network, images, reference, device=device)
    return evaluate_generator(forward, images, reference, runtime=runtime)


def compared_models(run: RunFolder, found: artifact.Artifact) -> dict[str, nn.Module]:
    """Return what a student is timed against: the original ResNet-9 and its teacher.

    The ResNet-9 has fresh weights; what it costs doesn't hang on them.
    """
    facts = found.preprocessing or {}
    channels = int(facts.get("channels", 3))
    compared: dict[str, nn.Module] = {"ResNet-9": ResNetGenerator(64, channels=channels).eval()}
    teacher = run.path / TEACHER
    if (teacher / "model.json").is_file():
        stored = artifact.read(teacher)
        if stored.network.name is not None:
            compared["teacher"] = stored.model()
    return compared
