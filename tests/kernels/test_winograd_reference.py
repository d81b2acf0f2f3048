"""The plain Winograd convolution against PyTorch's own in double precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.errors import UserError
from tenfold.kernels import winograd_reference
from tenfold.kernels.winograd_reference import conv3d, second_moment
from tenfold.kernels.winograd_transforms import (
    POINTS,
    column_count,
    tile_of,
    transforms,
    winograd_weight,
)

pytestmark = pytest.mark.parity


def values_of(weight, tile, points="accurate", columns=None):
    found = winograd_weight(weight, tile, points).flatten(2).permute(2, 0, 1)
    return found if columns is None else found[list(columns)]


def every(tile):
    return range(column_count(tile_of(tile)))


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("points", list(POINTS))
@pytest.mark.parametrize("tile", [2, 4, (2, 4, 4), (4, 2, 2)])
@pytest.mark.parametrize(
    ("size", "padding"),
    [
        *itertools.product([(5, 7, 6), (3, 3, 3)], [(0, 0, 0), (1, 1, 1), (1, 0, 2)]),
        *itertools.product([(1, 8, 4)], [(1, 1, 1), (1, 0, 2)]),
    ],
)
def test_equals_a_convolution(points, tile, padding, size):
    x, weight, bias = random(2, 3, *size), random(4, 3, 3, 3, 3, seed=1), random(4, seed=2)
    expected = F.conv3d(x, weight, bias, padding=padding)
    found = conv3d(x, values_of(weight, tile, points), every(tile), bias, tile, padding, points)
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    x, weight, bias = x.float(), weight.float(), bias.float()
    found = conv3d(x, values_of(weight, tile, points), every(tile), bias, tile, padding, points)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    padding=st.tuples(*[st.integers(0, 2)] * 3),
    tile=st.tuples(*[st.sampled_from([2, 4])] * 3),
    layout=st.sampled_from(["contiguous", "last", "strided", "expanded"]),
    kept=st.integers(1, 216),
)
def test_kept_columns_equal_zeroed_ones_for_any_shape(
    batch, channels, size, padding, tile, layout, kept
):
    """The full transforms with zeros in the other columns are the oracle."""
    size = tuple(max(s, 3 - 2 * p) for s, p in zip(size, padding, strict=True))
    x = random(batch, channels[0], *size)
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "strided":
        x = random(batch, channels[0], *size[::-1]).permute(0, 1, 4, 3, 2)
    elif layout == "expanded":
        x = x[:, :1].expand(-1, channels[0], -1, -1, -1)
    count = column_count(tile)
    generator = torch.Generator().manual_seed(kept)
    columns = sorted(torch.randperm(count, generator=generator)[:kept].tolist())
    values = random(len(columns), channels[1], channels[0], seed=1)
    full = torch.zeros(count, channels[1], channels[0], dtype=torch.float64)
    full[columns] = values
    found = conv3d(x, values, columns, None, tile, padding, "dyadic")
    expected = by_kronecker(x, full, tile, padding, "dyadic")
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(
        found, conv3d(x, full, every(tile), None, tile, padding, "dyadic"), atol=1e-8, rtol=1e-8
    )


def by_kronecker(x, values, tile, padding, points):
    """Compute tile by tile with the whole matrices, as the sheet writes it in 2.3."""
    import numpy as np

    a, b = (
        torch.from_numpy(np.kron(np.kron(*parts[:2]), parts[2]))
        for parts in zip(*[transforms(m, points)[:2] for m in tile], strict=True)
    )
    sizes = [s + 2 * p - 2 for s, p in zip(x.shape[2:], padding, strict=True)]
    tiles = [math.ceil(s / m) for s, m in zip(sizes, tile, strict=True)]
    sides = []
    for axis in (2, 1, 0):
        reach = tiles[axis] * tile[axis] + 2
        sides += [padding[axis], reach - x.shape[2 + axis] - padding[axis]]
    x = F.pad(x, sides)
    for axis, m in enumerate(tile):
        x = x.unfold(2 + axis, m + 2, m)
    v = torch.einsum("jk,nctuvk->jnctuv", b, x.flatten(5))
    y = torch.einsum("ij,joc,jnctuv->inotuv", a, values, v)
    y = y.unflatten(0, tile).permute(3, 4, 5, 0, 6, 1, 7, 2)
    y = y.flatten(2, 3).flatten(3, 4).flatten(4, 5)
    return y[:, :, : sizes[0], : sizes[1], : sizes[2]]


@pytest.mark.parametrize(("tile", "step"), [(2, 1), (2, 3), ((4, 2, 4), 5)])
def test_gradients(tile, step):
    columns = every(tile)[::step]
    x = random(2, 2, 4, 3, 5).requires_grad_()
    values = values_of(random(3, 2, 3, 3, 3), tile, columns=columns).contiguous().requires_grad_()
    bias = random(3).requires_grad_()

    def run(x, values, bias):
        return conv3d(x, values, columns, bias, tile, (1, 0, 1), "accurate")

    assert torch.autograd.gradcheck(run, (x, values, bias))
    only = torch.autograd.grad(run(x.detach(), values, None).square().sum(), values)[0]
    both = torch.autograd.grad(run(x, values, None).square().sum(), (x, values))
    torch.testing.assert_close(only, both[1])


def test_gradients_equal_those_of_the_convolution():
    x, weight = random(2, 3, 5, 6, 4).requires_grad_(), random(4, 3, 3, 3, 3).requires_grad_()
    expected = torch.autograd.grad(F.conv3d(x, weight, padding=1).square().sum(), (x, weight))
    y = conv3d(x, values_of(weight, 4), every(4), None, 4, (1, 1, 1), "accurate")
    found = torch.autograd.grad(y.square().sum(), (x, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("limit", [1, 6_000, 20_000, 70_000])
def test_blocks_change_nothing(limit, monkeypatch):
    """Blocks of rows, of depths, of samples, and the whole at once."""
    x, values = random(3, 4, 7, 9, 6).requires_grad_(), values_of(random(5, 4, 3, 3, 3), (2, 4, 2))
    values = values[::2].contiguous().requires_grad_()
    columns = every((2, 4, 2))[::2]
    results = []
    for most in (limit, 2**40):
        monkeypatch.setitem(winograd_reference._BLOCK_BYTES, "cpu", most)
        y = conv3d(x, values, columns, None, (2, 4, 2), (1, 2, 0), "accurate")
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, values))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_columns_as_a_tensor_and_a_coordinate_that_nobody_has():
    weight = random(2, 2, 3, 3, 3)
    columns = [j for j in every(2) if j // 16 in (0, 2)]  # two of four depths, all of the rest
    x = random(1, 2, 4, 4, 4)
    values = values_of(weight, 2, columns=columns)
    found = conv3d(x, values, torch.tensor(columns), None, 2, (1, 1, 1), "accurate")
    full = values_of(weight, 2).clone()
    full[[j for j in every(2) if j not in columns]] = 0
    expected = by_kronecker(x, full, (2, 2, 2), (1, 1, 1), "accurate")
    torch.testing.assert_close(found, expected)


def test_what_lies_beyond_the_input_changes_nothing():
    """The remainder of the last tile is zeros; outputs follow the tile's origin at 0."""
    x, weight = random(1, 2, 5, 5, 5), random(2, 2, 3, 3, 3)
    values = values_of(weight, 4)[::2]
    columns = every(4)[::2]
    y = conv3d(x, values, columns, None, 4, (0, 0, 0), "accurate")
    wide = conv3d(F.pad(x, [0, 5] * 3), values, columns, None, 4, (0, 0, 0), "accurate")
    torch.testing.assert_close(y, wide[:, :, :3, :3, :3])
    moved = conv3d(x[..., 1:], values, columns, None, 4, (0, 0, 0), "accurate")
    assert not torch.allclose(y[..., 1:], moved)  # pruned, the place in the tile matters


