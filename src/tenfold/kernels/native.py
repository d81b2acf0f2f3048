"""The compiled kernels, where they were built; see csrc/.

`TENFOLD_KERNELS` chooses the instruction set: `avx512`, `avx2`, `neon`, `portable`, or `reference`
for plain PyTorch. Without it the best that this processor runs is taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels.reference import channel_tile

__all__ = [
    "Prepared",
    "conv2d",
    "differentiated",
    "extension",
    "fits",
    "instruction_set",
    "linear",
    "live_gradient",
    "missing",
    "peak",
    "prepare_conv2d",
    "prepare_linear",
    "usable",
]

_ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "gelu": 3, "silu": 4}
_WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def _load() -> tuple[Any, str]:
    """Return the extension or None, and the instruction set or why there is none."""
    wanted = os.environ.get("TENFOLD_KERNELS", "")
    if wanted == "reference":
        return None, "TENFOLD_KERNELS=reference asks for plain PyTorch"
    try:
        # torch brings its OpenMP library; imported first, both share its threads.
        from tenfold import _kernels
    except ImportError as error:
        return None, f"the compiled extension is missing ({error})"
    able = _kernels.instruction_sets()
    if wanted and wanted not in able:
        raise UserError(
            f"TENFOLD_KERNELS={wanted}: expected reference or one that this processor runs: "
            f"{', '.join(able)}"
        )
    _kernels.use(wanted or able[0])
    return _kernels, wanted or able[0]


_module, _state = _load()


def instruction_set() -> str | None:
    """Return the instruction set that the kernels use, or None without compiled kernels."""
    return None if _module is None else _state


def missing() -> str | None:
    """Return why there are no compiled kernels, or None."""
    return _state if _module is None else None


def peak() -> tuple[float, float] | None:
    """Return the most multiply-adds a second of one thread, measured now, or None without kernels.

    The first figure is with all operands in registers, the second with one of them in the
    first-level cache, which is what a sparse product needs.
    """
    return None if _module is None else (_module.peak(False), _module.peak(True))


def extension() -> Any:
    """Return the compiled extension; call it only where `fits` holds."""
    return _module


def fits(x: Tensor) -> bool:
    """Tell whether the compiled kernels take this input: float32 on the CPU."""
    return _module is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def usable(x: Tensor) -> bool:
    """Tell whether to call the kernels directly, past PyTorch's dispatcher, which takes longer."""
    return type(x) is Tensor and fits(x) and not torch.compiler.is_compiling()


