"""From a stream to batches, the same as those of an indexed set.

Workers get keys (epoch, number of the batch), as those of an indexed set do, so that the epoch
travels with them and a loader has a length. Batch b of a rank is made by its reader
`b % workers`; each rank makes `ceil(ceil(samples / world_size) / batch_size)` training batches in
every epoch, whatever its shards hold: a reader that runs out starts its rows anew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tenfold.data.decode import BadImage, decode
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.sampler import check_epoch, check_rank
from tenfold.data.split import cpu_count
from tenfold.data.stream import Row, StreamSplit, in_order, shuffled_pass
from tenfold.data.transforms import Augmentation, BatchTransform
from tenfold.errors import UserError

__all__ = ["EpochKeys", "StreamLoader", "make_stream_loader"]

Key = tuple[int, int]
Decoded = tuple[int, Tensor, int]


class EpochKeys(Sampler[Key]):
    """Yield (epoch, 0), (epoch, 1) and so on.

    Args:
        batches: how many there are; None: without end, the loader knows when there are no more.
    """

    def __init__(self, batches: int | None) -> None:
        self.batches = batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        check_epoch(epoch)
        self.epoch = epoch

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("this stream's length is not known")
        return self.batches

    def __iter__(self) -> Iterator[Key]:
        numbers = itertools.count() if self.batches is None else range(self.batches)
        for number in numbers:
            yield self.epoch, number


@dataclass(frozen=True)
class _Failure:
    """An error's way out of a worker: DataLoader would wrap an exception in a traceback."""

    text: str


class _End:
    """Stands for every batch after the last."""


class StreamBatches(Dataset[Any]):
    """Make the batches of one rank by key, as long as the keys come in the order of `EpochKeys`.

    A key out of order costs reading from the beginning of its epoch.
    """

    def __init__(
        self,
        split: StreamSplit,
        facts: Preprocessing,
        augmentation: Augmentation | None,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        workers: int,
    ) -> None:
        self.split = split
        self.facts = facts
        self.training = augmentation is not None
        self.transform = BatchTransform(augmentation or Augmentation("none"), facts.size, seed)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self._batches: Iterator[Any] = iter(())
        self._next: Key | None = None

    @property
    def images(self) -> int | None:
        """How many images this rank gets in an epoch; None: not known."""
        if self.training:
            return math.ceil(self.split.size / self.world_size)
        if self.split.samples is None:
            return None
        return len(range(self.rank, self.split.size, self.world_size))

    def __getstate__(self) -> dict[str, object]:
        """Leave the place where reading stands out, where a worker is started by pickling."""
        return {**self.__dict__, "_batches": iter(()), "_next": None}

    def __getitem__(self, key: Key) -> Any:
        """Return a batch, `_End` when there are no more, or `_Failure`."""
        epoch, number = key
        try:
            if key != self._next:
                read = self._train if self.training else self._test
                self._batches = read(epoch, number % self.workers)
                for _ in range(number // self.workers):
                    next(self._batches, None)
            self._next = (epoch, number + self.workers)
            return next(self._batches, _End())
        except UserError as error:
            self._next = None
            return _Failure(str(error))

    def _train(self, epoch: int, worker: int) -> Iterator[dict[str, Tensor]]:
        images = self.images or 0
        rows = self._without_end(epoch, self.rank * self.workers + worker)
        for first in range(worker * self.batch_size, images, self.workers * self.batch_size):
            size = min(self.batch_size, images - first)
            yield self._batch(epoch, list(itertools.islice(rows, size)))

    def _without_end(self, epoch: int, reader: int) -> Iterator[Decoded]:
        readers = self.world_size * self.workers
        for turn in itertools.count():
            found = 0
            for row in shuffled_pass(self.split, reader, readers, self.seed, epoch, turn):
                for decoded in self._decoded(row):
                    found += 1
                    yield decoded
            if not found:
                raise UserError(
                    f"reader {reader} of {readers} finds no {self.split.title} image to read: "
                    "expected at least one for each process and worker; use fewer of them, or "
                    "check the data"
                )

    def _test(self, epoch: int, worker: int) -> Iterator[dict[str, Tensor]]:
        """Read all, keep this rank's share, and of its batches this worker's."""
        rows = itertools.islice(in_order(self.split), self.rank, None, self.world_size)
        for number in itertools.count():
            batch = list(itertools.islice(rows, self.batch_size))
            if not batch:
                return
            if number % self.workers != worker:
                continue
            found = [decoded for row in batch for decoded in self._decoded(row)]
            yield self._batch(epoch, found)

    def _decoded(self, row: Row) -> Iterator[Decoded]:
        """Yield the image, or nothing for a bad one that may be skipped."""
        position, encoded, label = row
        name = f"{self.split.title}: {self.split.stream.name(position)}"
        try:
            yield position, decode(encoded, self.facts.channels, name), label
        except BadImage as error:
            if not self.split.skip_bad:
                raise UserError(
                    f"can't read image {name} of the stream: {error.reason}; "
                    "pass --data.skip_bad true to go on without such images"
                ) from None

    def _batch(self, epoch: int, rows: Sequence[Decoded]) -> dict[str, Tensor]:
        ids = np.array([position for position, _, _ in rows], np.int64)
        if not len(ids):
            images = torch.empty((0, self.facts.channels, *self.facts.size), dtype=torch.uint8)
        else:
            images = self.transform(
                np.full_like(ids, epoch),
                ids,
                stored=lambda number: rows[number][1],
                fitted=lambda: torch.stack([self.facts.fit(image) for _, image, _ in rows]),
            )
        labels = torch.tensor([label for _, _, label in rows], dtype=torch.int64)
        return {"image": images, "label": labels, "id": torch.from_numpy(ids)}


class StreamLoader(DataLoader[Any]):
    """A DataLoader over a stream. Its length is that of an epoch, where it is known."""

    sampler: EpochKeys

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, _Failure):
                break
            if isinstance(batch, _End):
                return
            if len(batch["id"]):  # all of its images may have been bad
                yield batch
        else:
            return
        self._iterator = None  # let the workers go now, as `ImageLoader` does
        del batches
        raise UserError(batch.text)


def make_stream_loader(
    split: StreamSplit,
    facts: Preprocessing,
    augmentation: Augmentation | None,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    workers: int | None,
) -> StreamLoader:
    """Make the loader of one split; without an augmentation it is one for evaluation.

    `workers` None means: up to 4, but no more than there are shards for.

    Raises:
        UserError: a rank out of range, or the number of training images isn't known.
    """
    check_rank(rank, world_size)
    if workers is None:
        workers = min(4, cpu_count(), max(1, split.stream.shards // world_size))
    batches = StreamBatches(
        split,
        facts,
        augmentation,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=max(1, workers),
    )
    count = None if batches.images is None else math.ceil(batches.images / batch_size)
    if workers:
        # Seconds, which forked workers then don't each spend again.
        import torchvision.transforms.v2  # noqa: F401
    return StreamLoader(
        batches,
        batch_size=None,  # a key is a batch
        sampler=EpochKeys(count),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch
