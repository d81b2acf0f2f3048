"""Winograd's 3-D convolution over the kept columns, in plain PyTorch: oracle, training and export.

    x (N, C, D, H, W) -> V (K, P, C)      the input transform, one axis after the other
    M = V[k] @ values[k]^T (K, P, O)      one product a kept column, nothing for the others
    M -> y (N, O, D', H', W')             the output transform, one axis after the other

P counts tiles: they start at the padded input's first position and lie `tile` apart, so the last
ones may reach beyond the input, where zeros are read and outputs are dropped. Inside, channels are
last: all additions run along them.

V is up to eight times as large as x. So the tiles are taken block by block, each small enough to
stay in fast memory, and the backward pass computes V again instead of keeping it.

Transforms are computed in at least single precision, as sums of slices and not as matrix products,
so that neither autocast nor TF32 rounds them; autocast and half inputs reach the products alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels.winograd_domain import Domain, domain_of
from tenfold.kernels.winograd_transforms import Points, column_count, tile_of

__all__ = ["conv3d", "second_moment"]

# V of one block. Larger ones leave the caches, and their memory is handed back and fetched anew.
_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}


def conv3d(
    x: Tensor,
    values: Tensor,
    columns: Tensor | Sequence[int],
    bias: Tensor | None,
    tile: int | Sequence[int],
    padding: Sequence[int],
    points: Points,
) -> Tensor:
    """Convolve by the kept Winograd coordinates of a 3x3x3 kernel, stride 1; differentiable once.

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
    problem = _Problem(
        domain_of(tile_of(tile), points if isinstance(points, str) else tuple(points), kept),
        tuple(x.shape[2:]),
        tuple(padding),
        _product_type(x),
    )
    _check(x, values, problem)
    exact = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    wanted, low = x.to(exact), problem.product_type
    if torch.compiler.is_compiling():  # also while a file is exported
        with torch.autocast(x.device.type, enabled=False):
            y = problem.traceable(wanted, values.to(exact))
    elif torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        y = cast(Tensor, _Convolution.apply(wanted, values.to(exact), problem))
    else:
        y = problem.forward(wanted, values.to(exact))
    if bias is not None:
        y = y + bias.to(exact)[:, None, None, None]
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return y.to(low or x.dtype).contiguous(memory_format=layout)


