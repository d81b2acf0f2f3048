"""`edges2photo`: pairs of an edge map and the patch of a photo that it was drawn from.

The photos lie inside scikit-image, so that nothing is downloaded. Every photo has a strip that is
held out: training patches keep 16 pixels away from it. A patch is cut out of the photo first, and
only then made smaller and its edges drawn, so that no pixel beyond its window has a part in it.

Edges are drawn as is usual for such data (as for edges2shoes and edges2handbags, in spirit): blur,
Sobel's gradient, its ridges, and of these the strongest; dark lines on white.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.base import ArraySet
from tenfold.data.decode import decode
from tenfold.data.options import DataOptions
from tenfold.data.randomness import below, mix
from tenfold.data.translation import TranslationData
from tenfold.data.translation_loader import resized
from tenfold.data.translation_options import translation_options
from tenfold.errors import UserError

__all__ = ["PHOTOS", "Window", "edge_maps", "edges2photo", "patch_windows"]

_SIZE = (96, 96)
_TRAIN, _TEST = 160, 18  # patches of each photo
_MARGIN = 16  # pixels between the two sides, as wide as what JPEG encodes together
_TRIALS = 400
_SHARED = 0.6  # of a held-out window, so much may lie in another one

_BLUR = 1.4  # standard deviation, pixels
_STRONGEST = 0.88  # of a patch's pixels, so many have a weaker gradient than a line needs
_WEAKEST = 3.0  # grey levels a pixel: a weaker one is no line even where all else is smooth


@dataclass(frozen=True)
class Photo:
    """A photo inside scikit-image.

    Attributes:
        file: its name.
        size: (H, W).
        held_out: (top, left, bottom, right) of what training never sees; it spans the photo.
        scales: what a patch shows is made smaller by these, first the most usual.
    """

    file: str
    size: tuple[int, int]
    held_out: tuple[int, int, int, int]
    scales: tuple[float, ...] = (1.0, 0.75, 0.5)


# Colour photos of skin, fur, wood, cloth and tissue, mostly warm colours that lines can hint at. A
# few hundred patches can't teach those of the others: the motorcycle, the rocket, the night sky.
PHOTOS = (
    Photo("coffee.png", (400, 600), (0, 432, 400, 600)),
    Photo("chelsea.png", (300, 451), (0, 0, 300, 184)),
    Photo("retina.jpg", (1411, 1411), (960, 0, 1411, 1411), (0.5, 0.375, 0.25)),
)


@dataclass(frozen=True)
class Window:
    """Where a patch comes from: pixels `top:bottom, left:right` of the photo of that number."""

    photo: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def name(self) -> str:
        """What a person would look for, such as `coffee[12:108, 30:126]`."""
        stem = Path(PHOTOS[self.photo].file).stem
        return f"{stem}[{self.top}:{self.bottom}, {self.left}:{self.right}]"


class PatchSet(ArraySet):
    """Pairs of edge map and photo in memory, named by where they come from."""

    def __init__(self, pairs: Tensor, windows: Sequence[Window]) -> None:
        super().__init__(pairs, [0] * len(windows), "edges2photo")
        self.windows = list(windows)

    def name(self, index: int) -> str:
        return self.windows[index].name


def edges2photo(options: DataOptions) -> TranslationData:
    """Build the set, 480 pairs to train on and 33 held out; a `limit` takes from every photo.

    Raises:
        UserError: a path is given, patches larger than the photos' strips, or scikit-image's
            photos aren't there.
    """
    if options.path is not None:
        raise UserError(
            f"data path {options.path}: edges2photo comes with scikit-image; leave it out"
        )
    chosen = translation_options(options, _SIZE)
    photos = [_photo(photo) for photo in PHOTOS]
    # Cut at load_size, so that training's crops are as sharp as what is held out.
    train = patch_windows("train", chosen.load_size, photos)[: options.limit]
    test = patch_windows("test", chosen.size, photos)
    sets = [
        [PatchSet(_pairs(windows, photos, size), windows)]
        for windows, size in ((train, chosen.load_size), (test, chosen.size))
    ]
    return chosen.build("edges2photo", *sets)


def patch_windows(
    split: str, size: tuple[int, int], photos: Sequence[NDArray[np.uint8]] | None = None
) -> list[Window]:
    """Return where the patches of a split are cut, one of every photo in turn.

    Places are drawn by a hash, the same on every machine; those with more to see are taken, and
    of those held out only ones that overlap little.

    Args:
        split: "train" or "test".
        size: (H, W) of a patch.
        photos: uint8 `(C, H, W)` in the order of `PHOTOS`; None: read them.

    Raises:
        UserError: patches larger than the photos' strips.
    """
    photos = [_photo(photo) for photo in PHOTOS] if photos is None else photos
    found = [
        _train_windows(number, size, photos[number])
        if split == "train"
        else _test_windows(number, size, photos[number])
        for number in range(len(PHOTOS))
    ]
    turns = max(len(windows) for windows in found)
    return [windows[k] for k in range(turns) for windows in found if k < len(windows)]


def _train_windows(number: int, size: tuple[int, int], photo: NDArray[np.uint8]) -> list[Window]:
    top, left, bottom, right = PHOTOS[number].held_out
    height, width = PHOTOS[number].size
    # A strip along a side leaves one rectangle.
    area = (
        bottom + _MARGIN if top == 0 and bottom < height else 0,
        right + _MARGIN if left == 0 and right < width else 0,
        top - _MARGIN if top > 0 else height,
        left - _MARGIN if left > 0 else width,
    )
    drawn = _drawn(number, 0, area, size, 2 * _TRAIN)
    kept = np.sort(np.argsort(-_content(photo, drawn), kind="stable")[:_TRAIN])
    return [drawn[k] for k in kept]


def _test_windows(number: int, size: tuple[int, int], photo: NDArray[np.uint8]) -> list[Window]:
    drawn = _drawn(number, 1, PHOTOS[number].held_out, size, _TRIALS)
    # The quarter with least to see is left out; in the order of drawing all scales have a chance.
    seen = np.sort(np.argsort(-_content(photo, drawn), kind="stable")[: _TRIALS * 3 // 4])
    taken: list[Window] = []
    for k in seen:
        if len(taken) < _TEST and all(_overlap(drawn[k], other) < _SHARED for other in taken):
            taken.append(drawn[k])
    return taken


def _drawn(
    number: int, split: int, area: tuple[int, int, int, int], size: tuple[int, int], count: int
) -> list[Window]:
    """Draw windows inside an area, of all the scales that fit it."""
    top, left, bottom, right = area
    sides = [(round(size[0] / s), round(size[1] / s)) for s in PHOTOS[number].scales]
    sides = [(h, w) for h, w in sides if h <= bottom - top and w <= right - left]
    if not sides:
        what = "data.size" if split else "data.load_size"
        raise UserError(
            f"{what} is {list(size)}: expected patches that fit {bottom - top}x{right - left} "
            f"pixels of {PHOTOS[number].file}; lower data.size"
        )
    trials = np.arange(count, dtype=np.int64)
    which, down, across = (mix(number, split, trials, k) for k in range(3))
    windows = []
    for k, scale in enumerate(below(len(sides), which).tolist()):
        height, width = sides[scale]
        y = top + int(below(bottom - top - height + 1, down[k : k + 1])[0])
        x = left + int(below(right - left - width + 1, across[k : k + 1])[0])
        windows.append(Window(number, y, x, y + height, x + width))
    return windows


def _content(photo: NDArray[np.uint8], windows: Sequence[Window]) -> NDArray[np.float64]:
    """Return how much neighbouring pixels of each window differ on average."""
    level = photo[1].astype(np.float64)  # green
    change = np.abs(np.diff(level, axis=0))[:, 1:] + np.abs(np.diff(level, axis=1))[1:]
    total = np.pad(change.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    corners = [(w.top, w.left, w.bottom - 1, w.right - 1) for w in windows]
    top, left, bottom, right = np.array(corners).T
    sums = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    found: NDArray[np.float64] = sums / ((bottom - top) * (right - left))
    return found


def _overlap(one: Window, other: Window) -> float:
    """Return which share of the smaller window lies in the larger one."""
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    width = min(one.right, other.right) - max(one.left, other.left)
    areas = [(w.bottom - w.top) * (w.right - w.left) for w in (one, other)]
    return max(height, 0) * max(width, 0) / min(areas)


def _pairs(
    windows: Sequence[Window], photos: Sequence[NDArray[np.uint8]], size: tuple[int, int]
) -> Tensor:
    """Cut patches and draw their edges: uint8 `(N, 6, H, W)`."""
    patches = np.stack(
        [
            resized(torch.from_numpy(photos[w.photo][:, w.top : w.bottom, w.left : w.right]), size)
            for w in windows
        ]
    )
    edges = edge_maps(patches)[:, None].repeat(3, axis=1)
    return torch.from_numpy(np.concatenate([edges, patches], axis=1))


def edge_maps(patches: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draw the edges of each patch `(N, 3, H, W)` as dark lines on white: `(N, H, W)`.

    Each patch by itself: blur, Sobel's gradient, only pixels where the gradient is larger than at
    both neighbours across the line, and of these the ones among the patch's strongest gradients.
    """
    shares = np.array([0.299, 0.587, 0.114])
    grey = np.einsum("c,nchw->nhw", shares, patches).astype(np.float32)
    reach = math.ceil(3 * _BLUR)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _BLUR) ** 2)
    smooth = _along(_along(grey, kernel / kernel.sum(), 1), kernel / kernel.sum(), 2)
    slope, average = np.array([-0.5, 0.0, 0.5]), np.array([0.25, 0.5, 0.25])
    down = _along(_along(smooth, slope, 1), average, 2)
    across = _along(_along(smooth, slope, 2), average, 1)
    strength = np.hypot(down, across)
    # The gradient's direction, to the nearest of four; the line runs across it.
    direction = np.rint(np.arctan2(down, across) / (np.pi / 4)).astype(np.int64) % 4
    around = np.pad(strength, ((0, 0), (1, 1), (1, 1)))
    height, width = strength.shape[1:]
    ridge = np.zeros(strength.shape, np.bool_)
    for number, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = around[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = around[:, 1 - y : 1 - y + height, 1 - x : 1 - x + width]
        ridge |= (direction == number) & (strength > ahead) & (strength >= behind)
    limit = np.quantile(strength, _STRONGEST, axis=(1, 2), keepdims=True)
    line = ridge & (strength >= np.maximum(limit, _WEAKEST))
    return np.where(line, 0, 255).astype(np.uint8)


def _along(
    images: NDArray[np.float32], kernel: NDArray[np.float64], axis: int
) -> NDArray[np.float32]:
    """Correlate images `(N, H, W)` with a kernel along one axis, mirrored at the border."""
    reach = len(kernel) // 2
    pad = [(0, 0)] * 3
    pad[axis] = (reach, reach)
    padded = np.pad(images, pad, mode="reflect")
    length = images.shape[axis]
    total = np.zeros(images.shape, np.float32)
    for k, weight in enumerate(kernel.tolist()):
        if weight:
            part = [slice(None)] * 3
            part[axis] = slice(k, k + length)
            total += np.float32(weight) * padded[tuple(part)]
    return total


def _photo(photo: Photo) -> NDArray[np.uint8]:
    """Read a photo: `(C, H, W)`."""
    from skimage import data

    file = Path(data.data_dir) / photo.file
    if not file.is_file():
        raise UserError(
            f"scikit-image has no {photo.file} in {file.parent}: expected the photos that come "
            "with the package; install scikit-image 0.26 or newer"
        )
    pixels = decode(file, 3, photo.file).numpy()
    if pixels.shape[1:] != photo.size:
        raise UserError(
            f"scikit-image's {photo.file} is {pixels.shape[1]}x{pixels.shape[2]}: expected "
            f"{photo.size[0]}x{photo.size[1]}; install scikit-image 0.26 or newer"
        )
    return pixels
