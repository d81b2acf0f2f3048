"""Take the shadows out of a user's own photos, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tenfold.data.decode import BadImage
from tenfold.data.listing import ENDINGS
from tenfold.data.photo import (
    WRITTEN,
    Photo,
    read_photo_pixels,
    without_alpha,
    write_photo_pixels,
)
from tenfold.data.shadow_mask import ShadowMask, automatic_mask, read_mask, write_mask
from tenfold.deploy.shadow_detector import Detector, open_detector
from tenfold.deploy.shadow_photo import LARGEST_SIDE, SMALLEST_SIDE, remove_shadow
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.measure.runners import OnnxModel, OpenVinoModel
from tenfold.nn.packed_labnet import PackedLABNet, unpackable_labnet
from tenfold.nn.shadow_remover import ShadowRemover
from tenfold.tasks.translation_evaluation import in_evaluation

__all__ = ["ShadowRemoved", "is_shadow_removal", "open_exported", "remove_shadows", "remover_of"]

TASK = "shadow_removal"
EXPORTED: dict[str, type[OnnxModel] | type[OpenVinoModel]] = {
    ".onnx": OnnxModel,
    ".xml": OpenVinoModel,
}

Network = Callable[..., Any]  # an nn.Module, or an exported file


@dataclass(frozen=True)
class ShadowRemoved:
    """One photo that was read, and what became of it.

    Attributes:
        file: the photo.
        output: the photo that was written; None where it was skipped.
        mask: the mask that was used, a file.
        notes: what was converted, what to look at, or why it was skipped.
    """

    file: str
    output: str | None
    mask: str | None
    notes: tuple[str, ...] = ()


def is_shadow_removal(recipe: Mapping[str, Any] | None) -> bool:
    """Tell whether an artifact's recipe, or its preprocessing, is of the task shadow_removal."""
    return (recipe or {}).get("task") == TASK


def open_exported(path: str | Path) -> tuple[Network, dict[str, Any]] | None:
    """Open an exported remover, and return it with its preprocessing; None: no such file's name.

    Raises:
        UserError: a file that can't be run, or one of another task.
    """
    kind = EXPORTED.get(Path(path).suffix.lower())
    if kind is None or Path(path).is_dir():
        return None
    network = kind(path)
    facts = network.metadata.get("preprocessing") or {}
    if not is_shadow_removal(facts):
        raise UserError(
            f"{path} holds no shadow remover: expected one that tenfold export wrote; for other "
            "models give the run or the artifact"
        )
    return network, facts


def remover_of(network: Network, preprocessing: Mapping[str, Any]) -> ShadowRemover:
    """Return the remover that an artifact, or an exported file, holds with its network."""
    remover = ShadowRemover(
        network,
        guess=preprocessing.get("guess", "none"),
        composite=bool(preprocessing.get("composite", True)),
        space=preprocessing.get("space"),
        side=preprocessing.get("side"),
    )
    remover.multiple = int(preprocessing.get("multiple", remover.multiple))
    return remover


def remove_shadows(
    network: Network,
    preprocessing: Mapping[str, Any],
    files: Sequence[str | Path],
    out: str | Path,
    *,
    mask: str | Path | None = None,
    auto_mask: bool = False,
    detector: str | Path | Callable[[Any], Any] | None = None,
    background: str | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
) -> list[ShadowRemoved]:
    """Take the shadows out of photos of any size, and write each under its own name into a folder.

    Masks that were made here are written beside the results, as `<name>_mask.png`.

    Args:
        network: of an artifact, or an exported file.
        preprocessing: of the artifact: space, guess, composite, and the size that it was trained
            with, between 256 and 480 the shorter side of what it sees of a larger photo.
        files: photos of any kind that Pillow reads.
        out: the folder; made if missing.
        mask: a mask's file, of a single photo; or a folder of masks with the names of the photos,
            whatever their ending.
        auto_mask: guess the mask: what is dark. It often fails.
        detector: find the mask by a detector; see `tenfold.deploy.shadow_detector.open_detector`.
        background: white, black or #rrggbb, behind transparent photos.
        overwrite: replace files that are there.
        skip_bad: leave out photos and masks that can't be read.

    Raises:
        UserError: not one way to a mask, names that meet, a file that is there or can't be read, or
            a mask that doesn't fit; the file is named.
    """
    ways = [mask is not None, auto_mask, detector is not None]
    if sum(ways) != 1:
        raise UserError(
            f"{sum(ways)} ways to the shadow's mask: expected one of --mask FILE, --detector, and "
            "--auto_mask, which guesses and often fails"
        )
    find: Detector | None = None
    masks: list[Path | None] = [None] * len(files)
    if mask is not None:
        masks = list(_mask_files(Path(mask), files))
    elif detector is not None:
        find = open_detector(detector)
    else:
        find = _guessed
    plans = _plans(files, Path(out), masks, overwrite)
    network = _for_this_machine(network)
    remover = remover_of(network, preprocessing)
    trained = preprocessing.get("size")
    side = min(trained) if isinstance(trained, list | tuple) else SMALLEST_SIDE
    side = remover.side or max(SMALLEST_SIDE, min(LARGEST_SIDE, int(side)))
    done = []
    for plan in plans:
        try:
            pixels, facts = read_photo_pixels(plan.file)
            pixels, facts, notes = _opaque(pixels, facts, background)
            found = _mask_for(plan, pixels, facts, find)
        except BadImage as error:
            if not skip_bad:
                raise
            done.append(ShadowRemoved(str(plan.file), None, None, (str(error),)))
            continue
        if find is not None:
            write_mask(plan.mask, found, overwrite=overwrite)
        if isinstance(network, nn.Module):
            with in_evaluation(network):
                removal = remove_shadow(remover, pixels, found.pixels, side=side)
        else:
            removal = remove_shadow(remover, pixels, found.pixels, side=side)
        write_photo_pixels(plan.output, removal.pixels, facts, overwrite=overwrite)
        told = (*notes, *found.warnings, *removal.notes)
        done.append(ShadowRemoved(str(plan.file), str(plan.output), str(plan.mask), told))
    return done


