"""`motions`: clips made by moving, turning and zooming crops of the photos inside scikit-image.

The classes are the motions, so that a network has to compare frames: no frame by itself tells the
class. A clip is a function of (seed, split, id) alone. The photos to train on and the photos held
out are different ones, by nature too: no photo is on both sides.

How a clip is made. A window of a photo, turned by any angle and at a random scale, goes through
one of eight motions, at a speed drawn between slow and fast; weaker motions of the other kinds are
added, so that a clip that moves left may also sink and turn a little. Contrast and brightness of
the clip are drawn too, and every pixel gets noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.base import ClipSet
from tenfold.data.clips import ClipData
from tenfold.data.decode import decode
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError

__all__ = ["MOTIONS", "PHOTOS", "MotionSet", "motions"]

MOTIONS = (
    "left",
    "right",
    "up",
    "down",
    "zoom in",
    "zoom out",
    "clockwise",
    "counter-clockwise",
)

# Files of scikit-image's own package, none of those that it would download.
PHOTOS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coins.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
    ),
    "test": ("chelsea.png", "coffee.png", "gravel.png", "moon.png", "retina.jpg", "rocket.jpg"),
}

_FRAMES, _SIZE = 8, (32, 32)
_TRAIN, _TEST = 4000, 1000
_SPLITS = ("train", "test")

# Speeds a frame, of clips of 8 frames; longer ones go slower, so that the whole way is the same.
# A motion of the clip's own class is drawn from slow to fast, one of another from 0 to the third.
_SHIFT = (0.02, 0.08, 0.008)  # of the frame's side
_TURN = (0.04, 0.16, 0.016)  # radians
_ZOOM = (0.02, 0.08, 0.008)  # of the scale
_NOISE = 4.0  # grey levels

# A window where neighbouring pixels differ by less on average shows no motion.
_TEXTURE = 3.0
_TRIALS = 12


class MotionSet(ClipSet):
    """Clips of one split, made as they are asked for.

    Args:
        split: "train" or "test": from whose photos.
        count: how many clips; clip i is of class i modulo 8.
        frames: of a clip.
        size: (H, W) of a frame.
        seed: another seed gives other clips.
    """

    keep_decoded = True

    def __init__(
        self, split: str, count: int, frames: int, size: tuple[int, int], seed: int
    ) -> None:
        self._split = split
        self._count = count
        self._frames = frames
        self._size = size
        self._seed = seed
        self._photos = [_photo(name) for name in PHOTOS[split]]

    def __len__(self) -> int:
        return self._count

    def length(self, index: int) -> int:  # noqa: D102
        return self._frames

    def clip(self, index: int, frames: Sequence[int]) -> Tensor:  # noqa: D102
        drawn = _Draw(mix_one(self._seed, _SPLITS.index(self._split), index))
        photos = self._photos[drawn.below(len(self._photos))]
        motion = _motion(drawn, self.label(index), self._frames)
        made = _render(drawn, photos, motion, self._size)
        return torch.from_numpy(made)[:, list(frames)]

    def label(self, index: int) -> int:  # noqa: D102
        return index % len(MOTIONS)

    def labels(self) -> Tensor:  # noqa: D102
        return torch.arange(self._count) % len(MOTIONS)

    def name(self, index: int) -> str:  # noqa: D102
        return f"motions/{self._split}[{index}]"


def motions(options: DataOptions) -> ClipData:
    """Build the set, 4,000 clips to train on and 1,000 held out unless the options say otherwise.

    Raises:
        UserError: a path is given, or scikit-image's photos aren't there.
    """
    if options.path is not None:
        raise UserError(f"data path {options.path}: motions are made here; leave it out")
    frames, size = options.frames or _FRAMES, options.size or _SIZE
    if frames < 2:
        raise UserError("data.frames is 1: expected at least 2, for motions to show; raise it")
    counts = {"train": options.train_clips or _TRAIN, "test": options.test_clips or _TEST}
    counts["train"] = min(counts["train"], options.limit or counts["train"])
    seed = options.seed or 0
    train, test = (MotionSet(split, counts[split], frames, size, seed) for split in _SPLITS)
    return ClipData(
        name="motions",
        classes=MOTIONS,
        train=train,
        test=test,
        preprocessing=Preprocessing(
            channels=3,
            size=size,
            mean=options.mean or (0.5, 0.5, 0.5),
            std=options.std or (0.25, 0.25, 0.25),
            frames=frames,
        ),
        default_augment="none",
        mirror=False,  # left would be right
        workers=options.workers,
    )


class _Draw:
    """Numbers of one clip, in the order of the calls."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def below(self, limit: int) -> int:
        return int(self.generator.integers(limit))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def sign(self) -> int:
        return 2 * self.below(2) - 1


