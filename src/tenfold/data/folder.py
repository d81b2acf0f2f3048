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
from tenfold.data.class_folders import ClassFolders, by_turns, class_folders
from tenfold.data.decode import decode
from tenfold.data.images import ImageData
from tenfold.data.listing import ENDINGS, Listing
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split

__all__ = ["FileSet", "imagefolder"]

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
    found = class_folders(options.folder(), ENDINGS, "images")
    size = options.size or (224, 224)
    return ImageData(
        name="imagefolder",
        classes=found.classes,
        train=Split("train", _files(found, found.train, options.limit), options.skip_bad),
        test=Split("test", _files(found, found.test, None), options.skip_bad),
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


def _files(found: ClassFolders, listing: Listing, limit: int | None) -> FileSet:
    own = found.labels(listing)
    labels = own[listing.holder]
    chosen = np.flatnonzero(labels >= 0)  # files beside the class folders belong to none
    labels = labels[chosen]
    expected = f"images: expected files ending in {', '.join(ENDINGS)}"
    found.refuse_empty(listing, labels, expected)
    # Files of a class lie together in a listing.
    return FileSet(listing, own.tolist(), chosen[by_turns(labels, limit)].astype(np.int32))
