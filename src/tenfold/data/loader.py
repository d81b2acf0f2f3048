"""From a split to batches: dicts of image uint8 `(B, C, H, W)`, label and id int64 `(B,)`.

Clips come as clip uint8 `(B, C, T, H, W)` in place of image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tenfold.data.base import ArraySet, ImageSet
from tenfold.data.decode import BadImage
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.sampler import EpochSampler
from tenfold.data.split import SampleSplit, Split, cpu_count
from tenfold.data.transforms import Augmentation, BatchTransform

__all__ = [
    "Batch",
    "FittedImages",
    "FittedSamples",
    "ImageLoader",
    "Mixing",
    "Source",
    "load_batches",
    "make_loader",
]

Batch = dict[str, Tensor]

MEMORY_LIMIT = 1 << 30  # bytes of decoded images that a split may keep


class FittedSamples(ABC):
    """The samples of a set at the network's size, each decoded once if all of them fit in 1 GiB.

    They are filled as they are first used. Workers use what their parent had and keep nothing
    themselves: each would hold its own copy.

    Args:
        count: how many there are.
        facts: the network's input.
        keep: whether decoded samples may stay in memory.
    """

    def __init__(self, count: int, facts: Preprocessing, keep: bool) -> None:
        self.facts = facts
        shape = (count, *facts.shape)
        self.kept = keep and math.prod(shape) <= MEMORY_LIMIT
        self._store: Tensor | None = None
        if self.kept:
            # The system hands out these pages one by one, as samples are written to them.
            self._store = torch.empty(shape, dtype=torch.uint8)
            self._filled = torch.zeros(count, dtype=torch.bool)

    def __getstate__(self) -> dict[str, object]:
        """Leave the kept samples out where a worker is started by pickling."""
        return {**self.__dict__, "_store": None}

    def batch(self, ids: Tensor) -> Tensor:
        """Return uint8 `(B, ...)`, a copy."""
        if self._store is None:
            return torch.stack([self.one(i) for i in ids.tolist()])
        missing = ids[~self._filled[ids]].tolist()
        if missing and get_worker_info() is not None:
            known = self._filled[ids].tolist()
            pairs = zip(ids.tolist(), known, strict=True)
            return torch.stack([self._store[i] if have else self.one(i) for i, have in pairs])
        for index in missing:
            self._store[index] = self.one(index)
            self._filled[index] = True
        # By NumPy, on one core: torch would wait for all of them, which are busy with training.
        return torch.from_numpy(self._store.numpy()[ids.numpy()])

    def one(self, index: int) -> Tensor:
        """Decode one sample, resized and cropped."""
        return self.facts.fit(self.stored(index))

    @abstractmethod
    def stored(self, index: int) -> Tensor:
        """Return one sample as it is stored."""


class FittedImages(FittedSamples):
    """The images of a set at the network's size, kept where the set asks for it."""

    def __init__(self, images: ImageSet, facts: Preprocessing) -> None:
        self.images = images
        if isinstance(images, ArraySet) and tuple(images.images.shape) == (
            len(images),
            *facts.shape,
        ):
            super().__init__(len(images), facts, keep=False)
            self.kept = True
            self._store, self._filled = images.images, torch.ones(len(images), dtype=torch.bool)
        else:
            super().__init__(len(images), facts, images.keep_decoded)

    def stored(self, index: int) -> Tensor:
        """Return one image as it is stored: uint8 `(C, h, w)`."""
        return self.images.image(index)


