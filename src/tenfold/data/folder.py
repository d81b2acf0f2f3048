"""A folder of image files: PATH/{train,val}/<class>/*."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.decode import decode
from tenfold.data.images import ImageData
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split
from tenfold.errors import UserError

__all__ = ["FileSet", "imagefolder"]

_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_HELD_OUT = ("val", "validation", "test")

# ImageNet's constants, not the set's own: there is nothing to read ahead of the first epoch, and
# they are what nearly every pretrained network expects.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FileSet(ImageSet):
    """Image files with labels, RGB.

    Args:
        root: names are given relative to it.
        files: the files.
        labels: a class number for each.
    """

    def __init__(self, root: Path, files: Sequence[Path], labels: Sequence[int]) -> None:
        self._root = root
        self._files = list(files)
        self._labels = list(labels)

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Tensor:  # noqa: D102
        return decode(self._files[index], 3, str(self._files[index]))

    def label(self, index: int) -> int:  # noqa: D102
        return self._labels[index]

    def name(self, index: int) -> str:  # noqa: D102
        return self._files[index].relative_to(self._root).as_posix()

    def fingerprint(self) -> str:  # noqa: D102
        stats = ((file, file.stat()) for file in self._files)
        return "\n".join(f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats)


def imagefolder(options: DataOptions) -> ImageData:
    """Build the data set of a folder.

    Raises:
        UserError: a split is missing, a class is empty, or the held-out split has another class.
    """
    root = options.folder()
    if not (root / "train").is_dir():
        raise UserError(
            f"{root} has no folder train: expected {root / 'train'}/<class>/<images>; "
            "give the folder above train and val"
        )
    held_out = next((name for name in _HELD_OUT if (root / name).is_dir()), None)
    if held_out is None:
        raise UserError(
            f"{root} has no folder {' or '.join(_HELD_OUT)}: expected images to evaluate on beside "
            "train; move some of each class there"
        )
    classes = _class_names(root / "train")
    unknown = [name for name in _class_names(root / held_out) if name not in classes]
    if unknown:
        raise UserError(
            f"{root / held_out / unknown[0]} is a class that {root / 'train'} doesn't have: "
            "expected the same class folders in both; rename it, or add it to train"
        )
    size = options.size or (224, 224)
    return ImageData(
        name="imagefolder",
        classes=classes,
        train=Split("train", _files(root, "train", classes, options.limit), options.skip_bad),
        test=Split("test", _files(root, held_out, classes, None), options.skip_bad),
        preprocessing=Preprocessing(
            channels=3,
            size=size,
            mean=options.mean or _MEAN,
            std=options.std or _STD,
            resize=round(min(size) * 256 / 224),
        ),
        default_augment="imagenet",
        workers=options.workers,
    )


def _class_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(
            f"{folder} has no class folders: expected {folder}/<class>/<images>; "
            "put each class's images in a folder of its own"
        )
    return names


def _files(root: Path, split: str, classes: Sequence[str], limit: int | None) -> FileSet:
    """List a split, the first image of every class ahead of the second of any.

    So that `limit` leaves all classes in, and evaluation cut short has seen them all.
    """
    found: list[tuple[int, int, Path]] = []
    for label, name in enumerate(classes):
        folder = root / split / name
        files = _images_in(folder)
        if not files and (folder.is_dir() or split == "train"):
            raise UserError(
                f"{folder} has no images: expected files ending in {', '.join(_ENDINGS)}; "
                "add some, or remove the folder"
            )
        found += [(turn, label, file) for turn, file in enumerate(files)]
    found = sorted(found)[:limit]
    return FileSet(root, [file for _, _, file in found], [label for _, label, _ in found])


def _images_in(folder: Path) -> list[Path]:
    # Names that start with a dot are what file systems leave beside pictures ("._a.jpg").
    return sorted(
        Path(where, file)
        for where, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(_ENDINGS) and not file.startswith(".")
    )
