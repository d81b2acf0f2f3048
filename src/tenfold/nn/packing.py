"""N:M weights in their compact form: the kept values and their places, nothing for the zeros.

A weight of G blocks becomes `values` `(O, K * N / M)` in block order (K weights an output) and
`index`, the ascending positions of the kept weights inside their blocks, packed to
`ceil(log2 M)` bits each. At 2:4 in single precision that is 8.5 bytes a block instead of 16.

It is a storage format: a gathered product is normally slower than a dense one, so plain layers get
their dense weight back when they are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.nn.bits import pack_bits, unpack_bits
from tenfold.nn.blocks import from_blocks, to_blocks

__all__ = ["pack_nm", "packed_bytes", "unpack_nm"]


def pack_nm(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Pack a weight whose every block of `m` input channels has at most `n` that are not zero.

    Args:
        weight: `(O, I)` or `(O, I / groups, *kernel)`.
        n: weights kept a block; a block with fewer stores a zero.
        m: block length.

    Returns:
        `values` `(O, K * n / m)` in the weight's dtype and `index`, uint8, see the module.

    Raises:
        UserError: a block has more than `n` non-zeros; the first such block is named.
    """
    blocks = to_blocks(weight.detach(), m)
    filled = blocks != 0
    counts = filled.sum(dim=1)
    if int(counts.max()) > n:
        block = int((counts > n).nonzero()[0])
        raise UserError(f"block {block} has {int(counts[block])} non-zeros: expected at most {n}")
    places = torch.arange(m, device=weight.device).expand(len(blocks), m)
    # Filled places first; blocks with fewer than n lend the places of their first zeros.
    order = torch.where(filled, places, places + m).sort(dim=1).values[:, :n] % m
    kept = order.sort(dim=1).values
    values = blocks.gather(1, kept).reshape(weight.shape[0], -1).contiguous()
    return values, pack_bits(kept, _bits(m))


def unpack_nm(values: Tensor, index: Tensor, n: int, m: int, shape: Sequence[int]) -> Tensor:
    """Undo `pack_nm`: return the dense weight of `shape`, its zeros exact.

    Raises:
        UserError: sizes don't agree with the shape, or a place lies outside its block.
    """
    numel = 1
    for length in shape:
        numel *= length
    if not 0 < n < m or numel % m or values.numel() != numel // m * n:
        raise UserError(
            f"{values.numel()} packed values don't make a {n}:{m} weight of {tuple(shape)}"
        )
    kept = unpack_bits(index, _bits(m), values.numel()).to(torch.int64).reshape(-1, n)
    if kept.numel() and int(kept.max()) >= m:
        raise UserError(f"a packed place lies outside its block of {m}")
    blocks = torch.zeros(numel // m, m, dtype=values.dtype)
    blocks.scatter_(1, kept, values.reshape(-1, n))
    return from_blocks(blocks, shape)


def packed_bytes(weight: Tensor, n: int, m: int) -> int:
    """Return the bytes that `pack_nm` makes of a weight, without packing it."""
    kept = weight.numel() // m * n
    return kept * weight.element_size() + -(-kept * _bits(m) // 8)


def _bits(m: int) -> int:
    return (m - 1).bit_length()
