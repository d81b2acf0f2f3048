"""What a recipe may say about its data, typed and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tenfold.errors import UserError, unknown_name

__all__ = ["DIRECTIONS", "REFERENCES", "DataOptions"]

DIRECTIONS = ("AtoB", "BtoA")
REFERENCES = ("train+test", "test")

_TEXTS = ("config", "train_split", "test_split", "image_column", "label_column")
_STREAMING = ("samples", "buffer")
_CLIPS = ("frames", "stride", "train_clips", "test_clips")
_FILES = ("frames", "video", "clips_npz")
_TRANSLATION = ("pairs", "unpaired", "edges2photo")
_SHADOWS = ("triplets", "rendered_shadows", "shadow_frames")
_CHOICES = {"direction": DIRECTIONS, "reference": REFERENCES}

# The options that only some data sets have, with those sets.
_ONLY = {
    **dict.fromkeys((*_TEXTS, "classes", "streaming", *_STREAMING), ("hf",)),
    "frames": (*_FILES, "motions"),
    "stride": _FILES,
    **dict.fromkeys(("train_clips", "test_clips", "seed"), ("motions",)),
    **dict.fromkeys(("load_size", "direction"), _TRANSLATION),
    "reference": ("unpaired",),
    "samples": ("hf", "rendered_shadows"),
    **dict.fromkeys(("short_side", "test_size", "mask_above", "targets"), _SHADOWS),
    "threshold": ("shadow_frames",),
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options of a data set.

    Attributes:
        name: of the data set, see `names()`.
        path: its folder; for cifar10 and cifar100 where the download goes.
        size: (H, W) of the network's input, or one number for both; None: the set's own.
        skip_bad: go on without images that can't be read (one scan ahead of the first run).
        workers: loader processes; None: as `train_loader` says.
        limit: use only the first so many training images.
        mean: per channel, of images scaled to 0..1; None: the set's own.
        std: likewise.
        config: hf: the configuration, for sets that have several.
        train_split: hf: the split to train on, by default train; slices such as train[:90%] too.
        test_split: hf: the held-out split, by default test, validation or val.
        image_column: hf: by default the first column of images.
        label_column: hf: by default the first column of named classes.
        classes: hf: the classes' names, or how many there are; for labels without names.
        streaming: hf: read while training, for sets that don't fit on the disk.
        samples: streaming: the number of training images, where the set doesn't say it;
            rendered_shadows: how many make an epoch, None: 400.
        buffer: streaming: each reader shuffles among so many images; None: 1,000.
        frames: clips: how many frames the network sees; None: 16, and 8 of motions.
        stride: clips: every so many frames of a video or folder are taken; None: 1.
        train_clips: motions: how many to train on; None: 4,000.
        test_clips: motions: how many are held out; None: 1,000.
        seed: motions: another seed gives other clips; None: 0. It is not the run's.
        load_size: translation: (H, W) of training images ahead of the random crop, or one number
            for both; None: 286/256 of the size.
        direction: translation: AtoB, or BtoA to learn the other way; None: AtoB.
        reference: unpaired: the real images that an FID compares with, train+test or test; None:
            train+test.
        short_side: shadows: the least and most of a training photo's shorter side ahead of the
            crop, in pixels; None: from the crop's longer side to 479/256 of it, 400 to 479 for SRD.
        test_size: shadows: (H, W) of held-out photos, or one number for both, or native; None: 256.
        mask_above: shadows: share of white from which on a mask's level is shadow; None: 0.5.
        targets: shadows: false trains without shadow-free photos, which aren't looked for then.
        threshold: shadow_frames: by more than so many grey levels a pixel varies where a shadow
            moves; None: 80.

    Raises:
        UserError: a value of the wrong type or out of range.
    """

    name: str
    path: Path | None = None
    size: tuple[int, int] | None = None
    skip_bad: bool = False
    workers: int | None = None
    limit: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    config: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] | None = None
    streaming: bool = False
    samples: int | None = None
    buffer: int | None = None
    frames: int | None = None
    stride: int | None = None
    train_clips: int | None = None
    test_clips: int | None = None
    seed: int | None = None
    load_size: tuple[int, int] | None = None
    direction: str | None = None
    reference: str | None = None
    short_side: tuple[int, int] | None = None
    test_size: tuple[int, int] | Literal["native"] | None = None
    mask_above: float | None = None
    targets: bool | None = None
    threshold: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "name": _name(self.name),
            "path": _path(self.path),
            "size": _size("size", self.size),
            "skip_bad": _truth("skip_bad", self.skip_bad),
            "workers": _whole("workers", self.workers, 0),
            "limit": _whole("limit", self.limit, 1),
            "mean": _numbers("mean", self.mean),
            "std": _numbers("std", self.std),
            **{name: _text(name, getattr(self, name)) for name in _TEXTS},
            "classes": _classes(self.classes),
            "streaming": _truth("streaming", self.streaming),
            "samples": _whole("samples", self.samples, 1),
            "buffer": _whole("buffer", self.buffer, 1),
            **{name: _whole(name, getattr(self, name), 1) for name in _CLIPS},
            "seed": _whole("seed", self.seed, 0),
            "load_size": _size("load_size", self.load_size),
            **{name: _choice(name, getattr(self, name)) for name in _CHOICES},
            "short_side": _size("short_side", self.short_side),
            "test_size": _test_size(self.test_size),
            "mask_above": _share("mask_above", self.mask_above),
            "targets": None if self.targets is None else _truth("targets", self.targets),
            "threshold": _whole("threshold", self.threshold, 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.std is not None and min(self.std) <= 0:
            raise _wrong("std", list(self.std), "numbers above 0")
        for name, sets in _ONLY.items():
            value = getattr(self, name)
            given = value is not None and (value is not False or name == "targets")
            if given and self.name not in sets:
                known = " or ".join(sets)
                raise _wrong(name, value, f"it only for {known} data, not for {self.name}")
        for name in _STREAMING:
            if getattr(self, name) and self.name == "hf" and not self.streaming:
                raise _wrong(name, getattr(self, name), "it only beside streaming: true")

    @classmethod
    def parse(cls, spec: str | Mapping[str, object]) -> DataOptions:
        """Read `"name"`, `"name:PATH"` or a mapping with `name` and options.

        Raises:
            UserError: an unknown option, or a value of the wrong type or out of range.
        """
        if isinstance(spec, str):
            spec = {"name": spec}
        elif not isinstance(spec, Mapping):
            raise _wrong("data", spec, "a name, name:PATH, or a mapping with a name")
        given = dict(spec)
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise unknown_name("option of data", str(key), known)
        name, colon, path = _name(given.get("name")).partition(":")
        if colon and given.get("path") is not None:
            raise _wrong("data.name", given["name"], "the path once: in the name or as path")
        if colon:
            given |= {"path": path}
        return cls(**(given | {"name": name}))  # type: ignore[arg-type]

    def folder(self) -> Path:
        """Return the path of a set that can't do without one.

        Raises:
            UserError: no path is given, or it isn't a folder.
        """
        if self.path is None:
            raise UserError(
                f"data {self.name} has no path: expected its folder; give {self.name}:PATH"
            )
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "doesn't exist"
            raise UserError(f"data path {self.path} {what}: expected a folder; check the path")
        return self.path


def _wrong(name: str, value: object, expected: str) -> UserError:
    name = name if name.startswith("data") else f"data.{name}"
    return UserError(f"{name} is {value!r}: expected {expected}; correct it in the recipe")


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong("name", value, "the name of a data set, such as digits")
    return value


def _path(value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise _wrong("path", value, "a folder")
    return Path(os.fsdecode(value)).expanduser()


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(name: str, value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _wrong(name, value, "a name")
    return value


def _classes(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(str(number) for number in range(value))
    names = list(value) if isinstance(value, list | tuple) else []
    if not names or not all(isinstance(n, str) for n in names) or len({*names}) < len(names):
        raise _wrong("classes", value, "how many there are, or a list of their names, each once")
    return tuple(names)


def _whole(name: str, value: object, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(name, value, f"a whole number of at least {least}")
    return value


def _choice(name: str, value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in _CHOICES[name]):
        raise _wrong(name, value, " or ".join(_CHOICES[name]))
    return value


def _size(name: str, value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    whole = [s for s in sides if isinstance(s, int) and not isinstance(s, bool) and s >= 1]
    if len(whole) != 2 or len(sides) != 2:
        raise _wrong(name, value, "pixels, one whole number or [H, W], at least 1")
    return whole[0], whole[1]


def _test_size(value: object) -> tuple[int, int] | str | None:
    return "native" if value == "native" else _size("test_size", value)


def _share(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise _wrong(name, value, "a share of at least 0 and below 1")
    return float(value)


def _numbers(name: str, value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    values = list(value) if isinstance(value, list | tuple) else []
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise _wrong(name, value, "a list of numbers, one per channel")
    return tuple(float(v) for v in values)
