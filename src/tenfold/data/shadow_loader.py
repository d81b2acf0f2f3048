"""Batches of photos with shadows: image and target uint8 `(B, 3, H, W)`, mask uint8 `(B, 1, H, W)`.

What is random is a hash of (seed, epoch, id), see `tenfold.data.randomness`: the same with any
number of workers, and after a resume.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tenfold.data.decode import BadImage
from tenfold.data.randomness import mix
from tenfold.data.sampler import EpochSampler
from tenfold.data.shadow_crops import Crops, View, crop, whole
from tenfold.data.shadow_light import relight, rendered
from tenfold.data.shadow_set import ShadowSet, Triplet
from tenfold.data.split import SampleSplit, cpu_count
from tenfold.errors import UserError

__all__ = ["Part", "ShadowBatches", "ShadowLoader", "TrainingBatches", "WholeBatches", "load"]

Batch = dict[str, Tensor]
Pixels = NDArray[np.uint8]
Size = tuple[int, int]

# What a draw is for, beside those of the crops.
_SHADOW, _LIGHT = 16, 17


class Part:
    """A split and its triplets, each read once if they are kept.

    Workers use what their parent had and keep nothing themselves: each would hold its own copy.

    Args:
        split: which triplets are in use.
        triplets: the set.
        keep: whether triplets stay in memory.
    """

    def __init__(self, split: SampleSplit, triplets: ShadowSet, keep: bool) -> None:
        self.split = split
        self.triplets = triplets
        self.kept = keep or triplets.in_memory
        self._store: dict[int, Triplet] | None = {} if keep and not triplets.in_memory else None

    def __getstate__(self) -> dict[str, object]:
        """Leave the kept triplets out where a worker is started by pickling."""
        return {**self.__dict__, "_store": None}

    def with_ids(self, ids: Tensor) -> Part:
        """Return one that uses these ids, and the same memory."""
        other = copy.copy(self)
        other._store = self._store
        other.split = copy.copy(self.split)
        other.split.ids = ids
        return other

    def triplet(self, index: int, training: bool) -> Triplet:
        """Return one triplet, or what training augments.

        Raises:
            BadImage: it can't be read.
        """
        read = self.triplets.training if training else self.triplets.triplet
        if self._store is None:
            return read(index)
        found = self._store.get(index)
        if found is None:
            found = read(index)
            if get_worker_info() is None:
                self._store[index] = found
        return found


@dataclass(frozen=True)
class _Failure:
    """A bad image's way out of a worker: DataLoader would wrap an exception in a traceback."""

    name: str
    reason: str


