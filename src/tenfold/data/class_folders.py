"""PATH/{train,val}/<class>/…: what folders of images, of videos and of frames have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenfold.data.listing import Listing, list_files
from tenfold.errors import UserError

__all__ = ["ClassFolders", "by_turns", "class_folders"]

_HELD_OUT = ("val", "validation", "test")


@dataclass(frozen=True)
class ClassFolders:
    """The files of both splits and the classes that they are of.

    Attributes:
        classes: names of the class folders below train.
        train: files of the training split.
        test: files of the held-out split.
    """

    classes: list[str]
    train: Listing
    test: Listing

    def labels(self, listing: Listing) -> NDArray[np.int32]:
        """Return the class number of each of a listing's folders, -1 for the split's own."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        own = [numbers.get(folder.partition("/")[0], -1) for folder in listing.folders]
        return np.array(own, np.int32)

    def refuse_empty(self, listing: Listing, labels: NDArray[np.int32], expected: str) -> None:
        """Refuse a class without a sample.

        Args:
            listing: of the split.
            labels: the samples' class numbers.
            expected: what is missing, such as "images: expected files ending in .jpg".

        Raises:
            UserError: a class folder of the split holds no sample.
        """
        found = np.bincount(labels, minlength=len(self.classes))
        there = set(listing.folders)
        for number, name in enumerate(self.classes):
            if name in there and not found[number]:
                raise UserError(
                    f"{listing.root / name} has no {expected}; add some, or remove the folder"
                )


def class_folders(root: Path, endings: Sequence[str], inside: str) -> ClassFolders:
    """Find the files of a data set's folder.

    Args:
        root: the folder above train and val.
        endings: of the files, in lower case.
        inside: what a class folder holds, for messages.

    Raises:
        UserError: a split is missing, or the held-out split has another class.
    """
    if not (root / "train").is_dir():
        raise UserError(
            f"{root} has no folder train: expected {root / 'train'}/<class>/<{inside}>; "
            "give the folder above train and val"
        )
    held_out = next((name for name in _HELD_OUT if (root / name).is_dir()), None)
    if held_out is None:
        raise UserError(
            f"{root} has no folder {' or '.join(_HELD_OUT)}: expected {inside} to evaluate on "
            "beside train; move some of each class there"
        )
    train = list_files(root / "train", tuple(endings))
    test = list_files(root / held_out, tuple(endings))
    classes = _class_names(train, inside)
    unknown = [name for name in _class_names(test, inside) if name not in classes]
    if unknown:
        raise UserError(
            f"{root / held_out / unknown[0]} is a class that {root / 'train'} doesn't have: "
            "expected the same class folders in both; rename it, or add it to train"
        )
    return ClassFolders(classes, train, test)


def by_turns(labels: NDArray[np.int32], limit: int | None) -> NDArray[np.int64]:
    """Order samples, the first of every class ahead of the second of any.

    So that `limit` leaves all classes in, and evaluation cut short has seen them all.

    Args:
        labels: class numbers, those of a class one after the other.
        limit: take only the first so many.

    Returns:
        Indexes into `labels`.

    >>> by_turns(np.array([0, 0, 0, 1, 1], np.int32), limit=4).tolist()
    [0, 3, 1, 4]
    """
    firsts = np.flatnonzero(np.diff(labels, prepend=-1))
    turn = np.arange(len(labels)) - np.repeat(firsts, np.diff(firsts, append=len(labels)))
    return np.lexsort((labels, turn))[:limit]


def _class_names(listing: Listing, inside: str) -> list[str]:
    names = [folder for folder in listing.folders if folder and "/" not in folder]
    if not names:
        raise UserError(
            f"{listing.root} has no class folders: expected {listing.root}/<class>/<{inside}>; "
            f"put each class's {inside} in a folder of its own"
        )
    return names
