"""Crops of photos with shadows: turned, rotated and resized at random, the mask and target alike.

In the order of LAB-Net's training: four draws of {flip, quarter turn, nothing}; a rotation by a
whole number of degrees from -20 to 19 about the middle; a resize that keeps the aspect, the shorter
side drawn from a range; a crop; a flip. Two things differ from its code:

- The size to resize to is that of the turned photo; there, photos turned by a quarter were
  stretched to the aspect that they had before.
- What a rotation brings in from beyond the border is the photo's reflection; there, it is black in
  LAB codes, which is a saturated blue.

All these steps map a crop's pixel to a place in the photo, by one affine map, so that colours are
interpolated once, bilinearly, from a photo that is first made smaller where it has to be (by
averages, and only what is seen of it). A mask is taken at the nearest pixel, because a level
between two stands for nothing. The paper's code takes the nearest pixel of photos too, which draws
steps along their edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tenfold.data.randomness import below, mix
from tenfold.data.shadow_rendering import between
from tenfold.data.shadow_set import Triplet

__all__ = ["Crops", "View", "crop", "whole"]

Pixels = NDArray[np.uint8]
Size = tuple[int, int]

MOVES = 4
ANGLES = (-20, 20)
_FLIP, _TURN = 1, 2  # of a move: 0 leaves all as it is

# Of the middle, (row, column): where a moved photo's pixel was before, as a matrix.
_BEFORE = {0: np.eye(2), _FLIP: np.diag([1.0, -1.0]), _TURN: np.array([[0.0, 1.0], [-1.0, 0.0]])}

# What a draw is for: the hash's last word.
_MOVE, _ANGLE, _SIDE, _TOP, _LEFT, _MIRROR = 0, 4, 5, 6, 7, 8


@dataclass(frozen=True)
class View:
    """What is drawn for one crop.

    Attributes:
        moves: in turn, 1 for a flip from left to right, 2 for a quarter turn to the left.
        angle: degrees to the left.
        short_side: of the photo, resized; None: just enough for the crop.
        top: share of the rows to spare that lie above the crop.
        left: share of the columns to spare that lie on its left.
        mirrored: whether the crop is flipped at last.
    """

    moves: tuple[int, ...] = ()
    angle: int = 0
    short_side: int | None = None
    top: float = 0.5
    left: float = 0.5
    mirrored: bool = False

    def scaled(self, size: Size, crop: Size) -> Size:
        """Return (H, W) of the photo of a size, moved and resized."""
        height, width = size[::-1] if self.moves.count(_TURN) % 2 else size
        if self.short_side is None:
            scale = max(crop[0] / height, crop[1] / width)
        else:
            scale = self.short_side / min(height, width)
        return max(round(height * scale), crop[0]), max(round(width * scale), crop[1])

    def corner(self, scaled: Size, crop: Size) -> tuple[int, int]:
        """Return the first row and column of the crop in the moved and resized photo."""
        top, left = (
            min(int(share * (have - want + 1)), have - want)
            for share, have, want in zip((self.top, self.left), scaled, crop, strict=True)
        )
        return top, left


@dataclass(frozen=True)
class Crops:
    """Random crops.

    Attributes:
        size: (H, W) of a crop.
        short_side: least and most of a photo's shorter side, resized, in pixels.
        seed: the run's.
    """

    size: Size
    short_side: tuple[int, int]
    seed: int

    def draw(self, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> list[View]:
        """Return what (seed, epoch, id) decides for each photo."""

        def word(purpose: int) -> NDArray[np.uint64]:
            return mix(self.seed, epochs, ids, purpose)

        low, high = self.short_side
        columns = (
            zip(*(below(3, word(_MOVE + k)).tolist() for k in range(MOVES)), strict=True),
            (below(ANGLES[1] - ANGLES[0], word(_ANGLE)) + ANGLES[0]).tolist(),
            (below(high - low + 1, word(_SIDE)) + low).tolist(),
            between(0, 1, word(_TOP)).tolist(),
            between(0, 1, word(_LEFT)).tolist(),
            (below(2, word(_MIRROR)) == 1).tolist(),
        )
        return [View(*values) for values in zip(*columns, strict=True)]


def crop(triplet: Triplet, view: View, size: Size) -> Triplet:
    """Cut a view of `(H, W)` out of a triplet."""
    native = (triplet.image.shape[0], triplet.image.shape[1])
    scaled = view.scaled(native, size)
    rows, columns = _places(view, scaled, size)
    turned = scaled[::-1] if view.moves.count(_TURN) % 2 else scaled
    rows, columns = (
        _reflected(place, side) for place, side in zip((rows, columns), turned, strict=True)
    )
    photos = [photo for photo in (triplet.image, triplet.target) if photo is not None]
    made = _interpolated(photos, rows, columns, turned)
    nearest = tuple(
        np.minimum((place * (have / side)).astype(np.int32), have - 1)
        for place, have, side in zip((rows, columns), native, turned, strict=True)
    )
    return Triplet(
        image=made[0],
        levels=triplet.levels[nearest],
        target=made[1] if len(made) > 1 else None,
        region=None if triplet.region is None else triplet.region[nearest],
    )


def whole(triplet: Triplet, size: Size | None) -> Triplet:
    """Resize a triplet, whatever its aspect, to `(H, W)`; None: leave it as it is.

    Bicubic and against aliasing, as published figures are computed; the mask's levels too, ahead
    of their threshold.
    """
    if size is None or triplet.image.shape[:2] == size:
        return triplet
    parts = (triplet.image, triplet.levels, triplet.target, triplet.region)
    return Triplet(*(None if part is None else _stretched(part, size) for part in parts))  # type: ignore[arg-type]


def _stretched(pixels: Pixels, size: Size) -> Pixels:
    from PIL import Image

    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _places(
    view: View, scaled: Size, size: Size
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return where a crop's pixels lie in the photo that is resized, but not moved nor rotated.

    Rows and columns `(H, W)`, measured from the photo's upper and left border, which the first
    pixel's middle is half a pixel away from.
    """
    top, left = view.corner(scaled, size)
    down = top + np.arange(size[0]) + 0.5 - scaled[0] / 2
    across = left + np.arange(size[1]) + 0.5 - scaled[1] / 2
    if view.mirrored:
        across = across[::-1]
    turn = math.radians(view.angle)
    before = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    for move in reversed(view.moves):
        before = _BEFORE[move] @ before
    unmoved = scaled[::-1] if view.moves.count(_TURN) % 2 else scaled
    rows, columns = (
        (before[k, 0] * down + middle / 2).astype(np.float32)[:, None]
        + (before[k, 1] * across).astype(np.float32)
        for k, middle in enumerate(unmoved)
    )
    return rows, columns


