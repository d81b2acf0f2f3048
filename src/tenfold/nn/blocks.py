"""Blocks of M consecutive weights along the input channels: the unit of N:M sparsity."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tenfold.errors import UserError

__all__ = ["from_blocks", "nm_pattern", "to_blocks"]


def to_blocks(weight: Tensor, m: int) -> Tensor:
    """View a weight as blocks of `m` neighbouring input channels.

    A convolution's channels become the innermost axis first, so that a block lies at one
    (filter, kernel position) and never straddles two.

    Args:
        weight: `(O, I)` of a linear layer, or `(O, I / groups, *kernel)` of a convolution.
        m: block length; must divide the second axis.

    Returns:
        `(weight.numel() / m, m)`; a copy for convolutions larger than 1x1.

    Raises:
        UserError: the weight has fewer than two axes, or `m` does not divide its second axis.

    >>> import torch
    >>> to_blocks(torch.arange(8).reshape(1, 4, 1, 2), m=2).tolist()
    [[0, 2], [4, 6], [1, 3], [5, 7]]
    """
    if weight.ndim < 2:
        raise UserError(f"weight of shape {tuple(weight.shape)}: expected at least two axes")
    if m < 1 or weight.shape[1] % m:
        raise UserError(
            f"weight of shape {tuple(weight.shape)}: {weight.shape[1]} input channels are not "
            f"divisible into blocks of {m}"
        )
    return weight.movedim(1, -1).reshape(-1, m)


def from_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `to_blocks`.

    Args:
        blocks: `(G, M)`.
        shape: the weight's shape, `(O, I)` or `(O, I / groups, *kernel)`.

    Returns:
        A contiguous tensor of that shape.

    Raises:
        UserError: the number of elements differs.
    """
    numel = 1
    for length in shape:
        numel *= length
    if blocks.numel() != numel or len(shape) < 2:
        raise UserError(f"{tuple(blocks.shape)} blocks don't make a weight of {tuple(shape)}")
    innermost = [shape[0], *shape[2:], shape[1]]
    return blocks.reshape(innermost).movedim(-1, 1).contiguous()


def nm_pattern(weight: Tensor, largest_m: int = 32) -> tuple[int, int] | None:
    """Recognise the N:M pattern that a weight's zeros follow, whoever made them.

    Of all patterns that fit, the one with the least N/M, then the smallest M, is returned.

    Args:
        weight: `(O, I)` or `(O, I / groups, *kernel)`.
        largest_m: the longest block to look for.

    Returns:
        `(n, m)` with n < m, or None when no block length has a spare zero in every block.
        A weight of zeros alone has no pattern worth the name: None.

    >>> import torch
    >>> nm_pattern(torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 4.0]]))
    (2, 4)
    """
    if weight.ndim < 2:
        return None
    filled = weight.detach() != 0
    best: tuple[int, int] | None = None
    for m in range(2, min(largest_m, weight.shape[1]) + 1):
        if weight.shape[1] % m:
            continue
        n = int(to_blocks(filled, m).sum(dim=1).max())
        if 0 < n < m and (best is None or n * best[1] < best[0] * m):
            best = (n, m)
    return best
