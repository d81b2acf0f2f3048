"""Winograd's 3-D convolution over the kept columns, in plain PyTorch: oracle, training and export.

    x (N, C, D, H, W) -> V (K, P, C)      the input transform, one axis after the other
    M = V[k] @ values[k]^T (K, P, O)      one product a kept column, nothing for the others
    M -> y (N, O, D', H', W')             the output transform, one axis after the other

P counts tiles: they start at the padded input's first position and lie `tile` apart, so the last
ones may reach beyond the input, where zeros are read and outputs are dropped. Inside, channels are
last: all additions run along them.

Transforms are computed in at least single precision, as sums of slices and not as matrix products,
so that neither autocast nor TF32 rounds them; autocast and half inputs reach the products alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels.winograd_transforms import Points, Tile, column_count, tile_of, transforms

__all__ = ["Geometry", "conv3d"]

Rows = list[list[float]]


def conv3d(
    x: Tensor,
    values: Tensor,
    columns: Tensor | Sequence[int],
    bias: Tensor | None,
    tile: int | Sequence[int],
    padding: Sequence[int],
    points: Points,
) -> Tensor:
    """Convolve by the kept Winograd coordinates of a 3x3x3 kernel, stride 1; differentiable.

    Args:
        x: `(N, C, D, H, W)`, any strides.
        values: `(K, O, C)`, the weights at the kept coordinates.
        columns: the K kept coordinates `(a * t_h + b) * t_w + c`, ascending. Ints spare a device
            a synchronisation, and can be traced.
        bias: `(O,)` or None.
        tile: outputs of a tile in depth, height and width, see `tile_of`.
        padding: zeros at both sides, in depth, height and width.
        points: whose transforms the values are for, see `transforms`.

    Returns:
        `(N, O, D', H', W')`, in the memory format of `x`.

    Raises:
        UserError: shapes, columns or types that don't fit.

    >>> from tenfold.kernels.winograd_transforms import winograd_weight
    >>> x, weight = torch.randn(1, 2, 5, 5, 5), torch.randn(3, 2, 3, 3, 3)
    >>> values = winograd_weight(weight, 2).flatten(2).permute(2, 0, 1)
    >>> y = conv3d(x, values, range(64), None, 2, (1, 1, 1), "standard")
    >>> torch.allclose(y, F.conv3d(x, weight, padding=1), atol=1e-4)
    True
    """
    kept = tuple(columns.tolist()) if isinstance(columns, Tensor) else tuple(columns)
    _check(x, values, kept)
    depth, height, width = padding
    space = Geometry(tile_of(tile), points, kept, (depth, height, width), tuple(x.shape[2:]))
    low = _product_type(x)
    with torch.autocast(x.device.type, enabled=False):
        exact = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
        v = _linear(x.to(exact), space.to_domain, space.to_domain_adjoint)
        kernels = values.transpose(1, 2)
        product = torch.bmm(v.to(low or exact), kernels.to(low or exact)).to(exact)
        y = _linear(product, space.from_domain, space.from_domain_adjoint)
        if bias is not None:
            y = y + bias.to(exact)[:, None, None, None]
        y = y.to(low or x.dtype)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return y.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def _check(x: Tensor, values: Tensor, kept: tuple[int, ...]) -> None:
    if x.dim() != 5 or x.shape[1] != values.shape[2]:
        raise UserError(
            f"input of shape {tuple(x.shape)}: expected (N, {values.shape[2]}, D, H, W)"
        )
    if not x.is_floating_point():
        raise UserError(f"input of type {x.dtype}: expected a floating type")
    if values.dim() != 3 or len(values) != len(kept) or not kept:
        raise UserError(
            f"values of shape {tuple(values.shape)} for {len(kept)} columns: expected (K, O, C) "
            "with K of at least 1"
        )


def _product_type(x: Tensor) -> torch.dtype | None:
    """Return the half precision in which the products are wanted, or None."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
    return x.dtype if x.dtype in (torch.float16, torch.bfloat16) else None


