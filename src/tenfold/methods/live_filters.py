"""Leave out of the backward pass what its result would not need: the gradients of inert weights.

A weight is inert in a step when its gradient is zero whatever the loss: it is frozen with its code,
clipped by the bounds (where a clipped weight has no part in their gradients either), or masked out.
What is left out changes no other gradient:

- filters of inert weights alone drop out of the product that makes the weight's gradient;
- on a CPU with compiled kernels, where few weights are live, each of them is summed up by itself;
- a layer whose weights are all frozen computes none, and its weight has no gradient at all.

Clipped weights may come back by weight decay or moving bounds, so the weights are looked through
after every step, and again whenever weight, bounds or frozen set have been changed since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tenfold.kernels import live as kernel
from tenfold.kernels import native
from tenfold.methods.freezing import WeightQuantizer
from tenfold.methods.pieces import flat_pieces, rows_of

__all__ = ["LiveForward", "LiveProduct", "Survey", "survey"]

# Below this share of filters without a live weight, gathering the others costs what it saves.
LEAST_DEAD = 0.3
# Up to this share of live weights, summing them up one by one is clearly faster than all of them.
MOST_LIVE = {nn.Conv2d: 0.25, nn.Linear: 0.15}


@dataclass(frozen=True)
class Survey:
    """How things stand with the filters of one layer.

    Attributes:
        live: `(O,)` int32, how many weights of the filter aren't inert.
        frozen: `(O,)` int32, how many of its weights are frozen and not masked out.
        free: `(O,)` int32, how many are neither frozen nor masked out.
    """

    live: Tensor
    frozen: Tensor
    free: Tensor


@torch.no_grad()
def survey(
    weight: Tensor,
    quantizer: WeightQuantizer,
    mask: Tensor | None = None,
    places: Tensor | None = None,
) -> Survey:
    """Look through the filters of a layer.

    Args:
        weight: `(O, ...)`, latent.
        quantizer: its own.
        mask: of its shape, zero where the weight is masked out.
        places: of its shape, bool; is filled with which weights aren't inert.
    """
    lower, upper = quantizer.bounds.values[quantizer.row, :2]
    frozen = quantizer.frozen
    assert frozen is not None
    free = torch.empty_like(frozen)
    live = torch.empty_like(frozen) if places is None else places
    given = [weight, frozen, free, live, *([] if mask is None else [mask])]
    for w, stuck, open_, alive, *masked in flat_pieces(*given):
        torch.logical_not(stuck, out=open_)
        if masked:
            open_.logical_and_(masked[0] != 0)
        if quantizer.rescale:  # clipped weights have a part in the bounds' gradients then
            alive.copy_(open_)
            continue
        v = (w - lower).div_(upper - lower)  # compared as in the quantizer's backward
        torch.ge(v, 0, out=alive)
        alive.logical_and_(v <= 1).logical_and_(open_)
    counts = rows_of(free, weight).sum(dim=1, dtype=torch.int32)
    kept = weight[0].numel() if mask is None else (mask != 0).flatten(1).sum(1, dtype=torch.int32)
    return Survey(rows_of(live, weight).sum(dim=1, dtype=torch.int32), kept - counts, counts)


class LiveForward:
    """Stands in for a layer's `forward`, computes the same, and saves work in the backward pass.

    It is put on the layer itself, `layer.forward`, and taken away by `remove`.

    Attributes:
        saving: whether work is to be saved.
        macs: multiply-adds of the layer for one sample, known after the first forward pass.
        live: indices of the filters that need a gradient; None: all are computed.
        places: which weights need one, bool, where they are few; None: by filters.
        whole: every weight is frozen or masked out, for good.
    """

    def __init__(self, layer: nn.Module, quantizer: WeightQuantizer, saving: bool):
        self.layer, self.quantizer, self.saving = layer, quantizer, saving
        self.macs = 0
        self.live: Tensor | None = None
        self.places: Tensor | None = None
        self.whole = False
        self._seen: tuple[int, ...] | None = None
        self._counts: Tensor | None = None
        self._places: Tensor | None = None
        layer.forward = self

    def remove(self) -> None:
        """Give the layer its own `forward` back."""
        del self.layer.forward

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight."""
        chain: Any = self.layer.parametrizations
        latent: nn.Parameter = chain["weight"].original
        return latent

    @property
    def mask(self) -> Tensor | None:
        """The mask that follows the quantizer, if one does."""
        chain: Any = self.layer.parametrizations
        for one in chain["weight"]:
            mask = getattr(one, "mask", None)
            if isinstance(mask, Tensor):
                return mask
        return None

    def survey(self) -> Survey:
        """Look through the filters."""
        weight = self.weight.detach()
        if self.saving and self._places is None and _in_places(self.layer, weight):
            self._places = torch.zeros_like(weight, dtype=torch.bool)
        return survey(weight, self.quantizer, self.mask, self._places)

    @property
    def share_computed(self) -> float:
        """Share of the product for the weight's gradient that the next backward pass computes."""
        if not self.saving:
            return 1.0
        self.refresh()
        if self.places is not None and self._counts is not None:
            return int(self._counts.sum()) / max(1, self.weight.numel())
        return 1.0 if self.live is None else len(self.live) / max(1, len(self.weight))

    def refresh(self) -> None:
        """Look again if anything has changed since the last time: a checkpoint was loaded, say."""
        if not self.quantizer.any_frozen:
            self.live = self.places = self._counts = self._seen = None
            self.whole = False
        elif self._versions() != self._seen:
            found = self.survey()
            self.choose(found.live.cpu(), int(found.free.sum()))

    def choose(self, live: Tensor, free: int) -> None:
        """Choose the filters that need a gradient in the next step.

        Args:
            live: how many weights of each filter aren't inert, `(O,)` on the CPU.
            free: how many weights are neither frozen nor masked out.
        """
        self.whole = free == 0
        self._seen = self._versions()
        linear = isinstance(self.layer, nn.Linear)
        most = MOST_LIVE[nn.Linear if linear else nn.Conv2d] * self.weight.numel()
        self.places = self._places if 0 < int(live.sum()) <= most else None
        if self._counts is not None and torch.equal(live > 0, self._counts > 0):
            self._counts = live
            return
        self._counts = live
        found = live.nonzero().flatten()
        few = len(found) <= (1 - LEAST_DEAD) * len(live) and self._in_rows()
        self.live = found.to(self.weight.device) if few or len(found) == 0 else None

    def _versions(self) -> tuple[int, ...]:
        tensors = [self.weight, self.quantizer.frozen, self.mask]
        if not self.whole:  # frozen codes don't depend on the bounds, which go on moving
            tensors.append(self.quantizer.bounds.values)
        return tuple(tensor._version for tensor in tensors if tensor is not None)

    def _in_rows(self) -> bool:
        layer: Any = self.layer
        return isinstance(layer, nn.Linear) or (
            layer.groups == 1 and not isinstance(layer.padding, str)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layer's own `forward` does."""
        live, places = None, None
        if self.saving and torch.is_grad_enabled():
            self.refresh()
            live, places = self.live, self.places
        plain = live is None and places is None
        out = self._plain(x) if plain else self._saving(x, live, places)
        if not self.macs:
            weight = self.weight
            self.macs = out[0].numel() * weight[0].numel() if len(out) else 0
        return out

    def _plain(self, x: Tensor) -> Tensor:
        result: Tensor = type(self.layer).forward(self.layer, x)
        return result

    def _saving(self, x: Tensor, live: Tensor | None, places: Tensor | None) -> Tensor:
        layer: Any = self.layer
        # Under DDP every parameter must get a gradient: there it is zeros, which cost no product.
        self.quantizer.constant = self.whole and not _distributed()
        try:
            weight, bias = layer.weight, layer.bias
        finally:
            self.quantizer.constant = False
        linear = isinstance(layer, nn.Linear)
        if not weight.requires_grad or (not linear and isinstance(layer.padding, str)):
            # Autograd leaves the product out by itself, or can't be told how to do less of it.
            if linear:
                return nn.functional.linear(x, weight, bias)
            convolved: Tensor = layer._conv_forward(x, weight, bias)
            return convolved
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        how = None if linear else (layer.stride, layer.padding, layer.dilation, layer.groups)
        if places is not None and not kernel.able(x, weight):
            places = None
            if live is None:
                return self._plain(x)
        result: Tensor = LiveProduct.apply(x, weight, bias, live, places, how)
        return result


class LiveProduct(torch.autograd.Function):
    """A convolution or linear layer that computes the weight's gradient for some filters alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        live: Tensor | None,
        places: Tensor | None,
        conv: Any,
    ) -> Tensor:
        """Return the layer's output.

        Args:
            ctx: of autograd.
            x: the input.
            weight: `(O, ...)`.
            bias: `(O,)` or None.
            live: indices of the filters that need a gradient, or None for all.
            places: which weights need one, bool, or None for whole filters.
            conv: stride, padding, dilation and groups; None for a linear layer.
        """
        # Without a live filter nothing of the input is needed afterwards.
        needed = places is not None or live is None or len(live) > 0
        ctx.save_for_backward(x if needed else None, weight, live, places)
        ctx.conv, ctx.x_shape, ctx.has_bias = conv, x.shape, bias is not None
        if conv is None:
            return nn.functional.linear(x, weight, bias)
        stride, padding, dilation, groups = conv
        zeros = [0] * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight (zeros in filters without a live weight), bias."""
        x, weight, live, places = ctx.saved_tensors
        (gradient,) = gradients
        backward = _linear_backward if ctx.conv is None else _conv_backward
        wanted = ctx.needs_input_grad[1]
        chosen = live if wanted and x is not None and places is None else None
        to_x, of_live = backward(ctx, gradient, x, weight, chosen)
        to_weight = None
        if wanted and places is not None:
            to_weight = kernel.live_gradient(x, gradient, places, *(ctx.conv or ())[:3])
        elif wanted:
            to_weight = torch.zeros_like(weight)
            if of_live is not None:
                to_weight[live] = of_live
        to_bias = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            axis = -1 if ctx.conv is None else 1
            to_bias = gradient.sum(
                dim=[d for d in range(gradient.dim()) if d != axis % gradient.dim()]
            )
        return to_x, to_weight, to_bias, None, None, None


def _linear_backward(
    ctx: Any, gradient: Tensor, x: Tensor | None, weight: Tensor, live: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    to_x = gradient @ weight if ctx.needs_input_grad[0] else None
    if x is None or live is None:
        return to_x, None
    chosen = gradient.index_select(-1, live).flatten(0, -2)
    return to_x, chosen.T @ x.flatten(0, -2)


def _conv_backward(
    ctx: Any, gradient: Tensor, x: Tensor | None, weight: Tensor, live: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = ctx.conv
    zeros = [0] * len(stride)

    def backward(g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            g, x, w, None, stride, padding, dilation, False, zeros, groups, mask
        )

    to_x = of_live = None
    if ctx.needs_input_grad[0]:
        shaped = gradient.new_empty(1).expand(ctx.x_shape) if x is None else x
        to_x = backward(gradient, shaped, weight, [True, False, False])[0]
    if x is not None and live is not None:
        chosen = gradient.index_select(1, live)
        of_live = backward(chosen, x, weight[live], [False, True, False])[1]
    return to_x, of_live


def _in_places(layer: nn.Module, weight: Tensor) -> bool:
    """Tell whether the compiled kernel may take a layer's weight one by one."""
    conv = isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str)
    able = native.missing() is None and weight.device.type == "cpu"
    return able and weight.dtype == torch.float32 and (conv or isinstance(layer, nn.Linear))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