def _for_this_machine(network: Network) -> Network:
    """Return a LAB-Net on a CPU in the form that compiled kernels run, and others as they are."""
    if isinstance(network, nn.Module) and native.extension() is not None:
        with in_evaluation(network):
            if unpackable_labnet(network) is None:
                return PackedLABNet.from_network(network)
    return network


@dataclass(frozen=True)
class _Plan:
    file: Path
    output: Path
    mask: Path


def _plans(
    files: Sequence[str | Path], out: Path, masks: Sequence[Path | None], overwrite: bool
) -> list[_Plan]:
    """Say what will be read and written, and refuse it ahead of the work."""
    plans, written = list[_Plan](), list[Path]()
    for file, mask in zip(map(Path, files), masks, strict=True):
        ending = file.suffix if file.suffix.lower() in WRITTEN else ".png"
        output = out / f"{file.stem}{ending}"
        plans.append(_Plan(file, output, mask or out / f"{file.stem}_mask.png"))
        written += [output] if mask else [output, plans[-1].mask]
    for file, mask in zip(map(Path, files), masks, strict=True):
        if mask is not None and mask.resolve() == file.resolve():
            raise UserError(
                f"{file} is given as its own mask: expected another file, white in the shadow; "
                "give masks of the photos' names in a folder of their own"
            )
    read = {plan.file.resolve() for plan in plans} | {each.resolve() for each in masks if each}
    for target in written:
        if written.count(target) > 1:
            raise UserError(f"two of the files would be written to {target}: give other names")
        if target.resolve() in read:
            raise UserError(f"{target} is a file that is read: give another folder by --out")
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists: pass --overwrite, or another --out")
    return plans


def _mask_files(mask: Path, files: Sequence[str | Path]) -> list[Path]:
    """Return each photo's mask: the file, or that of the photo's stem in a folder."""
    if not mask.is_dir():
        if not mask.exists():
            raise UserError(f"the mask {mask} does not exist: give a file, or a folder of masks")
        if len(files) > 1:
            raise UserError(
                f"{len(files)} photos and one mask, {mask}: give a folder of masks that have the "
                "photos' names"
            )
        return [mask]
    found: dict[str, Path] = {}
    for entry in sorted(mask.iterdir()):
        # Where a stem has several endings, the PNG is the mask.
        if entry.suffix.lower() in ENDINGS and entry.suffix.lower() == ".png":
            found[entry.stem] = entry
        elif entry.suffix.lower() in ENDINGS:
            found.setdefault(entry.stem, entry)
    stems = [Path(file).stem for file in files]
    missing = [str(file) for file, stem in zip(files, stems, strict=True) if stem not in found]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{mask} has no mask for {', '.join(missing[:5])}{more}: expected files of the "
            "photos' names, whatever the ending"
        )
    return [found[stem] for stem in stems]


def _opaque(
    pixels: Tensor, facts: Photo, background: str | None
) -> tuple[Tensor, Photo, tuple[str, ...]]:
    """Return a photo without transparency, and what was converted."""
    notes = []
    grey = facts.mode in ("1", "L", "LA", "La") or facts.mode.startswith("I")
    if grey:
        notes.append("grey: its one channel stands for red, green and blue")
    elif facts.mode not in ("RGB", "RGBA"):
        notes.append(f"{facts.mode} pixels became 8-bit RGB")
    if facts.alpha is None:
        return pixels, facts, tuple(notes)
    pixels, opaque = without_alpha(pixels, facts, background)
    hidden = int(facts.alpha.min()) < 255
    notes.append(f"put on {background}" if hidden else "its opaque alpha channel was dropped")
    return pixels, opaque, tuple(notes)


def _mask_for(plan: _Plan, pixels: Tensor, facts: Photo, find: Detector | None) -> ShadowMask:
    if find is None:
        return read_mask(plan.mask, facts.size, facts.name)
    return find(plan.file, pixels)


def _guessed(file: Path, pixels: Tensor) -> ShadowMask:
    try:
        return automatic_mask(pixels)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
