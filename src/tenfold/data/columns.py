"""Which columns of a Hugging Face data set hold images and labels, and what the classes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold.data.options import DataOptions
from tenfold.errors import UserError, unknown_name

__all__ = ["Columns", "encoded_image", "find_columns"]


@dataclass(frozen=True)
class Columns:
    """Where images and labels are.

    Attributes:
        title: of the data set, for messages.
        image: the column of images.
        label: the column of labels.
        classes: the classes' names.
        by_name: labels are stored as the classes' names, not as their numbers.
    """

    title: str
    image: str
    label: str
    classes: Sequence[str]
    by_name: bool

    def numbers(self, labels: Sequence[Any] | NDArray[Any], where: str) -> NDArray[np.int64]:
        """Return class numbers for stored labels.

        Raises:
            UserError: a label is missing, or not one of the classes.
        """
        stored = np.asarray(labels)
        if self.by_name:
            known = {name: number for number, name in enumerate(self.classes)}
            found = np.array([known.get(label, -1) for label in stored.tolist()], np.int64)
        elif stored.dtype.kind in "iub":
            found = stored.astype(np.int64)
        else:  # a column of numbers with gaps arrives as objects or floats
            found = np.array([_or_gap(label) for label in stored.tolist()], np.int64)
        wrong = np.flatnonzero((found < 0) | (found >= len(self.classes)))
        if len(wrong):
            given = stored[wrong[0]]
            expected = (
                f"one of the names in classes, such as {self.classes[0]!r}"
                if self.by_name
                else f"0 to {len(self.classes) - 1}, for {len(self.classes)} classes"
            )
            raise UserError(
                f"image {wrong[0]} of {where} has {self.label} {given!s}: expected {expected}; a "
                "split with hidden labels can't be used, choose others by data.train_split and "
                "data.test_split, or correct data.classes"
            )
        return found


def find_columns(features: Mapping[str, Any] | None, options: DataOptions, title: str) -> Columns:
    """Find the columns, by the options or by their types.

    Args:
        features: the columns' types, as `datasets` has them.
        options: may name the columns and the classes.
        title: of the data set, for messages.

    Raises:
        UserError: there is no such column, or nothing says what the classes are.
    """
    from datasets import ClassLabel, Image, Value

    if not features:
        raise UserError(
            f"{title} doesn't say what its columns are: expected a column of images and one of "
            "labels; use it without data.streaming, or save it as parquet"
        )
    image = _named(options.image_column, "image_column", features) or _first(features, Image)
    if image is None:
        raise UserError(
            f"{title} has no column of images among {', '.join(features)}: expected one of type "
            "Image; name the one that holds image files' bytes by data.image_column"
        )
    label = _named(options.label_column, "label_column", features)
    label = label or _first(features, ClassLabel)
    if label is None:
        raise UserError(
            f"{title} has no column of classes among {', '.join(features)}: expected one of type "
            "ClassLabel; name the one that holds the labels by data.label_column"
        )
    kind = features[label]
    if isinstance(kind, ClassLabel):
        names = list(kind.names)
        if options.classes is not None and len(options.classes) != len(names):
            raise UserError(
                f"data.classes gives {len(options.classes)} classes and {title} has {len(names)}: "
                "expected as many names, in the same order; leave it out to keep the set's own"
            )
        return Columns(title, image, label, list(options.classes or names), by_name=False)
    stored = kind.dtype if isinstance(kind, Value) else type(kind).__name__
    if not stored.startswith(("int", "uint", "string", "large_string")):
        raise UserError(
            f"column {label} of {title} is {stored}: expected class numbers or names; choose "
            "another by data.label_column"
        )
    if options.classes is None:
        raise UserError(
            f"column {label} of {title} is {stored} and doesn't say which classes there are: "
            "expected data.classes, how many there are (labels from 0) or their names in order"
        )
    return Columns(title, image, label, options.classes, by_name="string" in stored)


def encoded_image(value: Any) -> bytes | Path:
    """Return what a cell of an image column holds: a file's content, or a file on this machine."""
    content = value.get("bytes") if isinstance(value, dict) else value
    path = value.get("path") if isinstance(value, dict) else None
    if content is not None:
        return bytes(content)
    if path is None:
        return b""  # which is met as an empty file is
    if "://" not in path:
        return Path(path)
    import fsspec

    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def _named(name: str | None, option: str, features: Mapping[str, Any]) -> str | None:
    if name is not None and name not in features:
        raise unknown_name(f"column in data.{option}", name, features)
    return name


def _first(features: Mapping[str, Any], kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _or_gap(label: Any) -> int:
    whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    return int(label) if whole else -1