def _reflected(places: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    corners = places[[0, 0, -1, -1], [0, -1, 0, -1]]
    if corners.min() >= 0 and corners.max() <= side:  # the extremes of an affine map
        return places
    back: NDArray[np.float32] = places % np.float32(2 * side) - np.float32(side)
    return np.float32(side) - np.abs(back)


def _interpolated(
    photos: Sequence[Pixels],
    rows: NDArray[np.float32],
    columns: NDArray[np.float32],
    scaled: Size,
) -> list[Pixels]:
    """Return photos `(H, W, 3)` at places of `_places`, between their pixels."""
    native = (photos[0].shape[0], photos[0].shape[1])
    ratios = [have / side for have, side in zip(native, scaled, strict=True)]
    smaller = max(ratios) > 1
    if not smaller:
        rows, columns = rows * np.float32(ratios[0]), columns * np.float32(ratios[1])
        scaled, ratios = native, [1.0, 1.0]
    # Only what is seen: a box with a pixel around it.
    box = [
        (max(int(place.min()) - 1, 0), min(int(place.max()) + 2, side))
        for place, side in zip((rows, columns), scaled, strict=True)
    ]
    parts = [_part(photo, box, ratios) if smaller else photo[_slices(box)] for photo in photos]
    planes = torch.from_numpy(np.concatenate(parts, axis=2)).permute(2, 0, 1).float()[None]
    grid = torch.empty((1, *rows.shape, 2))
    for k, place in enumerate((columns, rows)):
        first, last = box[1 - k]
        # grid_sample has -1 and 1 at the borders.
        torch.sub(torch.from_numpy(place), first, out=grid[0, ..., k])
        grid[0, ..., k].mul_(2 / (last - first)).sub_(1)
    sampled = functional.grid_sample(planes, grid, "bilinear", "border", align_corners=False)
    made = sampled[0].round_().to(torch.uint8).permute(1, 2, 0).numpy()
    return [made[..., first : first + 3] for first in range(0, made.shape[2], 3)]


def _slices(box: Sequence[tuple[int, int]]) -> tuple[slice, slice]:
    (top, bottom), (left, right) = box
    return slice(top, bottom), slice(left, right)


def _part(photo: Pixels, box: Sequence[tuple[int, int]], ratios: Sequence[float]) -> Pixels:
    """Make a photo smaller, by Pillow's triangle filter, but only what lies in a box of the result.

    Args:
        photo: `(h, w, 3)`.
        box: rows and columns of the result.
        ratios: old sides over new ones.
    """
    from PIL import Image

    inner = [
        (first * ratio, last * ratio) for (first, last), ratio in zip(box, ratios, strict=True)
    ]
    # The filter reaches a new pixel far, beyond the box too.
    outer = [
        (max(int(first - ratio) - 1, 0), min(math.ceil(last + ratio) + 1, side))
        for (first, last), ratio, side in zip(inner, ratios, photo.shape, strict=False)
    ]
    (top, bottom), (left, right) = (
        (first - start, last - start)
        for (first, last), (start, _) in zip(inner, outer, strict=True)
    )
    size = (box[1][1] - box[1][0], box[0][1] - box[0][0])
    image = Image.fromarray(np.ascontiguousarray(photo[_slices(outer)]))
    limits = (left, top, min(right, image.width), min(bottom, image.height))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=limits))
