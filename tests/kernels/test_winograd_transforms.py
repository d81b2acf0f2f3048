"""Winograd's matrices against the sheet's worked numbers and against convolution itself."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.errors import UserError
from tenfold.kernels.winograd_transforms import (
    POINTS,
    column_count,
    gain_scales,
    tile_of,
    transforms,
    winograd_weight,
)

pytestmark = pytest.mark.parity

F23 = (
    [[1, 1, 1, 0], [0, 1, -1, 1]],
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]],
    [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
)
F43 = (
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
)


@pytest.mark.parametrize(("m", "expected"), [(2, F23), (4, F43)])
def test_matrices_of_the_sheet(m, expected):
    for found, known in zip(transforms(m), expected, strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, known, rtol=0, atol=1e-16)


@pytest.mark.parametrize(
    ("m", "d", "g", "inputs", "kernel", "y"),
    [
        (2, (1, 2, 3, 4), (1, 0, -1), (-2, 5, 1, 2), (1, 0, 0, -1), (-2, -2)),
        (
            4,
            (1, 2, 3, 4, 5, 6),
            (1, 2, 3),
            (-6, -11, -3, 6, -2, -6),
            (1 / 4, -1, -1 / 3, 17 / 24, 3 / 8, 3),
            (14, 20, 26, 32),
        ),
    ],
)
def test_one_dimension_by_hand(m, d, g, inputs, kernel, y):
    a, b, g_matrix = transforms(m)
    np.testing.assert_allclose(b @ d, inputs, atol=1e-14)
    np.testing.assert_allclose(g_matrix @ g, kernel, atol=1e-14)
    np.testing.assert_allclose(a @ ((g_matrix @ g) * (b @ d)), y, atol=1e-13)


points_of_two = st.lists(
    st.fractions(-3, 3, max_denominator=8), min_size=3, max_size=3, unique=True
)


@settings(max_examples=40, deadline=None)
@given(points=points_of_two, seed=st.integers(0, 99))
def test_any_different_points_are_exact(points, seed):
    a, b, g = transforms(2, points)
    generator = np.random.default_rng(seed)
    d, kernel = generator.standard_normal(4), generator.standard_normal(3)
    size = np.abs(a).max() * np.abs(b).max() * np.abs(g).max()
    expected = np.correlate(d, kernel, "valid")
    np.testing.assert_allclose(a @ ((g @ kernel) * (b @ d)), expected, atol=1e-12 * size)


@pytest.mark.parametrize("name", list(POINTS))
@pytest.mark.parametrize("m", [2, 4])
def test_named_points_are_exact_and_their_numbers_mean_the_same(name, m):
    a, b, g = transforms(m, name)
    generator = np.random.default_rng(0)
    d, kernel = generator.standard_normal(m + 2), generator.standard_normal(3)
    expected = np.correlate(d, kernel, "valid")
    np.testing.assert_allclose(a @ ((g @ kernel) * (b @ d)), expected, atol=1e-13)
    numbers = [float(point) for point in POINTS[name][m]]
    for given_by_name, given_by_number in zip((a, b, g), transforms(m, numbers), strict=True):
        assert np.array_equal(given_by_name, given_by_number)


def test_a_caller_may_change_what_it_got():
    transforms(2)[0][:] = 7
    assert transforms(2)[0].max() == 1


@pytest.mark.parametrize(
    ("m", "v"),
    [(2, (1, 1.5, 0.5, 1)), (4, (1 / 4, -1 / 2, -1 / 6, 7 / 24, 1 / 8, 1))],
)
def test_kernel_of_ones(m, v):
    found = winograd_weight(torch.ones(1, 1, 3, 3, 3, dtype=torch.float64), m)[0, 0]
    v = torch.tensor(v, dtype=torch.float64)
    torch.testing.assert_close(found, torch.einsum("a,b,c->abc", v, v, v), atol=1e-15, rtol=0)
    if m == 2:
        assert float(found.sum()) == pytest.approx(64)


def test_weight_is_the_kronecker_form_and_differentiable():
    weight = torch.randn(3, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    found = winograd_weight(weight, (2, 4, 2), "accurate")
    assert found.shape == (3, 2, 4, 6, 4)
    g2, g4 = transforms(2)[2], transforms(4, "accurate")[2]
    matrix = torch.from_numpy(np.kron(np.kron(g2, g4), g2))
    expected = weight.detach().reshape(6, 27) @ matrix.T
    torch.testing.assert_close(found.detach().reshape(6, -1), expected, atol=1e-14, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda w: winograd_weight(w, 2), weight)
    assert winograd_weight(weight.detach().float(), 2).dtype == torch.float32


@pytest.mark.parametrize("m", [2, 4])
def test_rank_of_weights(m):
    g = transforms(m)[2]
    assert np.linalg.matrix_rank(np.kron(np.kron(g, g), g)) == 27
    weight = torch.randn(12, 10, 3, 3, 3, dtype=torch.float64)
    found = torch.linalg.svdvals(winograd_weight(weight, m).reshape(120, -1))
    assert float(found[27]) < 1e-12
    assert float(found[26]) > 1e-3


def test_gains():
    assert gain_scales(2).tolist() == [1, 2, 2, 1]
    assert gain_scales(4).tolist() == [8, 16, 16, 32, 32, 8]
    for m in (2, 4):
        for name in POINTS:
            a, b, _ = transforms(m, name)
            scales = gain_scales(m, name)
            assert (np.log2(scales) % 1 == 0).all()
            gains = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=1) / scales
            assert gains.min() > 0.7
            assert gains.max() < 1.42


def test_tiles():
    assert tile_of(2) == (2, 2, 2)
    assert tile_of([2, 4, 4]) == (2, 4, 4)
    assert column_count((2, 4, 4)) == 144
    for wrong in (3, True, 2.0, "2", (2, 4), (2, 4, 6), (2, 4, 4, 4), None):
        with pytest.raises(UserError, match="expected 2, 4, or three of them"):
            tile_of(wrong)


@pytest.mark.parametrize(
    ("m", "points", "text"),
    [
        (3, None, "m=3: expected 2 or 4"),
        (True, None, "expected 2 or 4"),
        (2, "acurate", "did you mean accurate"),
        (2, (0, 1), "needs 3 different points"),
        (2, (0, 1, 1), "needs 3 different points"),
        (2, (0, 1, "a"), "expected numbers"),
        (2, (0, 1, float("inf")), "expected numbers"),
    ],
)
def test_bad_transforms(m, points, text):
    with pytest.raises(UserError, match=text):
        transforms(m, points)


@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (2, 2, 1, 3, 3), (2, 2, 3, 3, 5)])
def test_bad_weights(shape):
    with pytest.raises(UserError, match=r"expected \(O, C, 3, 3, 3\)"):
        winograd_weight(torch.zeros(shape), 2)
    with pytest.raises(UserError, match="expected a floating type"):
        winograd_weight(torch.zeros(1, 1, 3, 3, 3, dtype=torch.int32), 2)


def test_points_are_taken_as_the_numbers_that_were_meant():
    assert np.array_equal(
        transforms(2, (0, 0.7, -0.7))[1], transforms(2, (0, Fraction(7, 10), Fraction(-7, 10)))[1]
    )
