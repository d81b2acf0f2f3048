"""N:M sparse weights times dense activations: two operators, `nm_conv2d` and `nm_linear`.

    y = activation(W x + bias + add)

W is stored as its kept values alone. A row has K = kernel positions x input channels of a group
weights, in the order (tile of about 16 channels, ky, kx, channel in the tile). They are cut into
blocks of at most 128, which the kernels keep in the first-level cache with the activations that
they meet, and stored block by block:

    values (blocks, O, slots)  float32 | bfloat16 | int8   (row o of int8 is multiplied by scale[o])
    index  (blocks, O, slots)  uint8, the place of each value in its block, ascending

A block of B weights has B * n / m slots. The last block may be shorter than the others; its spare
slots hold zeros.

Both are custom operators of PyTorch with shapes for tracing, so `torch.compile` and `torch.export`
keep them. Accumulation is in float32. They have no gradient: they are for finished models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native, reference

__all__ = [
    "ACTIVATIONS",
    "WEIGHT_TYPES",
    "block_length",
    "check_packed",
    "conv2d",
    "linear",
    "pack",
]

ACTIVATIONS = reference.ACTIVATIONS
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.int8)
# A block times the columns that the kernels take at once fills the first-level cache. Where many
# weights are kept, fewer rows and more columns spare loads of weights; where few are, more rows
# spare loads of sums.
LONGEST_BLOCK, LONGEST_DENSE_BLOCK = 128, 64


def block_length(k: int, n: int, m: int) -> int:
    """Return how many of a row's `k` weights make a block: a multiple of m, about equal blocks."""
    units = k // m
    blocks = -(-units // ((LONGEST_DENSE_BLOCK if 3 * n > m else LONGEST_BLOCK) // m))
    return -(-units // blocks) * m


def pack(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Return the kept `values` (in the weight's dtype) and `index` of a weight, see the module.

    Args:
        weight: `(O, I)` of a linear layer, or `(O, I / groups, kH, kW)` of a convolution.
        n: the most non-zeros in m neighbours; where there are fewer, zeros are stored.
        m: up to 32 neighbours along the input channels.

    Raises:
        UserError: channels that are no multiple of m, or more than n non-zeros among m
            neighbours: the first ones are named.
    """
    if not 0 < n < m <= 32:
        raise UserError(f"pattern {n}:{m}: expected 0 < n < m <= 32")
    if weight.ndim < 2 or weight.shape[1] == 0 or weight.shape[1] % m:
        raise UserError(
            f"weight of shape {tuple(weight.shape)}: its second axis, the input channels, doesn't "
            f"divide into blocks of {m}"
        )
    outputs, _channels = weight.shape[:2]
    groups = reference.tiled(weight.detach(), m).reshape(outputs, -1, m)
    filled = groups != 0
    counts = filled.sum(dim=2)
    if counts.numel() and int(counts.max()) > n:
        row, group = (int(i) for i in (counts > n).nonzero()[0])
        places = torch.arange(weight[0].numel()).reshape(1, *weight.shape[1:])
        channel, position = divmod(
            int(reference.tiled(places, m)[0, group * m]), weight[0, 0].numel()
        )
        raise UserError(
            f"not {n}:{m}: output {row}, kernel position {position}, input channels {channel} to "
            f"{channel + m - 1} have {int(counts[row, group])} non-zeros; expected at most {n}"
        )
    places = torch.arange(m, device=weight.device).expand_as(groups)
    # Filled places first; neighbours with fewer than n lend the places of their first zeros.
    order = torch.where(filled, places, places + m).sort(dim=2).values[..., :n] % m
    kept = order.sort(dim=2).values
    values = groups.gather(2, kept)
    k = groups.shape[1] * m
    length = block_length(k, n, m)
    a_block, blocks = length // m, -(-k // length)
    spare = blocks * a_block - groups.shape[1]
    if spare:
        values = torch.cat([values, values.new_zeros(outputs, spare, n)], dim=1)
        # Any place inside of the short block will do.
        kept = torch.cat([kept, kept.new_zeros(outputs, spare, n)], dim=1)
    starts = (torch.arange(blocks * a_block, device=weight.device) % a_block * m)[:, None]
    if spare:
        starts[-spare:] = 0
    return (
        _by_block(values, blocks).contiguous(),
        _by_block(kept + starts, blocks).to(torch.uint8).contiguous(),
    )


def _by_block(groups: Tensor, blocks: int) -> Tensor:
    return groups.reshape(len(groups), blocks, -1).transpose(0, 1)


def check_packed(values: Tensor, index: Tensor, n: int, m: int, k: int) -> None:
    """Refuse packed weights that the kernels would read out of bounds with.

    Args:
        values: `(blocks, O, slots)`.
        index: of the same shape.
        n: kept weights of m neighbours.
        m: neighbours.
        k: weights an output, zeros included.

    Raises:
        UserError: sizes, types or places that don't agree.
    """
    agrees = 0 < n < m <= 32 and k > 0 and k % m == 0 and values.shape == index.shape
    if agrees:
        length = block_length(k, n, m)
        agrees = values.ndim == 3 and (-(-k // length), length // m * n) == values.shape[::2]
    if not agrees:
        raise UserError(
            f"packed values {tuple(values.shape)} and index {tuple(index.shape)} are no {n}:{m} "
            f"weight of {k} weights an output"
        )
    if values.dtype not in WEIGHT_TYPES or index.dtype != torch.uint8:
        raise UserError(
            f"packed values are {values.dtype} and their index {index.dtype}: expected float32, "
            "bfloat16 or int8, and uint8"
        )
    lengths = [min(length, k - start) for start in range(0, k, length)]
    if values.shape[1] and bool(
        (index.amax(dim=(1, 2)) >= torch.tensor(lengths, device=index.device)).any()
    ):
        raise UserError("an index of the packed weight lies outside its block")


def conv2d(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    pattern: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Return activation(conv2d(x, W) + bias + add), `(B, O, OH, OW)`.

    Args:
        x: `(B, C, H, W)`, float32.
        values: `(blocks, O, slots)`, see the module.
        index: of the same shape.
        scale: `(O,)` for int8 values.
        bias: `(O,)`.
        add: `(B, O, OH, OW)`, such as a residual.
        pattern: n and m.
        kernel_size: of the convolution, like the next three.
        stride: of the convolution.
        padding: zeros at every side.
        dilation: of the kernel.
        groups: of the convolution.
        activation: one of `ACTIVATIONS`.
    """
    if native.usable(x):
        return native.conv2d(
            x, values, index, scale, bias, add, pattern, kernel_size, stride, padding, dilation,
            groups, activation,
        )  # fmt: skip
    result: Tensor = torch.ops.tenfold.nm_conv2d(
        x, values, index, scale, bias, add, pattern, kernel_size, stride, padding, dilation,
        groups, activation,
    )  # fmt: skip
    return result


def linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    pattern: tuple[int, int],
    activation: str = "none",
) -> Tensor:
    """Return activation(x W^T + bias + add), `(..., O)`, for x `(..., I)`; see `conv2d`."""
    if native.usable(x):
        return native.linear(x, values, index, scale, bias, add, pattern, activation)
    result: Tensor = torch.ops.tenfold.nm_linear(
        x, values, index, scale, bias, add, pattern, activation
    )
    return result


@torch.library.custom_op("tenfold::nm_conv2d", mutates_args=())
def _conv2d(
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
    run = native.conv2d if native.fits(x) else reference.conv2d
    return run(
        x, values, index, scale, bias, add, pattern, kernel_size, stride, padding, dilation,
        groups, activation,
    )  # fmt: skip


@_conv2d.register_fake
def _(
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
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return x.new_empty(x.shape[0], values.shape[1], height, width)


@torch.library.custom_op("tenfold::nm_linear", mutates_args=())
def _linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    pattern: Sequence[int],
    activation: str,
) -> Tensor:
    run = native.linear if native.fits(x) else reference.linear
    return run(x, values, index, scale, bias, add, pattern, activation)


@_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    pattern: Sequence[int],
    activation: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[1])
