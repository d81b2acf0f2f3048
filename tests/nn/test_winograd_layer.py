"""The Winograd layer for inference: what it computes, what it refuses, what it counts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tenfold.errors import UserError
from tenfold.nn.winograd import WinogradConv3d
from tenfold.nn.winograd_fit import refuse_unconvertible, unconvertible, zero_padding

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("tile", [2, 4, (2, 4, 4)])
def test_from_dense_loses_nothing(tile):
    for padding, bias in (((1, 0, 2), True), ("same", False), ("valid", True)):
        dense = nn.Conv3d(3, 5, 3, padding=padding, bias=bias).double()
        layer = WinogradConv3d.from_dense(dense, tile)
        x = torch.randn(2, 3, 5, 7, 6, dtype=torch.float64)
        assert layer.values.dtype == torch.float64
        torch.testing.assert_close(layer(x), dense(x), atol=1e-10, rtol=1e-10)
        assert not list(layer.parameters())


@pytest.mark.parametrize("points", ["standard", "dyadic", "accurate"])
def test_error_in_single_precision_by_points(points):
    """The sheet's table: largest error over the largest output, 64 channels behind a ReLU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 8, 8, 8, generator=generator).relu()
    dense = nn.Conv3d(64, 64, 3, padding=1, bias=False)
    nn.init.normal_(dense.weight, std=0.03, generator=generator)
    expected = F.conv3d(x.double(), dense.weight.detach().double(), padding=1)
    with torch.no_grad():
        found = WinogradConv3d.from_dense(dense, 4, points=points)(x)
    error = float((found - expected).abs().max() / expected.abs().max())
    bounds = {"standard": (3e-6, 4e-5), "dyadic": (5e-7, 1e-5), "accurate": (3e-7, 5e-6)}
    low, high = bounds[points]
    assert low < error < high


def test_multiplications_are_those_of_the_sheet():
    """8, 4.5 and 3.375 an output and pair of channels; more where the last tiles reach beyond."""
    dense = nn.Conv3d(2, 3, 3, padding=1)
    for tile, each in ((2, 8), ((2, 4, 4), 4.5), (4, 3.375)):
        layer = WinogradConv3d.from_dense(dense, tile)
        y = torch.zeros(2, 3, 8, 8, 8)
        assert layer.multiplications(y) == each * 2 * 3 * 2 * 8**3
        assert layer.macs(y) == 27 * 2 * 3 * 2 * 8**3
    wasted = {2: 10.45, (2, 4, 4): 5.88, 4: 8.82}
    for tile, each in wasted.items():
        y = torch.zeros(1, 3, 2, 7, 7)
        found = WinogradConv3d.from_dense(dense, tile).multiplications(y) / (2 * 3 * 98)
        assert found == pytest.approx(each, abs=0.005)
    half = WinogradConv3d.from_dense(dense, 2, range(0, 64, 2))
    assert half.multiplications(torch.zeros(1, 3, 8, 8, 8)) == 4 * 2 * 3 * 8**3


def test_dropped_columns_are_zeros():
    dense = nn.Conv3d(4, 4, 3, padding=1)
    every, some = WinogradConv3d.from_dense(dense, 2), list(range(0, 64, 3))
    kept = WinogradConv3d.from_dense(dense, 2, some)
    every.values[[j for j in range(64) if j not in some]] = 0
    x = torch.randn(1, 4, 5, 5, 5)
    torch.testing.assert_close(kept(x), every(x), atol=1e-6, rtol=1e-6)


def test_back_to_a_kernel_only_where_it_is_one():
    dense = nn.Conv3d(3, 4, 3, padding=(1, 0, 1))
    for tile in (2, 4):
        layer = WinogradConv3d.from_dense(dense, tile, name="layer1.conv")
        back = layer.to_dense()
        torch.testing.assert_close(back.weight, dense.weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(back.bias, dense.bias)
        assert zero_padding(back) == (1, 0, 1)
        layer.values[3] += 0.1
        with pytest.raises(UserError, match=r"layer1.conv was trained or pruned in the Winograd"):
            layer.to_dense()
    with pytest.raises(UserError, match="was trained or pruned"):
        WinogradConv3d.from_dense(dense, 2, range(63)).to_dense()


def test_gradients_reach_the_input():
    dense = nn.Conv3d(2, 3, 3).double()
    layer = WinogradConv3d.from_dense(dense, 2)
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(dense(x).square().sum(), x)[0]
    found = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(found, expected)


# -- states ---------------------------------------------------------------------------------------


def test_state_round_trip():
    layer = WinogradConv3d.from_dense(nn.Conv3d(3, 4, 3), 2, range(0, 64, 2))
    again = WinogradConv3d(3, 4, 2, range(0, 64, 2))
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 4, 4, 4)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"tile": (2, 2, 4)}, r"made for tile \(2, 2, 2\), .* the layer is for tile \(2, 2, 4\)"),
        ({"padding": (0, 1, 0)}, r"padding \(0, 0, 0\).* is for .*padding \(0, 1, 0\)"),
        ({"columns": range(1, 64, 2)}, r"conv: the state keeps other columns \(32, \[0, 2, 4, 6\]"),
        ({"columns": range(64)}, r"than the layer \(64, \[0, 1, 2, 3\]"),
    ],
)
def test_another_layers_state_is_refused(other, text):
    given = {"tile": 2, "columns": range(0, 64, 2), "padding": (0, 0, 0)}
    model = nn.ModuleDict({"conv": WinogradConv3d(3, 4, **given)})
    target = nn.ModuleDict({"conv": WinogradConv3d(3, 4, **{**given, **other})})
    with pytest.raises(UserError, match=text):
        target.load_state_dict(model.state_dict())


