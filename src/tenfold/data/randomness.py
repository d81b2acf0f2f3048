"""Random numbers that are a function of (seed, epoch, id) and of nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["below", "mix", "mix_one"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def mix(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash integers (arrays broadcast) into 64 random bits each, by SplitMix64 steps.

    A generator per sample would cost more than the crop that it draws for; a hash serves a whole
    batch at once and needs no state that a worker or a checkpoint would have to carry.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        # A negative seed is as good as any other; arrays wrap silently, scalars would warn.
        word = (
            np.array([part & _MASK], np.uint64) if isinstance(part, int) else part.view(np.uint64)
        )
        state = (state ^ word) + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def mix_one(*parts: int) -> int:
    """Hash integers into one seed that `torch.manual_seed` takes (63 bits)."""
    return int(mix(*parts)[0]) >> 1


def below(limit: int, words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Turn random bits into integers in [0, limit)."""
    unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (unit * limit).astype(np.int64)
