"""Uniform quantizers with trained clipping bounds, as parametrization and as forward hook.

With bounds l and u and L = 2^b levels (equations as in the authors' code):

    v = (w - l) / (u - l)                  not clipped
    q = round(clip(v, 0, 1) (L - 1))       the integer code; ties go to the even one
    weights       2 q / (L - 1) - 1        in [-1, 1]; with `rescale`  l + (u - l) q / (L - 1)
    activations     q / (L - 1)            in [0, 1];  with `rescale`  l + (u - l) q / (L - 1)

Backward, rounding passes its gradient straight through and clipping passes it where 0 <= v <= 1
(r = 1 there, else 0). For weights without `rescale`, g being the gradient that comes in:

    dw = 2 r g / (u - l)    dl = sum 2 r g (v - 1) / (u - l)    du = -sum 2 r g v / (u - l)

and the same for activations without the factor 2. With `rescale` the value is l + (u - l) q/(L-1),
so that dw = r g, dl = sum g (1 - q/(L-1) + r (v - 1)) and du = sum g (q/(L-1) - r v).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tenfold.errors import UserError
from tenfold.methods.pieces import flat_pieces

__all__ = [
    "Bounds",
    "InputQuantizer",
    "QuantizeInput",
    "QuantizeWeight",
    "codes",
    "quantize_input",
    "quantize_weight",
]

_HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |z|, z standard normal
LEAST_GAP = 1e-6


class Bounds(nn.Module):
    """The trained clipping bounds of all layers, one row a layer: lower and upper of weight, input.

    One tensor for all layers keeps the optimizer's step as cheap as that of one small parameter.
    """

    calibrated: Tensor

    def __init__(self, names: list[str], like: Tensor):
        super().__init__()
        self.names = names
        rows = torch.zeros(len(names), 4, dtype=like.dtype, device=like.device)
        self.values = nn.Parameter(rows)
        self.register_buffer("calibrated", torch.zeros(len(names), dtype=torch.bool))
        self.known = [False] * len(names)  # the same as Python values: forward asks every time

    def forward(self) -> Tensor:
        """Return the bounds `(layers, 4)`."""
        return self.values

    @torch.no_grad()
    def calibrate(self, row: int, weight: Tensor, x: Tensor) -> None:
        """Set a layer's bounds from its weight and its first input, alike on all ranks.

        Raises:
            UserError: the weight is constant, or the input is constant or not finite.
        """
        spread = 3 * weight.std()
        lower, upper = x.min(), 3 * x.std() / _HALF_NORMAL
        found = torch.stack([-spread, spread, *(e.to(weight.dtype) for e in (lower, upper))])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(found, src=0)
        self._refuse(row, found.tolist())
        # Around the version count: layers before this one may have saved their rows for backward.
        self.values.data[row].copy_(found)
        self.calibrated[row] = True
        self.known[row] = True

    def check(self) -> None:
        """Refuse bounds that have met or are not finite.

        Raises:
            UserError: naming the layer.
        """
        for row, values in enumerate(self.values.detach().tolist()):
            if self.known[row]:
                self._refuse(row, values)

    def _refuse(self, row: int, values: list[float]) -> None:
        for what, (lower, upper) in (("weight", values[:2]), ("input", values[2:])):
            if not (math.isfinite(lower) and math.isfinite(upper) and upper - lower >= LEAST_GAP):
                raise UserError(
                    f"layer {self.names[row]}: the bounds of its {what} are {lower:.4g} and "
                    f"{upper:.4g}: expected finite values, the upper one at least {LEAST_GAP:g} "
                    "above the lower; is it constant, or has training diverged? lower bounds_lr, "
                    "or exclude the layer"
                )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.known = self.calibrated.tolist()


def quantize_weight(
    weight: Tensor, lower: Tensor, upper: Tensor, levels: int, rescale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to `levels` values between two bounds.

    Args:
        weight: any shape.
        lower: bound l, a scalar tensor.
        upper: bound u, above `lower`.
        levels: L, 2 ** bits.
        rescale: to values in the weight's own units, instead of [-1, 1].

    Returns:
        The quantized weight, with the gradients of the module's head, and the codes 0 ... L-1,
        both of the weight's shape and type.

    >>> quantize_weight(torch.tensor([-1.0, -0.5, 0.31]), torch.tensor(-0.9), torch.tensor(0.9), 4)
    (tensor([-1.0000, -0.3333,  0.3333]), tensor([0., 1., 2.]))
    """
    zero = torch.zeros_like(lower)
    bounds = torch.stack([lower, upper, zero, zero])
    quantized: Tensor = QuantizeWeight.apply(weight, bounds, levels, rescale, None, None, True)
    with torch.no_grad():
        code = codes(weight, lower, upper, levels, torch.empty_like(weight))
    return quantized, code


def quantize_input(
    x: Tensor, lower: Tensor, upper: Tensor, levels: int, rescale: bool = False
) -> Tensor:
    """Quantize activations to `levels` values between two bounds.

    Args:
        x: any shape.
        lower: bound l, a scalar tensor.
        upper: bound u, above `lower`.
        levels: L, 2 ** bits.
        rescale: to values in the input's own units, instead of [0, 1].

    Returns:
        A tensor of the input's shape, with the gradients of the module's head.
    """
    zero = torch.zeros_like(lower)
    bounds = torch.stack([zero, zero, lower, upper])
    quantized: Tensor = QuantizeInput.apply(x, bounds, levels, rescale)
    return quantized


