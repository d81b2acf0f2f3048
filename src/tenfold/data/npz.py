"""A folder with train.npz and test.npz: encoded images, end to end in one array.

Keys of a file: `bytes` uint8, the JPEG or PNG files one after the other; `offsets` (N+1,), image i
is `bytes[offsets[i]:offsets[i+1]]`; `labels` (N,); `classes` (K,), names.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.cache import remembered
from tenfold.data.decode import decode, encoded_size
from tenfold.data.images import ImageData
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split
from tenfold.data.statistics import channel_statistics
from tenfold.errors import UserError

__all__ = ["PackedSet", "npz"]

_KEYS = ("bytes", "offsets", "labels", "classes")
_HELD_OUT = ("test.npz", "val.npz", "validation.npz")


class PackedSet(ImageSet):
    """The encoded images of one .npz file, RGB; greyscale ones are converted.

    Args:
        path: the file.
        limit: use only the first so many images.

    Raises:
        UserError: the file isn't of the expected layout.
    """

    keep_decoded = True

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self._path = path
        arrays = _read(path)
        _check(path, arrays)
        self.classes: list[str] = arrays["classes"].tolist()
        self._bytes = arrays["bytes"]
        self._labels: list[int] = arrays["labels"][:limit].tolist()
        self._offsets: list[int] = arrays["offsets"][: len(self._labels) + 1].tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> Tensor:  # noqa: D102
        return decode(self._encoded(index), 3, self.name(index))

    def label(self, index: int) -> int:  # noqa: D102
        return self._labels[index]

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._path.parent.name}/{self._path.name}[{index}]"

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of one image, from its header alone."""
        return encoded_size(self._encoded(index), self.name(index))

    def fingerprint(self) -> str:  # noqa: D102
        stat = self._path.stat()
        return f"{self._path.resolve()} {stat.st_size} {stat.st_mtime_ns} {len(self)}"

    def _encoded(self, index: int) -> bytes:
        return bytes(self._bytes[self._offsets[index] : self._offsets[index + 1]])


def npz(options: DataOptions) -> ImageData:
    """Build the data set of a folder with train.npz and a held-out file beside it.

    Raises:
        UserError: a file is missing or not of the expected layout, or an image can't be read.
    """
    root = options.folder()
    if not (root / "train.npz").is_file():
        raise UserError(f"{root} has no train.npz: expected it and {_HELD_OUT[0]}; check the path")
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_file()), None)
    if held_out is None:
        raise UserError(
            f"{root} has no {' or '.join(_HELD_OUT)}: expected images to evaluate on beside "
            "train.npz; pack some of each class there"
        )
    images, held_images = PackedSet(root / "train.npz", options.limit), PackedSet(held_out)
    if images.classes != held_images.classes:
        raise UserError(
            f"the classes of {held_out} aren't those of {root / 'train.npz'}: expected the same "
            "names in the same order; pack both with one list"
        )
    train = Split("train", images, options.skip_bad)
    with train.explaining():
        facts = remembered(
            "size-mean-std",
            f"{images.fingerprint()} without {train.skipped}",
            lambda: _measure(images, train),
        )
    size = options.size or (facts["size"][0], facts["size"][1])
    return ImageData(
        name=root.name,
        classes=images.classes,
        train=train,
        test=Split("test", held_images, options.skip_bad),
        preprocessing=Preprocessing(
            channels=3,
            size=size,
            mean=options.mean or tuple(facts["mean"]),
            std=options.std or tuple(facts["std"]),
            resize=None if facts["equal"] else min(size),
        ),
        default_augment="flip_crop" if max(size) <= 64 else "imagenet",
        workers=options.workers,
    )


def _measure(images: PackedSet, train: Split) -> dict[str, object]:
    """Find the size for the network (all images', or the largest square in them), mean and std."""
    sizes = {images.image_size(index) for index in train.ids.tolist()}
    short = min(min(size) for size in sizes)
    square = max(8, short // 8 * 8)
    mean, std = channel_statistics(train)
    equal = len(sizes) == 1
    size = next(iter(sizes)) if equal else (square, square)
    return {"equal": equal, "size": list(size), "mean": mean, "std": std}


def _read(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _KEYS if key not in file]
            if missing:
                raise UserError(
                    f"{path} has no {', '.join(missing)}: expected the keys {', '.join(_KEYS)}; "
                    "pack it again"
                )
            return {key: file[key] for key in _KEYS}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} can't be read ({reason}): expected a .npz of plain arrays; pack it again"
        ) from None


def _check(path: Path, arrays: dict[str, Any]) -> None:
    data, offsets, labels, classes = (arrays[key] for key in _KEYS)
    expected = {"bytes": "u", "offsets": "iu", "labels": "iu", "classes": "U"}
    for key, kinds in expected.items():
        array = arrays[key]
        if (
            array.ndim != 1
            or array.dtype.kind not in kinds
            or (key == "bytes" and array.itemsize > 1)
        ):
            raise UserError(
                f"{key} of {path} is {array.dtype} of shape {array.shape}: expected one dimension "
                "of uint8 bytes, whole offsets and labels, and names as text; pack it again"
            )
    if len(labels) == 0 or len(offsets) != len(labels) + 1:
        raise UserError(
            f"{path} has {len(labels)} labels and {len(offsets)} offsets: expected at least one "
            "label, and one offset more than labels; pack it again"
        )
    falling = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falling):
        raise UserError(
            f"offsets of {path} fall from {offsets[falling[0]]} to {offsets[falling[0] + 1]} at "
            f"image {falling[0]}: expected them in ascending order; pack it again"
        )
    if offsets[0] < 0 or offsets[-1] > len(data):
        raise UserError(
            f"offsets of {path} go from {offsets[0]} to {offsets[-1]}: expected them inside its "
            f"{len(data)} bytes; the file is damaged or packed wrongly, pack it again"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        raise UserError(
            f"image {outside[0]} of {path} has label {labels[outside[0]]}: expected 0 to "
            f"{len(classes) - 1}, for {len(classes)} classes; correct the labels"
        )