def test_other_points_are_refused_where_they_matter():
    with pytest.raises(UserError, match="points 0 7/10 -7/10 3/2 -3/2, and the layer is for"):
        WinogradConv3d(1, 1, 4, points="standard").load_state_dict(
            WinogradConv3d(1, 1, 4).state_dict()
        )
    # F(2,3) has the same points in every set.
    WinogradConv3d(1, 1, 2, points="standard").load_state_dict(WinogradConv3d(1, 1, 2).state_dict())


# -- refusals --------------------------------------------------------------------------------------


class Doubled(nn.Conv3d):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Conv3d):
    """As torchvision's: another constructor, the same convolution."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)


def hooked():
    layer = nn.Conv3d(4, 4, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def parametrized():
    layer = nn.Conv3d(4, 4, 3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv3d(4, 4, (1, 3, 3)), r"kernel \(1, 3, 3\), expected 3"),
        (nn.Conv3d(4, 4, 3, stride=(1, 2, 1)), r"stride \(1, 2, 1\), expected 1"),
        (nn.Conv3d(4, 4, 3, dilation=2), r"dilation \(2, 2, 2\), expected 1"),
        (nn.Conv3d(4, 4, 3, groups=2), "2 groups, expected 1"),
        (nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode 'circular'"),
        (nn.ConvTranspose3d(4, 4, 3), "transposed convolution"),
        (nn.Conv2d(4, 4, 3), "Conv2d is no 3-D convolution"),
        (Doubled(4, 4, 3), "Doubled has a forward of its own"),
        (hooked(), "it has hooks"),
        (parametrized(), "computed by a parametrization"),
    ],
)
def test_what_can_not_be_converted(layer, text):
    assert unconvertible(layer) is not None
    with pytest.raises(UserError, match=text):
        refuse_unconvertible(layer)
    if isinstance(layer, nn.Conv3d):
        with pytest.raises(UserError, match=f"layer features.3 can't .*{text}"):
            WinogradConv3d.from_dense(layer, 2, name="features.3")


def test_subclasses_that_are_convolutions_can_be():
    assert unconvertible(Named(4)) is None
    assert unconvertible(nn.Conv3d(4, 4, 3, padding="same")) is None


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(3, 5, 5, 5), r"layer a.b: input of shape .*expected \(N, 3, D, H, W\)"),
        (torch.zeros(1, 4, 5, 5, 5), r"layer a.b: input of shape .*expected \(N, 3, D, H, W\)"),
        (torch.zeros(1, 3, 2, 5, 5), "layer a.b: input of size .*at least 3 positions"),
        (torch.zeros(1, 3, 5, 5, 5, dtype=torch.int64), "layer a.b: input of type torch.int64"),
        (torch.zeros(1, 3, 5, 5, 5, dtype=torch.complex64), "layer a.b: input of type"),
    ],
)
def test_inputs_are_refused_with_the_layers_name(x, text):
    layer = WinogradConv3d(3, 4, 2, name="a.b")
    with pytest.raises(UserError, match=text):
        layer(x)


def test_half_precision_with_large_tiles_is_refused_unless_forced():
    x = torch.randn(1, 3, 5, 5, 5)
    layer = WinogradConv3d.from_dense(nn.Conv3d(3, 4, 3), 4, name="a.b")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match=r"layer a.b: half precision with tile \(4, 4, 4\)"),
    ):
        layer(x)
    with pytest.raises(UserError, match="half precision"):
        layer.bfloat16()(x.bfloat16())
    forced = WinogradConv3d.from_dense(nn.Conv3d(3, 4, 3), 4, allow_half=True)
    small = WinogradConv3d.from_dense(nn.Conv3d(3, 4, 3), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert forced(x).dtype == small(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tile": 3}, "expected 2, 4, or three"),
        ({"tile": 2, "points": "standart"}, "did you mean standard"),
        ({"tile": 2, "columns": [64]}, "from 0 to 63"),
        ({"tile": 2, "columns": [3, 1]}, "ascending"),
        ({"tile": 2, "columns": []}, "at least one"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(UserError, match=text):
        WinogradConv3d(3, 4, **arguments)


def test_fill_checks_shapes():
    layer = WinogradConv3d(3, 4, 2)
    with pytest.raises(UserError, match=r"expected \(64, 4, 3\) and a bias"):
        layer.fill(torch.zeros(64, 4, 3), None)
    with pytest.raises(UserError, match=r"\(64, 3, 4\) and a bias: expected"):
        layer.fill(torch.zeros(64, 3, 4), torch.zeros(4))
