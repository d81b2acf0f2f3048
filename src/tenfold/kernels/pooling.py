"""Pooling of contiguous images: two operators, `tenfold::max_pool2d` and `tenfold::mean_pool`.

They are custom operators of PyTorch with shapes for tracing. They have no gradient: where one is
wanted, and for images in channels_last, PyTorch's own pooling runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native

__all__ = ["max_pool2d", "mean_pool"]


def max_pool2d(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    relu: bool = False,
) -> Tensor:
    """Return the largest value of each window, `(B, C, OH, OW)`; NaN where there is one.

    >>> max_pool2d(torch.arange(16.0).reshape(1, 1, 4, 4), (2, 2), (2, 2)).flatten()
    tensor([ 5.,  7., 13., 15.])

    Args:
        x: `(B, C, H, W)`.
        kernel_size: height and width of a window, like the next three.
        stride: from one window to the next.
        padding: places at every side that don't count, at most half a window.
        dilation: from one pixel of a window to the next.
        ceil_mode: whether a last window may reach over the border.
        relu: whether to apply a ReLU too; whether before or after makes no difference.

    Raises:
        UserError: windows that don't fit into the image, or too much padding.
    """
    if native.differentiated(x) or x.dim() != 4:
        return _plain_max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, relu)
    if native.usable(x):
        return _max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, relu)
    result: Tensor = torch.ops.tenfold.max_pool2d(
        x, kernel_size, stride, padding, dilation, ceil_mode, relu
    )
    return result


def mean_pool(x: Tensor) -> Tensor:
    """Return the mean of each channel of x `(B, C, H, W)`, as `(B, C, 1, 1)`.

    >>> mean_pool(torch.arange(8.0).reshape(1, 2, 2, 2)).flatten()
    tensor([1.5000, 5.5000])
    """
    if native.differentiated(x) or x.dim() != 4:
        return _plain_mean_pool(x)
    if native.usable(x):
        return _mean_pool(x)
    result: Tensor = torch.ops.tenfold.mean_pool(x)
    return result


def _out_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    windows = -(-room // stride) + 1
    # The last one starts in the image or in the padding before it.
    return windows - 1 if (windows - 1) * stride >= size + padding else windows


def _max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> Tensor:
    if not x.is_contiguous():
        return _plain_max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, relu)
    batch, channels, height, width = x.shape
    (kernel_y, kernel_x), (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = (
        kernel_size, stride, padding, dilation,
    )  # fmt: skip
    sensible = min(kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x) > 0
    padded = 0 <= 2 * padding_y <= kernel_y and 0 <= 2 * padding_x <= kernel_x
    out_height = out_width = 0
    if sensible and padded and min(height, width) > 0:
        out_height = _out_size(height, kernel_y, stride_y, padding_y, dilation_y, ceil_mode)
        out_width = _out_size(width, kernel_x, stride_x, padding_x, dilation_x, ceil_mode)
    if min(out_height, out_width) < 1:
        raise UserError(
            f"max_pool2d of {tuple(x.shape)}: kernel {tuple(kernel_size)}, stride {tuple(stride)}, "
            f"padding {tuple(padding)}, dilation {tuple(dilation)} doesn't fit; padding is at most "
            "half of the kernel"
        )
    out = torch.empty((batch, channels, out_height, out_width))
    native.extension().max_pool2d(
        x.data_ptr(), out.data_ptr(), batch * channels, height, width, out_height, out_width,
        kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, relu,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _plain_max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> Tensor:
    y = F.max_pool2d(
        x, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
    )
    return y.relu_() if relu else y


def _mean_pool(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    if not x.is_contiguous() or not height or not width:
        return _plain_mean_pool(x)
    out = torch.empty((batch, channels, 1, 1))
    native.extension().mean_pool(
        x.data_ptr(), out.data_ptr(), batch * channels, height * width, torch.get_num_threads()
    )
    return out


def _plain_mean_pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


@torch.library.custom_op("tenfold::max_pool2d", mutates_args=())
def _max_pool2d_op(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> Tensor:
    run = _max_pool2d if native.fits(x) else _plain_max_pool2d
    y = run(x, kernel_size, stride, padding, dilation, ceil_mode, relu)
    return y.contiguous(memory_format=_memory_format(x))


@_max_pool2d_op.register_fake
def _(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> Tensor:
    height, width = (
        _out_size(x.shape[2 + i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    )
    shape = (x.shape[0], x.shape[1], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@torch.library.custom_op("tenfold::mean_pool", mutates_args=())
def _mean_pool_op(x: Tensor) -> Tensor:
    return (_mean_pool if native.fits(x) else _plain_mean_pool)(x).contiguous()


@_mean_pool_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], 1, 1)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
