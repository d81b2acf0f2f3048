"""The gradient of a weight at chosen places alone, `live_gradient`, for training on a CPU.

A dense product computes all of a weight's gradient at once, and is fast at it. Where most of it
isn't wanted, because weights are frozen, the compiled kernel sums up each wanted place by itself:
about as fast a place as the dense product, once the operands are packed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native

__all__ = ["able", "live_gradient"]

# Vectors hold a pixel of as many images as they have lanes; fewer images leave lanes empty.
LEAST_IMAGES = 8


def able(x: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """Tell whether the compiled kernel takes an operand and a weight.

    Args:
        x: `(B, C, H, W)` of a convolution, `(..., I)` of a linear layer.
        weight: `(O, C, kH, kW)` or `(O, I)`.
        groups: of the convolution.
    """
    conv = weight.dim() == 4
    if not native.fits(x) or weight.dtype != torch.float32 or groups != 1:
        return False
    return x.dim() == 4 and len(x) >= LEAST_IMAGES if conv else weight.dim() == 2


def live_gradient(
    x: Tensor,
    gradient: Tensor,
    live: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Return the gradient of a weight where it is wanted, and zeros elsewhere.

    Args:
        x: the layer's input, `(B, C, H, W)`, or `(..., I)` of a linear layer.
        gradient: of its output, `(B, O, OH, OW)` or `(..., O)`.
        live: where the gradient is wanted, bool `(O, C, kH, kW)` or `(O, I)`.
        stride: of the convolution.
        padding: zeros at every side.
        dilation: of the kernel.

    Returns:
        `(O, C, kH, kW)` or `(O, I)`, in the memory format of `live`.

    Raises:
        UserError: shapes that don't fit, or operands that `able` refuses.

    >>> x, gradient = torch.ones(8, 3), torch.ones(8, 2)
    >>> live = torch.tensor([[True, False, False], [False, False, True]])
    >>> live_gradient(x, gradient, live)  # doctest: +SKIP
    tensor([[8., 0., 0.],
            [0., 0., 8.]])
    """
    if not able(x, torch.empty(live.shape, device="meta", dtype=x.dtype)) or not native.fits(
        gradient
    ):
        raise UserError(
            f"live_gradient of {x.dtype} {tuple(x.shape)} on {x.device.type}: expected float32 on "
            f"the CPU, at least {LEAST_IMAGES} images, and compiled kernels"
        )
    if live.dtype != torch.bool or x.shape[1 if live.dim() == 4 else -1] != live.shape[1]:
        raise UserError(
            f"live_gradient of an input {tuple(x.shape)} at places {live.dtype} "
            f"{tuple(live.shape)}: expected bool, with the input's channels"
        )
    if live.dim() == 2:
        return _linear(x, gradient, live)
    out = torch.zeros_like(live, dtype=torch.float32)
    last = live.is_contiguous(memory_format=torch.channels_last)
    if not last and not live.is_contiguous():
        live, out = live.contiguous(), out.contiguous()
    outputs, channels, *kernel = live.shape
    height, width = x.shape[2:]
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    if tuple(gradient.shape) != (len(x), outputs, *size):
        raise UserError(
            f"live_gradient of an output's gradient {tuple(gradient.shape)}: expected "
            f"{(len(x), outputs, *size)}"
        )
    tables = _places(channels, tuple(kernel), tuple(padding), tuple(dilation), last)
    x = x.contiguous(memory_format=torch.channels_last)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    spans = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    native.live_gradient(
        x, gradient, live, tables, out, (len(x), height, width, channels), (*size, outputs),
        stride, (-padding[0], spans[0], -padding[1], spans[1]),
    )  # fmt: skip
    return out


def _linear(x: Tensor, gradient: Tensor, live: Tensor) -> Tensor:
    """Take tokens as images, and as many of them as pixels of one row as there are left over."""
    x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    if len(x) != len(gradient) or gradient.shape[1] != len(live):
        raise UserError(
            f"live_gradient of {len(x)} tokens and gradients {tuple(gradient.shape)}: expected "
            f"{(len(x), len(live))}"
        )
    out = torch.zeros(live.shape)
    images = 16 if len(x) % 16 == 0 else len(x)
    tables = _places(live.shape[1], (1, 1), (0, 0), (1, 1), True)
    columns = len(x) // max(1, images)
    native.live_gradient(
        x.contiguous(), gradient.contiguous(), live.contiguous(), tables, out,
        (images, 1, columns, live.shape[1]), (1, columns, len(live)), (1, 1), (0, 1, 0, 1),
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=256)
def _places(
    channels: int,
    kernel: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return channel, row and column of every weight of an output, in its order in memory."""
    numbers = torch.arange(channels * kernel[0] * kernel[1], dtype=torch.int32)
    if channels_last:
        channel, spot = numbers % channels, numbers // channels
    else:
        channel, spot = numbers // (kernel[0] * kernel[1]), numbers % (kernel[0] * kernel[1])
    row = spot // kernel[1] * dilation[0] - padding[0]
    column = spot % kernel[1] * dilation[1] - padding[1]
    return channel.contiguous(), row.contiguous(), column.contiguous()
