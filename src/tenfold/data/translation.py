"""`TranslationData`: what the task of turning images of one domain into another's needs.

Pairs show the same thing in both domains; without pairs there are images of each domain and nobody
says which belong together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.labelled import at_least, whole
from tenfold.data.loader import MEMORY_LIMIT
from tenfold.data.options import DIRECTIONS, REFERENCES
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split
from tenfold.data.translation_loader import (
    Crops,
    PairBatches,
    Part,
    ResizedImages,
    SourceBatches,
    TranslationLoader,
    UnpairedBatches,
    load_translation,
)
from tenfold.errors import UserError, unknown_name

__all__ = ["TranslationData", "translation_augmentations"]

# Generators halve an image twice and double it again, so that other sides would not come back.
_MULTIPLE, _LEAST = 4, 16

_AUGMENTATIONS = {
    "translation": "resize to load_size, random crop, flip; the same for both images of a pair",
    "none": "resize",
}


def translation_augmentations() -> dict[str, str]:
    """Return the names that `augment` takes here, each with one line that describes it."""
    return {"auto": "translation", **_AUGMENTATIONS}


class TranslationData:
    """Images of two domains to train on, held-out ones to evaluate on, and the facts about them.

    `create_translation` builds it; build it yourself for a set of your own. Batches are dicts:
    `source` and `target` uint8 `(B, C, H, W)`, `id` int64 `(B,)`, that of the source image.

    Args:
        name: of the data set.
        train: one set of pairs, each of which is one image: the channels of domain A, then those
            of B; or two sets, the images of domain A and those of B.
        test: the held-out images, likewise.
        size: (H, W) of training crops and of held-out images.
        load_size: (H, W) that training images are resized to ahead of the crop; None: 286/256 of
            the size.
        channels: of domain A and of B.
        direction: "AtoB", or "BtoA" to learn the other way.
        reference: which real target images `test_targets` gives without pairs: "train+test", as
            published FIDs have it, or "test".
        workers: default number of loader processes; None: as `train_loader` says.

    Attributes:
        name: of the data set.
        paired: whether each source image has its target.
        direction: "AtoB" or "BtoA".
        channels: of a source image, 3 (RGB) or 1 (grey).
        target_channels: of a target image.
        size: (H, W) of training crops and of held-out images.
        load_size: (H, W) of training images ahead of the crop.
        shape: of a source image: `(C, H, W)`.
        mean: of pixels scaled to 0..1, per channel: 0.5, so that the networks see -1..1.
        std: likewise.
        skipped: names of the images left out.
        key: what a sample is called.

    Raises:
        UserError: a size, direction or reference that there can't be, or an empty set.
    """

    key = "image"

    def __init__(
        self,
        *,
        name: str,
        train: Sequence[ImageSet | Split],
        test: Sequence[ImageSet | Split],
        size: tuple[int, int],
        load_size: tuple[int, int] | None = None,
        channels: tuple[int, int] = (3, 3),
        direction: str = "AtoB",
        reference: str = "train+test",
        workers: int | None = None,
    ) -> None:
        if len(train) != len(test) or len(train) not in (1, 2):
            raise UserError(
                f"{len(train)} sets to train on and {len(test)} held out: expected one of pairs, "
                "or two, of domain A and of B, on both sides"
            )
        for given, value, known in (
            ("direction", direction, DIRECTIONS),
            ("reference", reference, REFERENCES),
        ):
            if value not in known:
                raise unknown_name(given, value, known)
        check_size(size)
        load_size = load_size or default_load_size(size)
        check_load_size(size, load_size)
        self.name = name
        self.paired = len(train) == 1
        self.direction = direction
        self.reference = reference
        self.size, self.load_size = size, load_size
        forth = direction == "AtoB"
        self.channels, self.target_channels = channels if forth else channels[::-1]
        self.shape = (self.channels, *size)
        self._source_facts, self._target_facts = (
            Preprocessing(
                channels=count,
                size=size,
                mean=(0.5,) * count,
                std=(0.5,) * count,
                interpolation="bicubic",
            )
            for count in (self.channels, self.target_channels)
        )
        self.mean, self.std = self._source_facts.mean, self._source_facts.std
        self._workers = workers
        domain_a, domain_b = slice(0, channels[0]), slice(channels[0], None)
        self._planes: tuple[slice, slice] = (domain_a, domain_b) if forth else (domain_b, domain_a)
        counts = (sum(channels),) if self.paired else (self.channels, self.target_channels)
        order = 1 if self.paired or forth else -1
        self._train = _parts("train", train[::order], counts, load_size)
        self._test = _parts("test", test[::order], counts, size)
        self.skipped: list[str] = [
            name for part in (*self._train, *self._test) for name in part.split.skipped
        ]

    @property
    def described(self) -> str:
        """What the network is given, for messages: `an image of 3x256x256`."""
        return f"an image of {'x'.join(str(length) for length in self.shape)}"

    @property
    def train_size(self) -> int:
        """How many samples make an epoch: pairs, or images of the larger domain."""
        return max(part.split.size for part in self._train)

    @property
    def test_size(self) -> int:
        """How many source images are held out."""
        return self._test[0].split.size

    @property
    def reference_size(self) -> int:
        """How many images `test_targets` gives."""
        return sum(part.split.size for part in self._references())

    def train_loader(
        self,
        *,
        batch_size: int,
        seed: int,
        augment: str = "auto",
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
    ) -> TranslationLoader:
        """Return shuffled, augmented batches: `source`, `target` and `id`.

        Without pairs the target is drawn from the whole domain, whatever the source is. Call
        `loader.sampler.set_epoch(epoch)` ahead of each epoch.

        Args:
            batch_size: images per batch and rank; the last batch may be smaller.
            seed: with the epoch and the id, it decides everything random.
            augment: a name of `translation_augmentations()`.
            rank: which of the processes this is.
            world_size: how many there are; each gets the same number of images.
            workers: loader processes; None: 0 where the images are kept in memory (all of them
                together in 1 GiB), else up to 4.

        Raises:
            UserError: an argument is out of range or unknown; while iterating, an unreadable image.
        """
        if augment not in translation_augmentations():
            raise unknown_name("augmentation", augment, translation_augmentations())
        whole("seed", seed)
        parts, crops = self._train, None
        if augment == "none":
            parts = [_at_size(part, self.size, part.pixels.kept) for part in parts]
        else:
            crops = Crops(self.size, seed)
        return load_translation(
            PairBatches(parts[0], *self._planes, crops)
            if self.paired
            else UnpairedBatches(parts[0], parts[1], crops, seed),
            ids=parts[0].split.ids if self.paired else None,
            batch_size=at_least("batch_size", batch_size, 1),
            seed=seed,
            shuffle=True,
            rank=rank,
            world_size=world_size,
            workers=self._workers_or(workers),
        )

    def test_loader(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int | None = None
    ) -> TranslationLoader:
        """Return the held-out images in order: `source`, `target` where there are pairs, and `id`.

        Raises:
            UserError: an argument is out of range; while iterating, an unreadable image.
        """
        part = self._test[0]
        return load_translation(
            PairBatches(part, *self._planes, None) if self.paired else SourceBatches(part),
            ids=part.split.ids,
            batch_size=at_least("batch_size", batch_size, 1),
            seed=0,
            shuffle=False,
            rank=rank,
            world_size=world_size,
            workers=self._workers_or(workers),
        )

    def test_targets(self, batch_size: int) -> Iterator[Tensor]:
        """Yield real images of the target domain, to compare the generated ones with.

        They are the targets of the held-out pairs; without pairs, the domain's training and
        held-out images or, by `reference`, its held-out ones alone.

        Args:
            batch_size: images in a batch.

        Returns:
            uint8 `(B, C, H, W)`, batch after batch.

        Raises:
            UserError: the batch size is out of range; while iterating, an unreadable image.
        """
        at_least("batch_size", batch_size, 1)
        return self._targets(batch_size)

    def _targets(self, batch_size: int) -> Iterator[Tensor]:
        planes = self._planes[1] if self.paired else slice(None)
        for part in self._references():
            ids = part.split.ids.numpy()
            for first in range(0, len(ids), batch_size):
                with part.split.explaining():
                    images = part.pixels.batch(ids[first : first + batch_size])
                yield torch.from_numpy(np.ascontiguousarray(images[:, planes]))

    def _references(self) -> list[Part]:
        held_out = self._test[-1]
        if self.paired or self.reference == "test":
            return [held_out]
        return [_at_size(self._train[1], self.size, keep=False), held_out]

    def holding_out(self, count: int) -> tuple[TranslationData, TranslationData]:
        """Hold further images out of training, to choose among networks by.

        Args:
            count: the last so many training pairs, or source images.

        Returns:
            The data without them, and one whose held-out images they are.

        Raises:
            UserError: nothing would be left to train on.
        """
        source, *rest = self._train
        ids = source.split.ids
        if not 0 < count < len(ids):
            raise UserError(
                f"{count} of {len(ids)} training images to choose by: expected at least 1, and "
                "some that are left to train on"
            )
        training, choosing = copy.copy(self), copy.copy(self)
        training._train = [_with_ids(source, ids[:-count]), *rest]
        held_out = _with_ids(_at_size(source, self.size, source.pixels.kept), ids[-count:])
        choosing._test = [held_out, *self._test[1:]]
        return training, choosing

    def train_name_of(self, index: int) -> str:
        """Return what a person would look for: the file of a training pair or source image."""
        return self._train[0].split.images.name(index)

    def name_of(self, index: int) -> str:
        """Return the file of a held-out pair or source image."""
        return self._test[0].split.images.name(index)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 `(B, C, H, W)`, source or target, into float32 in -1..1, on its device.

        Raises:
            UserError: other than uint8, or another number of channels.
        """
        is_target = images.ndim >= 3 and images.shape[-3] == self.target_channels
        return (self._target_facts if is_target else self._source_facts).normalize(images)

    def preprocessing(self) -> dict[str, object]:
        """Return what turns a file into the network's input, JSON-able, for the artifact."""
        return self._source_facts.to_dict()

    def _workers_or(self, workers: int | None) -> int | None:
        workers = self._workers if workers is None else workers
        return None if workers is None else at_least("workers", workers, 0)


