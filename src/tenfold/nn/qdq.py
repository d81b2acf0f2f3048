"""Quantized layers in the form in which other engines run them on integers.

That form is QuantizeLinear and DequantizeLinear around a float operation (QDQ). With input codes k
and integer weights i, a layer's output is, for output o,

    A_o sum(k i) + C_o sum(k) + input_offset S_o + bias_o

A DequantizeLinear of i by the scales A stands before the operation. Up to 7 bits, i is the odd
number m of `tenfold.nn.quantized`. With 8 bits m doesn't fit into a byte: i = (m - 1) / 2 then, and
the rest is in C, as is what the weights' offset makes of the input. S is the sum of the weights
that meet the input and not its padding: one number an output, or a small convolution of ones.
Scales are positive: the sign of one that isn't goes into i.

Layers with removed weights that would not be zeros of i have no such form. They keep float weights,
whose values are exact too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.nn.quantized import QuantizedLayer

__all__ = ["QdqLayer", "to_qdq"]

_LEAST_SCALE = 1e-30  # an engine may divide by it
# Inputs are clipped at L - 1 less this, in steps: the last code all the same, as it is rounded. An
# engine that can tell the clip from the end of the codes' range doesn't merge it with its
# neighbours; OpenVINO else drops offsets below 0.003 steps.
_BELOW_TOP = 0.25


@torch.library.custom_op("tenfold::quantize_input", mutates_args=())
def _quantize(x: Tensor, lower: Tensor, step: Tensor, top: Tensor, shift: bool) -> Tensor:
    """Return the codes of an input as floats; `shift` says whether `lower` is other than zero."""
    return ((x - lower).clamp(torch.zeros_like(top), top) / step).round()


@_quantize.register_fake
def _(x: Tensor, lower: Tensor, step: Tensor, top: Tensor, shift: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tenfold::dequantize_weight", mutates_args=())
def _dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """Return integers `(O, ...)` times a scale an output, `(O,)`."""
    return integers.to(scale.dtype) * scale.reshape(-1, *[1] * (integers.dim() - 1))


@_dequantize.register_fake
def _(integers: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(integers, dtype=scale.dtype)


class QdqLayer(nn.Module):
    """A quantized layer for export; computes what the given one does.

    Args:
        layer: is not changed.
    """

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self.operate, self.beside = layer.operate, layer.beside
        self.over_ones: Any = getattr(layer, "over_ones", None)
        self.shift = bool(layer.lower != 0)
        outputs = layer.shape[0]
        ones = layer.step.new_ones(outputs)
        scale, offset = layer.weight_scale * ones, layer.weight_offset * ones
        removed = bool((layer.integers == 0).any())
        self.in_floats = removed and (layer.bits == 8 or bool(offset.any()))
        bias = layer.step.new_zeros(outputs) if layer.bias is None else layer.bias.clone()
        constants: dict[str, Tensor | None] = {
            "lower": layer.lower.clone(),
            "step": layer.step.clone(),
            "top": layer.step * (layer.levels - 1 - _BELOW_TOP),
            "bias": bias if layer.bias is not None or layer.rescale else None,
            "borders": None,
        }
        if self.in_floats:
            constants |= {
                "weight": layer.weight,
                "input_scale": layer.input_scale.clone(),
                "input_offset": layer.input_offset.clone(),
            }
        else:
            constants |= self._integer_form(layer, scale, offset, constants["bias"])
        for name, value in constants.items():
            self.register_buffer(name, value)
        sums = constants.get("sum_scale")
        self.has_sums = sums is not None and bool(sums.any())
        if self.has_sums:
            # One output a group would do; several groups take the full kernel.
            rows = 1 if getattr(layer, "groups", 1) == 1 else outputs
            shape = (rows, *layer.shape[1:])
            self.register_buffer("ones", torch.ones(shape, dtype=torch.int8))
            self.register_buffer("unit", layer.step.new_ones(rows))

    @staticmethod
    def _integer_form(
        layer: QuantizedLayer, scale: Tensor, offset: Tensor, bias: Tensor | None
    ) -> dict[str, Tensor | None]:
        borders = None
        if layer.rescale and _pads(layer):
            borders = layer.weight.sum(dim=1, keepdim=True) * layer.input_offset
        elif bias is not None:
            bias = bias + layer.weight.flatten(1).sum(dim=1) * layer.input_offset
        product, sums = scale * layer.input_scale, offset * layer.input_scale
        sign = torch.where(product < 0, -1, 1)
        integers = layer.integers.to(torch.int16) * sign.to(torch.int16).reshape(
            -1, *[1] * (len(layer.shape) - 1)
        )
        product = product.abs().clamp(min=_LEAST_SCALE)
        if layer.bits == 8:
            integers = torch.div(integers - 1, 2, rounding_mode="floor")  # -128 ... 127
            sums, product = sums + product, 2 * product
        return {
            "integers": integers.to(torch.int8),
            "scale": product,
            "sum_scale": sums,
            "bias": bias,
            "borders": borders,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map the input to the output."""
        given: Any = self  # its buffers
        operators: Any = torch.ops.tenfold
        k = operators.quantize_input(x, given.lower, given.step, given.top, self.shift)
        if self.in_floats:
            x = k * given.input_scale + given.input_offset
            return self.operate(x, given.weight, given.bias)
        weight = operators.dequantize_weight(given.integers, given.scale)
        total = self.operate(k, weight, None)
        if self.has_sums:
            ones = operators.dequantize_weight(given.ones, given.unit)
            total = total + self.operate(k, ones, None) * self.beside(given.sum_scale)
        if given.borders is not None:
            total = total + self.over_ones(k.new_ones(1, 1, *k.shape[2:]), given.borders)
        # By itself: ONNX Runtime would round the bias of a convolution to an integer.
        return total if given.bias is None else total + self.beside(given.bias)


def to_qdq(model: nn.Module) -> nn.Module:
    """Return a copy of a model with every quantized layer in its form for export.

    A model without such layers comes back itself.
    """
    import copy

    if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
        return model
    if isinstance(model, QuantizedLayer):
        return QdqLayer(model)
    changed = copy.deepcopy(model)
    for parent in list(changed.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, QuantizedLayer):
                setattr(parent, name, QdqLayer(child).train(child.training))
    return changed


def _pads(layer: QuantizedLayer) -> bool:
    padding = getattr(layer, "padding", 0)
    if isinstance(padding, str):
        return padding != "valid" and any(length > 1 for length in layer.shape[2:])
    return any(padding) if isinstance(padding, tuple) else bool(padding)
