"""Results, shadow-free photos and masks in folders: matched by name, read, brought to one size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tenfold.data.decode import _opened, _upright, _without_wide_pixels
from tenfold.data.listing import ENDINGS
from tenfold.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Matched", "Sample", "match_folders", "read_sample"]

# What SRD's shadow-free files carry behind the name of the shadow photo.
SUFFIXES = ("_no_shadow", "_shadow_free", "_free")
SHOWN = 5

Size = tuple[int, int]


@dataclass(frozen=True)
class Matched:
    """The files of one photo.

    Attributes:
        name: the stem that they share.
        files: by role: results, ground truth, masks, and input where it is compared too.
    """

    name: str
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Sample:
    """The images of one photo, at one size.

    Attributes:
        name: the stem that the files share.
        pictures: by role, uint8 `(3, H, W)`.
        levels: the mask before any rule, uint8 `(1, H, W)`.
        notes: what was converted or resized, each a phrase that doesn't name the photo.
    """

    name: str
    pictures: Mapping[str, Tensor]
    levels: Tensor
    notes: tuple[str, ...]


def match_folders(
    folders: Mapping[str, str | os.PathLike[str]], skip_unmatched: bool = False
) -> tuple[list[Matched], list[str]]:
    """Match the files of folders by stem; SRD's `_no_shadow` and `_free` don't count.

    Where masks of one stem differ in their ending, the PNG is taken.

    Args:
        folders: by role; `masks` is one of them.
        skip_unmatched: leave out what isn't in all folders.

    Returns:
        The photos, sorted by name, and what was left out, as `file (role)`.

    Raises:
        UserError: no such folder, no images, two files of one stem, or files without partners.
    """
    found = {role: _by_stem(Path(folder), role) for role, folder in folders.items()}
    everywhere = set.intersection(*(set(files) for files in found.values()))
    orphans = []
    for name in sorted(set().union(*found.values()) - everywhere):
        missing = [role for role, files in found.items() if name not in files]
        there = next((role, files[name]) for role, files in found.items() if name in files)
        orphans.append(f"{there[1].name} of {there[0]} (not in {' and '.join(missing)})")
    if orphans and not skip_unmatched:
        more = f" and {len(orphans) - SHOWN} more" if len(orphans) > SHOWN else ""
        raise UserError(
            f"{len(orphans)} without partners: {', '.join(orphans[:SHOWN])}{more}; expected the "
            "same names in all folders: rename them, or leave them out with --skip_unmatched"
        )
    if not everywhere:
        raise UserError(
            f"no name is in all of {', '.join(str(folder) for folder in folders.values())}: "
            "expected files of the same names"
        )
    matched = [
        Matched(name, {role: files[name] for role, files in found.items()})
        for name in sorted(everywhere)
    ]
    return matched, orphans


def read_sample(matched: Matched, size: Size | None) -> Sample:
    """Read a photo's files, each resized to `size`; None: they have to be of one size.

    Photos: upright as EXIF says; grey, palette, CMYK and 16 bits become 8-bit RGB; an opaque alpha
    is dropped. Masks: their luminance, alpha doesn't count; one of the levels 0 and 1 is made 0 and
    255.

    Raises:
        UserError: a file that can't be read, a transparent photo, or sizes that differ.
    """
    pictures, sizes, notes = {}, {}, list[str]()
    levels = torch.empty(0)
    for role, path in matched.files.items():
        with _opened(path, str(path)) as image:
            image.load()
            picture = _levels(image, notes) if role == "masks" else _colours(image, role, notes)
        if picture.mode == "RGBA":
            raise UserError(
                f"{path} is transparent in part: expected an opaque photo; put it on a background"
            )
        sizes[role] = (picture.height, picture.width)
        planes = _resized(picture, size)
        if role == "masks":
            levels = planes
        else:
            pictures[role] = planes
    _check_sizes(matched, sizes, size, notes)
    return Sample(matched.name, pictures, levels, tuple(notes))


def _by_stem(folder: Path, role: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected the folder of {role}")
    found: dict[str, Path] = {}
    for entry in sorted(os.listdir(folder)):
        path = folder / entry
        if path.suffix.lower() not in ENDINGS or entry.startswith("."):
            continue
        name = path.stem
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix) or name
        if name in found:
            pngs = [file for file in (found[name], path) if file.suffix.lower() == ".png"]
            if role != "masks" or len(pngs) != 1:
                raise UserError(
                    f"{folder} has {found[name].name} and {path.name}, which both stand for "
                    f"{name}: expected one file a photo, remove the other"
                )
            path = pngs[0]
        found[name] = path
    if not found:
        raise UserError(
            f"{folder} has no images: expected {role}, files ending in {', '.join(ENDINGS)}"
        )
    return found


def _colours(image: Image, role: str, notes: list[str]) -> Image:
    """Return 8-bit RGB, or RGBA where some of it is transparent."""
    kind = {"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "CMYK": "CMYK"}.get(image.mode)
    if image.mode.startswith("I;16"):
        kind = "16-bit grey"
    if kind:
        notes.append(f"{role}: {kind} made 8-bit RGB")
    picture = _without_wide_pixels(_upright(image))
    if picture.mode in ("LA", "La", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        least, _ = picture.getchannel("A").getextrema()
        if int(least) < 255:  # type: ignore[arg-type]
            return picture
        notes.append(f"{role}: opaque alpha dropped")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _levels(image: Image, notes: list[str]) -> Image:
    """Return a mask's luminance as 8-bit grey."""
    from PIL import Image as images

    picture = _upright(image)
    if picture.mode.startswith("I;16"):
        wide = np.asarray(picture)
        if wide.max(initial=0) > 1:
            picture = _without_wide_pixels(picture)
        else:
            picture = images.fromarray(wide.astype(np.uint8))
    picture = _without_wide_pixels(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to grey, Pillow warns
    if picture.mode == "RGBA":
        picture = picture.convert("RGB")
    if picture.mode != "L":
        picture = picture.convert("L")
    if int(picture.getextrema()[1]) == 1:  # type: ignore[arg-type]
        notes.append("masks: levels 0 and 1 taken for 0 and 255")
        picture = picture.point([0] + [255] * 255)
    return picture


def _resized(picture: Image, size: Size | None) -> Tensor:
    """Return uint8 `(C, H, W)`, resized bicubically, against aliasing, in 8 bits."""
    from PIL import Image as images

    if size is not None and (picture.height, picture.width) != size:
        picture = picture.resize((size[1], size[0]), images.Resampling.BICUBIC)
    pixels: Any = np.asarray(picture)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, order="C"))


def _check_sizes(
    matched: Matched, sizes: Mapping[str, Size], size: Size | None, notes: list[str]
) -> None:
    expected = sizes["ground truth"]
    for role, found in sizes.items():
        if found == expected:
            continue
        if size is None:
            raise UserError(
                f"{matched.files[role]} is {found[0]}x{found[1]}, and "
                f"{matched.files['ground truth']} {expected[0]}x{expected[1]}: expected one size; "
                "leave --size native out to resize both"
            )
        notes.append(f"{role}: of another size than the ground truth; both were resized")
