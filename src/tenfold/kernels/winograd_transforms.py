"""The matrices of Winograd's convolution, F(m,3), and a 3-D kernel's weight in its domain.

In one dimension m outputs y of a filter g of 3 taps over t = m + 2 inputs d are

    y = A^T [ (G g) * (B^T d) ]          a correlation: the filter is not flipped

with t multiplications instead of 3 m. In three dimensions each axis is transformed by its own
matrices; the t_d x t_h x t_w coordinates of the domain are numbered `(a * t_h + b) * t_w + c`.

The matrices follow from t - 1 points (Toom and Cook, in the sign convention of Lavin and Gray's
wincnn): any distinct points are exact, but how much rounding they bring differs. Three sets have a
name. With m = 2 all of them are 0, 1, -1; with m = 4 they are

    standard   0, 1, -1, 2, -2               integers in A and B
    dyadic     0, 1, -1, 1/2, -2             every entry of A and B exact in binary
    accurate   0, 7/10, -7/10, 3/2, -3/2     the least error of the three
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.errors import UserError, unknown_name

__all__ = [
    "POINTS",
    "TILES",
    "Points",
    "Tile",
    "column_count",
    "gain_scales",
    "tile_of",
    "transforms",
    "winograd_weight",
]

TILES = (2, 4)
POINTS: dict[str, dict[int, tuple[Fraction, ...]]] = {
    name: {2: (Fraction(0), Fraction(1), Fraction(-1)), 4: tuple(map(Fraction, four))}
    for name, four in {
        "standard": ("0", "1", "-1", "2", "-2"),
        "dyadic": ("0", "1", "-1", "1/2", "-2"),
        "accurate": ("0", "7/10", "-7/10", "3/2", "-3/2"),
    }.items()
}

Matrix = NDArray[np.float64]
Tile = tuple[int, int, int]
Points = str | Sequence[float | Fraction]


def transforms(m: int, points: Points | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """Return the matrices A^T `(m, t)`, B^T `(t, t)` and G `(t, 3)` of F(m,3), t = m + 2.

    Args:
        m: outputs of a tile, 2 or 4.
        points: the name of a set, or m + 1 different numbers; "standard" if None.

    Raises:
        UserError: another m, an unknown set, or numbers that don't fit.

    >>> a, b, g = transforms(2)
    >>> a @ ((g @ [1, 0, -1]) * (b @ [1, 2, 3, 4]))
    array([-2., -2.])
    """
    a, b, g = _transforms(m, _points_of(m, points))
    return a.copy(), b.copy(), g.copy()


def gain_scales(m: int, points: Points | None = None) -> Matrix:
    """Return the powers of two alpha `(t,)` that bring the coordinates' gains near to 1.

    A coordinate k reaches the output with the gain |A^T[:, k]| * |B^T[k, :]|, between 6.5 and 29
    with F(4,3) and the standard points. A weight kept as alpha * What, with A^T diag(1 / alpha)
    behind it, computes the same bit for bit, and all its coordinates learn at a similar rate.

    Args:
        m: outputs of a tile, 2 or 4.
        points: see `transforms`.

    >>> gain_scales(4)
    array([ 8., 16., 16., 32., 32.,  8.])
    """
    a, b, _ = _transforms(m, _points_of(m, points))
    gains = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=1)
    # The nearest power of two, the lower one of a tie (sqrt 2), whatever the rounding.
    return np.asarray(2.0 ** np.ceil(np.log2(gains) - 0.5 - 1e-9))


def winograd_weight(weight: Tensor, m: int | Sequence[int], points: Points | None = None) -> Tensor:
    """Return a convolution's weight in the Winograd domain, What = G-transform of every kernel.

    Computed in double precision and returned in the weight's own; differentiable.

    Args:
        weight: `(O, C, 3, 3, 3)`.
        m: outputs of a tile, one number or one for each of depth, height and width.
        points: see `transforms`; where axes differ in m, the name of a set.

    Returns:
        `(O, C, t_d, t_h, t_w)`.

    Raises:
        UserError: a weight of another shape, or an m or points that don't fit.

    >>> winograd_weight(torch.ones(1, 1, 3, 3, 3), 2).sum()
    tensor(64.)
    """
    if weight.dim() != 5 or tuple(weight.shape[2:]) != (3, 3, 3):
        raise UserError(
            f"weight of shape {tuple(weight.shape)}: expected (O, C, 3, 3, 3), the weight of a "
            "3-D convolution with kernel size 3"
        )
    if not weight.is_floating_point():
        raise UserError(f"weight of type {weight.dtype}: expected a floating type")
    found = weight.double()
    for size in tile_of(m):
        g = torch.from_numpy(transforms(size, points)[2]).to(weight.device)
        found = torch.tensordot(found, g, dims=([2], [1]))  # the new axis goes to the end
    return found.to(weight.dtype)


def tile_of(given: Any) -> Tile:
    """Return a tile as outputs in depth, height and width.

    Args:
        given: 2, 4, or three of them.

    Raises:
        UserError: anything else.

    >>> tile_of(2)
    (2, 2, 2)
    """
    sizes = [given] * 3 if isinstance(given, int) else given
    if (
        isinstance(sizes, str)
        or not isinstance(sizes, Sequence)
        or len(sizes) != 3
        or any(type(size) is not int or size not in TILES for size in sizes)
    ):
        raise UserError(
            f"tile={given!r}: expected 2, 4, or three of them for depth, height and width, such "
            "as (2, 4, 4)"
        )
    depth, height, width = (int(size) for size in sizes)
    return depth, height, width


def column_count(tile: Sequence[int]) -> int:
    """Return the coordinates of a tile's domain, t_d * t_h * t_w: 64 for F(2,3), 216 for F(4,3)."""
    return math.prod(size + 2 for size in tile)


