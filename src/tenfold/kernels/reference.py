"""The kernels' arithmetic in plain PyTorch: the oracle, and what runs where nothing is compiled.

It rebuilds the dense weight on every call, so it is as slow as a dense layer and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "channel_tile", "conv2d", "dense_rows", "linear", "tiled", "untiled"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
}


def dense_rows(
    values: Tensor, index: Tensor, scale: Tensor | None, pattern: Sequence[int], k: int
) -> Tensor:
    """Return the dense `(O, k)` matrix of a packed weight."""
    if scale is not None:
        values = values.to(scale.dtype) * scale[:, None]
    blocks, outputs, slots = values.shape
    length = slots // pattern[0] * pattern[1]
    rows = values.new_zeros(blocks, outputs, length)
    # Added, not set: a spare slot may share the place of a kept value.
    rows.scatter_add_(2, index.to(torch.int64), values)
    return rows.transpose(0, 1).reshape(outputs, -1)[:, :k]


def channel_tile(m: int) -> int:
    """Return how many channels a tile has; the last tile may have fewer."""
    return -(-16 // m) * m


def tiled(weight: Tensor, m: int) -> Tensor:
    """Return a weight `(O, I, *kernel)` as rows `(O, K)` in the kernels' order."""
    tiles = torch.split(weight.reshape(*weight.shape[:2], -1), channel_tile(m), dim=1)
    return torch.cat([tile.transpose(1, 2).flatten(1) for tile in tiles], dim=1)


def untiled(rows: Tensor, channels: int, kernel_size: Sequence[int], m: int) -> Tensor:
    """Undo `tiled`: return `(O, channels, *kernel_size)`."""
    positions = math.prod(kernel_size)
    tiles = torch.split(rows, channel_tile(m) * positions, dim=1)
    weight = torch.cat([t.reshape(len(t), positions, -1).transpose(1, 2) for t in tiles], dim=1)
    return weight.reshape(-1, channels, *kernel_size)


def conv2d(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    pattern: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """See `tenfold.kernels.nm.conv2d`."""
    channels = x.shape[1] // groups
    rows = dense_rows(values, index, scale, pattern, kernel_size[0] * kernel_size[1] * channels)
    weight = untiled(rows, channels, kernel_size, pattern[1]).to(x.dtype)
    y = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return ACTIVATIONS[activation](y if add is None else y + add).contiguous()


def linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    pattern: Sequence[int],
    activation: str,
) -> Tensor:
    """See `tenfold.kernels.nm.linear`."""
    rows = dense_rows(values, index, scale, pattern, x.shape[-1]).to(x.dtype)
    y = F.linear(x, rows, bias)
    return ACTIVATIONS[activation](y if add is None else y + add).contiguous()
