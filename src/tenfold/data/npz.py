"""A folder with train.npz and test.npz: encoded images, end to end in one array.

Keys of a file: `bytes` uint8, the JPEG or PNG files one after the other; `offsets` (N+1,), image i
is `bytes[offsets[i]:offsets[i+1]]`; `labels` (N,); `classes` (K,), names.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.cache import remembered
from tenfold.data.decode import decode, encoded_size
from tenfold.data.images import ImageData
from tenfold.data.options import DataOptions
from tenfold.data.packed import check_cuts, check_kinds, check_labels, read_arrays
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
        arrays = read_arrays(path, _KEYS)
        check_kinds(path, arrays)
        check_labels(path, arrays, "offsets", "image")
        check_cuts(path, arrays, "offsets", "image", len(arrays["bytes"]), "bytes")
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
