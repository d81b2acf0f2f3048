"""Images that are read while training: what a stream is, and the order that it is read in.

A stream lies in shards (files, mostly), each of which can only be read from its beginning. An
image's id is its position when one image of each shard is read in turn: `row * shards + shard`. It
belongs to the image, whatever the epoch, the process or the order.

A run has `world_size * workers` readers. An epoch's shards are dealt out to them in an order drawn
from (seed, epoch). Where they can't be dealt evenly, every shard is cut into parts, and each reader
of a shard reads all of it and keeps its part. A reader shuffles in a buffer, also by (seed, epoch).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenfold.data.randomness import mix_one
from tenfold.errors import UserError

__all__ = ["ImageStream", "Row", "StreamSplit", "in_order", "shuffled_pass"]

BUFFER = 1000

# A reader with this many whole shards may have one more or less than another: 6 % of its images.
_ENOUGH = 16

Row = tuple[int, bytes | Path, int]
"""Id, the encoded image or its file, and the label."""


class ImageStream(ABC):
    """Labelled images that can only be read one after the other, shard by shard."""

    shards: int
    """How many shards there are."""

    @abstractmethod
    def rows(self, shard: int) -> Iterator[tuple[bytes | Path, int]]:
        """Yield the encoded images (or their files) of one shard, with labels, always in one order.

        Raises:
            UserError: it can't be read, or a label is not one.
        """

    def name(self, position: int) -> str:
        """Return what a person would look for."""
        shard, row = position % self.shards, position // self.shards
        return f"image {row} of shard {shard}" if self.shards > 1 else f"image {row}"


@dataclass(frozen=True)
class StreamSplit:
    """A stream and how to read it.

    Attributes:
        title: "train" or "test", for messages.
        stream: the images.
        samples: how many there are, or for training: how many make an epoch; None: not known,
            which only held-out images may be.
        limit: use only ids below this.
        buffer: images that a reader shuffles among.
        skip_bad: go on without images that can't be read, instead of stopping.
    """

    title: str
    stream: ImageStream
    samples: int | None = None
    limit: int | None = None
    buffer: int = BUFFER
    skip_bad: bool = False

    @property
    def size(self) -> int:
        """How many images make an epoch.

        Raises:
            UserError: that isn't known.
        """
        if self.samples is None:
            raise UserError(
                f"the stream doesn't say how many {self.title} images it has: expected a number, "
                "for the schedules; give data.samples"
            )
        return self.samples if self.limit is None else min(self.samples, self.limit)

    @property
    def skipped(self) -> list[str]:
        """Nothing: a stream's bad images are met while it is read."""
        return []


def in_order(split: StreamSplit) -> Iterator[Row]:
    """Yield every row, shard after shard."""
    for shard in range(split.stream.shards):
        yield from _part(split, shard, 0, 1)


def shuffled_pass(
    split: StreamSplit, reader: int, readers: int, seed: int, epoch: int, turn: int
) -> Iterator[Row]:
    """Yield one reader's rows of an epoch, shuffled.

    Args:
        split: what to read.
        reader: which of the readers this is.
        readers: how many there are, over all ranks.
        seed: the run's.
        epoch: it changes which shards this reader gets, and the order.
        turn: how often this reader has been through its rows in this epoch; changes the order.
    """
    shards = split.stream.shards
    parts = _parts(shards, readers)
    dealt = np.random.default_rng(mix_one(seed, epoch)).permutation(shards * parts)
    mine = dealt[reader::readers]
    generator = np.random.default_rng(mix_one(seed, epoch, reader, turn))
    pieces = [divmod(int(piece), parts) for piece in generator.permutation(mine)]
    rows = itertools.chain.from_iterable(_part(split, shard, part, parts) for shard, part in pieces)
    yield from _shuffled(rows, split.buffer, generator)


def _parts(shards: int, readers: int) -> int:
    """Return in how many parts to cut each shard, so that all readers get about as much."""
    parts = 1
    while shards * parts % readers and shards * parts < _ENOUGH * readers:
        parts += 1
    return parts


def _part(split: StreamSplit, shard: int, part: int, parts: int) -> Iterator[Row]:
    shards = split.stream.shards
    end = None if split.limit is None else max(0, math.ceil((split.limit - shard) / shards))
    rows = itertools.islice(split.stream.rows(shard), part, end, parts)
    for row, (encoded, label) in zip(itertools.count(part, parts), rows, strict=False):
        yield row * shards + shard, encoded, label


def _shuffled(rows: Iterable[Row], size: int, generator: np.random.Generator) -> Iterator[Row]:
    """Hold `size` rows and let each new one push out one of them by chance."""
    held: list[Row] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        index = int(generator.integers(size))
        yield held[index]
        held[index] = row
    for index in generator.permutation(len(held)).tolist():
        yield held[index]
