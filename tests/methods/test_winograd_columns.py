"""What columns are worth and how others make up for them: the sheet's numbers, and sampling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tenfold.errors import UserError
from tenfold.kernels.winograd_reference import conv3d, second_moment
from tenfold.kernels.winograd_transforms import column_count, gain_scales, tile_of, transforms
from tenfold.methods.winograd_columns import (
    compensation,
    eliminate,
    error_matrix,
    kept_columns,
    scales_of,
    white_moment,
)

pytestmark = pytest.mark.parity


def random_gamma(tile=2, seed=0):
    """The error matrix of smooth inputs, which real features are nearer to than noise."""
    x = torch.randn(4, 8, 12, 12, 12, generator=torch.Generator().manual_seed(seed)).double()
    x = F.avg_pool3d(x, 3, 1).relu()
    total, count = second_moment(x, tile, (1, 1, 1), "accurate")
    return error_matrix(tile, total / count, "accurate")


def squared_error(gamma, change):
    return float((change @ gamma * change).sum())


def test_one_dimension_by_hand():
    a, b, g = transforms(2)
    gamma = (a.T @ a) * (b @ b.T)
    assert gamma.tolist() == [[2, -1, -1, 0], [-1, 4, 0, -1], [-1, 0, 4, -1], [0, -1, -1, 2]]
    assert np.trace(g.T @ gamma @ g) == 6
    # error_matrix is the same, nested: Gamma of white noise is the product of the axes' ones.
    expected = np.kron(np.kron(gamma, gamma), gamma)
    np.testing.assert_allclose(error_matrix(2, scaled=False), expected, atol=1e-12)


@pytest.mark.parametrize(("tile", "trace"), [(2, 216), (4, 1728), ((2, 4, 4), 27 * 32)])
@pytest.mark.parametrize("points", ["standard", "accurate"])
def test_trace_counts_the_kernels_taps_at_every_output(tile, trace, points):
    g = [transforms(m, points)[2] for m in tile_of(tile)]
    kernel = torch.from_numpy(np.kron(np.kron(g[0], g[1]), g[2]))
    gamma = error_matrix(tile, points=points, scaled=False)
    assert float((kernel.T @ gamma @ kernel).trace()) == pytest.approx(trace, rel=1e-9)
    scaled = error_matrix(tile, points=points)
    kernel = kernel * scales_of(tile, points)[:, None]
    assert float((kernel.T @ scaled @ kernel).trace()) == pytest.approx(trace, rel=1e-9)


def test_scales_are_the_products_of_the_axes():
    found = scales_of((2, 4, 2)).reshape(4, 6, 4)
    two, four = (torch.from_numpy(gain_scales(m)) for m in (2, 4))
    assert torch.equal(found, torch.einsum("a,b,c->abc", two, four, two))


@pytest.mark.parametrize("tile", [2, (2, 4, 2)])
def test_expected_error_is_the_measured_one(tile):
    """A changed weight's squared error over white tiles, sampled: within 1 %."""
    generator = torch.Generator().manual_seed(0)
    count = column_count(tile_of(tile))
    x = torch.randn(2, 1, 64, 64, 64, generator=generator, dtype=torch.float64)
    change = torch.randn(count, 1, 1, generator=generator, dtype=torch.float64)
    y = conv3d(x, change, range(count), None, tile, (0, 0, 0), "standard")
    y = y[:, :, :60, :60, :60]
    each = squared_error(error_matrix(tile, scaled=False), change[:, 0, 0])
    outputs = np.prod(tile_of(tile))
    assert float(y.square().mean()) == pytest.approx(each / outputs, rel=0.01)
    total, vectors = second_moment(x, tile, (0, 0, 0), "standard")
    measured = error_matrix(tile, total / vectors, scaled=False)
    assert squared_error(measured, change[:, 0, 0]) == pytest.approx(each, rel=0.01)
    torch.testing.assert_close(
        white_moment(tile).diagonal(), (total / vectors).diagonal(), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("tile", [2, (4, 2, 2)])
def test_compensation_never_loses_and_is_the_least_squares(tile):
    gamma = random_gamma(tile)
    count = len(gamma)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, count, generator=generator, dtype=torch.float64)
    for share in (0.9, 0.5, 0.25, 0.1):
        order = torch.randperm(count, generator=generator)
        kept = sorted(order[: round(share * count)].tolist())
        removed = sorted(set(range(count)) - set(kept))
        plain, fitted = weight.clone(), weight.clone()
        plain[:, removed] = fitted[:, removed] = 0
        fitted[:, kept] += weight[:, removed] @ compensation(gamma, kept, removed)
        before = squared_error(gamma, plain - weight)
        after = squared_error(gamma, fitted - weight)
        assert after < before
        # No other change of the kept columns does better: the error's slope there is nothing.
        slope = ((fitted - weight) @ gamma)[:, kept]
        assert float(slope.abs().max()) < 1e-4 * float((plain - weight).abs().max() * gamma.max())


def test_nothing_removed_nothing_moved():
    gamma = random_gamma()
    assert compensation(gamma, range(64), []).shape == (0, 64)


def test_elimination_takes_the_cheapest_each_time():
    """Against the plain way: fit anew for every candidate, and take the best."""
    torch.manual_seed(0)
    basis = torch.randn(20, 8, dtype=torch.float64)
    gamma = basis.T @ basis / 20
    weight = torch.randn(8, 5, dtype=torch.float64)  # (columns, rows)
    kept, expected = list(range(1, 8)), []
    current = weight.clone()
    current[0] = 0
    alive = list(kept)
    for _ in range(4):
        costs = {}
        for column in alive:
            rest = [j for j in alive if j != column]
            change = torch.zeros_like(current)
            change[column] = -current[column]
            change[rest] = compensation(gamma, rest, [column]).T @ current[[column]]
            costs[column] = squared_error(gamma, change.T)
        cheapest = min(costs, key=costs.__getitem__)
        expected.append(cheapest)
        rest = [j for j in alive if j != cheapest]
        current[rest] += compensation(gamma, rest, [cheapest]).T @ current[[cheapest]]
        current[cheapest] = 0
        alive = rest
    assert eliminate(gamma, weight, kept, 4) == expected


def test_elimination_with_compensation_beats_random_and_taylor_like_choices():
    gamma = random_gamma(2)
    weight = torch.randn(64, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def error(removed):
        kept = sorted(set(range(64)) - set(removed))
        fitted = torch.zeros_like(weight)
        fitted[kept] = weight[kept] + compensation(gamma, kept, removed).T @ weight[removed]
        return squared_error(gamma, (fitted - weight).T)

    chosen = error(eliminate(gamma, weight, range(64), 32))
    for seed in range(5):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        assert chosen < error(sorted(order[:32].tolist()))


def test_schedule_is_monotone_and_ends_where_it_should():
    for columns, final, start, end in itertools.product((64, 216), (8, 32, 64), (0, 7), (20, 300)):
        found = [kept_columns(step, columns, final, start, end) for step in range(end + 5)]
        assert found[start] == columns
        assert found[end] == found[-1] == final
        assert found == sorted(found, reverse=True)
        middle = (start + end) / 2
        if middle.is_integer():  # 1/8 of the way is left at half time
            assert found[int(middle)] == final + -(-(columns - final) // 8)


def test_a_moment_of_another_tile_is_refused():
    with pytest.raises(UserError, match=r"expected \(216, 216\) for tile \(4, 4, 4\)"):
        error_matrix(4, torch.zeros(64, 64))
