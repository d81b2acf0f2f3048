"""Pixels of dropped samples, mixed into those at the boundary of what is kept (KCD, eq. 14-15).

Loaders and data sets ask one of two objects for what stands in an image's place:

- `CurrentMixing`: mixed when the set is condensed, on raw pixels; a later mix takes the mixed image
  again. For images of one size that fit in memory, as in the authors' code.
- `LazyMixing`: partner and share are noted, and two augmented views of original images are mixed as
  they are loaded. For files of any size.

Both keep what changes during training in shared memory, so that loader processes that outlive an
epoch see it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from tenfold.errors import UserError

__all__ = ["CurrentMixing", "LazyMixing", "mix_images"]


def mix_images(images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Return `(1 - share) * image + share * partner`; uint8 is cut off to whole numbers (eq. 14).

    Args:
        images: `(B, ...)`, uint8 or floating point.
        partners: `(B, ...)`, alike.
        shares: `(B,)` in [0, 1).

    Raises:
        UserError: shapes or types differ.

    >>> one, other = torch.full((2, 1), 200, dtype=torch.uint8), torch.full((2, 1), 100)
    >>> mix_images(one, other.to(torch.uint8), torch.tensor([0.0, 0.15])).flatten().tolist()
    [200, 185]
    """
    if images.shape != partners.shape or images.dtype != partners.dtype:
        raise UserError(
            f"can't mix {images.dtype} {tuple(images.shape)} with {partners.dtype} "
            f"{tuple(partners.shape)}: expected images of one shape and type; use "
            "mix_source='original' behind a transform that makes them so"
        )
    share = shares.to(images.device, torch.float32).reshape(-1, *[1] * (images.ndim - 1))
    mixed = (1 - share) * images.float() + share * partners.float()
    return mixed.to(images.dtype)


class CurrentMixing:
    """Mixed images that stand in place of the stored ones.

    Args:
        size: ids are 0 to size - 1.
        capacity: how many different images can be mixed.
        shape: of one image, in any order of its axes.

    Raises:
        UserError: they would take more than `limit` bytes.
    """

    def __init__(self, size: int, capacity: int, shape: tuple[int, ...], limit: int = 2**32):
        needed = capacity * torch.Size(shape).numel()
        if needed > limit:
            raise UserError(
                f"{capacity:,} mixed images take {needed / 2**30:,.1f} GiB of memory: expected at "
                f"most {limit / 2**30:,.1f} GiB; use mix_source='original' (mixed as they are "
                "loaded), or augment_max=0"
            )
        self.slots = shared(torch.full((size,), -1, dtype=torch.int32))
        self.pixels = shared(torch.empty((capacity, *shape), dtype=torch.uint8))
        self.used = 0

    def replaced(self, ids: Tensor, images: Tensor) -> Tensor:
        """Return stored images `(B, ...)` with mixed ones in place of those that were mixed."""
        check_shared(self.slots, self.pixels)
        slots = self.slots[ids]
        mixed = slots >= 0
        if bool(mixed.any()):
            images[mixed] = self.pixels[slots[mixed].long()]
        return images

    def blended(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return no positions: nothing is left to be mixed when images are loaded."""
        none = ids[:0]
        return none, none, none.float()

    @staticmethod
    def blend(images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        """See `mix_images`."""
        return mix_images(images, partners, shares)

    def mix(self, ids: Tensor, images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        """Keep mixes of stored images `(L, ...)`; both are first replaced by what stands for them.

        Args:
            ids: whose images change, `(L,)`.
            images: as `replaced` returned them.
            partners: likewise, of the dropped samples.
            shares: of the partners, `(L,)`; where it is 0 nothing changes.

        Returns:
            The ids that have changed.
        """
        changing = shares > 0
        ids, mixed = ids[changing], mix_images(images, partners, shares)[changing]
        slots = self.slots[ids]
        new = slots < 0
        count = int(new.sum())
        slots[new] = torch.arange(self.used, self.used + count, dtype=torch.int32)
        self.used += count
        self.pixels[slots.long()] = mixed
        self.slots[ids] = slots
        return ids

    def checksums(self, ids: Tensor) -> Tensor:
        """Return a number for the pixels of each mixed image, int32 `(L,)`, never 0."""
        slots = self.slots[ids].tolist()
        found = [zlib.crc32(self.pixels[slot].numpy().data) % (2**31 - 2) + 1 for slot in slots]
        return torch.tensor(found, dtype=torch.int32)

    def state_dict(self) -> dict[str, Any]:
        """Return what was mixed so far."""
        return {"slots": self.slots.clone(), "pixels": self.pixels[: self.used].clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it, in the shared memory that loaders have already."""
        self.slots.copy_(state["slots"])
        self.used = len(state["pixels"])
        self.pixels[: self.used] = state["pixels"]


class LazyMixing:
    """Who is mixed into whom, when images are loaded.

    Args:
        size: ids are 0 to size - 1.
    """

    def __init__(self, size: int):
        self.partners = shared(torch.full((size,), -1, dtype=torch.int64))
        self.shares = shared(torch.zeros(size))

    def replaced(self, ids: Tensor, images: Tensor) -> Tensor:
        """Return stored images as they are."""
        return images

    def blended(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions in the batch to be mixed, the ids of their partners, and the shares."""
        check_shared(self.partners, self.shares)
        at = torch.nonzero(self.partners[ids] >= 0).flatten()
        return at, self.partners[ids[at]], self.shares[ids[at]]

    @staticmethod
    def blend(images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        """See `mix_images`."""
        return mix_images(images, partners, shares)

    def pair(self, ids: Tensor, partners: Tensor, shares: Tensor) -> None:
        """Mix these pairs `(L,)` from now on, each on one level."""
        mixed = shares > 0
        self.partners[ids] = torch.where(mixed, partners, -1)
        self.shares[ids] = shares

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs."""
        return {"partners": self.partners.clone(), "shares": self.shares.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them, in the shared memory that loaders have already."""
        self.partners.copy_(state["partners"])
        self.shares.copy_(state["shares"])


def shared(values: Tensor) -> Tensor:
    """Move a tensor into shared memory, where there is room for it."""
    try:
        room = os.statvfs("/dev/shm")
        free = room.f_bavail * room.f_frsize
    except (AttributeError, OSError):  # other systems keep it elsewhere
        free = None
    # Where the room is too small, writing would end the process, without an error to catch.
    if free is not None and values.nbytes > free // 2:
        return values
    values.share_memory_()  # type: ignore[no-untyped-call]
    return values


def check_shared(*tensors: Tensor) -> None:
    """Refuse to go on with images that another process can't change.

    Raises:
        UserError: this is a loader's process with a copy of its own.
    """
    if get_worker_info() is not None and not all(
        tensor.is_shared()  # type: ignore[no-untyped-call]
        for tensor in tensors
    ):
        raise UserError(
            "loader workers hold a copy of the images, and would not see those that are mixed "
            "later (persistent workers with in-place mixing): give the loader kcd.dataset itself, "
            "not a copy; where /dev/shm is too small, use num_workers=0 or augment_max=0"
        )
