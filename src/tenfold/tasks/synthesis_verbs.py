"""`tenfold synthesize`: pseudo shadow triplets for any trainer, painted by a run of HQSS."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tenfold.data.photo import check_photo_path, write_photo_pixels
from tenfold.data.region_pairs import FULL, LEAST_PIXELS, MaskShapes, stretched
from tenfold.data.shadow_matching import Matched, match_folders, some_of
from tenfold.data.shadow_photos import read_levels, read_pixels
from tenfold.errors import UserError
from tenfold.methods.hqss import HQSS, synthesize
from tenfold.tasks.loading import model_of, open_artifact

__all__ = ["Synthesized", "open_synthesizer", "synthesize_files"]

PHOTOS, MASKS = "photos", "masks"
LARGEST = 640  # pixels of the longer side
COMPARED = (256, 256)  # size at which areas of masks are compared
SPLITS = ("train", "test")


@dataclass
class Synthesized:
    """What was written.

    Attributes:
        out: the folder; triplets lie in `SPLIT_A` (pseudo shadow), `SPLIT_B` (mask) and `SPLIT_C`
            (the photo).
        names: of the photos whose triplets are there.
        left_out: of what isn't, with the reason.
    """

    out: Path
    names: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Write a line for a person, and one for what was left out."""
        lines = [f"{self.out}: {len(self.names):,} pseudo triplets"]
        if self.left_out:
            lines.append(f"left out {len(self.left_out):,}: {some_of(self.left_out)}")
        return "\n".join(lines)


def open_synthesizer(path: str | Path) -> HQSS:
    """Open a run of the task shadow_synthesis, or its artifact.

    Raises:
        UserError: there is none, or it is of another task.
    """
    run, found = open_artifact(path)
    model = model_of(run, found)
    if not isinstance(model, HQSS):
        raise UserError(
            f"{path} holds {type(model).__name__}, which paints no shadows: expected a finished "
            "run of the task shadow_synthesis"
        )
    return model.eval()


def synthesize_files(
    run: str | Path,
    images: str | Path,
    masks: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    split: str = "train",
    largest: int = LARGEST,
    overwrite: bool = False,
    skip_bad: bool = False,
    skip_unmatched: bool = False,
) -> Synthesized:
    """Paint a further shadow into each photo, and write photo, mask and pseudo photo as a triplet.

    The shadow is in the shape of another photo's, on ground that is lit. The photo itself stands
    for the one without shadow: its real shadow stays in both.

    Args:
        run: a finished run of the task shadow_synthesis, or its artifact.
        images: folder of photos with shadows.
        masks: folder of their masks, white in the shadow; files are matched by name.
        out: folder of the triplets; made if missing.
        seed: of the shapes.
        split: train or test, for the folders' names.
        largest: longer side of what is written, in pixels; larger photos are made smaller.
        overwrite: replace files that are there.
        skip_bad: leave out photos and masks that can't be used; they are named.
        skip_unmatched: leave out files without partners; they are named.

    Raises:
        UserError: a file has no partner, can't be read or is of another size than its partner, a
            mask is empty or nearly full, or a triplet is there already; it is named.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: expected train or test")
    if largest < 32:
        raise UserError(f"largest {largest}: expected at least 32 pixels")
    network = open_synthesizer(run)
    matched, orphans = match_folders({PHOTOS: images, MASKS: masks}, skip_unmatched)
    found = Synthesized(Path(out), left_out=list(orphans))
    targets = {one.name: _targets(Path(out), split, one.name) for one in matched}
    read = {file.resolve() for one in matched for file in one.files.values()}
    for files in targets.values():
        for target in files:
            if target.resolve() in read:
                raise UserError(f"{target} is a file that is read: give another folder by --out")
            check_photo_path(target, overwrite)
    shapes, kept = _shapes(matched, skip_bad, found)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    for one in kept:
        try:
            triplet = _painted(network, one, kept, shapes, seed, largest)
        except UserError as error:
            if not skip_bad:
                raise
            found.left_out.append(f"{one.name} ({error})")
            continue
        if triplet is None:
            found.left_out.append(f"{one.name} (no lit region of {LEAST_PIXELS} pixels)")
            continue
        # The photo in shadow last: where it is, its triplet is whole.
        for target, pixels in reversed(list(zip(targets[one.name], triplet, strict=True))):
            write_photo_pixels(target, pixels, overwrite=overwrite)
        found.names.append(one.name)
    if not found.names:
        raise UserError(
            f"nothing was written, {len(found.left_out)} left out: {some_of(found.left_out)}"
        )
    return found


def _targets(out: Path, split: str, name: str) -> tuple[Path, Path, Path]:
    pseudo, mask, photo = (out / f"{split}_{letter}" / f"{name}.png" for letter in "ABC")
    return pseudo, mask, photo


def _shapes(
    matched: list[Matched], skip_bad: bool, found: Synthesized
) -> tuple[MaskShapes, list[Matched]]:
    """Read all masks, small, and return them with the photos that have a usable one."""
    masks, kept = [], []
    for one in matched:
        try:
            mask = _mask(one)
            share = float(mask.float().mean())
            if share == 0 or share > FULL:
                raise UserError(
                    f"{one.files[MASKS]} is white on {share:.0%}: expected white in the shadow "
                    "alone; correct the mask, or leave it out with --skip_bad"
                )
        except UserError as error:
            if not skip_bad:
                raise
            found.left_out.append(f"{one.name} ({error})")
            continue
        masks.append(stretched(mask, COMPARED))
        kept.append(one)
    return MaskShapes(masks, COMPARED), kept


def _painted(
    network: HQSS,
    one: Matched,
    others: list[Matched],
    shapes: MaskShapes,
    seed: int,
    largest: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return pseudo photo, mask and photo, uint8 `(1, C, H, W)`; None: no lit region."""
    photo, mask = _photo(one, largest), _mask(one)
    size = (photo.shape[2], photo.shape[3])
    mask = stretched(mask, size)
    number = others.index(one)
    region = shapes.lit_region(stretched(mask, shapes.size), seed, number)
    if region is None:
        return None
    lit = stretched(_mask(others[region.shape]), size) * (1 - mask)
    if int(lit.sum()) < LEAST_PIXELS:
        return None
    parts = (photo, mask[None, None], lit[None, None])
    device = next(network.parameters()).device
    pseudo = synthesize(network, *(part.to(device) for part in parts)).cpu()
    # Rounded, so that the photo outside the region stays what it is.
    return pseudo.mul(255).round_().to(torch.uint8), parts[2] * 255, photo


def _photo(one: Matched, largest: int) -> Tensor:
    """Read a photo, uint8 `(1, 3, H, W)`, made smaller where it is too large.

    Raises:
        BadImage: it can't be read.
        UserError: its mask is of another size.
    """
    from PIL import Image

    pixels = read_pixels(one.files[PHOTOS])
    other = read_levels(one.files[MASKS]).shape
    if pixels.shape[:2] != other:
        raise UserError(
            f"{one.files[PHOTOS]} is {pixels.shape[0]}x{pixels.shape[1]}, and {one.files[MASKS]} "
            f"{other[0]}x{other[1]}: expected one size for a photo and its mask"
        )
    longer = max(pixels.shape[:2])
    if longer > largest:
        height, width = (max(1, round(side * largest / longer)) for side in pixels.shape[:2])
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))[None]


def _mask(one: Matched) -> Tensor:
    """Read a mask, uint8 `(H, W)` of zeros and ones.

    Raises:
        BadImage: it can't be read.
    """
    levels = read_levels(one.files[MASKS])
    return torch.from_numpy((levels > 127).astype(np.uint8))
