"""The linear maps between tiles and the kept coordinates of their Winograd domain, in PyTorch.

Channels are last, and the number of samples is left open, so that a graph can be traced for any.
Tensors have few axes at a time: some runtimes compute wrongly with seven or more.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels.winograd_transforms import Tile, column_count, transforms

__all__ = ["Domain", "domain_of"]

Rows = list[list[float]]


@functools.lru_cache(maxsize=256)
def domain_of(
    tile: Tile, points: str | tuple[float | Fraction, ...], columns: tuple[int, ...]
) -> Domain:
    """Return the domain of a tile's kept columns, made once.

    Raises:
        UserError: columns that aren't ascending coordinates, or other sizes that don't fit.
    """
    return Domain(tile, points, columns)


@dataclass(frozen=True)
class Domain:
    """The kept coordinates of a tile's Winograd domain, and the four maps to and from them.

    Attributes:
        tile: outputs of a tile by axis, m.
        points: of the transforms.
        columns: the kept coordinates, ascending.
    """

    tile: Tile
    points: str | tuple[float | Fraction, ...]
    columns: tuple[int, ...]

    def __post_init__(self) -> None:
        most, given = column_count(self.tile), self.columns
        ascending = all(low < high for low, high in itertools.pairwise(given))
        if not given or not ascending or not 0 <= given[0] <= given[-1] < most:
            raise UserError(
                f"{len(given)} columns {list(given[:4])}…: expected at least one, ascending, from "
                f"0 to {most - 1} for the tile {self.tile}"
            )

    def to_domain(self, x: Tensor) -> Tensor:
        """Map padded inputs `(N, n_d m_d + 2, n_h m_h + 2, n_w m_w + 2, C)` to `(K, P, C)`."""
        v, lengths, channels = x, tuple(x.shape[1:4]), x.shape[4]
        for axis in range(3):
            # (coordinates so far, samples and tiles so far, this axis, all that is left)
            done, rest = math.prod(self._box[:axis]), math.prod(lengths[axis + 1 :]) * channels
            v = v.reshape(done, -1, lengths[axis], rest)
            parts = [v[:, :, tap] for tap in self._taps(axis, lengths[axis])]
            v = _combine(parts, self._input_rows[axis], 1)
        return self._kept(v.reshape(math.prod(self._box), -1, channels))

    def to_domain_adjoint(self, g: Tensor, tiles: Sequence[int]) -> Tensor:
        """Map `(K, P, C)` back by the transposed of `to_domain`: its gradient."""
        v, channels = self._filled(g), g.shape[2]
        lengths = [n * m + 2 for n, m in zip(tiles, self.tile, strict=True)]
        for axis in (2, 1, 0):
            done, rest = math.prod(self._box[:axis]), math.prod(lengths[axis + 1 :]) * channels
            parts = v.reshape(done, self._box[axis], -1, tiles[axis], rest).unbind(1)
            v = g.new_zeros(done, parts[0].shape[1], lengths[axis], rest)
            taps = self._taps(axis, lengths[axis])
            for part, row in zip(parts, self._input_rows[axis], strict=True):
                for tap, factor in zip(taps, row, strict=True):
                    if factor:
                        v[:, :, tap].add_(part, alpha=factor)
        return v.reshape(-1, *lengths, channels)

    def from_domain(self, product: Tensor, tiles: Sequence[int]) -> Tensor:
        """Map products `(K, P, O)` to outputs `(N, n_d m_d, n_h m_h, n_w m_w, O)`."""
        y, channels = self._filled(product), product.shape[2]
        for axis in range(3):
            # (coordinates of this axis, of the next ones, samples and positions, tiles, the rest)
            later, rest = math.prod(self._box[axis + 1 :]), math.prod(tiles[axis + 1 :]) * channels
            y = y.reshape(self._box[axis], later, -1, tiles[axis], rest)
            # A tile's outputs go beside each other, so that the axis is whole again.
            y = _combine(y.unbind(0), self._output_rows[axis], 3)
        whole = [n * m for n, m in zip(tiles, self.tile, strict=True)]
        return y.reshape(-1, *whole, channels)

    def from_domain_adjoint(self, g: Tensor) -> Tensor:
        """Map `(N, n_d m_d, n_h m_h, n_w m_w, O)` back by the transposed of `from_domain`."""
        y, channels = g, g.shape[4]
        tiles = [length // m for length, m in zip(g.shape[1:4], self.tile, strict=True)]
        for axis in (2, 1, 0):
            later, rest = math.prod(self._box[axis + 1 :]), math.prod(tiles[axis + 1 :]) * channels
            y = y.reshape(later, -1, tiles[axis], self.tile[axis], rest)
            rows = [list(column) for column in zip(*self._output_rows[axis], strict=True)]
            y = _combine(y.unbind(3), rows, 0)
        return self._kept(y.reshape(math.prod(self._box), -1, channels))

    # -- columns -----------------------------------------------------------------------------------

    @cached_property
    def used(self) -> list[list[int]]:
        """Return the coordinates that some kept column has, by axis; others are not computed."""
        _, height, width = (m + 2 for m in self.tile)
        found = [(j // (height * width), j // width % height, j % width) for j in self.columns]
        return [sorted(set(axis)) for axis in zip(*found, strict=True)]

    @cached_property
    def _box(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.used)

    @cached_property
    def _places(self) -> list[int] | None:
        """Return where the kept columns lie in the box of used ones; None if they fill it."""
        if len(self.columns) == math.prod(self._box):
            return None
        _, height, width = (m + 2 for m in self.tile)
        d, h, w = self.used
        box = [(a * height + b) * width + c for a in d for b in h for c in w]
        place = {j: index for index, j in enumerate(box)}
        return [place[j] for j in self.columns]

    def _kept(self, v: Tensor) -> Tensor:
        places = self._places
        return v if places is None else v.index_select(0, torch.tensor(places, device=v.device))

    def _filled(self, v: Tensor) -> Tensor:
        """Put columns `(K, P, C)` into their box, with zeros for the others of it."""
        places = self._places
        if places is None:
            return v
        box = v.new_zeros(math.prod(self._box), v.shape[1], v.shape[2])
        return box.index_copy(0, torch.tensor(places, device=v.device), v)

    # -- coefficients ------------------------------------------------------------------------------

    @cached_property
    def _input_rows(self) -> list[Rows]:
        found = [transforms(m, self.points)[1] for m in self.tile]
        return [cast(Rows, b[used].tolist()) for b, used in zip(found, self.used, strict=True)]

    @cached_property
    def _output_rows(self) -> list[Rows]:
        found = [transforms(m, self.points)[0] for m in self.tile]
        return [cast(Rows, a[:, used].tolist()) for a, used in zip(found, self.used, strict=True)]

    def _taps(self, axis: int, length: int) -> list[slice]:
        """Return the positions of each tap of all tiles along a padded axis."""
        m = self.tile[axis]
        last = (length - 2) // m * m - m + 1
        return [slice(k, k + last, m) for k in range(m + 2)]


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
    if not terms:  # few columns may leave an output without any
        return torch.zeros_like(parts[0]) if out is None else out.zero_()
    terms.sort(key=lambda term: term[0] != 1.0)  # one that needs no product goes first
    factor, total = terms[0]
    if factor != 1.0:
        total = torch.mul(total, factor, out=out)
    for factor, part in terms[1:]:
        total = torch.add(total, part, alpha=factor, out=out)
    if out is not None and total is not out:
        out.copy_(total)
    return total