class ShadowBatches(Dataset[Any]):
    """Makes a batch from the keys `epoch * count + id` of `EpochSampler`.

    Args:
        part: the triplets.
        mask_above: share of white from which on a mask's level is shadow.
        targets: whether batches have targets.
    """

    def __init__(self, part: Part, mask_above: float, targets: bool) -> None:
        self.part = part
        self.mask_above = mask_above
        self.targets = targets and part.triplets.has_targets

    def __len__(self) -> int:
        return len(self.part.triplets)

    def __getitem__(self, key: int) -> Batch:
        return {name: values[0] for name, values in self._made([key]).items()}

    def __getitems__(self, keys: list[int]) -> Batch | _Failure:
        """Make one batch; DataLoader prefers this to item after item."""
        try:
            return self._made(keys)
        except BadImage as error:
            return _Failure(error.name, error.reason)

    def _made(self, keys: list[int]) -> Batch:
        epochs, ids = np.divmod(np.array(keys, dtype=np.int64), len(self))
        made = self.batch(epochs, ids)
        if not self.targets:
            made.pop("target", None)
        made["id"] = ids
        return {name: torch.from_numpy(values) for name, values in made.items()}

    def batch(self, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return what is in a batch, but for its ids."""
        raise NotImplementedError

    def stacked(self, triplets: list[Triplet]) -> dict[str, NDArray[Any]]:
        """Return triplets of one size as arrays `(B, C, H, W)`, masks of 0 and 1."""
        sizes = {triplet.image.shape for triplet in triplets}
        if len(sizes) > 1:
            raise UserError(
                f"photos of {len(sizes)} sizes in one batch: expected one photo a batch at native "
                "size; evaluate with batch_size 1, or give data.test_size"
            )
        parts = {
            "image": _planes([one.image for one in triplets]),
            "mask": self._masks([one.levels for one in triplets]),
            "target": _planes([one.target for one in triplets if one.target is not None]),
            "region": self._masks([one.region for one in triplets if one.region is not None]),
        }
        return {name: part for name, part in parts.items() if len(part) == len(triplets)}

    def _masks(self, levels: list[Pixels]) -> Pixels:
        if not levels:
            return np.empty(0, np.uint8)
        return (np.stack(levels)[:, None] > 255 * self.mask_above).astype(np.uint8)


class WholeBatches(ShadowBatches):
    """Photos as a whole, at one size.

    Args:
        part: the triplets.
        mask_above: share of white from which on a mask's level is shadow.
        targets: whether batches have targets.
        size: (H, W); None: their own.
    """

    def __init__(self, part: Part, mask_above: float, targets: bool, size: Size | None) -> None:
        super().__init__(part, mask_above, targets)
        self.size = size

    def batch(  # noqa: D102
        self, epochs: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        return self.stacked([whole(self.part.triplet(i, False), self.size) for i in ids.tolist()])


class TrainingBatches(ShadowBatches):
    """Crops of photos, augmented.

    Args:
        part: the triplets.
        mask_above: share of white from which on a mask's level is shadow.
        targets: whether batches have targets.
        crops: how they are drawn.
        augment: "shadows", "relight", or "none" for crops out of the middle.
    """

    def __init__(
        self, part: Part, mask_above: float, targets: bool, crops: Crops, augment: str
    ) -> None:
        super().__init__(part, mask_above, targets)
        self.crops = crops
        self.augment = augment

    def batch(  # noqa: D102
        self, epochs: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        fixed = self.augment == "none"
        views = [View()] * len(ids) if fixed else self.crops.draw(epochs, ids)
        made = self.stacked(
            [
                crop(self.part.triplet(i, True), view, self.crops.size)
                for i, view in zip(ids.tolist(), views, strict=True)
            ]
        )
        seed = self.crops.seed
        if self.part.triplets.renders:
            numbers = mix(seed, 0 * epochs if fixed else epochs, ids, _SHADOW).view(np.int64)
            made["target"] = made["image"]
            made["image"], made["mask"] = rendered(made["image"], numbers)
        if self.augment == "relight":
            target = made.get("target") if self.targets else None
            made["image"], made["mask"], target = relight(
                made["image"], made["mask"], target, mix(seed, epochs, ids, _LIGHT)
            )
            if target is not None:
                made["target"] = target
        made.pop("region", None)
        return made


class ShadowLoader(DataLoader[Any]):
    """A DataLoader in whose batches a bad image, met by any worker, is an error of one line."""

    dataset: ShadowBatches
    sampler: EpochSampler

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, _Failure):
                break
            yield batch
        else:
            return
        # Let the workers go now, see `tenfold.data.loader.ImageLoader`.
        self._iterator = None
        del batches
        raise self.dataset.part.split.explain(BadImage(batch.name, batch.reason))


def load(
    batches: ShadowBatches,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    rank: int,
    world_size: int,
    workers: int | None,
) -> ShadowLoader:
    """Make a loader.

    Args:
        batches: makes them.
        batch_size: photos per batch and rank; the last batch may be smaller.
        seed: of the order.
        shuffle: training order, or ascending ids.
        rank: which of the processes this is.
        world_size: how many there are.
        workers: loader processes; None: 0 where all photos are kept in memory, else up to 4.
    """
    if workers is None:
        workers = 0 if batches.part.kept else min(4, cpu_count())
    ids = batches.part.split.ids
    return ShadowLoader(
        batches,
        batch_size=batch_size,
        sampler=EpochSampler(len(batches), seed, shuffle, rank, world_size, ids),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_it_is,
        # DataLoader draws a seed at each start; from here, not from the run's global generator.
        generator=torch.Generator(),
    )


def _planes(photos: list[Pixels]) -> Pixels:
    if not photos:
        return np.empty(0, np.uint8)
    return np.ascontiguousarray(np.stack(photos).transpose(0, 3, 1, 2))


def _as_it_is(batch: Any) -> Any:
    return batch