def codes(weight: Tensor, lower: Tensor, upper: Tensor, levels: int, out: Tensor) -> Tensor:
    """Write the integer codes round(clip(v) (L - 1)) of a weight into `out`, and return it."""
    torch.sub(weight, lower, out=out)
    return out.div_(upper - lower).clamp_(0, 1).mul_(levels - 1).round_()


class QuantizeWeight(torch.autograd.Function):
    """The weights' quantizer; frozen positions keep their code and get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bounds: Tensor,
        levels: int,
        rescale: bool,
        code: Tensor | None,
        frozen: Tensor | None,
        pin_code: bool,
    ) -> Tensor:
        """Return the quantized weight. `bounds` is a row of `Bounds`; `code` uint8, `frozen` bool.

        With `pin_code` frozen positions have the stored code and give no gradient at all; without,
        they give one to the bounds.
        """
        ctx.save_for_backward(weight, bounds, frozen)
        ctx.levels, ctx.rescale, ctx.pin_code = levels, rescale, pin_code
        lower, upper = bounds[0], bounds[1]
        out = torch.empty_like(weight)
        pinned = [code, frozen] if frozen is not None and code is not None and pin_code else []
        for w, o, *rest in flat_pieces(weight, out, *pinned):
            codes(w, lower, upper, levels, o)
            if rest:
                torch.where(rest[1], rest[0], o, out=o)
            if rescale:
                o.mul_((upper - lower) / (levels - 1)).add_(lower)
            else:  # (2 q - (L - 1)) / (L - 1): the integer that is exported, and one division
                o.mul_(2).sub_(levels - 1).div_(levels - 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight and bounds."""
        weight, bounds, frozen = ctx.saved_tensors
        (gradient,) = gradients
        lower, upper = bounds[0], bounds[1]
        to_weight = torch.empty_like(weight)
        sums = torch.zeros(2, dtype=bounds.dtype, device=bounds.device)
        alike = [weight, gradient.to(weight.dtype), to_weight]
        for w, g, out, *rest in flat_pieces(*alike, *([] if frozen is None else [frozen])):
            v = (w - lower).div_(upper - lower)
            if rest and ctx.pin_code:
                g = g.masked_fill(rest[0], 0)
            torch.mul(g, (v >= 0).logical_and_(v <= 1), out=out)
            if ctx.rescale:
                # dl = sum g (1 - Q + r (v - 1)), du = sum g (Q - r v)
                q = v.clamp(0, 1).mul_(ctx.levels - 1).round_().div_(ctx.levels - 1)
                sums[0] += (g * (1 - q)).add_(out * (v - 1)).sum()
                sums[1] += (g * q).sub_(out * v).sum()
            else:
                out.mul_(2 / (upper - lower))
                sums[0] += (out * (v - 1)).sum()
                sums[1] -= (out * v).sum()
            if rest and not ctx.pin_code:
                out.masked_fill_(rest[0], 0)
        to_bounds = torch.cat([sums, torch.zeros_like(sums)])
        return to_weight, to_bounds, None, None, None, None, None


class QuantizeInput(torch.autograd.Function):
    """The activations' quantizer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: Tensor, levels: int, rescale: bool) -> Tensor:
        """Return the quantized input; `bounds` is a row of `Bounds`."""
        ctx.save_for_backward(x, bounds)
        ctx.levels, ctx.rescale = levels, rescale
        lower = bounds[2].to(x.dtype)
        step = ((bounds[3] - bounds[2]) / (levels - 1)).to(x.dtype)
        out = torch.empty_like(x)
        for part, o in flat_pieces(x, out):
            # (x - l) / step and not v (L - 1): what QuantizeLinear computes in exported models
            torch.sub(part, lower, out=o)
            o.div_(step).clamp_(0, levels - 1).round_()
            if rescale:
                o.mul_(step).add_(lower)
            else:
                o.div_(levels - 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bounds."""
        x, bounds = ctx.saved_tensors
        (gradient,) = gradients
        lower, upper = bounds[2].to(x.dtype), bounds[3].to(x.dtype)
        to_x = torch.empty_like(x)
        sums = torch.zeros(2, dtype=bounds.dtype, device=bounds.device)
        for part, g, out in flat_pieces(x, gradient.to(x.dtype), to_x):
            torch.mul(g, (part >= lower).logical_and_(part <= upper), out=out)
            v = (part - lower).div_(upper - lower)
            if ctx.rescale:
                q = v.clamp(0, 1).mul_(ctx.levels - 1).round_().div_(ctx.levels - 1)
                sums[0] += (g * (1 - q)).add_(out * (v - 1)).sum()
                sums[1] += (g * q).sub_(out * v).sum()
            else:
                out.div_(upper - lower)
                sums[0] += (out * v).sub_(out).sum()
                sums[1] -= (out * v).sum()
        return to_x, torch.cat([torch.zeros_like(sums), sums]), None, None


class InputQuantizer:
    """Forward pre-hook of a layer: quantize its input, after setting its bounds at the first one.

    The first input in training mode calibrates, within the forward pass, so that each layer sees
    what the layers before it have quantized. Until then, the layer computes in floats.
    """

    def __init__(self, bounds: Bounds, row: int, levels: int, rescale: bool):
        # An object and not a closure: a copy of the model must use the copy's bounds.
        self.bounds, self.row, self.levels, self.rescale = bounds, row, levels, rescale

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the layer's arguments with the first one quantized."""
        bounds, x = self.bounds, args[0]
        if not bounds.known[self.row]:
            if not layer.training:
                return None
            chain: Any = layer.parametrizations
            bounds.calibrate(self.row, chain["weight"].original.detach(), x.detach())
        row = bounds.values[self.row]
        return (QuantizeInput.apply(x, row, self.levels, self.rescale), *args[1:])
