"""A 3-D convolution that keeps its weight in the Winograd domain, for inference.

Its tensors are buffers, since it isn't trained:

    values   (K, O, C)  the weight at the kept coordinates, free of masks and scales
    columns  (K,)       the kept coordinates (a * t_h + b) * t_w + c, ascending, int64
    bias     (O,)       where there is one
    geometry            tile, padding and points, as integers

What is kept of a pruned or trained weight is no kernel of 3x3x3 any more: what an output gets
depends on its place in the tile. So tile, points, padding and columns belong to the weights, and a
state that was made for others is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.kernels import winograd_reference, winograd_triton
from tenfold.kernels.winograd_domain import domain_of
from tenfold.kernels.winograd_transforms import (
    POINTS,
    column_count,
    tile_of,
    transforms,
    winograd_weight,
)
from tenfold.nn.winograd_fit import refuse_unconvertible, zero_padding

__all__ = ["DEFAULT_POINTS", "WinogradConv3d", "check_geometry", "geometry_of", "refuse_half"]

# F(4,3) rounds 2.9e-6 of the largest output with these points, 1.9e-5 with the standard ones.
DEFAULT_POINTS = "accurate"
# How far a weight may be from a kernel's, relative to its norm, to be handed out as that kernel.
_DENSE_TOLERANCE = 1e-5


class WinogradConv3d(nn.Module):
    """A 3x3x3 convolution of stride 1 over the kept columns of its Winograd domain.

    All zeros until it is filled, by `from_dense`, `fill` or a state.

    >>> dense = nn.Conv3d(4, 8, 3, padding=1)
    >>> layer = WinogradConv3d.from_dense(dense, tile=2)
    >>> layer
    WinogradConv3d(4, 8, tile=(2, 2, 2), columns=64 of 64, padding=(1, 1, 1))
    >>> x = torch.randn(1, 4, 6, 6, 6)
    >>> torch.allclose(layer(x), dense(x), atol=1e-5)
    True

    Args:
        in_channels: C.
        out_channels: O.
        tile: outputs of a tile, 2, 4 or three of them for depth, height and width.
        columns: the coordinates that are kept, ascending; all of them if None.
        padding: zeros at both sides, in depth, height and width.
        bias: whether there is one.
        points: the set of points of the transforms, see `transforms`.
        allow_half: compute the products of F(4,3) in half precision where the input or autocast
            asks for it, instead of refusing: the error may reach several percent.
        name: of the layer, for errors.

    Raises:
        UserError: an unknown tile or set, or columns that don't fit.
    """

    values: Tensor
    columns: Tensor
    geometry: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        tile: int | Sequence[int],
        columns: Sequence[int] | None = None,
        *,
        padding: Sequence[int] = (0, 0, 0),
        bias: bool = True,
        points: str = DEFAULT_POINTS,
        allow_half: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.tile = tile_of(tile)
        self.points, self.allow_half, self.name = points, allow_half, name
        depth, height, width = padding
        self.padding = (depth, height, width)
        most = column_count(self.tile)
        self.kept = tuple(range(most) if columns is None else (int(j) for j in columns))
        domain_of(self.tile, points, self.kept)  # refuses what doesn't fit
        self.register_buffer("values", torch.zeros(len(self.kept), out_channels, in_channels))
        self.register_buffer("columns", torch.tensor(self.kept))
        self.register_buffer("bias", torch.zeros(out_channels) if bias else None)
        self.register_buffer("geometry", geometry_of(self.tile, self.padding, points))

    @classmethod
    def like(
        cls,
        layer: nn.Conv3d,
        tile: int | Sequence[int],
        columns: Sequence[int] | None = None,
        *,
        points: str = DEFAULT_POINTS,
        bias: bool | None = None,
        allow_half: bool = False,
        name: str = "",
    ) -> Self:
        """Return an unfilled layer of a convolution's sizes, type and device.

        Raises:
            UserError: the convolution can't live in the Winograd domain, see `unconvertible`.
        """
        refuse_unconvertible(layer, name)
        made = cls(
            layer.in_channels,
            layer.out_channels,
            tile,
            columns,
            padding=zero_padding(layer),
            bias=layer.bias is not None if bias is None else bias,
            points=points,
            allow_half=allow_half,
            name=name,
        )
        return made.to(layer.weight.device, layer.weight.dtype).train(layer.training)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Conv3d,
        tile: int | Sequence[int],
        columns: Sequence[int] | None = None,
        *,
        points: str = DEFAULT_POINTS,
        allow_half: bool = False,
        name: str = "",
    ) -> Self:
        """Return a convolution's Winograd form; without loss where all columns are kept.

        Args:
            layer: is not changed.
            tile: outputs of a tile.
            columns: those to keep; the others are dropped without compensation.
            points: of the transforms.
            allow_half: see the class.
            name: of the layer, for errors.

        Raises:
            UserError: see `like`.
        """
        made = cls.like(layer, tile, columns, points=points, allow_half=allow_half, name=name)
        weight = winograd_weight(layer.weight.detach(), made.tile, points)
        bias = None if layer.bias is None else layer.bias.detach()
        return made.fill(weight.flatten(2).permute(2, 0, 1)[list(made.kept)], bias)

    def fill(self, values: Tensor, bias: Tensor | None) -> Self:
        """Take over the weights at the kept columns, `(K, O, C)`, and the bias; return the layer.

        Raises:
            UserError: other shapes.
        """
        if values.shape != self.values.shape or (bias is None) != (self.bias is None):
            raise UserError(
                f"values of shape {tuple(values.shape)}{'' if bias is None else ' and a bias'}: "
                f"expected {tuple(self.values.shape)}{'' if self.bias is None else ' and a bias'}"
            )
        self.values = values.detach().to(self.values).contiguous().clone()
        if bias is not None:
            self.bias = bias.detach().to(self.values).clone()
        return self

    def fold(self, values: Tensor, bias: Tensor) -> None:
        """Take over values `(K, O, C)` and a bias that a normalisation was merged into."""
        self.values = values.detach().to(self.values).contiguous()
        self.bias = bias.detach().to(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, D, H, W)` to `(N, O, D', H', W')`.

        Raises:
            UserError: another shape or type, or half precision with F(4,3).
        """
        if not self.allow_half:
            refuse_half(x, self.tile, self.name)
        # On a GPU by kernels of our own, where there is Triton and no gradient to compute.
        on_gpu = winograd_triton.takes(x)
        convolve = winograd_triton.convolve if on_gpu else winograd_reference.conv3d
        try:
            return convolve(
                x, self.values, self.kept, self.bias, self.tile, self.padding, self.points
            )
        except UserError as error:
            raise UserError(f"layer {self.name or type(self).__name__}: {error}") from error

    @property
    def weight(self) -> Tensor:
        """Return the values, `(K, O, C)`: what stands for a weight here."""
        return self.values

    def macs(self, output: Tensor) -> int:
        """Return the multiply-adds of the 3x3x3 convolution behind an output."""
        return output.numel() * self.in_channels * 27

    def multiplications(self, output: Tensor) -> int:
        """Return the multiply-adds of the products that this layer does for an output.

        K a tile and pair of channels; the transforms' additions are not counted.
        """
        tiles = [-(-size // m) for size, m in zip(output.shape[2:], self.tile, strict=True)]
        pairs = self.in_channels * self.out_channels
        return len(output) * math.prod(tiles) * len(self.kept) * pairs

    def to_dense(self) -> nn.Conv3d:
        """Return the 3x3x3 convolution that the layer computes.

        Raises:
            UserError: it computes none, because its weights were trained or pruned.
        """
        matrices = [transforms(m, self.points)[2] for m in self.tile]
        kernel_to_domain = torch.from_numpy(np.kron(np.kron(*matrices[:2]), matrices[2]))
        values = torch.zeros(column_count(self.tile), self.out_channels * self.in_channels)
        values = values.double()
        values[list(self.kept)] = self.values.detach().double().cpu().flatten(1)
        weight = torch.linalg.lstsq(kernel_to_domain, values).solution
        rest = float((kernel_to_domain @ weight - values).norm())
        if not rest <= _DENSE_TOLERANCE * float(values.norm()):
            raise UserError(
                f"layer {self.name or type(self).__name__} was trained or pruned in the Winograd "
                "domain and is no 3x3x3 kernel any more: export it as it is"
            )
        layer = nn.Conv3d(
            self.in_channels,
            self.out_channels,
            3,
            padding=self.padding,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        ).train(self.training)
        with torch.no_grad():
            layer.weight.copy_(weight.T.reshape(layer.weight.shape))
            if layer.bias is not None and self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        most = column_count(self.tile)
        parts = [f"{self.in_channels}, {self.out_channels}, tile={self.tile}"]
        parts += [f"columns={len(self.kept)} of {most}"]
        parts += [f"padding={self.padding}"] if any(self.padding) else []
        parts += [f"points={self.points}"] if self.points != DEFAULT_POINTS else []
        parts += ["bias=False"] if self.bias is None else []
        return ", ".join(parts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        check_geometry(state_dict.get(f"{prefix}geometry"), self.geometry, prefix)
        columns = state_dict.get(f"{prefix}columns")
        if isinstance(columns, Tensor) and tuple(columns.tolist()) != self.kept:
            raise UserError(
                f"layer {prefix.rstrip('.') or type(self).__name__}: the state keeps other columns "
                f"({len(columns)}, {columns.tolist()[:4]}…) than the layer ({len(self.kept)}, "
                f"{list(self.kept[:4])}…): make the layer with the columns that were saved"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def geometry_of(tile: Sequence[int], padding: Sequence[int], points: str) -> Tensor:
    """Return tile, padding and points as integers, int64: what a weight's meaning depends on.

    The points are numerators and denominators, those of each m of the tile; so two sets that have
    the same points for a tile are the same.
    """
    if points not in POINTS:
        raise unknown_name("set of points", str(points), POINTS)
    found = [*tile, *padding]
    for m in sorted(set(tile)):
        found += [part for point in POINTS[points][m] for part in point.as_integer_ratio()]
    return torch.tensor(found)


def check_geometry(given: object, expected: Tensor, prefix: str) -> None:
    """Refuse a state that was made for another tile, padding or set of points.

    Args:
        given: what the state holds as `geometry`; None is left to PyTorch's own check.
        expected: the layer's.
        prefix: of the layer's tensors in the state.

    Raises:
        UserError: they differ; both are said.
    """
    if not isinstance(given, Tensor) or expected.device.type == "meta":
        return
    if given.tolist() != expected.tolist():
        raise UserError(
            f"layer {prefix.rstrip('.') or 'the model'}: the state was made for "
            f"{_said(given)}, and the layer is for {_said(expected)}: its weights mean something "
            "else there; make the layer as it was saved"
        )


def _said(geometry: Tensor) -> str:
    numbers = geometry.tolist()
    pairs = [
        f"{n}/{d}" if d != 1 else str(n) for n, d in zip(*[iter(numbers[6:])] * 2, strict=True)
    ]
    tile, padding = tuple(numbers[:3]), tuple(numbers[3:6])
    return f"tile {tile}, padding {padding}, points {' '.join(pairs)}"


def refuse_half(x: Tensor, tile: Sequence[int], name: str) -> None:
    """Refuse half precision with F(4,3), whose error is percents then.

    Raises:
        UserError: the input or autocast asks for it.
    """
    low = x.dtype in (torch.float16, torch.bfloat16) or (
        torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    )
    if low and max(tile) > 2:
        raise UserError(
            f"layer {name or 'of tile ' + str(tuple(tile))}: half precision with tile "
            f"{tuple(tile)} loses up to several percent: expected float32 without autocast, or "
            "tile=2; allow_half=True takes the loss"
        )
