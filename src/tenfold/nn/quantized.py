"""Convolutions and linear layers with integer weights on a few bits, for inference.

With b bits there are L = 2^b levels. The weight is kept as odd integers m = 2 q - (L - 1), where q
is the code 0 ... L-1; a weight that a mask has removed is 0, which no code is. The layer computes

    k  = clip(round((x - lower) / step), 0, L - 1)         ties to the even one
    y  = layer(input_scale k + input_offset, weight_scale m + weight_offset) + bias

where a removed weight stays exactly 0 and padding adds zeros to the layer's input. Without offsets
the sum runs over whole numbers, which single precision holds exactly up to 2^24. All tensors are
buffers, since such a layer isn't trained. On disk a weight takes b bits: see `pack_codes`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.nn.bits import pack_bits, unpack_bits
from tenfold.nn.blocks import nm_pattern
from tenfold.nn.packing import pack_nm, unpack_nm

__all__ = [
    "QUANTIZED",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedLayer",
    "QuantizedLinear",
    "pack_codes",
    "quantized_like",
    "unpack_codes",
]

FloatLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class QuantizedLayer(nn.Module):
    """What the quantized layers have in common; zero codes until it is filled.

    Args:
        layer: a convolution or linear layer, for its sizes.
        bits: 2 to 8, of weights and input.
        rescale: whether weights and inputs have their own units, or [-1, 1] and [0, 1].
        bias: whether there is one; by default as the layer has.
        per_channel: whether each output has a weight scale and offset of its own.

    Raises:
        UserError: bits out of range.
    """

    integers: Tensor
    weight_scale: Tensor
    weight_offset: Tensor
    lower: Tensor
    step: Tensor
    input_scale: Tensor
    input_offset: Tensor
    bias: Tensor | None
    kind: ClassVar[type[nn.Module]]

    def __init__(
        self,
        layer: FloatLayer,
        bits: int,
        *,
        rescale: bool = False,
        bias: bool | None = None,
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UserError(f"bits={bits!r}: expected an int from 2 to 8")
        self.bits, self.levels, self.rescale = bits, 2**bits, rescale
        self.shape = tuple(layer.weight.shape)
        outputs, device = self.shape[0], layer.weight.device
        whole = torch.int16 if bits == 8 else torch.int8
        integers = torch.full(self.shape, 1 - self.levels, dtype=whole, device=device)
        self.register_buffer("integers", integers)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        rows = outputs if per_channel else 1
        for name in ("weight_scale", "weight_offset"):
            self.register_buffer(name, torch.zeros(rows, dtype=dtype, device=device))
        for name in ("lower", "step", "input_scale", "input_offset"):
            self.register_buffer(name, torch.ones((), dtype=dtype, device=device))
        has_bias = layer.bias is not None if bias is None else bias
        zeros = torch.zeros(outputs, dtype=dtype, device=device)
        self.register_buffer("bias", zeros if has_bias else None)

    @torch.no_grad()
    def fill(self, codes: Tensor, bounds: Tensor, mask: Tensor | None = None) -> Self:
        """Take over codes and clipping bounds.

        Args:
            codes: `(O, ...)`, 0 ... L-1.
            bounds: lower and upper of the weight, lower and upper of the input.
            mask: of the weight's shape; zero where a weight is removed.

        Raises:
            UserError: codes out of range, or of another shape.
        """
        if tuple(codes.shape) != self.shape:
            raise UserError(f"codes of shape {tuple(codes.shape)}: expected {self.shape}")
        if int(codes.min()) < 0 or int(codes.max()) >= self.levels:
            raise UserError(
                f"codes from {int(codes.min())} to {int(codes.max())}: expected 0 to "
                f"{self.levels - 1}, {self.bits} bits"
            )
        integers = 2 * codes.to(torch.int16) - (self.levels - 1)
        if mask is not None:
            integers = integers.masked_fill(mask == 0, 0)
        self.integers.copy_(integers)
        spaces = self.levels - 1
        weight_lower, weight_upper, lower, upper = bounds.to(self.step.dtype)
        self.lower.copy_(lower)
        self.step.copy_((upper - lower) / spaces)
        if self.rescale:
            self.weight_scale.copy_((weight_upper - weight_lower) / (2 * spaces))
            self.weight_offset.copy_((weight_upper + weight_lower) / 2)
            self.input_scale.copy_(self.step)
            self.input_offset.copy_(lower)
        else:
            self.weight_scale.fill_(1 / spaces)
            self.weight_offset.zero_()
            self.input_scale.fill_(1 / spaces)
            self.input_offset.zero_()
        return self

    @property
    def weight(self) -> Tensor:
        """The weight in floats, in the layer's own shape; computed anew at each reading."""
        scale, offset = (self._per_output(t) for t in (self.weight_scale, self.weight_offset))
        integers = self.integers.to(self.step.dtype)
        # Not m * scale + offset: a removed weight is exactly zero.
        return torch.where(integers == 0, integers, integers * scale + offset)

    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Take in an affine map `scale y + shift` of the outputs, both `(O,)`; codes stay."""
        ones = torch.ones_like(scale)
        self.weight_scale = self.weight_scale * ones * scale
        self.weight_offset = self.weight_offset * ones * scale
        bias = torch.zeros_like(scale) if self.bias is None else self.bias
        self.bias = bias * scale + shift

    def input_codes(self, x: Tensor) -> Tensor:
        """Return the input's codes k as floats, of the input's shape."""
        k = ((x - self.lower.to(x.dtype)) / self.step.to(x.dtype)).round()
        return k.clamp(0, self.levels - 1)

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the float layer with another weight and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map the input to the output, both of the float layer's shapes."""
        k = self.input_codes(x)
        if self.rescale:
            x = k * self.input_scale.to(x.dtype) + self.input_offset.to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return self.operate(x, self.weight.to(x.dtype), bias)
        total = self.operate(k, self.integers.to(x.dtype), None)
        total = total * self.beside((self.weight_scale * self.input_scale).to(x.dtype))
        return total if self.bias is None else total + self.beside(self.bias.to(x.dtype))

    def _per_output(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (len(self.shape) - 1))

    def beside(self, values: Tensor) -> Tensor:
        """Shape values, one an output, so that they broadcast against the layer's result."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        sizes = "x".join(str(length) for length in self.shape)
        return f"{sizes}, bits={self.bits}{'' if self.bias is not None else ', bias=False'}"


class QuantizedLinear(QuantizedLayer):
    """A linear layer with integer weights."""

    kind = nn.Linear

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x weight^T + bias`."""
        return functional.linear(x, weight, bias)

    def beside(self, values: Tensor) -> Tensor:
        """Return the values as they are: outputs are the last axis."""
        return values


