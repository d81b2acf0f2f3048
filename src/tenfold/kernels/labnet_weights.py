"""The order of LAB-Net's weights in one row of numbers, which the fused network is stored as.

It is that of the network's state dict, each tensor flattened, the high-pass kernels included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tenfold.errors import UserError

__all__ = ["BLOCKS", "DILATIONS", "SLOPE", "deviations_of", "size_of", "tensors_of"]

SLOPE = 0.2  # of each leaky ReLU
REDUCTION = 8  # of the channel attention
DILATIONS = {"x": (1, 4, 16), "y": (2, 8, 32), "z": (4, 16, 64)}
SCALES = ("near", "middle", "far")
BLOCKS = 8
LEAST_VARIANCE = 1e-24

# What stands where, in the network's order: blocks, fusions and attentions by name.
_ORDER = (
    "block1", "block2", "fuse12_l", "block3", "fuse12_ab", "block4", "fuse34_l", "attention1",
    "block5", "fuse34_ab", "attention2", "block6", "fuse56_l", "attention3", "block7",
    "fuse56_ab", "attention4", "block8",
)  # fmt: skip


@functools.cache
def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its name in the network, in order.

    Args:
        width: channels inside.
    """
    return dict(_shapes(width))


def _shapes(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    far = 3 * width // 2
    yield from _conv("first", 3, 3, 3)
    for name in _ORDER:
        if name.startswith("block"):
            number = int(name[5:])
            yield from _block(
                name, 4 if number < 3 else width, {7: 1, 8: 2}.get(number, width), width
            )
        elif name.startswith("fuse"):
            yield from _conv(name, 2 * width, width, 1)
        else:
            yield from _conv(f"{name}.query", width, far, 3)
            yield from _conv(f"{name}.key", width, far, 3)
            yield from _conv(f"{name}.merge", width + far, width, 1)
    yield from _conv("last", 3, 3, 3)


def _conv(
    name: str, inputs: int, outputs: int, kernel: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.conv.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.conv.bias", (outputs,)


def _block(
    name: str, inputs: int, outputs: int, width: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for stage in DILATIONS:
        sizes = (width // 2, width, 3 * width // 2)
        for scale, size in zip(SCALES, sizes, strict=True):
            yield from _conv(f"{name}.{stage}.{scale}", inputs, size, 3)
        yield from _conv(f"{name}.{stage}.merge", 3 * width, width, 1)
        inputs = width
    yield from _conv(f"{name}.merge", 3 * width, width, 1)
    yield from _conv(f"{name}.out", width, outputs, 3)
    channels, hidden = 3 * width, 3 * width // REDUCTION
    yield f"{name}.attention.reduce.weight", (hidden, channels)
    yield f"{name}.attention.reduce.bias", (hidden,)
    yield f"{name}.attention.expand.weight", (channels, hidden)
    yield f"{name}.attention.expand.bias", (channels,)
    yield f"{name}.attention.highpass.weight", (channels, 1, 3, 3)


def size_of(width: int) -> int:
    """Return how many numbers a network of a width has."""
    return sum(math.prod(shape) for shape in shapes(width).values())


def tensors_of(weights: Tensor, width: int) -> Mapping[str, Tensor]:
    """Return views of the weights by name.

    Args:
        weights: one-dimensional.
        width: channels inside.

    Raises:
        UserError: another number of weights.
    """
    wanted = shapes(width)
    if weights.dim() != 1 or len(weights) != size_of(width):
        raise UserError(
            f"weights of a LAB-Net have shape {tuple(weights.shape)}: expected {size_of(width)} "
            f"in a row at width {width}"
        )
    parts = torch.split(weights, [math.prod(shape) for shape in wanted.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(wanted.items(), parts, strict=True)
    }


def deviations_of(variances: Tensor) -> Tensor:
    """Return standard deviations, of constant channels as the network has them."""
    return variances.clamp_min(LEAST_VARIANCE).sqrt()
