"""One-shot conversion: lossless with all columns, compensated with fewer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tenfold.errors import UserError
from tenfold.kernels.winograd_transforms import column_count
from tenfold.methods.winograd3d import convert
from tenfold.nn.winograd import WinogradConv3d

pytestmark = pytest.mark.parity


class Shared(nn.Module):
    """Calls one convolution twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(3, 16, 3, padding=1)
        self.inner = nn.Conv3d(16, 16, 3, padding=1)
        self.again = self.inner
        self.strided = nn.Conv3d(16, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm3d(16)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.strided(self.again(self.inner(x).relu()).relu())


def network():
    torch.manual_seed(0)
    return Shared().eval()


def clips(count=6, seed=0):
    """Smooth clips: real ones are no white noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 10, 14, 14, generator=generator)
    return F.avg_pool3d(x, 3, 1, 1) * 3


@pytest.mark.parametrize("tile", [2, 4, (2, 4, 4)])
def test_all_columns_lose_nothing(tile):
    model = network().double()
    x = clips(2).double()
    before = copy.deepcopy(model.state_dict())
    made = convert(model, tile)
    assert isinstance(made.inner, WinogradConv3d)
    assert made.again is made.inner
    assert isinstance(made.first, nn.Conv3d)  # fewer channels than 16
    assert isinstance(made.strided, nn.Conv3d)
    assert made.inner.values.dtype == torch.float64
    torch.testing.assert_close(made(x), model(x), atol=1e-10, rtol=1e-10)
    assert isinstance(model.inner, nn.Conv3d)  # the given one is as it was
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert isinstance(convert(model, tile, min_channels=3).first, WinogradConv3d)


@pytest.mark.parametrize(("tile", "keep_ratio"), [(2, 0.5), (4, 0.5), ((2, 4, 4), 0.25)])
def test_calibration_loses_less_than_white_noise_and_than_dropping(tile, keep_ratio):
    model, x = network(), clips(seed=1)
    with torch.no_grad():
        expected = model(x)

        def error(made):
            return float((made(x) - expected).norm() / expected.norm())

        calibrated = convert(model, tile, keep_ratio, calibration=clips(8).split(2))
        with pytest.warns(UserWarning, match="takes the layers' inputs for white noise"):
            white = convert(model, tile, keep_ratio)
        kept = calibrated.inner.kept
        assert len(kept) == round(keep_ratio * column_count(calibrated.inner.tile))
        dropped = copy.deepcopy(model)
        dropped.inner = dropped.again = WinogradConv3d.from_dense(model.inner, tile, kept)
        assert error(calibrated) < 0.9 * error(white)
        assert error(calibrated) < 0.8 * error(dropped)


def test_batches_may_be_tuples_and_mappings():
    model = network()
    x = clips(4)
    found = [
        convert(model, 2, 0.5, calibration=batches).inner
        for batches in (
            [x],
            [(x, torch.zeros(4))],
            [{"clip": x, "label": torch.zeros(4)}],
            iter([[x.double(), 0]]),
        )
    ]
    for other in found[1:]:
        assert other.kept == found[0].kept
        torch.testing.assert_close(other.values, found[0].values)


def test_the_copys_modes_and_hooks_stay():
    model = network().train()
    model.norm.eval()
    made = convert(model, 2, 0.5, calibration=[clips(2)])
    assert made.training
    assert not made.norm.training
    assert made.inner.training
    assert not any(m._forward_pre_hooks for m in made.modules())
    torch.testing.assert_close(made.norm.running_mean, model.norm.running_mean)


def test_the_model_itself_may_be_the_layer():
    layer = nn.Conv3d(16, 4, 3)
    assert isinstance(convert(layer, 4), WinogradConv3d)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tile": 3}, "expected 2, 4, or three"),
        ({"keep_ratio": 0.0}, r"expected a share in \(0, 1\]"),
        ({"keep_ratio": 1.5}, r"expected a share in \(0, 1\]"),
        ({"keep_ratio": True}, r"expected a share in \(0, 1\]"),
        ({"keep_ratio": 0.001}, "keeps none of 64 columns"),
        ({"min_channels": 17}, "inner: 16 input channels, fewer than min_channels=17"),
        ({"keep_ratio": 0.5, "calibration": []}, "layer inner saw no input"),
        ({"keep_ratio": 0.5, "calibration": ["a"]}, "calibration gave a str"),
        ({"points": "other"}, "unknown set of points"),
    ],
)
def test_refusals(changes, text):
    with pytest.raises(UserError, match=text):
        convert(network(), **{"tile": 2, **changes})


def test_no_layer_to_convert():
    with pytest.raises(UserError, match="the model has no 3-D convolution"):
        convert(nn.Linear(2, 2), 2)
    with pytest.raises(UserError, match=r"0: kernel \(1, 1, 1\).*1: transposed"):
        convert(nn.Sequential(nn.Conv3d(16, 4, 1), nn.ConvTranspose3d(16, 4, 3)), 2)


def test_fewer_columns_than_outputs_are_warned_about():
    with pytest.warns(UserWarning, match="keeps 5 columns, fewer than the 8 outputs"):
        convert(network(), 2, 0.08, calibration=[clips(1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(network(), 2, 0.125, calibration=[clips(1)])
