"""The mask of a user's own photo: a file that is there, or a guess from the photo's lightness.

The guess is Otsu's threshold on L of LAB, blurred and cleaned. It takes anything dark for shadow:
against careful masks its IoU is anything from 0.1 to 1. So it is a start to correct by hand, and
whoever makes one writes it down and says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tenfold.data.decode import _opened
from tenfold.data.photo import write_photo_pixels
from tenfold.data.shadow_photos import as_levels
from tenfold.errors import UserError
from tenfold.nn.lab import rgb_to_lab

__all__ = ["ShadowMask", "automatic_mask", "mask_of_values", "otsu", "read_mask", "write_mask"]

# Levels of a mask between which a pixel is grey: JPEG's own noise stays outside.
DARK, BRIGHT = 26, 230
MOST_GREY, MOST_SHADOW = 0.05, 0.95
THRESHOLD = 128
GUESS_SIDE = 320  # shorter side at which the guess is made
GUESS_SIGMA, OPENED, CLOSED = 2.5, 3, 5  # in its pixels

Size = tuple[int, int]


@dataclass(frozen=True)
class ShadowMask:
    """Where a photo's shadow is.

    Attributes:
        pixels: uint8 `(H, W)` of zeros and ones, 1 in shadow.
        source: the file that it came from, or what made it.
        warnings: what the user should look at.
    """

    pixels: Tensor
    source: str
    warnings: tuple[str, ...] = ()


def read_mask(
    path: str | os.PathLike[str], size: Size | None = None, photo: str = "the photo"
) -> ShadowMask:
    """Read a mask file: light is shadow. Its luminance counts, never its alpha.

    Args:
        path: an image file.
        size: (H, W) that it must have; None: any.
        photo: what an error calls the photo of that size.

    Raises:
        UserError: a file that can't be read, another size, or a mask without shadow.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"the mask {path} does not exist: give the file of {photo}'s mask")
    with _opened(path, str(path)) as image:
        image.load()
        levels = as_levels(image, [])
    found = (levels.height, levels.width)
    if size is not None and found != size:
        turned = ", which is that size turned: rotate it" if found == size[::-1] else ""
        raise UserError(
            f"the mask {path} is {found[0]}x{found[1]}, and {photo} {size[0]}x{size[1]} (height x "
            f"width, upright): expected one size{turned}"
        )
    counts = levels.histogram()
    grey = sum(counts[DARK:BRIGHT]) / sum(counts)
    warnings = []
    if grey > MOST_GREY:
        warnings.append(
            f"the mask {path} has {grey:.0%} grey pixels: lighter than the middle is taken for "
            "shadow"
        )
    binary = levels.point([int(level >= THRESHOLD) for level in range(256)])
    return checked(torch.from_numpy(np.array(binary)), str(path), warnings)


def checked(pixels: Tensor, source: str, warnings: list[str]) -> ShadowMask:
    """Refuse masks without shadow, and warn of those that are nearly nothing else.

    Raises:
        UserError: no pixel in shadow.
    """
    share = torch.count_nonzero(pixels).item() / pixels.numel()
    if share == 0:
        raise UserError(
            f"the mask {source} is empty: expected light pixels where the shadow is; nothing is to "
            "be removed without"
        )
    if share > MOST_SHADOW:
        warnings = [
            *warnings,
            f"the mask {source} covers {share:.1%} of the photo: light stands for shadow, is it "
            "the wrong way round?",
        ]
    return ShadowMask(pixels, source, tuple(warnings))


def write_mask(
    path: str | os.PathLike[str], mask: ShadowMask | Tensor, *, overwrite: bool = False
) -> Path:
    """Write a mask as a grey image, white in shadow, which `read_mask` reads.

    Raises:
        UserError: a path that can't be written, or a file that is there.
    """
    pixels = mask.pixels if isinstance(mask, ShadowMask) else mask
    return write_photo_pixels(path, pixels.mul(255)[None, None], overwrite=overwrite)


