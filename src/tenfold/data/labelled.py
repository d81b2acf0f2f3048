"""`LabelledData`: what a classification task needs of its data, whatever a sample is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tenfold.data.loader import ImageLoader, Mixing
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.stream_loader import StreamLoader
from tenfold.errors import UserError

__all__ = ["LabelledData", "at_least", "whole"]


class _Part(Protocol):
    """A split, indexed or streamed."""

    @property
    def size(self) -> int: ...

    @property
    def skipped(self) -> list[str]: ...


class LabelledData(ABC):
    """Samples to train on, held-out samples to evaluate on, and the facts about them.

    `create` builds one; `ImageData` and `ClipData` are its kinds.

    Attributes:
        name: of the data set.
        classes: their names, by label.
        num_classes: how many there are.
        channels: 1 (grey) or 3 (RGB).
        size: (H, W) of the network's input.
        frames: of a clip; None for images.
        shape: of the network's input without the batch: `(C, H, W)`, or `(C, T, H, W)`.
        mean: per channel, of pixels scaled to 0..1.
        std: per channel, likewise.
        default_augment: what `augment="auto"` means.
        skipped: names of the samples left out.
        key: what the samples are called in a batch.
        eval_batch_size: how many to evaluate at a time, where nobody says.
    """

    key: str
    eval_batch_size: int

    def __init__(
        self,
        *,
        name: str,
        classes: Sequence[str],
        train: _Part,
        test: _Part,
        preprocessing: Preprocessing,
        default_augment: str,
        workers: int | None,
    ) -> None:
        self.name = name
        self.classes = list(classes)
        self.num_classes = len(self.classes)
        self.channels = preprocessing.channels
        self.size = preprocessing.size
        self.frames = preprocessing.frames
        self.shape = preprocessing.shape
        self.mean = preprocessing.mean
        self.std = preprocessing.std
        self.default_augment = default_augment
        self.skipped: list[str] = [*train.skipped, *test.skipped]
        self._facts = preprocessing
        self._workers = workers
        self._parts = (train, test)

    @property
    def described(self) -> str:
        """What the network is given, for messages: `an image of 3x32x32`."""
        article = "an" if self.key[0] in "aeiou" else "a"
        return f"{article} {self.key} of {'x'.join(str(length) for length in self.shape)}"

    @property
    def train_size(self) -> int:
        """How many training samples make an epoch, of all ranks together."""
        return self._parts[0].size

    @property
    @abstractmethod
    def train_ids(self) -> Tensor:
        """The training ids that the loader visits, all but the skipped ones: int64, ascending."""

    @property
    @abstractmethod
    def test_ids(self) -> Tensor:
        """The held-out ids that the loader visits, likewise."""

    @abstractmethod
    def train_loader(
        self,
        *,
        batch_size: int,
        seed: int,
        augment: str = "auto",
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        mixing: Mixing | None = None,
        views: bool = False,
    ) -> ImageLoader | StreamLoader:
        """Return shuffled, augmented batches of the training samples."""

    @abstractmethod
    def test_loader(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int | None = None
    ) -> ImageLoader | StreamLoader:
        """Return batches of the held-out samples in order; no rank sees one twice."""

    def normalize(self, samples: Tensor) -> Tensor:
        """Turn uint8 `(B, C, H, W)` into normalised float32, on the device that it is on.

        Clips are `(B, C, T, H, W)`.

        Raises:
            UserError: other than uint8, or another number of channels.
        """
        return self._facts.normalize(samples)

    def preprocessing(self) -> dict[str, object]:
        """Return what turns a file into the network's input, JSON-able, for the artifact."""
        return self._facts.to_dict()

    def _workers_or(self, workers: int | None) -> int | None:
        workers = self._workers if workers is None else workers
        return None if workers is None else at_least("workers", workers, 0)


def whole(name: str, value: int) -> int:
    """Refuse anything but a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} is {value!r}: expected a whole number; correct it in the call")
    return value


def at_least(name: str, value: int, least: int) -> int:
    """Refuse a number below the least."""
    if whole(name, value) < least:
        raise UserError(f"{name} is {value}: expected at least {least}; correct it in the call")
    return value