class Prepared:
    """A packed layer on inputs of one shape, checked once: call it with an input and an addition.

    The input, and the addition where there is one, must be contiguous float32 tensors on the CPU
    of the shapes that it was prepared for.

    Attributes:
        out_shape: of the result, and of the addition.
        tensors: values, index, scale and bias, which the kernel reads where they are now.
    """

    __slots__ = ("_run", "addresses", "out_shape", "tensors")

    def __init__(
        self, run: Any, out_shape: tuple[int, ...], tensors: tuple[Tensor | None, ...]
    ) -> None:
        self._run, self.out_shape, self.tensors = run, out_shape, tensors
        self.addresses = tuple(map(_address, tensors))

    def __call__(self, x: Tensor, add: Tensor | None) -> Tensor:
        """Return activation(W x + bias + add)."""
        out = torch.empty(self.out_shape)
        self._run(x.data_ptr(), _address(add), out.data_ptr(), torch.get_num_threads())
        return out

    def reads(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Tell whether these are the tensors it was prepared with, where they were then."""
        for now, then, address in zip(tensors, self.tensors, self.addresses, strict=True):
            if now is not then or (now is not None and now.data_ptr() != address):
                return False
        return True


def prepare_conv2d(
    shape: Sequence[int],
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    pattern: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Prepared:
    """Check a convolution of inputs of a shape; see `tenfold.kernels.nm.conv2d`."""
    batch, channels, height, width = shape
    blocks, rows, slots = values.shape
    out_height = (height + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    block = slots // pattern[0] * pattern[1]
    weights = kernel_size[0] * kernel_size[1] * (channels // groups)
    fits = -(-weights // block) == blocks and weights % pattern[1] == 0 and rows % groups == 0
    if not fits or out_height < 1 or out_width < 1:
        raise UserError(
            f"input {tuple(shape)} doesn't fit a packed convolution of {tuple(values.shape)} "
            f"values, kernel {tuple(kernel_size)} and {groups} groups"
        )
    run = _module.conv2d(
        values.data_ptr(), index.data_ptr(), _pointer("scale", scale, (rows,)),
        _pointer("bias", bias, (rows,)), batch, channels, height, width, rows, out_height,
        out_width, *kernel_size, *stride, *padding, *dilation, groups, channel_tile(pattern[1]),
        block, slots, _WEIGHT_TYPES[values.dtype], _ACTIVATIONS[activation],
    )  # fmt: skip
    return Prepared(run, (batch, rows, out_height, out_width), (values, index, scale, bias))


def prepare_linear(
    shape: Sequence[int],
    values: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    pattern: Sequence[int],
    activation: str,
) -> Prepared:
    """Check a linear layer on inputs of a shape; see `tenfold.kernels.nm.linear`."""
    features = shape[-1]
    blocks, rows, slots = values.shape
    block = slots // pattern[0] * pattern[1]
    if -(-features // block) != blocks or features % pattern[1]:
        raise UserError(
            f"input {tuple(shape)} doesn't fit a packed linear layer of {tuple(values.shape)} "
            "values"
        )
    run = _module.linear(
        values.data_ptr(), index.data_ptr(), _pointer("scale", scale, (rows,)),
        _pointer("bias", bias, (rows,)), math.prod(shape[:-1]), features, rows, features, block,
        slots, _WEIGHT_TYPES[values.dtype], _ACTIVATIONS[activation],
    )  # fmt: skip
    return Prepared(run, (*shape[:-1], rows), (values, index, scale, bias))


def differentiated(*tensors: Tensor) -> bool:
    """Tell whether a gradient is wanted, which the kernels don't compute."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
    prepared = prepare_conv2d(
        x.shape, values, index, scale, bias, pattern, kernel_size, stride, padding, dilation,
        groups, activation,
    )  # fmt: skip
    return _run(prepared, x, add)


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
    return _run(prepare_linear(x.shape, values, index, scale, bias, pattern, activation), x, add)


def _run(prepared: Prepared, x: Tensor, add: Tensor | None) -> Tensor:
    if add is not None:
        add = add.contiguous()
        _pointer("add", add, prepared.out_shape)
    return prepared(x.contiguous(), add)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def live_gradient(
    x: Tensor,
    gradient: Tensor,
    live: Tensor,
    tables: Sequence[Tensor],
    out: Tensor,
    size: Sequence[int],
    out_size: Sequence[int],
    stride: Sequence[int],
    span: Sequence[int],
) -> None:
    """Write the gradient of a weight at its live places into `out`; see `tenfold.kernels.live`.

    Args:
        x: channels last.
        gradient: channels last.
        live: bool, `out`'s shape and layout.
        tables: channel, row and column of the weights of an output, int32.
        out: zeros.
        size: images, height, width, channels.
        out_size: height, width, outputs.
        stride: of rows and columns.
        span: first row and how many, first column and how many, of the kernel.
    """
    weights = live.numel() // max(1, live.shape[0])
    _module.live_gradient(
        x.data_ptr(), gradient.data_ptr(), live.data_ptr(), *[t.data_ptr() for t in tables],
        out.data_ptr(), *size, *out_size, weights, *stride, *span, torch.get_num_threads(),
    )  # fmt: skip


def _pointer(name: str, tensor: Tensor | None, shape: Sequence[int]) -> int:
    """Return the address of a tensor that the kernel reads as float32 of that shape."""
    if tensor is None:
        return 0
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        raise UserError(
            f"{name} has type {tensor.dtype} and shape {tuple(tensor.shape)}: expected "
            f"torch.float32 and {tuple(shape)}"
        )
    return tensor.data_ptr()