def automatic_mask(pixels: Tensor) -> ShadowMask:
    """Guess the shadow of a photo: what is darker than Otsu's threshold. Weak; see the module.

    Args:
        pixels: uint8 `(1, 3, H, W)`.

    Raises:
        UserError: nothing is left after cleaning.
    """
    height, width = pixels.shape[-2:]
    scale = min(1.0, GUESS_SIDE / min(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    # Of Pillow's, as it works on bytes: a copy of a large photo in float32 takes much memory.
    light = rgb_to_lab(_reduced(pixels, size))[:, :1] / 100
    light = _blurred(light, GUESS_SIGMA)
    dark = (light < otsu(light.flatten().numpy())).float()
    cleaned = _eroded(_dilated(_dilated(_eroded(dark, OPENED), OPENED), CLOSED), CLOSED)
    # Blurred and enlarged, the border of half is smooth, without the small copy's steps.
    soft = functional.interpolate(_blurred(cleaned, 1.0), (height, width), mode="bilinear")
    warning = (
        "the automatic mask takes dark things for shadow, and often fails: look at it, correct "
        "it, and give it with --mask"
    )
    return checked((soft[0, 0] > 0.5).to(torch.uint8), "that was made automatically", [warning])


def otsu(values: NDArray[np.float32], levels: int = 256) -> float:
    """Return the threshold that parts values with the most variance between both sides.

    Source: Otsu, "A Threshold Selection Method from Gray-Level Histograms", 1979.

    >>> otsu(np.array([0.1] * 10 + [0.2] * 10 + [0.9] * 20, np.float32)) > 0.2
    True
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        return low
    counts, edges = np.histogram(values, levels, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()[:-1]
    above = counts.sum() - below
    total = (counts * centres).cumsum()
    apart = total[:-1] / np.maximum(below, 1) - (total[-1] - total[:-1]) / np.maximum(above, 1)
    between = below * above * apart**2
    best = np.flatnonzero(between == between.max())  # a gap in the values is a plateau
    return float(edges[1 + round(best.mean())])


def mask_of_values(values: Tensor | NDArray[np.generic], size: Size, source: str) -> ShadowMask:
    """Return the mask that a detector's map stands for, at the photo's size.

    Args:
        values: one map `(H, W)`, of any size, with or without axes of 1: booleans; integers, where
            more than half of the largest (1 or 255) is shadow; floats in [0, 1], which are
            probabilities; or other floats, which are logits.
        size: (H, W) of the photo.
        source: what made it, for errors.

    Raises:
        UserError: more than one map, values that aren't numbers, or no shadow at all.
    """
    maps = torch.as_tensor(values).detach().cpu().squeeze()
    if maps.ndim != 2:
        raise UserError(
            f"{source} gives a map of shape {tuple(torch.as_tensor(values).shape)}: expected one, "
            "(H, W)"
        )
    if maps.is_floating_point():
        maps = maps.float()
        if not bool(torch.isfinite(maps).all()):
            raise UserError(f"{source} gives values that aren't numbers: expected a finite map")
        low, high = (value.item() for value in maps.aminmax())
        if low < 0 or high > 1:
            maps = torch.sigmoid(maps)
    else:
        maps = maps.float() / (255 if int(maps.max()) > 1 else 1)
    if maps.shape != size:
        maps = functional.interpolate(maps[None, None], size, mode="bilinear")[0, 0]
    return checked((maps > 0.5).to(torch.uint8), f"of {source}", [])


def _reduced(pixels: Tensor, size: Size) -> Tensor:
    from PIL import Image

    picture = Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
    small = picture.resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]


def _blurred(x: Tensor, sigma: float) -> Tensor:
    reach = round(3 * sigma)
    kernel = (-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2)).exp()
    kernel /= kernel.sum()
    x = functional.pad(x, [reach] * 4, "replicate")
    return functional.conv2d(
        functional.conv2d(x, kernel[None, None, None]), kernel[None, None, :, None]
    )


def _dilated(x: Tensor, side: int) -> Tensor:
    return functional.max_pool2d(x, side, 1, side // 2)


def _eroded(x: Tensor, side: int) -> Tensor:
    return 1 - _dilated(1 - x, side)