def _motion(drawn: _Draw, label: int, frames: int) -> tuple[NDArray[np.float64], ...]:
    """Return (right, down, angle, zoom) of what is seen, by frame; all 0 in the middle of the clip.

    Shifts are shares of the frame's side, angles are clockwise, zooms the logarithm of the scale.
    """
    middle = (frames - 1) / 2
    way = np.linspace(-middle, middle, frames) * ((_FRAMES - 1) / (frames - 1))
    kinds = ("right", "down", "clockwise", "zoom in")
    opposite = {"left": "right", "up": "down", "counter-clockwise": "clockwise"}
    opposite["zoom out"] = "zoom in"
    own = MOTIONS[label]
    speeds = []
    for kind, (slow, fast, weak) in zip(kinds, (_SHIFT, _SHIFT, _TURN, _ZOOM), strict=True):
        if kind == opposite.get(own, own):
            speed = math.exp(drawn.between(math.log(slow), math.log(fast)))
            speeds.append(speed if kind == own else -speed)
        else:
            speeds.append(drawn.between(-weak, weak))
    return tuple(way * speed for speed in speeds)


def _render(
    drawn: _Draw,
    photos: Sequence[NDArray[np.uint8]],
    motion: tuple[NDArray[np.float64], ...],
    size: tuple[int, int],
) -> NDArray[np.uint8]:
    """Return (C, T, H, W): windows of a photo, seen through the motion."""
    right, down, angle, zoom = motion
    height, width = size
    photo = photos[drawn.below(len(photos))]
    scale = math.exp(drawn.between(0.0, math.log(1.4)))  # the photo's pixels to one of the clip's
    scale = min(scale, min(photo.shape[:2]) / (1.5 * max(size)))
    turned = drawn.between(0.0, 2 * math.pi)
    mirrored = drawn.sign()
    top, left = _place(drawn, photo, scale * max(size))
    # From a frame's pixel to the photo's: the inverse of how what is seen moves.
    rows, columns = np.arange(height)[None, :, None], np.arange(width)[None, None]
    x = columns - (width - 1) / 2 - (right * width)[:, None, None]
    y = rows - (height - 1) / 2 - (down * height)[:, None, None]
    by = (-angle - turned)[:, None, None]
    step = (scale * np.exp(-zoom))[:, None, None]
    across = mirrored * step * (x * np.cos(by) - y * np.sin(by)) + left
    along = step * (x * np.sin(by) + y * np.cos(by)) + top
    seen = _sample(photo, along, across)
    contrast, brightness = drawn.between(0.6, 1.2), drawn.between(-40.0, 40.0)
    seen = (seen - 128) * contrast + 128 + brightness
    seen += _NOISE * drawn.generator.standard_normal(seen.shape, dtype=np.float32)
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


def _place(drawn: _Draw, photo: NDArray[np.uint8], side: float) -> tuple[float, float]:
    """Return the centre (y, x) of a window with something to see, the best of some trials."""
    height, width, _ = photo.shape
    best, found = -1.0, (height / 2, width / 2)
    half = side / 2
    for _ in range(_TRIALS):
        y = drawn.between(min(half, height / 2), max(height - half, height / 2))
        x = drawn.between(min(half, width / 2), max(width - half, width / 2))
        window = photo[
            int(max(0, y - half)) : int(y + half), int(max(0, x - half)) : int(x + half), 1
        ]
        level = window.astype(np.int16)
        texture = float(np.abs(np.diff(level, axis=0)).mean() + np.abs(np.diff(level)).mean()) / 2
        if texture > best:
            best, found = texture, (y, x)
        if texture >= _TEXTURE:
            break
    return found


def _sample(
    photo: NDArray[np.uint8], y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Interpolate a photo bilinearly, mirrored at its edges: (C, T, H, W)."""
    height, width, _ = photo.shape
    y0, x0 = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    fy, fx = (y - y0).astype(np.float32), (x - x0).astype(np.float32)
    rows = [_folded(y0 + k, height) * width for k in (0, 1)]
    columns = [_folded(x0 + k, width) for k in (0, 1)]
    pixels = photo.reshape(-1, photo.shape[2])
    weights = ((1 - fy, fy), (1 - fx, fx))
    seen = np.zeros((*y.shape, photo.shape[2]), np.float32)
    for row, weight_y in zip(rows, weights[0], strict=True):
        for column, weight_x in zip(columns, weights[1], strict=True):
            seen += pixels[row + column] * (weight_y * weight_x)[..., None]
    return np.ascontiguousarray(np.moveaxis(seen, -1, 0))


def _folded(index: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Reflect indexes outside 0..length-1 back into it."""
    index = index % (2 * length)
    return np.minimum(index, 2 * length - 1 - index)


@cache
def _photo(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a photo (H, W, 3) in its own size and in half of it, averaged."""
    from skimage import data

    file = Path(data.data_dir) / name
    if not file.is_file():
        raise UserError(
            f"scikit-image has no {name} in {file.parent}: expected the photos that come with the "
            "package; install scikit-image 0.26 or newer"
        )
    full = decode(file, 3, name).permute(1, 2, 0).numpy()
    height, width = full.shape[0] // 2 * 2, full.shape[1] // 2 * 2
    quarters = full[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).astype(np.float32)
    return full, np.rint(quarters.mean((1, 3))).astype(np.uint8)
