"""Clips as video files: PATH/{train,val}/<class>/*.mp4, decoded by PyAV (the extra `video`).

A clip's frames are counted by its packets, not by its header, which may be empty or wrong. They are
decoded from the beginning up to the last one that is wanted, without seeking: not every format says
at what time its frames are shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.base import ClipSet
from tenfold.data.class_folders import ClassFolders, by_turns, class_folders
from tenfold.data.clips import ClipData
from tenfold.data.decode import BadClip
from tenfold.data.frames import clip_preprocessing
from tenfold.data.listing import Listing
from tenfold.data.options import DataOptions
from tenfold.data.split import ClipSplit
from tenfold.errors import UserError

__all__ = ["VIDEO_ENDINGS", "VideoSet", "count_frames", "read_video", "video"]

VIDEO_ENDINGS = (
    ".avi",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".webm",
    ".wmv",
)


class VideoSet(ClipSet):
    """Video files with labels, RGB.

    Args:
        listing: the files below a split's folder.
        labels: a class number for each of the listing's folders.
        order: the files to use, as indexes into the listing.
    """

    def __init__(
        self, listing: Listing, labels: NDArray[np.int32], order: NDArray[np.int64]
    ) -> None:
        self._listing = listing
        self._labels = labels
        self._order = order
        self._lengths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._order)

    def length(self, index: int) -> int:  # noqa: D102
        if index not in self._lengths:
            self._lengths[index] = count_frames(self._path(index), self.name(index))
        return self._lengths[index]

    def clip(self, index: int, frames: Sequence[int]) -> Tensor:  # noqa: D102
        return read_video(self._path(index), frames, self.name(index))

    def label(self, index: int) -> int:  # noqa: D102
        return int(self._labels[self._listing.holder[self._order[index]]])

    def labels(self) -> Tensor:  # noqa: D102
        return torch.from_numpy(self._labels[self._listing.holder[self._order]].astype(np.int64))

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._listing.root.name}/{self._listing.relative(self._order[index])}"

    def fingerprint(self) -> str:  # noqa: D102
        digest = hashlib.sha256(os.fsencode(self._listing.root))
        digest.update(f"av {_av().__version__}\n".encode())  # another one may read other files
        for index in range(len(self)):
            stat = self._path(index).stat()
            digest.update(self.name(index).encode("utf-8", "surrogateescape"))
            digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _path(self, index: int) -> Path:
        return self._listing.path(self._order[index])


def video(options: DataOptions) -> ClipData:
    """Build the data set of a folder of video files.

    Raises:
        UserError: PyAV is missing, a split is missing, a class is empty, or the held-out split has
            another class.
    """
    _av()
    found = class_folders(options.folder(), VIDEO_ENDINGS, "videos")
    return ClipData(
        name="video",
        classes=found.classes,
        train=ClipSplit("train", _files(found, found.train, options.limit), options.skip_bad),
        test=ClipSplit("test", _files(found, found.test, None), options.skip_bad),
        preprocessing=clip_preprocessing(options),
        default_augment="imagenet",
        workers=options.workers,
    )


def count_frames(file: Path, name: str) -> int:
    """Count a file's frames without decoding them.

    Raises:
        BadClip: it can't be read, or has no picture.
        UserError: PyAV is missing.
    """
    with _opened(file, name) as container:
        packets = container.demux(container.streams.video[0])
        count = sum(1 for packet in packets if packet.size)
    if not count:
        raise BadClip(name, "it has no frames")
    return count


def read_video(file: Path, frames: Sequence[int], name: str) -> Tensor:
    """Decode some of a file's frames, upright: uint8 `(3, T, H, W)`.

    Where a file ends a few frames earlier than its packets promise, its last frame stands in.

    Args:
        file: the video.
        frames: their numbers, ascending.
        name: what an error calls the clip.

    Raises:
        BadClip: it can't be read.
        UserError: PyAV is missing.
    """
    wanted = set(frames)
    pictures: dict[int, NDArray[np.uint8]] = {}
    last = None
    with _opened(file, name) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the loader's workers are the threads
        for number, last in enumerate(container.decode(stream)):
            if number in wanted:
                pictures[number] = _upright(last)
            if number >= frames[-1]:
                break
        if last is None:
            raise BadClip(name, "it has no frames")
        end = _upright(last)
        stacked = np.stack([pictures.get(number, end) for number in frames])
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(3, 0, 1, 2)))


def _files(found: ClassFolders, listing: Listing, limit: int | None) -> VideoSet:
    own = found.labels(listing)
    labels = own[listing.holder]
    chosen = np.flatnonzero(labels >= 0)
    labels = labels[chosen]
    expected = f"videos: expected files ending in {', '.join(VIDEO_ENDINGS)}"
    found.refuse_empty(listing, labels, expected)
    return VideoSet(listing, own, chosen[by_turns(labels, limit)])


@contextlib.contextmanager
def _opened(file: Path, name: str) -> Iterator[Any]:
    """Open a video file; whatever its decoder says of it is a `BadClip`."""
    av = _av()
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise BadClip(name, "it has no picture")
            yield container
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # FFmpeg's errors are of many classes, some of them Python's own
        reason = getattr(error, "strerror", None) or error
        raise BadClip(name, " ".join(str(reason).split()) or type(error).__name__) from None


def _upright(frame: Any) -> NDArray[np.uint8]:
    """Return a frame's pixels (H, W, 3), turned as its display matrix says."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))


@cache
def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(
            "video data needs the package av (PyAV), which can't be imported: expected tenfold "
            "with its extra video; run pip install 'tenfold[video]'"
        ) from None
    return av