class _QuantizedConv(QuantizedLayer):
    """What quantized convolutions have in common."""

    function: ClassVar[Any]

    def __init__(
        self,
        layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        bits: int,
        *,
        rescale: bool = False,
        bias: bool | None = None,
        per_channel: bool = False,
    ) -> None:
        super().__init__(layer, bits, rescale=rescale, bias=bias, per_channel=per_channel)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of `x` `(B, C, ...)` with a weight."""
        result: Tensor = type(self).function(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )
        return result

    def over_ones(self, ones: Tensor, weight: Tensor) -> Tensor:
        """Convolve `(1, 1, ...)` with a weight of one input channel, without groups."""
        result: Tensor = type(self).function(
            ones, weight, None, self.stride, self.padding, self.dilation, 1
        )
        return result

    def beside(self, values: Tensor) -> Tensor:
        """Return the values with an axis of length 1 behind them for each axis of the kernel."""
        return values.reshape(-1, *[1] * (len(self.shape) - 2))


class QuantizedConv1d(_QuantizedConv):
    """A 1-D convolution with integer weights."""

    kind = nn.Conv1d
    function = staticmethod(functional.conv1d)


class QuantizedConv2d(_QuantizedConv):
    """A 2-D convolution with integer weights."""

    kind = nn.Conv2d
    function = staticmethod(functional.conv2d)


class QuantizedConv3d(_QuantizedConv):
    """A 3-D convolution with integer weights."""

    kind = nn.Conv3d
    function = staticmethod(functional.conv3d)


QUANTIZED: dict[str, type[QuantizedLayer]] = {
    one.__name__: one
    for one in (QuantizedConv1d, QuantizedConv2d, QuantizedConv3d, QuantizedLinear)
}


def quantized_like(layer: nn.Module, bits: int, **arguments: Any) -> QuantizedLayer:
    """Return an unfilled quantized layer of the kind and sizes of a float one.

    Args:
        layer: Conv1d, Conv2d, Conv3d or Linear.
        bits: 2 to 8.
        arguments: `rescale`, `bias`, `per_channel` of `QuantizedLayer`.

    Raises:
        UserError: a layer of another kind.
    """
    for one in QUANTIZED.values():
        if isinstance(layer, one.kind):
            return one(layer, bits, **arguments)  # type: ignore[arg-type]
    raise UserError(
        f"{type(layer).__name__} has no quantized form: expected Conv1d, Conv2d, Conv3d or Linear"
    )


def pack_codes(integers: Tensor, bits: int) -> tuple[dict[str, Tensor], list[int] | None]:
    """Pack a layer's integers for a file: b bits a weight, and the places of those that are kept.

    Args:
        integers: odd numbers m, or 0 for a removed weight, `(O, ...)`.
        bits: b.

    Returns:
        `codes`, uint8; where weights are removed also `index`, their places: as in `pack_nm` when
        every block of M has exactly N weights, else one bit a weight. And [N, M], or None.
    """
    integers = integers.detach().cpu()
    offset = 2**bits - 1
    removed = integers == 0
    if not bool(removed.any()):
        return {"codes": pack_bits((integers + offset) // 2, bits)}, None
    pattern = nm_pattern(integers)
    if pattern is not None:
        n, m = pattern
        values, index = pack_nm(integers, n, m)
        if bool((values != 0).all()):
            return {"codes": pack_bits((values + offset) // 2, bits), "index": index}, [n, m]
    kept = integers[~removed]
    return {"codes": pack_bits((kept + offset) // 2, bits), "index": pack_bits(~removed, 1)}, None


def unpack_codes(
    codes: Tensor,
    index: Tensor | None,
    bits: int,
    shape: tuple[int, ...],
    pattern: tuple[int, int] | None,
) -> Tensor:
    """Undo `pack_codes`; returns the integers of `shape`, int8 or, with 8 bits, int16.

    Raises:
        UserError: sizes that don't agree.
    """
    numel = math.prod(shape)
    kept = numel
    marks = None
    if index is not None and pattern is None:
        marks = unpack_bits(index, 1, numel).bool()
        kept = int(marks.sum())
    elif pattern is not None:
        kept = numel // pattern[1] * pattern[0]
    dtype = torch.int16 if bits == 8 else torch.int8
    found = unpack_bits(codes, bits, kept).to(torch.int16)
    values: Tensor = (found * 2 - (2**bits - 1)).to(dtype)
    if pattern is not None and index is not None:
        dense: Tensor = unpack_nm(values, index, *pattern, shape)
        return dense
    if marks is None:
        return values.reshape(shape)
    integers = torch.zeros(numel, dtype=dtype)
    integers[marks] = values
    return integers.reshape(shape)
