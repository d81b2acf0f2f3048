"""A dense convolution of contiguous images that PyTorch computes in channels_last.

PyTorch's convolution of a few channels into many, such as a network's first one, takes a multiple
of the time when the images are contiguous, and so does its pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv2d_channels_last"]

Pair = tuple[int, int]


def conv2d_channels_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    relu: bool = False,
    pool: tuple[Pair, Pair, Pair, bool] | None = None,
) -> Tensor:
    """Return a convolution with what follows it, computed in channels_last; it is contiguous.

    >>> x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    >>> y = conv2d_channels_last(x, weight, None, pool=((2, 2), (2, 2), (0, 0), False))
    >>> torch.allclose(y, F.max_pool2d(F.conv2d(x, weight), 2), atol=1e-5)
    True

    Args:
        x: `(B, C, H, W)`.
        weight: `(O, C / groups, kH, kW)`.
        bias: `(O,)`.
        stride: as of PyTorch's `conv2d`, like the next three.
        padding: zeros at every side.
        dilation: between elements of the kernel.
        groups: of channels.
        relu: whether a ReLU follows.
        pool: kernel, stride, padding and `ceil_mode` of maximum pooling behind it.
    """
    last = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(last, weight, bias, stride, padding, dilation, groups)
    if pool is not None:
        y = F.max_pool2d(y, *pool[:3], dilation=1, ceil_mode=pool[3])
    # Behind the pooling there is less to do, and maxima of positive parts are the same.
    return (F.relu(y) if relu else y).contiguous()
