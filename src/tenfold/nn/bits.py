"""Small numbers packed tightly into bytes, for files."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.errors import UserError

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack numbers below `2 ** bits` (or booleans) one after another, lowest bit first.

    Args:
        values: any shape, integer or bool; read in row-major order.
        bits: 1 to 8 bits a number.

    Returns:
        `(ceil(values.numel() * bits / 8),)` uint8 on the CPU.

    >>> pack_bits(torch.tensor([1, 0, 3, 2]), bits=2).tolist()
    [177]
    """
    if not 1 <= bits <= 8:
        raise UserError(f"bits={bits}: expected 1 to 8")
    flat = values.detach().cpu().reshape(-1, 1).to(torch.uint8)
    stream = ((flat >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    packed: Tensor = stream << torch.arange(8, dtype=torch.uint8)
    return packed.sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: what it returned.
        bits: bits a number.
        count: how many numbers to read.

    Returns:
        `(count,)` uint8.

    Raises:
        UserError: `packed` holds another number of bytes.
    """
    if len(packed) != -(-count * bits // 8):
        raise UserError(f"{len(packed)} bytes don't hold {count} numbers of {bits} bits")
    stream = ((packed.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    digits = stream[: count * bits].reshape(count, bits)
    shifted: Tensor = digits << torch.arange(bits, dtype=torch.uint8)
    return shifted.sum(dim=1, dtype=torch.uint8)
