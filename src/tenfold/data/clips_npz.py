"""Clips packed into .npz files: encoded frames, end to end in one array.

Keys of a file: `bytes` uint8, the JPEG or PNG files of all frames one after the other; `offsets`
(N+1,), frame i is `bytes[offsets[i]:offsets[i+1]]`; `clip_start` (M+1,), clip k is the frames
`clip_start[k]` to `clip_start[k+1]`; `labels` (M,); `classes` (K,), names.

The folder holds train.npz and test.npz, or clips.npz alone, of which every fifth clip of each class
is then held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tenfold.data.base import ClipSet
from tenfold.data.clips import ClipData
from tenfold.data.decode import decode_frames
from tenfold.data.frames import clip_preprocessing
from tenfold.data.options import DataOptions
from tenfold.data.packed import check_cuts, check_kinds, check_labels, read_arrays
from tenfold.data.split import ClipSplit
from tenfold.errors import UserError

__all__ = ["PackedClips", "clips_npz"]

_KEYS = ("bytes", "offsets", "clip_start", "labels", "classes")
_HELD_OUT = ("test.npz", "val.npz", "validation.npz")
_EVERY = 5


class PackedClips(ClipSet):
    """The clips of one .npz file, RGB.

    Args:
        path: the file.

    Raises:
        UserError: the file isn't of the expected layout.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        arrays = read_arrays(path, _KEYS)
        check_kinds(path, arrays)
        check_labels(path, arrays, "clip_start", "clip")
        frames = len(arrays["offsets"]) - 1
        check_cuts(path, arrays, "offsets", "frame", len(arrays["bytes"]), "bytes")
        check_cuts(path, arrays, "clip_start", "clip", frames, "frames")
        self.classes: list[str] = arrays["classes"].tolist()
        self._bytes = arrays["bytes"]
        self._labels: list[int] = arrays["labels"].tolist()
        self._offsets: list[int] = arrays["offsets"].tolist()
        self._starts: list[int] = arrays["clip_start"].tolist()
        empty = [k for k in range(len(self)) if not self.length(k)]
        if empty:
            raise UserError(
                f"clip {empty[0]} of {path} has no frames: expected some; pack it again"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def length(self, index: int) -> int:  # noqa: D102
        return self._starts[index + 1] - self._starts[index]

    def clip(self, index: int, frames: Sequence[int]) -> Tensor:  # noqa: D102
        return decode_frames(lambda number: self._encoded(index, number), frames, self.name(index))

    def label(self, index: int) -> int:  # noqa: D102
        return self._labels[index]

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._path.parent.name}/{self._path.name}[{index}]"

    def fingerprint(self) -> str:  # noqa: D102
        stat = self._path.stat()
        return f"{self._path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def _encoded(self, index: int, number: int) -> tuple[bytes, str]:
        at = self._starts[index] + number
        return bytes(self._bytes[self._offsets[at] : self._offsets[at + 1]]), f"frame {number}"


class _Chosen(ClipSet):
    """Some of a file's clips; their ids count anew from 0."""

    def __init__(self, clips: PackedClips, chosen: Sequence[int]) -> None:
        self._clips = clips
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def length(self, index: int) -> int:
        return self._clips.length(self._chosen[index])

    def clip(self, index: int, frames: Sequence[int]) -> Tensor:
        return self._clips.clip(self._chosen[index], frames)

    def label(self, index: int) -> int:
        return self._clips.label(self._chosen[index])

    def name(self, index: int) -> str:
        return self._clips.name(self._chosen[index])

    def fingerprint(self) -> str:
        return f"{self._clips.fingerprint()} {self._chosen}"


def clips_npz(options: DataOptions) -> ClipData:
    """Build the data set of a folder with packed clips.

    Raises:
        UserError: a file is missing or not of the expected layout, or a class is too small for some
            of it to be held out.
    """
    root = options.folder()
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_file()), None)
    if (root / "train.npz").is_file() and held_out is not None:
        clips, held_clips = PackedClips(root / "train.npz"), PackedClips(held_out)
        if clips.classes != held_clips.classes:
            raise UserError(
                f"the classes of {held_out} aren't those of {root / 'train.npz'}: expected the "
                "same names in the same order; pack both with one list"
            )
        train, test = list(range(len(clips))), list(range(len(held_clips)))
    elif (root / "clips.npz").is_file():
        clips = held_clips = PackedClips(root / "clips.npz")
        train, test = _divided(clips, root / "clips.npz")
    else:
        raise UserError(
            f"{root} has neither train.npz and {_HELD_OUT[0]} nor clips.npz: expected packed "
            "clips; check the path"
        )
    return ClipData(
        name=root.name,
        classes=clips.classes,
        train=ClipSplit("train", _Chosen(clips, train[: options.limit]), options.skip_bad),
        test=ClipSplit("test", _Chosen(held_clips, test), options.skip_bad),
        preprocessing=clip_preprocessing(options),
        default_augment="imagenet",
        workers=options.workers,
    )


def _divided(clips: PackedClips, path: Path) -> tuple[list[int], list[int]]:
    """Hold out every fifth clip of each class."""
    parts: tuple[list[int], list[int]] = ([], [])
    seen = [0] * len(clips.classes)
    for index in range(len(clips)):
        label = clips.label(index)
        parts[seen[label] % _EVERY == _EVERY - 1].append(index)
        seen[label] += 1
    if not parts[1]:
        raise UserError(
            f"{path} has fewer than {_EVERY} clips of any class: expected so many, for one of them "
            "to be held out; pack train.npz and test.npz"
        )
    return parts
