"""What a set of shadow photos is: photo, mask, and the same scene without the shadow if known."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tenfold.data.base import LabelledSet
from tenfold.errors import UserError

__all__ = ["ArrayTriplets", "ShadowSet", "Triplet"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Triplet:
    """One photo as it is stored, of any size; the order of axes is that of image files.

    Attributes:
        image: the photo with its shadow, `(H, W, 3)`.
        levels: of the mask, 0 lit to 255 in shadow, before any threshold, `(H, W)`.
        target: the same scene without the shadow, `(H, W, 3)`; None: not known.
        region: where else a result is looked at, 0 or 255, `(H, W)`; None: nowhere.
    """

    image: Pixels
    levels: Pixels
    target: Pixels | None = None
    region: Pixels | None = None


class ShadowSet(LabelledSet):
    """An indexed set of photos with shadows. A photo's index is its id in batches.

    Write your own by giving `__len__`, `triplet` and `name`, and set `has_targets`; `triplet`
    raises `BadImage` for a file that can't be read.
    """

    unit = "photo"

    has_targets: bool = True
    """Whether every triplet has a target."""

    renders: bool = False
    """Whether `training` gives photos without shadows, in which one is rendered at each visit."""

    in_memory: bool = False
    """Whether nothing is read when a triplet is asked for."""

    @abstractmethod
    def triplet(self, index: int) -> Triplet:
        """Return one photo with its mask and target, the same each time."""

    def training(self, index: int) -> Triplet:
        """Return what training augments: the triplet, or with `renders` a photo without shadow."""
        return self.triplet(index)

    def levels(self, index: int) -> Pixels:
        """Return the levels of one mask alone, `(H, W)`."""
        return self.triplet(index).levels

    def byte_count(self) -> int | None:
        """Return how many bytes all triplets take together; None: not known, or far too many."""
        return None

    def label(self, index: int) -> int:
        """Return 0: photos have no classes."""
        return 0

    def check(self, index: int) -> None:  # noqa: D102
        self.triplet(index)

    def labels(self) -> torch.Tensor:  # noqa: D102
        return torch.zeros(len(self), dtype=torch.int64)


class ArrayTriplets(ShadowSet):
    """Triplets in memory.

    Args:
        triplets: each of any size.
        title: the names are `title[number]`, unless `names` are given.
        names: of the triplets.

    Raises:
        UserError: sizes that differ, other than uint8, or targets for some only.
    """

    in_memory = True

    def __init__(
        self, triplets: Sequence[Triplet], title: str, names: Sequence[str] | None = None
    ) -> None:
        self._triplets = list(triplets)
        self._names = list(names) if names else [f"{title}[{i}]" for i in range(len(triplets))]
        self.has_targets = all(one.target is not None for one in self._triplets)
        for name, one in zip(self._names, self._triplets, strict=True):
            _check(name, one)
            if (one.target is not None) != self.has_targets:
                raise UserError(
                    f"{name} and others: expected a target for every photo, or for none"
                )

    def __len__(self) -> int:
        return len(self._triplets)

    def triplet(self, index: int) -> Triplet:  # noqa: D102
        return self._triplets[index]

    def name(self, index: int) -> str:  # noqa: D102
        return self._names[index]


def _check(name: str, triplet: Triplet) -> None:
    size = triplet.image.shape[:2]
    wanted = {"image": (*size, 3), "levels": size, "target": (*size, 3), "region": size}
    for part, shape in wanted.items():
        pixels = getattr(triplet, part)
        if pixels is not None and (pixels.dtype != np.uint8 or pixels.shape != shape):
            raise UserError(
                f"{name}: {part} is {pixels.dtype} of shape {pixels.shape}: expected uint8 of "
                f"shape {shape}, one size for photo, mask and target"
            )