@dataclass(frozen=True)
class Geometry:
    """Where the tiles of one input lie, and the four linear maps between it and its domain.

    Attributes:
        tile: outputs of a tile by axis, m.
        points: of the transforms.
        columns: the kept coordinates, ascending.
        padding: zeros at both sides, by axis.
        size: of the input, by axis.
    """

    tile: Tile
    points: Points
    columns: tuple[int, ...]
    padding: Tile
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        padded = [size + 2 * p for size, p in zip(self.size, self.padding, strict=True)]
        if min(padded) < 3 or min(self.padding) < 0:
            raise UserError(
                f"input of size {tuple(self.size)} with padding {self.padding}: expected at least "
                "3 positions in depth, height and width, the length of the kernel"
            )
        most = column_count(self.tile)
        if any(low >= high for low, high in zip(self.columns, self.columns[1:], strict=False)) or (
            not 0 <= self.columns[0] <= self.columns[-1] < most
        ):
            raise UserError(
                f"columns {self.columns[:4]}…: expected ascending coordinates from 0 to {most - 1}"
            )

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """Return the size of the output, by axis."""
        return tuple(s + 2 * p - 2 for s, p in zip(self.size, self.padding, strict=True))

    @cached_property
    def tiles(self) -> tuple[int, ...]:
        """Return the number of tiles, by axis."""
        return tuple(-(-size // m) for size, m in zip(self.outputs, self.tile, strict=True))

    @property
    def _used(self) -> tuple[tuple[int, ...], ...]:
        return _layout(self.columns, self.tile)[0]

    @property
    def _box(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self._used)

    @property
    def _places(self) -> list[int] | None:
        return _layout(self.columns, self.tile)[1]

    def _input_rows(self, axis: int) -> Rows:
        b = transforms(self.tile[axis], self.points)[1]
        return cast(Rows, b[list(self._used[axis])].tolist())

    def _output_rows(self, axis: int) -> Rows:
        a = transforms(self.tile[axis], self.points)[0]
        return cast(Rows, a[:, list(self._used[axis])].tolist())

    def _taps(self, axis: int) -> list[slice]:
        """Return the positions of each tap of all tiles along a padded axis."""
        m, last = self.tile[axis], self.tile[axis] * (self.tiles[axis] - 1) + 1
        return [slice(k, k + last, m) for k in range(m + 2)]

    # -- input -------------------------------------------------------------------------------------

    def to_domain(self, x: Tensor) -> Tensor:
        """Map an input `(N, C, D, H, W)` to `(K, P, C)`."""
        v = F.pad(x.permute(0, 2, 3, 4, 1), self._sides).contiguous()
        for axis in range(3):
            # (coordinates, N and tiles so far, length, all that is left)
            done, length = math.prod(self._box[:axis]), self._reach[axis]
            v = v.reshape(done, -1, length, math.prod(self._reach[axis + 1 :]) * x.shape[1])
            parts = [v[:, :, tap] for tap in self._taps(axis)]
            v = _combine(parts, self._input_rows(axis), 1)
        return self._kept(v.reshape(math.prod(self._box), -1, x.shape[1]))

    def to_domain_adjoint(self, g: Tensor) -> Tensor:
        """Map `(K, P, C)` back by the transposed map: the gradient of an input."""
        v, channels = self._filled(g), g.shape[2]
        for axis in (2, 1, 0):
            done, tiles = math.prod(self._box[:axis]), self.tiles[axis]
            rest = math.prod(self._reach[axis + 1 :]) * channels
            parts = v.reshape(done, self._box[axis], -1, tiles, rest).unbind(1)
            v = g.new_zeros(done, parts[0].shape[1], self._reach[axis], rest)
            for part, row in zip(parts, self._input_rows(axis), strict=True):
                for tap, factor in zip(self._taps(axis), row, strict=True):
                    if factor:
                        v[:, :, tap].add_(part, alpha=factor)
        v = v.reshape(-1, *self._reach, channels)
        for axis, (size, p) in enumerate(zip(self.size, self.padding, strict=True)):
            v = v.narrow(1 + axis, p, size)
        return v.permute(0, 4, 1, 2, 3)

    @property
    def _reach(self) -> tuple[int, ...]:
        """Return how many positions the tiles cover, by axis."""
        return tuple(n * m + 2 for n, m in zip(self.tiles, self.tile, strict=True))

    @property
    def _sides(self) -> list[int]:
        """Return the zeros around an input with its channels last, as F.pad takes them."""
        sides = [0, 0]
        for axis in (2, 1, 0):
            ahead = self.padding[axis]
            sides += [ahead, self._reach[axis] - self.size[axis] - ahead]
        return sides

    # -- output ------------------------------------------------------------------------------------

    def from_domain(self, product: Tensor) -> Tensor:
        """Map products `(K, P, O)` to an output `(N, O, D', H', W')`."""
        y, channels = self._filled(product), product.shape[2]
        for axis in range(3):
            # (coordinates of this axis, of the next ones, N and positions so far, tiles, the rest)
            later = math.prod(self._box[axis + 1 :])
            rest = math.prod(self.tiles[axis + 1 :]) * channels
            y = y.reshape(self._box[axis], later, -1, self.tiles[axis], rest)
            # A tile's outputs go beside each other, so that the axis is whole again.
            y = _combine(y.unbind(0), self._output_rows(axis), 3)
        y = y.reshape(-1, *self._whole, channels)
        for axis, size in enumerate(self.outputs):
            y = y.narrow(1 + axis, 0, size)
        return y.permute(0, 4, 1, 2, 3)

    def from_domain_adjoint(self, g: Tensor) -> Tensor:
        """Map an output's gradient `(N, O, D', H', W')` back to `(K, P, O)`."""
        channels, sides = g.shape[1], [0, 0]
        for axis in (2, 1, 0):
            sides += [0, self._whole[axis] - self.outputs[axis]]
        y = F.pad(g.permute(0, 2, 3, 4, 1), sides).contiguous()
        for axis in (2, 1, 0):
            later = math.prod(self._box[axis + 1 :])
            rest = math.prod(self.tiles[axis + 1 :]) * channels
            y = y.reshape(later, -1, self.tiles[axis], self.tile[axis], rest)
            y = _combine(y.unbind(3), _transposed(self._output_rows(axis)), 0)
        return self._kept(y.reshape(math.prod(self._box), -1, channels))

    @property
    def _whole(self) -> tuple[int, ...]:
        """Return the outputs of all tiles, by axis, before those beyond the output are dropped."""
        return tuple(n * m for n, m in zip(self.tiles, self.tile, strict=True))

    # -- columns -----------------------------------------------------------------------------------

    def _kept(self, v: Tensor) -> Tensor:
        """Take the kept columns `(K, P, C)` out of their box."""
        places = self._places
        return v if places is None else v.index_select(0, torch.tensor(places, device=v.device))

    def _filled(self, v: Tensor) -> Tensor:
        """Put columns `(K, P, C)` into their box, with zeros for the others of it."""
        places = self._places
        if places is None:
            return v
        box = v.new_zeros(math.prod(self._box), v.shape[1], v.shape[2])
        return box.index_copy(0, torch.tensor(places, device=v.device), v)


@functools.lru_cache(maxsize=256)
def _layout(
    columns: tuple[int, ...], tile: Tile
) -> tuple[tuple[tuple[int, ...], ...], list[int] | None]:
    """Return the used coordinates by axis, and the kept columns' places in the box that they span.

    A coordinate that no kept column has is never computed. The places are None where the kept
    columns fill the box.
    """
    _, height, width = (m + 2 for m in tile)
    found = [(j // (height * width), j // width % height, j % width) for j in columns]
    a, b, c = (sorted(set(axis)) for axis in zip(*found, strict=True))
    box = [(d * height + h) * width + w for d in a for h in b for w in c]
    place = {j: index for index, j in enumerate(box)}
    places = [place[j] for j in columns] if len(columns) < len(box) else None
    return (tuple(a), tuple(b), tuple(c)), places


def _combine(parts: Sequence[Tensor], rows: Rows, dim: int) -> Tensor:
    """Return the sums `row . parts` of every row, stacked along a new axis `dim`."""
    if torch.compiler.is_compiling():  # also while a file is exported: nothing is written in place
        return torch.stack([_sum(parts, row) for row in rows], dim)
    shape = parts[0].shape
    found = parts[0].new_empty((*shape[:dim], len(rows), *shape[dim:]))
    for index, row in enumerate(rows):
        _sum(parts, row, found.select(dim, index))
    return found


def _sum(parts: Sequence[Tensor], row: Sequence[float], out: Tensor | None = None) -> Tensor:
    terms = [(factor, part) for factor, part in zip(row, parts, strict=True) if factor]
    # One that needs no product goes first.
    terms.sort(key=lambda term: term[0] != 1.0)
    factor, total = terms[0]
    if factor != 1.0:
        total = torch.mul(total, factor, out=out)
    for factor, part in terms[1:]:
        total = torch.add(total, part, alpha=factor, out=out)
    return total if out is None or len(terms) > 1 or terms[0][0] != 1.0 else out.copy_(total)


def _transposed(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


class _Linear(torch.autograd.Function):
    """A linear map with its transposed one; each is the other's derivative."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[..., Tensor], back: Callable[..., Tensor]
    ) -> Tensor:
        ctx.maps = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.maps
        return _linear(gradients[0], back, there), None, None


def _linear(x: Tensor, there: Callable[..., Tensor], back: Callable[..., Tensor]) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Linear.apply(x, there, back))
    return there(x)
