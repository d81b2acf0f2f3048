"""A folder of image files: PATH/{train,val}/<class>/*."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.decode import decode
from tenfold.data.images import ImageData
from tenfold.data.listing import ENDINGS, Listing, list_images
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split
from tenfold.errors import UserError

__all__ = ["FileSet", "imagefolder"]

_HELD_OUT = ("val", "validation", "test")

# ImageNet's constants, not the set's own: there is nothing to read ahead of the first epoch, and
# they are what nearly every pretrained network expects.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FileSet(ImageSet):
    """Image files with labels, RGB.

    Args:
        listing: the files below a split's folder.
        labels: a class number for each of the listing's folders.
        order: the files to use, as indexes into the listing; by default all.
    """

    def __init__(
        self,
        listing: Listing,
        labels: Sequence[int],
        order: NDArray[np.int32] | None = None,
    ) -> None:
        self._listing = listing
        self._labels = np.array(labels, np.int32)
        self._order = np.arange(len(listing), dtype=np.int32) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def image(self, index: int) -> Tensor:  # noqa: D102
        file = self._listing.path(self._order[index])
        return decode(file, 3, str(file))

    def label(self, index: int) -> int:  # noqa: D102
        return int(self._labels[self._listing.holder[self._order[index]]])

    def labels(self) -> Tensor:  # noqa: D102
        held = self._listing.holder[self._order]
        return torch.from_numpy(self._labels[held].astype(np.int64))

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._listing.root.name}/{self._listing.relative(self._order[index])}"

    def fingerprint(self) -> str:  # noqa: D102
        digest = hashlib.sha256(os.fsencode(self._listing.root))
        for index in self._order:
            file = self._listing.path(index)
            stat = file.stat()
            digest.update(os.fsencode(file))
            digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


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
    train, test = list_images(root / "train"), list_images(root / held_out)
    classes = _class_names(train)
    unknown = [name for name in _class_names(test) if name not in classes]
    if unknown:
        raise UserError(
            f"{root / held_out / unknown[0]} is a class that {root / 'train'} doesn't have: "
            "expected the same class folders in both; rename it, or add it to train"
        )
    size = options.size or (224, 224)
    return ImageData(
        name="imagefolder",
        classes=classes,
        train=Split("train", _files(train, classes, options.limit), options.skip_bad),
        test=Split("test", _files(test, classes, None), options.skip_bad),
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


def _class_names(listing: Listing) -> list[str]:
    names = [folder for folder in listing.folders if folder and "/" not in folder]
    if not names:
        raise UserError(
            f"{listing.root} has no class folders: expected {listing.root}/<class>/<images>; "
            "put each class's images in a folder of its own"
        )
    return names


def _files(listing: Listing, classes: Sequence[str], limit: int | None) -> FileSet:
    """Order a split, the first image of every class ahead of the second of any.

    So that `limit` leaves all classes in, and evaluation cut short has seen them all.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    own = [numbers.get(folder.partition("/")[0], -1) for folder in listing.folders]
    label = np.array(own, np.int32)[listing.holder]
    counts = np.bincount(label[label >= 0], minlength=len(classes))
    for name in _class_names(listing):
        if not counts[numbers[name]]:
            raise UserError(
                f"{listing.root / name} has no images: expected files ending in "
                f"{', '.join(ENDINGS)}; add some, or remove the folder"
            )
    # Files of a class lie together in a listing: its n-th file is n after its first.
    chosen = np.flatnonzero(label >= 0)  # files beside the class folders belong to none
    label = label[chosen]
    firsts = np.flatnonzero(np.diff(label, prepend=-1))
    turn = np.arange(len(label)) - np.repeat(firsts, np.diff(firsts, append=len(label)))
    order = chosen[np.lexsort((label, turn))[:limit]]
    return FileSet(listing, own, order.astype(np.int32))
