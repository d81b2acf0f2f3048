"""Elementwise work in pieces that stay in a core's cache: several operations cost one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["flat_pieces", "rows_of"]

_CACHED = 2**15  # elements: a few single-precision tensors of that length fit the second level


def flat_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of tensors of one shape, piece by piece, in the same order for all of them.

    On other devices than the CPU, or where the tensors lie differently in memory, the tensors
    themselves are the only piece.
    """
    first = tensors[0]
    alike = all(t.stride() == first.stride() and _dense(t) for t in tensors)
    if not alike or not _in_pieces(first):
        yield tensors
        return
    flat = [t.as_strided((first.numel(),), (1,), t.storage_offset()) for t in tensors]
    for start in range(0, first.numel(), _CACHED):
        yield tuple(t[start : start + _CACHED] for t in flat)


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """View a weight `(O, ...)` as `(O, n)`, one filter a row, ordered as `like` lies in memory.

    Tensors that lie in memory alike give views whose rows are contiguous, whatever the format.
    """
    strides: tuple[int, ...] = like.stride()
    inner = sorted(range(1, like.dim()), key=lambda axis: -strides[axis])
    return tensor.permute(0, *inner).view(len(tensor), -1)


def _in_pieces(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.numel() > _CACHED
        and not torch.compiler.is_compiling()
    )


def _dense(tensor: Tensor) -> bool:
    return (
        tensor.is_contiguous()
        or tensor.is_contiguous(memory_format=torch.channels_last)
        or tensor.is_contiguous(memory_format=torch.channels_last_3d)
    )
