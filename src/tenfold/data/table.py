"""A split of a Hugging Face data set on this machine's disk, by index."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.columns import Columns, encoded_image
from tenfold.data.decode import decode, encoded_size

__all__ = ["TableSet"]


class TableSet(ImageSet):
    """The images of an arrow table, RGB. The table stays on the disk, mapped into memory.

    Args:
        table: a `datasets.Dataset` whose image column isn't decoded.
        columns: where images and labels are.
        split: the split's name.
        limit: use only so many images, the first of every class ahead of the second of any.

    Raises:
        UserError: a label is not one of the classes.
    """

    keep_decoded = True

    def __init__(self, table: Any, columns: Columns, split: str, limit: int | None = None) -> None:
        self._title = f"{columns.title}/{split}"
        self._column = columns.image
        self._images = table.select_columns([columns.image])
        stored = table.select_columns([columns.label]).with_format("arrow")[:][columns.label]
        labels = columns.numbers(stored.to_numpy(), self._title)
        self._rows = np.arange(len(labels)) if limit is None else _spread(labels, limit)
        self._labels = torch.from_numpy(labels[self._rows])

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> Tensor:  # noqa: D102
        return decode(self._encoded(index), 3, self.name(index))

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of one image, from its header alone."""
        return encoded_size(self._encoded(index), self.name(index))

    def label(self, index: int) -> int:  # noqa: D102
        return int(self._labels[index])

    def labels(self) -> Tensor:  # noqa: D102
        return self._labels

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._title}[{self._rows[index]}]"

    def fingerprint(self) -> str:  # noqa: D102
        digest = hashlib.sha256(self._rows.tobytes())
        files = [Path(file["filename"]) for file in self._images.cache_files]
        for number in range(len(self)):
            source = self._encoded(number)
            if not isinstance(source, Path):
                break  # inside the table, then, as all the others
            files.append(source)
        for file in files:
            digest.update(os.fsencode(file))
            if file.exists():
                stat = file.stat()
                digest.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
        return f"{self._title} {self._column} {digest.hexdigest()}"

    def _encoded(self, index: int) -> bytes | Path:
        return encoded_image(self._images[int(self._rows[index])][self._column])


def _spread(labels: np.ndarray[Any, Any], limit: int) -> np.ndarray[Any, Any]:
    """Choose rows so that all classes stay in: sets are often stored class by class."""
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty(len(labels), np.int64)
    turn[by_class] = np.arange(len(labels)) - starts
    return np.sort(np.lexsort((labels, turn))[:limit])
