"""Shadows beside lit regions of the same photo, in the shape of other photos' shadows (HQSS).

A lit region is another photo's mask m' without what is in shadow here: m_N = m' minus (m' and m_S).
Its area should be that of the shadow, nearly: a ratio in [0.8, 1.2]. Of all masks that give such a
ratio one is taken, each as likely as the other. Where none does, masks are drawn until the ratio is
at least 0.05, at most 100 of them, and the best of them is kept.

The released code looks ratios up in a table of whole photos; here they are those of the crop that
is trained on, so the bounds hold there. The mask of another photo comes whole, stretched to the
crop. Photos without shadow aren't read. Source: "Shadow Removal by High-Quality Shadow Synthesis"
(arXiv 2212.04108).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tenfold.data.randomness import mix
from tenfold.errors import UserError

if TYPE_CHECKING:
    from tenfold.data.shadows import ShadowData

__all__ = ["LEAST_PIXELS", "RATIOS", "LitRegion", "MaskShapes", "RegionLoader", "RegionPairs"]

RATIOS = (0.8, 1.2)  # of a lit region's area to the shadow's
LEAST_RATIO = 0.05  # where no mask gives such a ratio
DRAWS = 100
LEAST_PIXELS = 10  # of each region, else there is nothing to learn from
FULL = 0.95  # a mask of more isn't a shadow beside lit ground
CHUNK = 32  # masks that are compared at once

# What a draw is for: the hash's last word but one.
_SHAPE = 23

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LitRegion:
    """Where a shadow can be painted.

    Attributes:
        mask: uint8 `(H, W)` of zeros and ones.
        ratio: of its area to that of the shadow.
        shape: number of the mask that it has its shape from.
    """

    mask: Tensor
    ratio: float
    shape: int


class MaskShapes:
    """The masks of photos as shapes for lit regions, all at one size.

    They are kept one bit a pixel: a thousand of 400 x 400 take 20 MB.

    Args:
        masks: uint8 `(H, W)` or `(1, H, W)` of zeros and ones, of any sizes.
        size: (H, W) that they are stretched to.

    Raises:
        UserError: fewer than two masks, or none that marks a shadow.
    """

    def __init__(self, masks: Sequence[Tensor], size: tuple[int, int]) -> None:
        if len(masks) < 2:
            raise UserError(
                f"{len(masks)} photo with its mask: expected at least 2, as a lit region has the "
                "shape of another photo's shadow"
            )
        self.size = size
        self._bits = np.stack([_packed(stretched(mask, size)) for mask in masks])
        areas = _area(self._bits)
        self._usable = np.flatnonzero((areas >= LEAST_PIXELS) & (areas <= FULL * size[0] * size[1]))
        if len(self._usable) == 0:
            raise UserError(
                f"none of the {len(masks)} masks marks a shadow: expected white in the shadow, and "
                f"from {LEAST_PIXELS} pixels to {FULL:.0%} of the photo"
            )

    def __len__(self) -> int:
        return len(self._bits)

    def shape(self, number: int) -> Tensor:
        """Return a mask, uint8 `(H, W)` of zeros and ones."""
        return _unpacked(self._bits[number], self.size)

    def lit_region(self, shadow: Tensor, *words: int) -> LitRegion | None:
        """Choose a lit region for a shadow, or None: where a region would be under 10 pixels.

        Args:
            shadow: uint8 `(H, W)` of zeros and ones, of the shapes' size.
            words: what the choice depends on, such as seed, epoch and id.

        Raises:
            UserError: a shadow of another size.
        """
        if tuple(shadow.shape) != self.size:
            raise UserError(
                f"the shadow's mask is {tuple(shadow.shape)}: expected the shapes' size {self.size}"
            )
        own = _packed(shadow)
        area = int(_area(own[None])[0])
        if area < LEAST_PIXELS:
            return None
        order = self._usable[np.argsort(mix(*words, _SHAPE, self._usable), kind="stable")]
        drawn = list[float]()  # the ratios of the first draws
        for first in range(0, len(order), CHUNK):
            lit = self._bits[order[first : first + CHUNK]] & ~own
            ratios = _area(lit) / area
            # The first of a shuffled row that fits is any of those that fit.
            fitting = np.flatnonzero((ratios >= RATIOS[0]) & (ratios <= RATIOS[1]))
            if len(fitting):
                return self._region(order[first + fitting[0]], own, float(ratios[fitting[0]]))
            drawn += ratios[: max(0, DRAWS - len(drawn))].tolist()
        enough = [at for at, ratio in enumerate(drawn) if ratio >= LEAST_RATIO]
        best = enough[0] if enough else int(np.argmax(drawn))
        if round(drawn[best] * area) < LEAST_PIXELS:
            return None
        return self._region(order[best], own, drawn[best])

    def fitted(self, shadow: Tensor, *words: int) -> Tensor | None:
        """Choose a lit region for a shadow of any size, or None; the ratio holds nearly.

        Args:
            shadow: uint8 `(H, W)` of zeros and ones.
            words: as for `lit_region`.

        Returns:
            uint8 `(H, W)` of zeros and ones.
        """
        size = (shadow.shape[0], shadow.shape[1])
        found = self.lit_region(stretched(shadow, self.size), *words)
        if found is None:
            return None
        lit = found.mask if size == self.size else stretched(self.shape(found.shape), size)
        lit = lit * (1 - shadow)
        return lit if int(lit.sum()) >= LEAST_PIXELS else None

    def _region(self, shape: np.int64, own: NDArray[np.uint8], ratio: float) -> LitRegion:
        return LitRegion(_unpacked(self._bits[shape] & ~own, self.size), ratio, int(shape))


class RegionPairs:
    """Photos with shadows as HQSS trains on them.

    Args:
        data: photos and masks; what they look like without shadow is left aside.

    Raises:
        UserError: fewer than two photos, or no mask that marks a shadow.

    Attributes:
        shapes: the masks of the training photos, at the size of crops.
    """

    def __init__(self, data: ShadowData) -> None:
        self.data = data
        self.shapes = MaskShapes(data.train_masks(), data.size)

    def train_loader(
        self, *, batch_size: int, seed: int, augment: str = "auto", **settings: Any
    ) -> RegionLoader:
        """Return batches of `image`, `mask`, `lit` and `id`; see `RegionLoader`.

        Args:
            batch_size: photos a step and process.
            seed: of the order, the augmentation and the regions.
            augment: as for `ShadowData.train_loader`.
            settings: further ones of it: rank, world_size and workers.
        """
        loader = self.data.train_loader(
            batch_size=batch_size, seed=seed, augment=augment, **settings
        )
        return RegionLoader(loader, self.shapes, seed, self.data.name)


class RegionLoader:
    """Adds lit regions to batches of photos and masks.

    Batches hold `image` uint8 `(B, 3, H, W)`, `mask` and `lit` uint8 `(B, 1, H, W)` of zeros and
    ones, and `id` int64 `(B,)`. A crop that shows under 10 pixels of a region has nothing to teach:
    another sample of the batch, or the batch before, stands in its place, so that an epoch has its
    number of steps. All is decided by seed, epoch and id.

    Args:
        loader: of photos and masks; it has a sampler with an epoch.
        shapes: for the lit regions.
        seed: of their choice.
        name: of the data, for errors.
    """

    def __init__(self, loader: Any, shapes: MaskShapes, seed: int, name: str) -> None:
        self.loader = loader
        self.shapes = shapes
        self.seed = seed
        self.name = name

    @property
    def sampler(self) -> Any:
        """The order of epochs; `set_epoch` goes ahead of each."""
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Raises:
            UserError: no photo of the epoch has both regions.
        """
        epoch, last, owed = int(self.sampler.epoch), None, 0
        for batch in self.loader:
            found = self.paired(batch, epoch)
            if found is None and last is None:
                owed += 1
                continue
            last = found or last
            assert last is not None
            for _ in range(1 + owed):
                yield dict(last)
            owed = 0
        if owed:
            raise UserError(
                f"{self.name}: no crop of epoch {epoch} has {LEAST_PIXELS} pixels of shadow and a "
                "lit region as well: expected masks that are white in the shadow; give larger crops"
            )

    def paired(self, batch: Batch, epoch: int) -> Batch | None:
        """Return a batch with lit regions; None: no photo has both regions.

        Args:
            batch: `image`, `mask` and `id`.
            epoch: from 0.
        """
        regions = [
            self.shapes.lit_region(mask[0], self.seed, epoch, number)
            for mask, number in zip(batch["mask"], batch["id"].tolist(), strict=True)
        ]
        usable = [place for place, region in enumerate(regions) if region is not None]
        if not usable:
            return None
        spare = iter(usable * len(regions))
        places = [p if region is not None else next(spare) for p, region in enumerate(regions)]
        lit = torch.stack([regions[place].mask for place in places])  # type: ignore[union-attr]
        taken = torch.tensor(places)
        return {
            "image": batch["image"][taken],
            "mask": batch["mask"][taken],
            "lit": lit[:, None],
            "id": batch["id"][taken],
        }


def stretched(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask `(H, W)` or `(1, H, W)` at another size, uint8 `(H', W')` of zeros and ones."""
    planes = mask.reshape(1, 1, *mask.shape[-2:])
    if tuple(planes.shape[2:]) != size:
        planes = functional.interpolate(
            planes.float(), size=size, mode="bilinear", antialias=True
        ).gt(0.5)
    return planes[0, 0].to(torch.uint8)


def _packed(mask: Tensor) -> NDArray[np.uint8]:
    return np.packbits(mask.contiguous().numpy().reshape(-1) != 0)


def _unpacked(bits: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, count=size[0] * size[1]).reshape(size))


def _area(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the number of ones in rows of packed bits."""
    areas: NDArray[np.int64] = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    return areas
