"""Freezing weights that have settled: each one's distance to its level, and when it is pinned.

In iteration n (from 0), with v, q, L as in `quantizers` and D = |v - q / (L - 1)|, v not clipped:

    n <= 1:  d = D
    n >  1:  d = beta d + (1 - beta) D;  where q has changed:  d = 1 / (L - 1), one level spacing
    n >  W:  freeze where d <= rho(n) / (L - 1), with W and rho as in `freezing_schedule`

A frozen weight stays frozen, with the value that it had in the forward pass of the iteration in
which it froze.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.methods.pieces import flat_pieces
from tenfold.methods.quantizers import Bounds, QuantizeWeight, codes

__all__ = ["WeightQuantizer"]


class WeightQuantizer(nn.Module):
    """Parametrization of a weight by its quantized form; keeps what freezing needs to know of it.

    Args:
        weight: that is to be quantized; gives shape, type and place.
        bounds: of all layers.
        row: of this layer in `bounds`.
        levels: L.
        rescale: to the weight's own units.
        pin_code: frozen weights keep their code; else their latent value alone.
        freezes: whether weights will be frozen at all.
        freeze_clipped: count weights beyond the bounds as lying on their outermost level.
    """

    bounds: Bounds
    distance: Tensor | None
    code: Tensor | None
    frozen: Tensor | None
    elementwise = True  # every weight stays in its place, so that a mask may follow

    def __init__(
        self,
        weight: Tensor,
        bounds: Bounds,
        row: int,
        levels: int,
        *,
        rescale: bool,
        pin_code: bool,
        freezes: bool,
        freeze_clipped: bool = False,
    ):
        super().__init__()
        # Not a submodule: the bounds live on the model, under the method's own name.
        object.__setattr__(self, "bounds", bounds)
        self.row, self.levels = row, levels
        self.rescale, self.pin_code = rescale, pin_code
        self.freeze_clipped = freeze_clipped
        self.any_frozen = False
        self.constant = False  # set where no gradient is wanted: then there is none to compute
        like = weight.detach() if freezes else None
        for name, dtype in (
            ("distance", weight.dtype),
            ("code", torch.uint8),
            ("frozen", torch.bool),
        ):
            buffer = None if like is None else torch.zeros_like(like, dtype=dtype)
            self.register_buffer(name, buffer)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, or the weight itself as long as it has no bounds."""
        if not self.bounds.known[self.row]:
            return weight
        frozen = self.frozen if self.any_frozen else None
        settings = (self.levels, self.rescale, self.code, frozen, self.pin_code)
        if self.constant:
            with torch.no_grad():
                constant: Tensor = QuantizeWeight.apply(
                    weight, self.bounds.values[self.row], *settings
                )
            return constant
        quantized: Tensor = QuantizeWeight.apply(weight, self.bounds.values[self.row], *settings)
        return quantized

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes 0 ... L-1 of a weight, those that are pinned included."""
        lower, upper = self.bounds.values[self.row, :2]
        found = codes(weight, lower, upper, self.levels, torch.empty_like(weight))
        if self.pin_code and self.code is not None and self.frozen is not None:
            found = torch.where(self.frozen, self.code, found)
        return found.to(torch.uint8)

    @torch.no_grad()
    def update(
        self, weight: Tensor, kept: Tensor, *, momentum: float | None, limit: float | None
    ) -> None:
        """Follow the distances of one iteration, and freeze what has settled.

        Args:
            weight: as it was in the forward pass.
            kept: of its shape; takes over its values when something is frozen afterwards.
            momentum: beta; None sets d = D.
            limit: freezes where d is at most that; None freezes nothing.
        """
        assert self.distance is not None
        assert self.code is not None
        assert self.frozen is not None
        lower, upper = self.bounds.values[self.row, :2]
        spacing = 1 / (self.levels - 1)
        alike = (weight, self.distance, self.code, self.frozen, kept)
        for w, d, code, frozen, old in flat_pieces(*alike):
            v = (w - lower).div_(upper - lower)
            if self.freeze_clipped:
                v.clamp_(0, 1)
            q = v.clamp(0, 1).mul_(self.levels - 1).round_()
            found = q.to(torch.uint8)
            distance = q.div_(self.levels - 1).sub_(v).abs_()
            if momentum is None:
                d.copy_(distance)
            else:
                d.lerp_(distance, 1 - momentum)
                d.masked_fill_(found != code, spacing)
            if self.any_frozen and self.pin_code:
                torch.where(frozen, code, found, out=code)
            else:
                code.copy_(found)
            if limit is not None:
                frozen.logical_or_(d <= limit)
                old.copy_(w)
        self.any_frozen = self.any_frozen or limit is not None

    @torch.no_grad()
    def restore(self, weight: Tensor, kept: Tensor) -> None:
        """Give frozen positions of a weight the values that they had before its update."""
        assert self.frozen is not None
        for w, frozen, old in flat_pieces(weight, self.frozen, kept):
            torch.where(frozen, old, w, out=w)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.any_frozen = self.frozen is not None and bool(self.frozen.any())
