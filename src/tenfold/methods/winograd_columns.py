"""What a column of a Winograd-domain weight is worth, and how the others make up for its loss.

A change dw of a weight's row (one pair of channels, t^3 coordinates) changes a tile's output by
A (dw * v), where v are the tile's inputs in the domain. Averaged over tiles, its squared size is

    dw Gamma dw^T,    Gamma = (A^T A) * E[v v^T]    elementwise, (t^3, t^3)

with A = A_d (x) A_h (x) A_w. So the best weights on the kept columns J, when the columns R go, are

    What_J + What_R X,    X = Gamma[R, J] Gamma[J, J]^-1

Channels are taken as uncorrelated. Everything here is in double precision on the CPU.
`error_matrix` gives Gamma for weights multiplied by the gains' powers of two, alpha * What (see
`gain_scales`): their columns are of similar size, so that the small number which is added to the
diagonal before solving is small beside each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels.winograd_transforms import Points, gain_scales, tile_of, transforms

__all__ = ["compensation", "eliminate", "error_matrix", "kept_columns", "scales_of", "white_moment"]

# Added to the diagonal, relative to its mean.
_RIDGE = 1e-6


def error_matrix(
    tile: int | Sequence[int],
    moment: Tensor | None = None,
    points: Points | None = None,
    scaled: bool = True,
) -> Tensor:
    """Return Gamma: the squared error at a tile's output of a change dw is `dw @ Gamma @ dw`.

    For a weight that is multiplied by `scales_of(tile, points)`, unless `scaled` is off.

    Args:
        tile: outputs of a tile, 2, 4 or three of them.
        moment: `(t^3, t^3)`, the second moment E[v v^T] of a tile's inputs in the domain, its mean
            not subtracted; of white noise if None, see `white_moment`.
        points: of the transforms; "standard" if None.
        scaled: for a weight multiplied by the gains' powers of two.

    Returns:
        `(t^3, t^3)`, double precision, on the CPU.

    >>> error_matrix(2).shape
    torch.Size([64, 64])
    """
    outputs = _kron([transforms(m, points)[0] for m in tile_of(tile)])
    known = white_moment(tile, points) if moment is None else moment.double().cpu()
    if known.shape != (outputs.shape[1],) * 2:
        raise UserError(
            f"moment of shape {tuple(known.shape)}: expected {(outputs.shape[1],) * 2} for tile "
            f"{tile_of(tile)}"
        )
    gamma = (outputs.T @ outputs) * known
    if not scaled:
        return gamma
    scales = scales_of(tile, points)
    return gamma / scales[:, None] / scales


def white_moment(tile: int | Sequence[int], points: Points | None = None) -> Tensor:
    """Return E[v v^T] `(t^3, t^3)` for inputs that are white noise of variance 1."""
    inputs = _kron([transforms(m, points)[1] for m in tile_of(tile)])
    return inputs @ inputs.T


def scales_of(tile: int | Sequence[int], points: Points | None = None) -> Tensor:
    """Return the gains' powers of two of all columns, `(t^3,)`, the product over the axes."""
    return _kron([gain_scales(m, points)[None] for m in tile_of(tile)])[0]


def compensation(gamma: Tensor, kept: Sequence[int], removed: Sequence[int]) -> Tensor:
    """Return X: what of each removed column is added to each kept one, to lose the least.

    The new weights are `weight[:, kept] + weight[:, removed] @ X`.

    Args:
        gamma: of `error_matrix`.
        kept: J.
        removed: R; what is gone already belongs to neither.

    Returns:
        `(R, J)`.

    >>> gamma = torch.tensor([[2.0, -1.0], [-1.0, 4.0]])
    >>> compensation(gamma, [1], [0])
    tensor([[-0.2500]], dtype=torch.float64)
    """
    j, r = list(kept), list(removed)
    known = gamma.double().cpu()[j]
    # Gamma is symmetric: (Gamma[J, J]^-1 Gamma[J, R])^T
    found: Tensor = torch.linalg.solve(_ridged(known[:, j]), known[:, r])
    return found.T


def eliminate(gamma: Tensor, weight: Tensor, kept: Sequence[int], count: int) -> list[int]:
    """Choose columns to remove one by one, each the one whose loss costs the least.

    Removing column j costs |w_j|^2 / (Gamma^-1)_jj once the others are fitted anew, which follows
    in closed form: w - w_j (Gamma^-1)_j / (Gamma^-1)_jj. Ties go to the lower column.

    Args:
        gamma: of `error_matrix`.
        weight: `(t^3, rows)`.
        kept: the columns to choose among, ascending.
        count: how many to remove.

    Returns:
        The removed columns, in the order of their removal.
    """
    alive = list(kept)
    inverse = torch.linalg.inv(_ridged(gamma[alive][:, alive]))
    chosen = weight[alive].double().cpu()
    # Only the columns' products matter for the costs, and a fit changes them from both sides.
    products = chosen @ chosen.T
    removed = []
    for _ in range(count):
        costs = products.diagonal() / inverse.diagonal()
        place = int(costs.argmin())
        row = inverse[place] / inverse[place, place]
        fit = torch.eye(len(alive), dtype=torch.float64)
        fit[place] -= row
        products = fit.T @ products @ fit
        inverse = inverse - torch.outer(inverse[:, place], row)
        rest = [index for index in range(len(alive)) if index != place]
        products, inverse = products[rest][:, rest], inverse[rest][:, rest]
        removed.append(alive.pop(place))
    return removed


def kept_columns(step: int, columns: int, final: int, start: int, end: int) -> int:
    """Return how many columns are kept at a step: K + (t^3 - K) (1 - u)^3.

    Args:
        step: the moment.
        columns: t^3, all of them.
        final: K, those that are kept in the end.
        start: up to here all are kept, u = 0.
        end: from here on K are kept, u = 1.

    >>> [kept_columns(step, 64, 32, 0, 8) for step in (0, 1, 2, 4, 7, 8)]
    [64, 54, 46, 36, 33, 32]
    """
    if step <= start:
        return columns
    if step >= end:
        return final
    # In integers, rounded up: no machine decides otherwise.
    return final - (-(columns - final) * (end - step) ** 3 // (end - start) ** 3)


def _ridged(matrix: Tensor) -> Tensor:
    matrix = matrix.double().cpu()
    ridge = _RIDGE * float(matrix.diagonal().mean())
    return matrix + ridge * torch.eye(len(matrix), dtype=torch.float64)


def _kron(matrices: Sequence[NDArray[np.float64]]) -> Tensor:
    depth, height, width = matrices
    return torch.from_numpy(np.kron(np.kron(depth, height), width))