def test_memory_format_is_the_inputs():
    x = random(2, 4, 4, 4, 4, dtype=torch.float32)
    values = values_of(random(4, 4, 3, 3, 3), 2).float()
    y = conv3d(x, values, every(2), None, 2, (1, 1, 1), "accurate")
    assert y.is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last_3d)
    z = conv3d(last, values, every(2), None, 2, (1, 1, 1), "accurate")
    assert z.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, z)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_reaches_the_products_alone(dtype, bound):
    x, weight = random(2, 16, 6, 6, 6).relu(), random(16, 16, 3, 3, 3, seed=1)
    expected = F.conv3d(x, weight, padding=1)
    values = values_of(weight, 2).float()
    low = conv3d(x.to(dtype), values, every(2), None, 2, (1, 1, 1), "accurate")
    with torch.autocast("cpu", dtype):
        cast = conv3d(x.float(), values, every(2), None, 2, (1, 1, 1), "accurate")
    for found in (low, cast):
        assert found.dtype == dtype
        assert float((found - expected).abs().max() / expected.abs().max()) < bound


def test_second_moment_of_tiles():
    x = random(2, 3, 5, 4, 6)
    total, count = second_moment(x, (2, 2, 4), (1, 0, 1), "accurate")
    tiles = F.pad(x, (1, 3, 0, 0, 1, 2))
    for axis, m in enumerate((2, 2, 4)):
        tiles = tiles.unfold(2 + axis, m + 2, m)
    d = tiles.flatten(5).flatten(0, 4)
    assert count == len(d)
    b = [torch.from_numpy(transforms(m, "accurate")[1]) for m in (2, 2, 4)]
    v = d @ torch.kron(torch.kron(b[0], b[1]), b[2]).T
    torch.testing.assert_close(total, v.T @ v, atol=1e-8, rtol=1e-8)
    assert second_moment(x, (2, 2, 4), (1, 0, 1), "accurate", most=count // 3)[1] == count // 3


@pytest.mark.parametrize(
    ("x", "changes", "text"),
    [
        (torch.zeros(1, 2, 4, 4), {}, r"expected \(N, 2, D, H, W\)"),
        (torch.zeros(1, 3, 4, 4, 4), {}, r"expected \(N, 2, D, H, W\)"),
        (torch.zeros(1, 2, 4, 2, 4), {}, "at least 3 positions"),
        (torch.zeros(1, 2, 4, 4, 4).int(), {}, "expected a floating type"),
        (torch.zeros(1, 2, 4, 4, 4).cfloat(), {}, "expected a floating type"),
        (torch.zeros(1, 2, 4, 4, 4), {"columns": range(63)}, "for 63 columns"),
        (torch.zeros(1, 2, 4, 4, 4), {"columns": [*range(63), 64]}, "from 0 to 63"),
        (torch.zeros(1, 2, 4, 4, 4), {"columns": [0, *range(63)]}, "ascending"),
        (torch.zeros(1, 2, 4, 4, 4), {"columns": []}, "at least one"),
        (torch.zeros(1, 2, 4, 4, 4), {"padding": (1, 1)}, "three numbers"),
        (torch.zeros(1, 2, 4, 4, 4), {"padding": (1, 1, -1)}, "at least 0"),
        (torch.zeros(1, 2, 4, 4, 4), {"tile": 3}, "expected 2, 4"),
        (torch.zeros(1, 2, 4, 4, 4), {"points": "other"}, "unknown set of points"),
    ],
)
def test_refusals(x, changes, text):
    given = {"columns": range(64), "tile": 2, "padding": (0, 0, 0), "points": "accurate", **changes}
    with pytest.raises(UserError, match=text):
        conv3d(
            x, torch.zeros(64, 3, 2), given["columns"], None, given["tile"], given["padding"],
            given["points"],
        )  # fmt: skip
