"""Results, shadow-free photos and masks in folders: matched by name, read, brought to one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.decode import _opened
from tenfold.data.shadow_matching import Matched, match_folders
from tenfold.data.shadow_photos import as_colours, as_levels
from tenfold.errors import UserError
from tenfold.kernels import resize

__all__ = ["Matched", "Sample", "match_folders", "read_sample"]

Size = tuple[int, int]
Pixels = NDArray[np.uint8]


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
        pixels = _read(path, role, notes)
        found = pixels.shape[:2]
        sizes[role] = (found[0], found[1])
        planes = _resized(pixels, size)
        if role == "masks":
            levels = planes
        else:
            pictures[role] = planes
    _check_sizes(matched, sizes, size, notes)
    return Sample(matched.name, pictures, levels, tuple(notes))


def _read(path: Path, role: str, notes: list[str]) -> Pixels:
    """Return `(H, W, 3)` of a photo, `(H, W, 1)` of a mask."""
    with _opened(path, str(path)) as image:
        image.load()
        picture = as_levels(image, notes) if role == "masks" else as_colours(image, role, notes)
    if picture.mode == "RGBA":
        raise UserError(
            f"{path} is transparent in part: expected an opaque photo; put it on a background"
        )
    pixels: Pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _resized(pixels: Pixels, size: Size | None) -> Tensor:
    """Return uint8 `(C, H, W)`, resized bicubically, against aliasing, in 8 bits: Pillow's way."""
    from PIL import Image as images

    found = (pixels.shape[0], pixels.shape[1])
    if size is not None and found != size:
        if resize.able(found, size):
            return resize.bicubic(pixels, size)
        picture = images.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        resized = np.asarray(picture.resize((size[1], size[0]), images.Resampling.BICUBIC))
        pixels = resized.reshape(*size, -1)
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


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
