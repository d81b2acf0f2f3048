"""N:M sparse weights times dense activations: two operators, `nm_conv2d` and `nm_linear`.

    y = activation(W x + bias + add)

W is stored as its kept values alone. With K = kernel positions x input channels of a group, in the
order (ky, kx, channel), row o of W has S = K * n / m kept values in ascending order of k:

    values (O, S)  float32 | bfloat16 | int8        (an int8 row is multiplied by scale[o])
    index  (O, S)  uint16, the k of each value; slot s belongs to block s // n of m neighbours

Both are custom operators of PyTorch with shapes for tracing, so `torch.compile` and `torch.export`
keep them. Accumulation is in float32. They have no gradient: they are for finished models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native, reference

__all__ = ["ACTIVATIONS", "LARGEST_K", "WEIGHT_TYPES", "check_packed", "conv2d", "linear", "pack"]

ACTIVATIONS = reference.ACTIVATIONS
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.int8)
LARGEST_K = 65536  # an index has 16 bits


def pack(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Return the kept `values` (in the weight's dtype) and `index` of a weight.

    Args:
        weight: `(O, I)` of a linear layer, or `(O, I / groups, kH, kW)` of a convolution.
        n: the most non-zeros in a block; a block with fewer stores zeros.
        m: block length along the input channels.

    Raises:
        UserError: channels that are no multiple of m, more than 65,536 weights an output, or a
            block with more than n non-zeros: the first one is named.
    """
    if not 0 < n < m:
        raise UserError(f"pattern {n}:{m}: expected 0 < n < m")
    if weight.ndim < 2 or weight.shape[1] == 0 or weight.shape[1] % m:
        raise UserError(
            f"weight of shape {tuple(weight.shape)}: its second axis, the input channels, doesn't "
            f"divide into blocks of {m}"
        )
    rows = weight.detach().movedim(1, -1).reshape(weight.shape[0], -1)  # k = (ky, kx, channel)
    if rows.shape[1] > LARGEST_K:
        raise UserError(
            f"weight of shape {tuple(weight.shape)}: {rows.shape[1]:,} weights an output; the "
            f"kernels take at most {LARGEST_K:,}: leave this layer dense"
        )
    blocks = rows.reshape(weight.shape[0], -1, m)
    filled = blocks != 0
    counts = filled.sum(dim=2)
    if counts.numel() and int(counts.max()) > n:
        row, block = (int(i) for i in (counts > n).nonzero()[0])
        position, channel = divmod(block * m, weight.shape[1])
        raise UserError(
            f"not {n}:{m}: output {row}, kernel position {position}, input channels {channel} to "
            f"{channel + m - 1} have {int(counts[row, block])} non-zeros; expected at most {n}"
        )
    places = torch.arange(m, device=weight.device).expand_as(blocks)
    # Filled places first; blocks with fewer than n lend the places of their first zeros.
    order = torch.where(filled, places, places + m).sort(dim=2).values[..., :n] % m
    kept = order.sort(dim=2).values
    values = blocks.gather(2, kept).reshape(weight.shape[0], -1).contiguous()
    starts = torch.arange(blocks.shape[1], device=weight.device)[:, None] * m
    return values, (kept + starts).reshape(values.shape).to(torch.uint16).contiguous()


def check_packed(values: Tensor, index: Tensor, n: int, m: int, k: int) -> None:
    """Refuse packed weights that the kernels would read out of bounds with.

    Args:
        values: `(O, S)`.
        index: `(O, S)`.
        n: kept weights a block.
        m: block length.
        k: weights an output, zeros included.

    Raises:
        UserError: sizes, types or places that don't agree.
    """
    if not 0 < n < m or k % m or values.shape != index.shape or values.shape[1:] != (k // m * n,):
        raise UserError(
            f"packed values {tuple(values.shape)} and index {tuple(index.shape)} are no {n}:{m} "
            f"weight of {k} weights an output"
        )
    if values.dtype not in WEIGHT_TYPES or index.dtype != torch.uint16:
        raise UserError(
            f"packed values are {values.dtype} and their index {index.dtype}: expected float32, "
            "bfloat16 or int8, and uint16"
        )
    blocks = index.to(torch.int64) // m
    if not torch.equal(blocks, (torch.arange(values.shape[1]) // n).expand_as(blocks)):
        raise UserError(f"an index of the packed weight lies outside its block of {m}")


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
        values: `(O, S)`, see the module.
        index: `(O, S)`.
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
    return x.new_empty(x.shape[0], values.shape[0], height, width)


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
    return x.new_empty(*x.shape[:-1], values.shape[0])