def _points_of(m: int, points: Points | None) -> tuple[Fraction, ...]:
    if not isinstance(m, int) or isinstance(m, bool) or m not in TILES:
        raise UserError(f"m={m!r}: expected 2 or 4, the outputs of a tile that are generated")
    if points is None:
        points = "standard"
    if isinstance(points, str):
        if points not in POINTS:
            raise unknown_name("set of points", points, POINTS)
        return POINTS[points][m]
    try:
        # A point such as 0.7 is meant as 7/10, not as the nearest binary number.
        found = tuple(
            point if isinstance(point, Fraction) else Fraction(point).limit_denominator(10**6)
            for point in points
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"points={points!r}: expected numbers") from error
    if len(found) != m + 1 or len(set(found)) != m + 1:
        raise UserError(f"points={points!r}: F({m},3) needs {m + 1} different points")
    return found


@functools.lru_cache(maxsize=32)
def _transforms(m: int, points: tuple[Fraction, ...]) -> tuple[Matrix, Matrix, Matrix]:
    """Build the matrices in rational numbers, so that nothing is lost before the last rounding."""
    t = m + 2
    a = [[point**power for point in points] + [Fraction(power == m - 1)] for power in range(m)]
    b, g = [], []
    for i, point in enumerate(points):
        others = [other for k, other in enumerate(points) if k != i]
        product = math.prod((point - other for other in others), start=Fraction(1))
        sign = -1 if i == 0 and product < 0 else 1
        b.append([sign * value for value in [*_polynomial(others), Fraction(0)]])
        g.append([sign * point**power / product for power in range(3)])
    b.append(_polynomial(points))
    g.append([Fraction(0), Fraction(0), Fraction(1)])
    found = tuple(np.array([[float(value) for value in row] for row in rows]) for rows in (a, b, g))
    assert [matrix.shape for matrix in found] == [(m, t), (t, t), (t, 3)]
    return found[0], found[1], found[2]


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), from the constant upwards."""
    found = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *found]
        scaled = [root * value for value in [*found, Fraction(0)]]
        found = [high - low for high, low in zip(shifted, scaled, strict=True)]
    return found
