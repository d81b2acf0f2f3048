"""Batches for image translation: source and target uint8 `(B, C, H, W)`, id int64 `(B,)`.

What is random is drawn as in `tenfold.data.transforms`: a hash of (seed, epoch, place), where the
place of a pair is its id, and that of an unpaired source image its position in the longer domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tenfold.data.base import ArraySet, ImageSet
from tenfold.data.decode import BadImage
from tenfold.data.randomness import below, mix
from tenfold.data.sampler import EpochSampler
from tenfold.data.split import Split, cpu_count
from tenfold.errors import UserError

__all__ = [
    "Crops",
    "PairBatches",
    "Part",
    "ResizedImages",
    "SourceBatches",
    "TranslationLoader",
    "UnpairedBatches",
    "load_translation",
]

Batch = dict[str, Tensor]
Pixels = NDArray[np.uint8]

# What a draw is for: the hash's last word. A pair's crop and flip are drawn once, for both images.
_SOURCE_VIEW, _TARGET_VIEW, _TARGET = 0, 3, 6


def resized(image: Tensor, size: tuple[int, int]) -> Pixels:
    """Stretch uint8 `(C, h, w)` to `(C, H, W)`, bicubic, averaging where it shrinks.

    By Pillow, plane by plane: the papers' own data are resized by it, and it takes one core, not
    those that are busy with training.
    """
    planes: Pixels = image.numpy()
    if planes.shape[1:] == size:
        return planes
    from PIL import Image

    height, width = size
    return np.stack(
        [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(plane)).resize(
                    (width, height), Image.Resampling.BICUBIC
                )
            )
            for plane in planes
        ]
    )


class ResizedImages:
    """The images of a set at one size, each decoded once if they are kept.

    They are filled as they are first used. Workers use what their parent had and keep nothing
    themselves: each would hold its own copy.

    Args:
        images: the set.
        channels: that its images have; 6 where a pair of RGB images is one image.
        size: (H, W).
        keep: whether decoded images stay in memory.
    """

    def __init__(self, images: ImageSet, channels: int, size: tuple[int, int], keep: bool) -> None:
        self.images = images
        self.channels = channels
        self.size = size
        self.kept = keep
        self._store: Pixels | None = None
        shape = (len(images), channels, *size)
        if isinstance(images, ArraySet) and tuple(images.images.shape) == shape:
            self.kept = True
            self._store, self._filled = images.images.numpy(), np.ones(len(images), np.bool_)
        elif keep:
            # The system hands out these pages one by one, as images are written to them.
            self._store, self._filled = np.empty(shape, np.uint8), np.zeros(len(images), np.bool_)

    def __getstate__(self) -> dict[str, object]:
        """Leave the kept images out where a worker is started by pickling."""
        return {**self.__dict__, "_store": None}

    def batch(self, ids: NDArray[np.int64]) -> Pixels:
        """Return `(B, C, H, W)`, a copy.

        Raises:
            BadImage: one can't be read.
        """
        store = self._store
        if store is None:
            return np.stack([self._one(i) for i in ids.tolist()])
        if get_worker_info() is not None:
            return np.stack([store[i] if self._filled[i] else self._one(i) for i in ids.tolist()])
        for index in ids[~self._filled[ids]].tolist():
            store[index] = self._one(index)
            self._filled[index] = True
        return store[ids]

    def _one(self, index: int) -> Pixels:
        image = self.images.image(index)
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != self.channels:
            raise UserError(
                f"{self.images.name(index)} is {image.dtype} of shape {tuple(image.shape)}: "
                f"expected torch.uint8 ({self.channels}, H, W); let the set's image() return that"
            )
        return resized(image, self.size)


@dataclass(frozen=True)
class Part:
    """A split and its images at one size."""

    split: Split
    pixels: ResizedImages


@dataclass(frozen=True)
class Crops:
    """Random crops and flips.

    Attributes:
        size: (H, W) of a crop.
        seed: the run's seed.
    """

    size: tuple[int, int]
    seed: int

    def __call__(
        self, images: Pixels, epochs: NDArray[np.int64], places: NDArray[np.int64], view: int
    ) -> Pixels:
        """Crop each image `(B, C, h, w)` somewhere and mirror half of them: `(B, C, H, W)`.

        Args:
            images: may be changed.
            epochs: `(B,)`.
            places: `(B,)`.
            view: with the seed and each image's epoch and place it decides what is drawn.
        """
        spare = [have - want for have, want in zip(images.shape[2:], self.size, strict=True)]
        if any(spare):
            top, left = (
                below(room + 1, mix(self.seed, epochs, places, view + axis))
                for axis, room in enumerate(spare)
            )
            windows = np.lib.stride_tricks.sliding_window_view(images, self.size, axis=(2, 3))
            images = np.ascontiguousarray(windows[np.arange(len(images)), :, top, left])
        mirrored = below(2, mix(self.seed, epochs, places, view + 2)) == 1
        images[mirrored] = images[mirrored][..., ::-1]
        return images


@dataclass(frozen=True)
class _Failure:
    """A bad image's way out of a worker: DataLoader would wrap an exception in a traceback."""

    part: int
    name: str
    reason: str


