"""One layer under training on few bits: its quantizers, its frozen weights, its finished form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tenfold.methods.freezing import WeightQuantizer
from tenfold.methods.layers import Layer
from tenfold.methods.live_filters import LiveForward
from tenfold.methods.quantizers import Bounds, InputQuantizer
from tenfold.nn.quantized import QuantizedLayer, quantized_like

__all__ = ["TreatedLayer", "misfit", "weight_of"]


class TreatedLayer:
    """Puts quantizers on a layer; keeps what training holds of it beside the model.

    Args:
        name: of the layer.
        layer: Conv1d, Conv2d, Conv3d or Linear.
        bounds: of all layers.
        row: of this layer in `bounds`.
        levels: L.
        rescale: whether it computes in its own units.
        pin_code: whether frozen weights keep their code.
        freezes: whether weights freeze.
        freeze_clipped: whether those beyond the bounds do.
        saving: whether the backward pass leaves out what it needn't compute.

    Attributes:
        covered: freezing is done, and no optimizer touches the weight: nothing is left to do.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        bounds: Bounds,
        row: int,
        levels: int,
        *,
        rescale: bool,
        pin_code: bool,
        freezes: bool,
        freeze_clipped: bool,
        saving: bool,
    ):
        self.name, self.layer, self.row = name, layer, row
        self.quantizer = WeightQuantizer(
            weight_of(layer).detach(),
            bounds,
            row,
            levels,
            rescale=rescale,
            pin_code=pin_code,
            freezes=freezes,
            freeze_clipped=freeze_clipped,
        )
        parametrize.register_parametrization(layer, "weight", self.quantizer)
        self.forward = LiveForward(layer, self.quantizer, saving)
        self._hook = layer.register_forward_pre_hook(InputQuantizer(bounds, row, levels, rescale))
        self.covered = False
        self._kept: Tensor | None = None  # weights ahead of the update, while one is under way

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight."""
        return self.forward.weight

    @property
    def bits(self) -> int:
        """Bits of weight and input."""
        return (self.quantizer.levels - 1).bit_length()

    @property
    def masks_final(self) -> bool:
        """Whether no mask behind the quantizer is still being chosen."""
        chain: Any = self.layer.parametrizations
        return all(getattr(one, "final", True) for one in chain["weight"])

    def update(self, momentum: float | None, rho: float | None) -> None:
        """Follow the distances, and freeze where they are at most `rho` level spacings."""
        if self.covered or not self.quantizer.bounds.known[self.row]:
            return
        weight = self.weight.detach()
        if rho is not None and self._kept is None:
            self._kept = torch.empty_like(weight)
        self.quantizer.update(
            weight,
            weight if self._kept is None else self._kept,
            momentum=momentum,
            limit=None if rho is None else rho / (self.quantizer.levels - 1),
        )

    def restore(self) -> None:
        """Put frozen weights back to where they were before the optimizer's step."""
        if self._kept is not None and not self.covered:
            self.quantizer.restore(self.weight.detach(), self._kept)

    def cover(self) -> None:
        """Note that no optimizer touches the weight from now on."""
        self.covered, self._kept = True, None

    def reset(self, macs: int) -> None:
        """Forget what follows from the weights, which were loaded from a checkpoint."""
        self.covered, self._kept = False, None
        self.forward.macs = macs

    def finish(self, bounds: Tensor) -> QuantizedLayer:
        """Take the quantizers away, and return the layer with integer weights.

        Args:
            bounds: the layer's row.
        """
        done = quantized_like(self.layer, self.bits, rescale=self.quantizer.rescale)
        done.fill(self.quantizer.codes(self.weight.detach()), bounds, self.forward.mask)
        bias = self.layer.bias
        if done.bias is not None and isinstance(bias, Tensor):
            done.bias.copy_(bias.detach())
        self._hook.remove()
        self.forward.remove()
        return done.train(self.layer.training)


def weight_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def misfit(layer: Layer) -> str | None:
    """Say why a layer can't be quantized, or None."""
    weight = layer.weight
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight without calling it"
    if weight.dtype not in (torch.float32, torch.float64) or weight.layout != torch.strided:
        return f"its weight is {weight.dtype}, {weight.layout}: expected float32"
    if not isinstance(layer, nn.Linear) and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    plain = next(kind for kind in _PLAIN if isinstance(layer, kind))
    if type(layer).forward is not plain.forward:
        return f"{type(layer).__name__} has a forward of its own"
    return None


_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
