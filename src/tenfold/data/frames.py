"""Clips as folders of frames: PATH/{train,val}/<class>/<clip>/*.jpg."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.base import ClipSet
from tenfold.data.class_folders import ClassFolders, by_turns, class_folders
from tenfold.data.clips import ClipData
from tenfold.data.decode import decode_frames
from tenfold.data.listing import ENDINGS, Listing
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import ClipSplit
from tenfold.errors import UserError

__all__ = ["FrameFolders", "clip_preprocessing", "frames", "read_frames"]

# What torchvision's video networks are made for: 16 frames of 112 x 112 cut from a short side of
# 128, and the channels' mean and standard deviation over Kinetics.
_FRAMES, _SIZE, _RESIZE = 16, (112, 112), 128 / 112
_MEAN, _STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


class FrameFolders(ClipSet):
    """Folders of image files, one a clip; frames are in the order of the numbers in their names.

    Args:
        listing: the files below a split's folder.
        labels: a class number for each of the listing's folders.
        order: the folders that are clips, as indexes into the listing's.
    """

    def __init__(
        self, listing: Listing, labels: NDArray[np.int32], order: NDArray[np.int64]
    ) -> None:
        self._listing = listing
        self._labels = labels
        self._order = order
        # The files of each folder: those of one may lie apart, on both sides of folders inside it.
        self._files = np.argsort(listing.holder, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(listing.holder, minlength=len(listing.folders)))
        self._starts = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self._order)

    def length(self, index: int) -> int:  # noqa: D102
        folder = self._order[index]
        return int(self._starts[folder + 1] - self._starts[folder])

    def clip(self, index: int, frames: Sequence[int]) -> Tensor:  # noqa: D102
        return read_frames(self._paths(index), frames, self.name(index))

    def label(self, index: int) -> int:  # noqa: D102
        return int(self._labels[self._order[index]])

    def labels(self) -> Tensor:  # noqa: D102
        return torch.from_numpy(self._labels[self._order].astype(np.int64))

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._listing.root.name}/{self._listing.folders[self._order[index]]}"

    def fingerprint(self) -> str:  # noqa: D102
        digest = hashlib.sha256(os.fsencode(self._listing.root))
        for index in range(len(self)):
            for file in self._paths(index):
                stat = file.stat()
                digest.update(os.fsencode(file))
                digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _paths(self, index: int) -> list[Path]:
        folder = self._order[index]
        files = self._files[self._starts[folder] : self._starts[folder + 1]]
        return in_order([self._listing.path(file) for file in files])


def frames(options: DataOptions) -> ClipData:
    """Build the data set of folders of frames.

    Raises:
        UserError: a split is missing, a class is empty, or the held-out split has another class.
    """
    found = class_folders(options.folder(), ENDINGS, "folders of frames")
    return ClipData(
        name="frames",
        classes=found.classes,
        train=ClipSplit("train", _folders(found, found.train, options.limit), options.skip_bad),
        test=ClipSplit("test", _folders(found, found.test, None), options.skip_bad),
        preprocessing=clip_preprocessing(options),
        default_augment="imagenet",
        workers=options.workers,
    )


def clip_preprocessing(options: DataOptions) -> Preprocessing:
    """Return what happens to clips of unknown size, unless the options say otherwise."""
    size = options.size or _SIZE
    return Preprocessing(
        channels=3,
        size=size,
        mean=options.mean or _MEAN,
        std=options.std or _STD,
        resize=round(min(size) * _RESIZE),
        frames=options.frames or _FRAMES,
        stride=options.stride or 1,
    )


def read_frames(files: Sequence[Path], frames: Sequence[int], name: str) -> Tensor:
    """Decode some of a clip's frames: uint8 `(3, T, H, W)`.

    Args:
        files: all of them, in order.
        frames: the numbers of those to decode.
        name: what an error calls the clip.

    Raises:
        BadClip: one can't be read, or isn't of the others' size.
    """
    return decode_frames(lambda number: (files[number], files[number].name), frames, name)


def in_order(files: Sequence[Path]) -> list[Path]:
    """Sort files by the numbers in their names, frame 2 ahead of frame 10.

    >>> [file.name for file in in_order([Path("10.jpg"), Path("2.jpg"), Path("01.jpg")])]
    ['01.jpg', '2.jpg', '10.jpg']
    """

    def key(file: Path) -> tuple[list[tuple[int, int, str]], str]:
        parts = re.split(r"(\d+)", file.name)
        return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts], file.name

    return sorted(files, key=key)


def _folders(found: ClassFolders, listing: Listing, limit: int | None) -> FrameFolders:
    own = found.labels(listing)
    filled = np.bincount(listing.holder, minlength=len(listing.folders)) > 0
    beside = [
        folder
        for folder, some in zip(listing.folders, filled, strict=True)
        if some and folder and "/" not in folder
    ]
    if beside:
        raise UserError(
            f"{listing.root / beside[0]} has images beside the clips' folders: expected "
            f"{listing.root / beside[0]}/<clip>/<frames>; put each clip's frames in a folder"
        )
    chosen = np.flatnonzero(filled & (own >= 0))
    expected = f"clips: expected folders of files ending in {', '.join(ENDINGS)}"
    found.refuse_empty(listing, own[chosen], expected)
    # Folders of a class lie together in a listing.
    return FrameFolders(listing, own, chosen[by_turns(own[chosen], limit)])