class Mixing(Protocol):
    """What changes training images while they are loaded; loader processes get it too."""

    def replaced(self, ids: Tensor, images: Tensor) -> Tensor:
        """Return what stands in place of fitted images `(B, C, H, W)`, ahead of augmentation."""
        ...

    def blended(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions in a batch that get another image's view, whose, and how much of it."""
        ...

    def blend(self, images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        """Return augmented images `(L, C, H, W)` with their partners' views mixed in."""
        ...


@dataclass(frozen=True)
class _Failure:
    """A bad sample's way out of a worker: DataLoader would wrap an exception in a traceback."""

    name: str
    reason: str


class Source(Protocol):
    """Makes the inputs of a batch."""

    def __call__(self, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> Batch:
        """Return uint8 `(B, ...)` by name; only the seed and each sample's epoch and id decide."""


class _ImageSource:
    """Images of a split, augmented, and changed by a method if it wants to."""

    def __init__(
        self,
        split: Split,
        fitted: FittedImages,
        augmentation: Augmentation | None,
        seed: int,
        mixing: Mixing | None = None,
        views: bool = False,
    ) -> None:
        self.split = split
        self.fitted = fitted
        self.mixing = mixing
        self.views = views
        self.transform = BatchTransform(
            augmentation or Augmentation("none"), fitted.facts.size, seed
        )

    def __call__(self, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> Batch:
        chosen = torch.from_numpy(ids)
        images = self._images(epochs, chosen)
        if self.mixing is not None:
            at, partners, shares = self.mixing.blended(chosen)
            if len(at):
                others = self._images(epochs[at.numpy()], partners)
                images[at] = self.mixing.blend(images[at], others, shares)
        batch = {"image": images}
        if self.views:
            batch["view"] = torch.from_numpy(self.transform.views(epochs, ids))
        return batch

    def _images(self, epochs: NDArray[np.int64], ids: Tensor) -> Tensor:
        def fitted() -> Tensor:
            images = self.fitted.batch(ids)
            return images if self.mixing is None else self.mixing.replaced(ids, images)

        return self.transform(
            epochs,
            ids.numpy(),
            stored=lambda number: self.split.images.image(int(ids[number])),
            fitted=fitted,
        )


class _Batches(Dataset[Any]):
    """Make a batch from the keys `epoch * n + id` of `EpochSampler`."""

    def __init__(self, split: SampleSplit, source: Source) -> None:
        self.split = split
        self.source = source
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.split.samples)

    def __getitem__(self, key: int) -> Batch:
        return {name: values[0] for name, values in self._batch([key]).items()}

    def __getitems__(self, keys: list[int]) -> Batch | _Failure:
        """Make one batch; DataLoader prefers this to item after item."""
        try:
            return self._batch(keys)
        except BadImage as error:
            return _Failure(error.name, error.reason)

    def _batch(self, keys: list[int]) -> Batch:
        epochs, ids = np.divmod(np.array(keys, dtype=np.int64), len(self))
        chosen = torch.from_numpy(ids)
        return {**self.source(epochs, ids), "label": self.labels[chosen], "id": chosen}


class ImageLoader(DataLoader[Any]):
    """A DataLoader in whose batches a bad sample, met by any worker, is an error of one line."""

    dataset: _Batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, _Failure):
                break
            yield batch
        else:
            return
        # Let the workers go now: held by the error's traceback until some garbage collection,
        # their queues may be gone before them, and each then keeps the process waiting for 5 s.
        self._iterator = None
        del batches
        raise self.dataset.split.explain(BadImage(batch.name, batch.reason))


def make_loader(
    split: Split,
    fitted: FittedImages,
    augmentation: Augmentation | None,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    workers: int | None,
    mixing: Mixing | None = None,
    views: bool = False,
) -> ImageLoader:
    """Make the loader of one split; without an augmentation it is one for evaluation.

    `workers` None means: 0 where decoded images are kept and whole batches are augmented at once
    (under 1 ms per 128, less than handing a batch over costs), else up to 4.
    """
    if workers is None:
        slow = augmentation is not None and (augmentation.resized_crop or augmentation.policy)
        workers = 0 if fitted.kept and not slow else min(4, cpu_count())
    return load_batches(
        split,
        _ImageSource(split, fitted, augmentation, seed, mixing, views),
        batch_size=batch_size,
        seed=seed,
        shuffle=augmentation is not None,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )


def load_batches(
    split: SampleSplit,
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    rank: int,
    world_size: int,
    workers: int,
) -> ImageLoader:
    """Make the loader of one split from what makes the inputs of a batch."""
    if workers:
        # Seconds, which forked workers then don't each spend again.
        import torchvision.transforms.v2  # noqa: F401
    return ImageLoader(
        _Batches(split, source),
        batch_size=batch_size,
        sampler=EpochSampler(len(split.samples), seed, shuffle, rank, world_size, split.ids),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_it_is,
        # DataLoader draws a seed at each start; from here, not from the run's global generator.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch
