"""What a set of labelled images is, and one of labelled clips."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ArrayClips", "ArraySet", "ClipSet", "ImageSet", "LabelledSet"]


class LabelledSet(ABC):
    """An indexed set of labelled samples. An index is an id in batches; it never shifts."""

    unit: str = "sample"
    """What a sample is called in messages."""

    keep_decoded: bool = False
    """Whether decoded samples may stay in memory (they do only where the whole set fits)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def label(self, index: int) -> int:
        """Return the class of one sample."""

    @abstractmethod
    def check(self, index: int) -> None:
        """Read one sample, all of it.

        Raises:
            BadImage: it can't be read.
        """

    def labels(self) -> Tensor:
        """Return the class of every sample: int64 `(N,)`."""
        return torch.tensor([self.label(i) for i in range(len(self))], dtype=torch.int64)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a person would look for: a file, or `digits[17]`."""

    def fingerprint(self) -> str | None:
        """Return a text that changes when the files do; None if there is no file to be bad."""
        return None


class ImageSet(LabelledSet):
    """An indexed set of labelled images. An image's index is its id in batches; it never shifts.

    Write your own by giving `__len__`, `image`, `label` and `name`; `image` raises `BadImage` for a
    file that can't be read.
    """

    unit = "image"

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return one image as it is stored: uint8 `(C, H, W)`."""

    def check(self, index: int) -> None:  # noqa: D102
        self.image(index)


class ClipSet(LabelledSet):
    """An indexed set of labelled clips of any length. A clip's index is its id in batches.

    Write your own by giving `__len__`, `length`, `clip`, `label` and `name`; `clip` raises
    `BadClip` for what can't be read.
    """

    unit = "clip"

    @abstractmethod
    def length(self, index: int) -> int:
        """Return how many frames one clip has, at least 1."""

    @abstractmethod
    def clip(self, index: int, frames: Sequence[int]) -> Tensor:
        """Return frames of one clip as they are stored: uint8 `(C, T, H, W)`.

        Args:
            index: of the clip.
            frames: T numbers from 0 to `length(index) - 1`, ascending; one may come repeatedly.
        """

    def check(self, index: int) -> None:  # noqa: D102
        self.clip(index, range(self.length(index)))


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


class ArrayClips(ClipSet):
    """Clips that are in memory already, all of one length.

    Args:
        clips: uint8 `(N, C, T, H, W)`.
        labels: N class numbers.
        title: the names are `title[number]`.
    """

    def __init__(self, clips: Tensor, labels: Sequence[int], title: str) -> None:
        self.clips = clips.contiguous()
        self._labels = list(labels)
        self._title = title

    def __len__(self) -> int:
        return len(self.clips)

    def length(self, index: int) -> int:  # noqa: D102
        return int(self.clips.shape[2])

    def clip(self, index: int, frames: Sequence[int]) -> Tensor:  # noqa: D102
        return self.clips[index][:, list(frames)]

    def label(self, index: int) -> int:  # noqa: D102
        return self._labels[index]

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._title}[{index}]"