def default_load_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return what training images are resized to, as both papers have it: 286 for crops of 256.

    >>> default_load_size((256, 96))
    (286, 107)
    """
    height, width = (round(side * 286 / 256) for side in size)
    return height, width


def check_size(size: tuple[int, int]) -> None:
    """Refuse a size that generators don't take.

    Raises:
        UserError: a side is no multiple of 4, or below 16.
    """
    if any(side % _MULTIPLE or side < _LEAST for side in size):
        raise UserError(
            f"data.size is {list(size)}: expected multiples of {_MULTIPLE}, at least {_LEAST}; "
            "correct it in the recipe"
        )


def check_load_size(size: tuple[int, int], load_size: tuple[int, int]) -> None:
    """Refuse a load_size that a crop can't be cut out of.

    Raises:
        UserError: a side is below that of the size.
    """
    if load_size[0] < size[0] or load_size[1] < size[1]:
        raise UserError(
            f"data.load_size is {list(load_size)}: expected at least the size, {list(size)}, "
            "which is cut out of it; raise it, or lower data.size"
        )


def _parts(
    title: str, sets: Sequence[ImageSet | Split], channels: Sequence[int], size: tuple[int, int]
) -> list[Part]:
    """Bring a split's sets to a size, in memory if all of them together fit."""
    splits = [part if isinstance(part, Split) else Split(title, part) for part in sets]
    for split in splits:
        if split.size == 0:
            raise UserError(f"{title} is empty: expected at least one image; check the data set")
    total = sum(
        len(split.images) * count * math.prod(size)
        for split, count in zip(splits, channels, strict=True)
    )
    return [
        Part(split, ResizedImages(split.images, count, size, keep=total <= MEMORY_LIMIT))
        for split, count in zip(splits, channels, strict=True)
    ]


def _with_ids(part: Part, ids: Tensor) -> Part:
    split = copy.copy(part.split)
    split.ids = ids
    return Part(split, part.pixels)


def _at_size(part: Part, size: tuple[int, int], keep: bool) -> Part:
    pixels = part.pixels
    if pixels.size == size:
        return part
    return Part(part.split, ResizedImages(pixels.images, pixels.channels, size, keep))