@torch.no_grad()
def second_moment(
    x: Tensor, tile: int | Sequence[int], padding: Sequence[int], points: Points, most: int = 2**18
) -> tuple[Tensor, int]:
    """Return the sum of v v^T over a clip's tiles and channels, and how many there were.

    v is a tile's input in the domain, zeros of the padding included.

    Args:
        x: `(N, C, D, H, W)`.
        tile: outputs of a tile.
        padding: zeros at both sides, in depth, height and width.
        points: of the transforms.
        most: of about so many vectors; where there are more, every n-th channel is taken.

    Returns:
        `(t^3, t^3)` in double precision on the input's device, and the count.

    >>> second_moment(torch.ones(2, 3, 4, 4, 4), 2, (0, 0, 0), "standard")[1]
    6
    """
    named = points if isinstance(points, str) else tuple(points)
    domain = domain_of(tile_of(tile), named, tuple(range(column_count(tile_of(tile)))))
    problem = _Problem(domain, tuple(x.shape[2:]), tuple(padding), None)
    vectors = len(x) * x.shape[1] * math.prod(problem.tiles)
    x = x[:, :: max(1, vectors // most)]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.zeros(len(domain.columns), len(domain.columns), device=x.device).double()
    with torch.autocast(x.device.type, enabled=False):
        wide = problem.padded(x)
        for block in problem.blocks(x, x.new_empty(len(domain.columns), 1, x.shape[1])):
            v = domain.to_domain(wide[block.reads]).flatten(1)
            total += v @ v.T
    return total, len(x) * x.shape[1] * math.prod(problem.tiles)


def _check(x: Tensor, values: Tensor, problem: _Problem) -> None:
    if values.dim() != 3 or len(values) != len(problem.domain.columns):
        raise UserError(
            f"values of shape {tuple(values.shape)} for {len(problem.domain.columns)} columns: "
            "expected (K, O, C), one slice a column"
        )
    if x.dim() != 5 or x.shape[1] != values.shape[2]:
        raise UserError(
            f"input of shape {tuple(x.shape)}: expected (N, {values.shape[2]}, D, H, W)"
        )
    if not x.is_floating_point():
        raise UserError(f"input of type {x.dtype}: expected a floating type")
    if len(problem.padding) != 3 or min(problem.padding) < 0:
        raise UserError(f"padding={problem.padding}: expected three numbers of at least 0")
    if min(problem.outputs) < 1:
        raise UserError(
            f"input of size {tuple(problem.size)} with padding {problem.padding}: expected at "
            "least 3 positions in depth, height and width, the length of the kernel"
        )


def _product_type(x: Tensor) -> torch.dtype | None:
    """Return the half precision in which the products are wanted, or None."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
    return x.dtype if x.dtype in (torch.float16, torch.bfloat16) else None


@dataclass(frozen=True)
class _Problem:
    """One convolution: the domain, the input's size and what surrounds it."""

    domain: Domain
    size: tuple[int, ...]
    padding: tuple[int, ...]
    product_type: torch.dtype | None

    @property
    def outputs(self) -> tuple[int, ...]:
        """Return the size of the output, by axis."""
        return tuple(s + 2 * p - 2 for s, p in zip(self.size, self.padding, strict=True))

    @property
    def tiles(self) -> tuple[int, ...]:
        """Return the number of tiles, by axis."""
        return tuple(-(-size // m) for size, m in zip(self.outputs, self.domain.tile, strict=True))

    def traceable(self, x: Tensor, values: Tensor) -> Tensor:
        """Convolve all tiles at once, by operations that a graph can hold."""
        v = self.domain.to_domain(self.padded(x))
        y = self.domain.from_domain(self.product(v, values.transpose(1, 2)), self.tiles)
        return self.cropped(y)

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """Convolve block by block."""
        wide, by_column = self.padded(x), values.transpose(1, 2)
        whole = [n * m for n, m in zip(self.tiles, self.domain.tile, strict=True)]
        y = x.new_empty(len(x), *whole, values.shape[1])
        for block in self.blocks(x, values):
            v = self.domain.to_domain(wide[block.reads])
            y[block.writes] = self.domain.from_domain(self.product(v, by_column), block.tiles)
        return self.cropped(y)

    def backward(
        self, x: Tensor, values: Tensor, gradient: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the input and of the values, where needed."""
        wide, whole = self.padded(x), self._whole_gradient(gradient)
        of_wide = torch.zeros_like(wide) if needed[0] else None
        of_values = torch.zeros_like(values) if needed[1] else None
        for block in self.blocks(x, values):
            g = self.domain.from_domain_adjoint(whole[block.writes])
            if of_values is not None:
                v = self.domain.to_domain(wide[block.reads])
                of_values += self.product(g.transpose(1, 2), v)
            if of_wide is not None:
                of_wide[block.reads] += self.domain.to_domain_adjoint(
                    self.product(g, values), block.tiles
                )
        if of_wide is not None:
            for axis, (size, p) in enumerate(zip(self.size, self.padding, strict=True)):
                of_wide = of_wide.narrow(1 + axis, p, size)
            of_wide = of_wide.permute(0, 4, 1, 2, 3)
        return of_wide, of_values

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply column by column, in half precision if that is wanted."""
        if self.product_type is None:
            return torch.bmm(a, b)
        return torch.bmm(a.to(self.product_type), b.to(self.product_type)).to(a.dtype)

    def padded(self, x: Tensor) -> Tensor:
        """Return an input with its channels last, with zeros up to where the tiles reach."""
        sides = [0, 0]
        for axis in (2, 1, 0):
            reach = self.tiles[axis] * self.domain.tile[axis] + 2
            sides += [self.padding[axis], reach - self.size[axis] - self.padding[axis]]
        return F.pad(x.permute(0, 2, 3, 4, 1), sides).contiguous()

    def cropped(self, y: Tensor) -> Tensor:
        """Drop what the last tiles computed beyond the output; put the channels second again."""
        for axis, size in enumerate(self.outputs):
            y = y.narrow(1 + axis, 0, size)
        return y.permute(0, 4, 1, 2, 3)

    def _whole_gradient(self, gradient: Tensor) -> Tensor:
        sides = [0, 0]
        for axis in (2, 1, 0):
            sides += [0, self.tiles[axis] * self.domain.tile[axis] - self.outputs[axis]]
        return F.pad(gradient.permute(0, 2, 3, 4, 1), sides).contiguous()

    def blocks(self, x: Tensor, values: Tensor) -> Iterator[_Block]:
        """Cut the tiles into blocks of samples, or of one sample's depths, or of its rows."""
        most = _BLOCK_BYTES["cpu" if x.device.type == "cpu" else "cuda"]
        depth, height, width = self.tiles
        a_row = len(values) * max(values.shape[1:]) * width * x.element_size()
        rows = max(1, most // a_row)
        depths, samples = max(1, rows // height), max(1, rows // (height * depth))
        lengths = (samples, min(depths, depth), min(rows, height))
        ends = (len(x), depth, height)
        for n in range(0, ends[0], lengths[0]):
            for d in range(0, ends[1], lengths[1]):
                for h in range(0, ends[2], lengths[2]):
                    yield _Block(
                        slice(n, n + lengths[0]),
                        slice(d, min(d + lengths[1], depth)),
                        slice(h, min(h + lengths[2], height)),
                        width,
                        self.domain.tile,
                    )


@dataclass(frozen=True)
class _Block:
    """Some tiles of a problem: samples, and the spans of tiles in depth and height."""

    samples: slice
    depth: slice
    height: slice
    width: int
    tile: tuple[int, ...]

    @property
    def tiles(self) -> tuple[int, int, int]:
        d, h = self.depth, self.height
        return d.stop - d.start, h.stop - h.start, self.width

    @property
    def reads(self) -> tuple[slice, slice, slice]:
        """Return its part of a padded input."""
        return self._part(2)

    @property
    def writes(self) -> tuple[slice, slice, slice]:
        """Return its part of the outputs of all tiles."""
        return self._part(0)

    def _part(self, overlap: int) -> tuple[slice, slice, slice]:
        spans = [
            slice(span.start * m, span.stop * m + overlap)
            for span, m in zip((self.depth, self.height), self.tile[:2], strict=True)
        ]
        return self.samples, spans[0], spans[1]


class _Convolution(torch.autograd.Function):
    """The convolution by blocks, with a backward pass that computes V again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, problem: _Problem) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.problem = problem
        return problem.forward(x, values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        return (*ctx.problem.backward(x, values, gradients[0], ctx.needs_input_grad), None)
