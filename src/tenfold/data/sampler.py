"""The order of an epoch, for one of several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from tenfold.data.randomness import mix_one
from tenfold.errors import UserError

__all__ = ["EpochSampler", "check_epoch", "check_rank"]


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that there can't be."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(
            f"rank {rank} of {world_size}: expected 0 <= rank < world_size; "
            "give this process's own rank"
        )


def check_epoch(epoch: int) -> None:
    """Refuse an epoch that there can't be."""
    if epoch < 0:
        raise UserError(f"epoch {epoch}: expected 0 or more; count epochs from 0")


class EpochSampler(Sampler[int]):
    """Yield `epoch * n + id`, in an order that (seed, epoch) alone decides.

    The epoch travels inside the key, so that workers which outlive an epoch need no state. Call
    `set_epoch` ahead of each epoch (Lightning does). With `shuffle` (training), every rank gets
    the same number of keys, padded by wrapping around; without it (evaluation), nothing is padded
    and rank r takes every `world_size`-th id from r.

    Args:
        n: number of ids in the set.
        seed: the run's seed.
        shuffle: training order, or ascending ids.
        rank: which of the processes this is.
        world_size: how many processes there are.
        ids: the ids in use, by default all n.

    Attributes:
        ids: what is drawn from at present, see `restrict`.
        pool: the ids in use from the start.

    Example:
        >>> sampler = EpochSampler(4, seed=0, shuffle=False)
        >>> sampler.set_epoch(2)
        >>> list(sampler)
        [8, 9, 10, 11]
    """

    def __init__(
        self,
        n: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        ids: Tensor | None = None,
    ) -> None:
        check_rank(rank, world_size)
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.ids = torch.arange(n)
        self.restrict(ids)
        self.pool = self.ids

    def restrict(self, ids: Tensor | None) -> None:
        """Draw from these ids only, from the next epoch on; None means all.

        Raises:
            UserError: no id is given, or one lies outside 0..n-1.
        """
        ids = torch.arange(self.n) if ids is None else ids.to("cpu", torch.int64)
        if len(ids) == 0:
            raise UserError("no image to draw from: expected at least one id; check the data set")
        if int(ids.min()) < 0 or int(ids.max()) >= self.n:
            raise UserError(
                f"ids from {int(ids.min())} to {int(ids.max())}: expected 0 to {self.n - 1}; "
                "give indexes into the training set"
            )
        self.ids = ids

    def repeats(self) -> Tensor:
        """Return the ids that this rank draws in this epoch only to have as many as the others.

        Another rank draws them as its own; who counts visits leaves them out here.
        """
        if not self.shuffle:
            return self.ids[:0]
        order = self._order()
        place = torch.arange(len(order), len(self) * self.world_size)
        return order[place[place % self.world_size == self.rank] % len(order)]

    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(mix_one(self.seed, self.epoch))
        return self.ids[torch.randperm(len(self.ids), generator=generator)]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        check_epoch(epoch)
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return -(-len(self.ids) // self.world_size)
        return len(range(self.rank, len(self.ids), self.world_size))

    def __iter__(self) -> Iterator[int]:
        order = self.ids
        if self.shuffle:
            order = self._order()
            order = order[torch.arange(len(self) * self.world_size) % len(order)]
        first_key = self.epoch * self.n
        # In pieces: as Python's numbers, a million keys at once would take 40 MB for all the epoch.
        keys = order[self.rank :: self.world_size] + first_key
        for first in range(0, len(keys), 4096):
            yield from keys[first : first + 4096].tolist()
