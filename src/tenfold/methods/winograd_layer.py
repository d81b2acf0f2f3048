"""A 3-D convolution in its training form: its weight lives in the Winograd domain.

    residual   What = base + left @ right     base, the transformed kernel, is frozen; right = 0
    factor     What = left @ right            from the nearest kernels of rank s
    dense      What itself is trained

left is `(O, C, s)`, right `(s, t^3)`: with an axis for each of the three coordinates it would have
four, and PyTorch could not put the network into channels-last any more. What is trained is kept
multiplied by the gains' powers of two (see `gain_scales`), so that one learning rate suits all
coordinates; `base` is not, since it isn't trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.kernels import winograd_reference
from tenfold.kernels.winograd_transforms import column_count, tile_of, winograd_weight
from tenfold.methods.winograd_columns import scales_of
from tenfold.nn.winograd import WinogradConv3d, check_geometry, geometry_of, refuse_half
from tenfold.nn.winograd_fit import refuse_unconvertible, zero_padding

__all__ = ["Mode", "WinogradTraining", "replace_module"]

Mode = Literal["residual", "factor", "dense"]


class WinogradTraining(nn.Module):
    """What `Winograd3d` puts in the place of a convolution while it trains.

    Args:
        layer: the convolution; its weight is read, its bias is taken over.
        tile: outputs of a tile.
        mode: see the module.
        rank: s, of left and right.
        points: of the transforms.
        normalize: keep what is trained multiplied by the gains' powers of two.
        allow_half: see `WinogradConv3d`.
        name: of the layer, for errors.

    Raises:
        UserError: the layer can't live in the Winograd domain, or a rank that doesn't fit.
    """

    training_form = True  # an artifact refuses it
    mask: Tensor
    scales: Tensor
    geometry: Tensor
    base: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        layer: nn.Conv3d,
        tile: int | Sequence[int],
        mode: Mode,
        rank: int,
        points: str,
        *,
        normalize: bool = True,
        allow_half: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        refuse_unconvertible(layer, name)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.tile, self.padding, self.points = tile_of(tile), zero_padding(layer), points
        self.mode, self.rank = mode, rank
        self.allow_half, self.name = allow_half, name
        self.count = column_count(self.tile)
        # What the method reads and clears: |What * gradient| by column, and E[v v^T] as sum, count.
        self.scoring = self.observing = False
        self.score: Tensor | None = None
        self.moment: tuple[Tensor, int] | None = None
        self.tiles = 0  # of a clip, at the last forward pass
        self.turn = 0  # which clip of a batch is observed

        weight = layer.weight.detach()
        scales = scales_of(self.tile, points) if normalize else torch.ones(self.count)
        self.register_buffer("scales", scales.to(weight))
        self.register_buffer("mask", torch.ones(self.count, dtype=torch.bool, device=weight.device))
        geometry = geometry_of(self.tile, self.padding, points)
        self.register_buffer("geometry", geometry.to(weight.device))
        self.kept = tuple(range(self.count))
        self.bias = layer.bias  # type: ignore[assignment]  # the parameter itself
        self._start(weight, mode, rank)
        self.train(layer.training)

    def _start(self, weight: Tensor, mode: Mode, rank: int) -> None:
        outputs, inputs = weight.shape[:2]
        domain = winograd_weight(weight, self.tile, self.points).flatten(2)  # (O, C, t^3)
        if mode == "dense":
            scaled = domain.permute(2, 0, 1) * self.scales[:, None, None]
            self.weight = nn.Parameter(scaled.contiguous())
            return
        most = min(outputs * inputs, self.count)
        if not 1 <= rank <= most:
            raise UserError(f"layer {self.name}: rank={rank}: expected 1 to {most}")
        left = weight.new_empty(outputs, inputs, rank).normal_(std=rank**-0.5)
        right = weight.new_zeros(rank, self.count)
        if mode == "residual":
            self.register_buffer("base", domain.permute(2, 0, 1).contiguous())
        else:
            self._factorize(weight, left, right)
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)

    def _factorize(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Take the nearest kernels of rank s, in the spatial domain: optimal for white inputs.

        A kernel has rank 27 at most: what the rank allows beyond starts at zero, by right.
        """
        u, s, vh = torch.linalg.svd(weight.double().flatten(2).flatten(0, 1), full_matrices=False)
        known = min(left.shape[2], len(s))
        left.flatten(0, 1)[:, :known] = (u * s)[:, :known].to(left)
        kernels = vh[:known].reshape(known, 1, 3, 3, 3)
        transformed = winograd_weight(kernels, self.tile, self.points).flatten(1)
        right[:known] = (transformed * self.scales).to(right)

    # -- the weight --------------------------------------------------------------------------------

    def values(self) -> Tensor:
        """Return the weights at the kept columns, `(K, O, C)`, free of scales; differentiable."""
        kept = list(self.kept)
        every = len(kept) == self.count
        scales = self.scales if every else self.scales[kept]
        if self.mode == "dense":
            weight = self.weight if every else self.weight[kept]
            return weight / scales[:, None, None]
        right = (self.right if every else self.right[:, kept]) / scales
        left = self.left.flatten(0, 1)
        if self.mode == "factor":
            found = right.T @ left.T
        else:
            base = (self.base if every else self.base[kept]).flatten(1)
            found = torch.addmm(base, right.T, left.T)
        return found.reshape(len(kept), self.out_channels, self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, D, H, W)` to `(N, O, D', H', W')`; keep scores and moments if asked for.

        Raises:
            UserError: another shape or type, or half precision with F(4,3).
        """
        if not self.allow_half:
            refuse_half(x, self.tile, self.name)
        with torch.autocast(x.device.type, enabled=False):
            values = self.values()
        learning = self.training and torch.is_grad_enabled()
        if self.scoring and learning and values.requires_grad:
            self._score_in_backward(values)
        try:
            y = winograd_reference.conv3d(
                x, values, self.kept, self.bias, self.tile, self.padding, self.points
            )
        except UserError as error:
            raise UserError(f"layer {self.name}: {error}") from error
        self.tiles = math.prod(-(-s // m) for s, m in zip(y.shape[2:], self.tile, strict=True))
        if self.observing and learning:
            # One clip a step, in turn: many clips are seen, and the cost stays small.
            clip = self.turn % len(x)
            self._observe(x[clip : clip + 1])
        return y

    def _score_in_backward(self, values: Tensor) -> None:
        """Have the backward pass add up |What * dL/dWhat| by column; the same for any scales."""
        weight = values.detach()

        def add(gradient: Tensor) -> None:
            found = weight.new_zeros(self.count, dtype=torch.float32)
            found[list(self.kept)] = (weight * gradient).abs().sum(dim=(1, 2)).float()
            self.score = found if self.score is None else self.score + found

        values.register_hook(add)  # type: ignore[no-untyped-call]

    def _observe(self, x: Tensor) -> None:
        total, count = winograd_reference.second_moment(x, self.tile, self.padding, self.points)
        if self.moment is not None:
            total, count = total + self.moment[0], count + self.moment[1]
        self.moment = total, count

    # -- columns -----------------------------------------------------------------------------------

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these columns alone."""
        self.kept = tuple(kept)
        self.mask.zero_()
        self.mask[list(kept)] = True

    @torch.no_grad()
    def remove(self, removed: Sequence[int], moved: Tensor | None) -> None:
        """Remove columns, and add what is moved of them to those that stay.

        Args:
            removed: columns that are kept so far.
            moved: `(removed, kept)`, of `compensation`, in coordinates scaled by the gains; None
                moves nothing.
        """
        gone, stay = list(removed), sorted(set(self.kept) - set(removed))
        for tensor, column, scaled in self._by_column():
            columns = tensor.movedim(column, 0)
            if moved is not None:
                # `base` is not scaled by the gains.
                factor = self._scaled_by_gains(moved, gone, stay, scaled).to(tensor)
                lost = columns[gone].flatten(1)
                columns[stay] += (factor.T @ lost).reshape(columns[stay].shape)
            columns[gone] = 0
        self.keep(stay)

    def scaled_weight(self) -> Tensor:
        """Return the weight `(t^3, O * C)`, scaled by the gains, in double precision on the CPU.

        Zeros stand for columns that are gone.
        """
        found = torch.zeros(self.count, self.out_channels * self.in_channels, dtype=torch.float64)
        kept = list(self.kept)
        found[kept] = self.values().detach().double().cpu().flatten(1)
        return found * scales_of(self.tile, self.points)[:, None]

    def _by_column(self) -> list[tuple[Tensor, int, bool]]:
        """Return every tensor that holds columns, their axis, and whether `scales` are in it."""
        if self.mode == "dense":
            return [(self.weight.data, 0, True)]
        right = (self.right.data, 1, True)
        return [right] if self.mode == "factor" else [(self.base, 0, False), right]

    def _scaled_by_gains(
        self, moved: Tensor, gone: list[int], stay: list[int], scaled: bool
    ) -> Tensor:
        """Bring a map between columns that are scaled by the gains into a tensor's own scales."""
        ratio = scales_of(self.tile, self.points)
        if scaled:
            ratio = ratio / self.scales.double().cpu()
        return moved * ratio[gone][:, None] / ratio[stay]

    # -- the end, checkpoints ----------------------------------------------------------------------

    def inference(self) -> WinogradConv3d:
        """Return the layer for inference: factors and scales merged, kept columns alone."""
        values = self.values().detach()
        made = WinogradConv3d(
            self.in_channels,
            self.out_channels,
            self.tile,
            self.kept,
            padding=self.padding,
            bias=self.bias is not None,
            points=self.points,
            allow_half=self.allow_half,
            name=self.name,
        ).to(values.device, values.dtype)
        bias = None if self.bias is None else self.bias.detach()
        return made.fill(values, bias).train(self.training)

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        rank = "" if self.mode == "dense" else f", rank={self.rank}"
        return (
            f"{self.in_channels}, {self.out_channels}, tile={self.tile}, mode={self.mode}{rank}, "
            f"columns={len(self.kept)} of {self.count}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        check_geometry(state_dict.get(f"{prefix}geometry"), self.geometry, prefix)
        scales = state_dict.get(f"{prefix}scales")
        if isinstance(scales, Tensor) and scales.tolist() != self.scales.tolist():
            raise UserError(
                f"layer {prefix.rstrip('.') or self.name}: the state's weights are scaled by other "
                "powers of two: go on with the same tile, points and normalize"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.kept = tuple(self.mask.nonzero().flatten().tolist())


def replace_module(model: nn.Module, module: nn.Module, by: nn.Module) -> nn.Module:
    """Put a module in another's place, under all its names, in place; return the model."""
    if model is module:
        return by
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module:
                setattr(parent, name, by)
    return model
