"""The compiled kernels for 3-D tensors: convolution in the Winograd domain, and reordering."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native

__all__ = ["channels_first", "channels_last", "empty_in_large_pages", "winograd_conv3d"]

_AXES, _SHORT = {2: 0, 4: 1}, 2  # kinds of axes, see csrc/winograd.h


def winograd_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    columns: Sequence[int],
    outputs: int,
    tile: Sequence[int],
    padding: Sequence[int],
    points: tuple[float, float],
    activation: str,
    pool: Sequence[int],
    short: Sequence[bool],
) -> Tensor:
    """See `tenfold.kernels.winograd.conv3d`; x lies channels-last, and so does the result."""
    batch, channels, *size = x.shape
    full = [length + 2 * p - 2 for length, p in zip(size, padding, strict=True)]
    if not x.is_contiguous(memory_format=torch.channels_last_3d) or weight.dtype != torch.float32:
        raise UserError(
            f"the kernel takes channels-last inputs and float32 weights: these are {weight.dtype}"
        )
    if add is not None and tuple(add.shape) == (batch, outputs, *full):
        add = channels_last(add)
    y = _empty_channels_last(
        batch, outputs, *(length // window for length, window in zip(full, pool, strict=True))
    )
    kinds = [_SHORT if s else _AXES[m] for m, s in zip(tile, short, strict=True)]
    native._module.winograd3d(
        x.data_ptr(), weight.contiguous().data_ptr(), native._pointer("bias", bias, (outputs,)),
        _pointer("add", add, (batch, outputs, *full)), y.data_ptr(), [*columns],
        [batch, channels, outputs, *size, *full, *padding, *kinds, *pool], *points,
        native._ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return y


def channels_last(x: Tensor) -> Tensor:
    """Return `(N, C, D, H, W)` in channels-last order; itself where it is that already."""
    if x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    if not x.is_contiguous() or x.dtype != torch.float32:
        return x.contiguous(memory_format=torch.channels_last_3d)
    batch, channels, *size = x.shape
    y = _empty_channels_last(batch, channels, *size)
    _transpose(x, y, batch, channels, math.prod(size))
    return y


def channels_first(x: Tensor) -> Tensor:
    """Return a channels-last `(N, C, D, H, W)` in contiguous order."""
    batch, channels, *size = x.shape
    y = torch.empty(x.shape)
    _transpose(x, y, batch, math.prod(size), channels)
    return y


def empty_in_large_pages(*shape: int) -> Tensor:
    """Return an unfilled float32 tensor that the system may put into large pages.

    Weights of hundreds of megabytes are read front to back: small pages halve that speed.
    """
    y = torch.empty(shape)
    if native._module is not None:
        native._module.large_pages(y.data_ptr(), y.nbytes)
    return y


def _empty_channels_last(*shape: int) -> Tensor:
    return torch.empty(shape, memory_format=torch.channels_last_3d)


def _transpose(x: Tensor, y: Tensor, batch: int, rows: int, columns: int) -> None:
    threads = torch.get_num_threads()
    native._module.transpose(x.data_ptr(), y.data_ptr(), batch, rows, columns, threads)


def _pointer(name: str, tensor: Tensor | None, shape: Sequence[int]) -> int:
    """Return the address of a tensor that the kernel reads as float32, channels last."""
    if tensor is None:
        return 0
    ordered = tensor.is_contiguous(memory_format=torch.channels_last_3d)
    if tensor.dtype != torch.float32 or tensor.shape != shape or not ordered:
        raise UserError(
            f"{name} has type {tensor.dtype} and shape {tuple(tensor.shape)}: expected "
            f"torch.float32 and {tuple(shape)}"
        )
    return tensor.data_ptr()
