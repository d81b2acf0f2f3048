"""What a set of labelled images is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ArraySet", "ImageSet"]


class ImageSet(ABC):
    """An indexed set of labelled images. An image's index is its id in batches; it never shifts.

    Write your own by giving the four methods; `image` raises `BadImage` for a file that can't be
    read.
    """

    keep_decoded: bool = False
    """Whether decoded images may stay in memory (they do only where the whole set fits)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return one image as it is stored: uint8 `(C, H, W)`."""

    @abstractmethod
    def label(self, index: int) -> int:
        """Return the class of one image."""

    def labels(self) -> Tensor:
        """Return the class of every image: int64 `(N,)`."""
        return torch.tensor([self.label(i) for i in range(len(self))], dtype=torch.int64)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a person would look for: a file, or `digits[17]`."""

    def fingerprint(self) -> str | None:
        """Return a text that changes when the files do; None if there is no file to be bad."""
        return None


class ArraySet(ImageSet):
    """Images that are in memory already.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: N class numbers.
        title: the names are `title[number]`.
        numbers: the number of each image in the original set, by default 0, 1, 2, …
    """

    keep_decoded = True

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int],
        title: str,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.images = images.contiguous()
        self._labels = list(labels)
        self._title = title
        self._numbers = range(len(images)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:  # noqa: D102
        return self.images[index]

    def label(self, index: int) -> int:  # noqa: D102
        return self._labels[index]

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._title}[{self._numbers[index]}]"