class _Batches(Dataset[Any]):
    """Makes a batch from the keys `epoch * count + place` of `EpochSampler`."""

    def __init__(self, parts: Sequence[Part], count: int, crops: Crops | None) -> None:
        self.parts = parts
        self.count = count
        self.crops = crops
        self._reading = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int) -> Batch:
        return {name: values[0] for name, values in self._made([key]).items()}

    def __getitems__(self, keys: list[int]) -> Batch | _Failure:
        """Make one batch; DataLoader prefers this to item after item."""
        try:
            return self._made(keys)
        except BadImage as error:
            return _Failure(self._reading, error.name, error.reason)

    def _made(self, keys: list[int]) -> Batch:
        epochs, places = np.divmod(np.array(keys, dtype=np.int64), self.count)
        return {name: torch.from_numpy(v) for name, v in self.batch(epochs, places).items()}

    def batch(
        self, epochs: NDArray[np.int64], places: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return what is in a batch."""
        raise NotImplementedError

    def images(
        self, part: int, ids: NDArray[np.int64], epochs: NDArray[np.int64],
        places: NDArray[np.int64], view: int,
    ) -> Pixels:  # fmt: skip
        """Return a part's images by id, cropped."""
        self._reading = part
        found = self.parts[part].pixels.batch(ids)
        return found if self.crops is None else self.crops(found, epochs, places, view)


class PairBatches(_Batches):
    """Source and target of pairs, each stored as one image, so that they are cropped as one.

    Args:
        part: the pairs.
        source: the channels of the source.
        target: the channels of the target.
        crops: of the images; None: they stay whole.
    """

    def __init__(self, part: Part, source: slice, target: slice, crops: Crops | None) -> None:
        super().__init__((part,), len(part.split.images), crops)
        self.source = source
        self.target = target

    def batch(  # noqa: D102
        self, epochs: NDArray[np.int64], places: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        both = self.images(0, places, epochs, places, _SOURCE_VIEW)
        source, target = (np.ascontiguousarray(both[:, s]) for s in (self.source, self.target))
        return {"source": source, "target": target, "id": places}


class SourceBatches(_Batches):
    """Source images alone, whole."""

    def __init__(self, part: Part) -> None:
        super().__init__((part,), len(part.split.images), None)

    def batch(  # noqa: D102
        self, epochs: NDArray[np.int64], places: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        return {"source": self.images(0, places, epochs, places, _SOURCE_VIEW), "id": places}


class UnpairedBatches(_Batches):
    """Source images in turn, each beside a target image drawn from the whole domain.

    An epoch has as many as the larger domain; a smaller source domain is gone through repeatedly,
    each time with other crops.
    """

    def __init__(self, source: Part, target: Part, crops: Crops | None, seed: int) -> None:
        self.source_ids, self.target_ids = (part.split.ids.numpy() for part in (source, target))
        super().__init__((source, target), max(len(self.source_ids), len(self.target_ids)), crops)
        self.seed = seed

    def batch(  # noqa: D102
        self, epochs: NDArray[np.int64], places: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        ids = self.source_ids[places % len(self.source_ids)]
        drawn = below(len(self.target_ids), mix(self.seed, epochs, places, _TARGET))
        return {
            "source": self.images(0, ids, epochs, places, _SOURCE_VIEW),
            "target": self.images(1, self.target_ids[drawn], epochs, places, _TARGET_VIEW),
            "id": ids,
        }


class TranslationLoader(DataLoader[Any]):
    """A DataLoader in whose batches a bad image, met by any worker, is an error of one line."""

    dataset: _Batches
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
        split = self.dataset.parts[batch.part].split
        raise split.explain(BadImage(batch.name, batch.reason))


def load_translation(
    batches: _Batches,
    *,
    ids: Tensor | None,
    batch_size: int,
    seed: int,
    shuffle: bool,
    rank: int,
    world_size: int,
    workers: int | None,
) -> TranslationLoader:
    """Make a loader.

    Args:
        batches: makes them.
        ids: the places in use; None: all.
        batch_size: images per batch and rank; the last batch may be smaller.
        seed: of the order.
        shuffle: training order, or ascending places.
        rank: which of the processes this is.
        world_size: how many there are.
        workers: loader processes; None: 0 where all images are kept in memory, else up to 4.
    """
    if workers is None:
        kept = all(part.pixels.kept for part in batches.parts)
        workers = 0 if kept else min(4, cpu_count())
    return TranslationLoader(
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


def _as_it_is(batch: Any) -> Any:
    return batch
