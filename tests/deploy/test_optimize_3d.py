"""Optimized 3-D networks: tiles, what is fused, the step back, saving and loading."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tenfold
from tenfold.deploy import choose, winograd_options
from tenfold.deploy import optimize as module
from tenfold.deploy.plan import OptimizePlan
from tenfold.deploy.winograd_options import Option, Ranking
from tenfold.errors import StateError, UserError
from tenfold.kernels import native
from tenfold.measure.cost import count_cost
from tenfold.measure.onnx_write import write_onnx
from tenfold.methods.winograd3d import convert
from tenfold.nn.winograd import WinogradConv3d
from tenfold.nn.winograd_packed import PackedWinogradConv3d
from tests.pruning import relative, settled

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block, and what may follow it."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(channels)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += x
        return F.max_pool3d(F.relu(y), (1, 2, 2))


def small():
    return settled(
        nn.Sequential(
            nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2),
            Block(16), nn.Conv3d(16, 20, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(20, 5),
        )
    )  # fmt: skip


def fused(fast):
    return Counter(row.fused for row in fast.plan.packed)


def test_a_network_with_everything_that_is_fused():
    network = small()
    before = copy.deepcopy(network.state_dict())
    fast = tenfold.optimize(network, torch.randn(1, 3, 6, 16, 16), choose="packed")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    expected = {"relu, max 2x2x2": 1, "relu": 1, "add, relu, max 1x2x2": 1}
    assert fused(fast) == expected
    rows = {row.layer: row for row in fast.plan.layers}
    assert rows["5"].reason == "stride (2, 2, 2), expected 1"
    assert rows["0"].columns == (144, 144)
    assert "stride (2, 2, 2)" in str(fast.plan)
    assert "2x4x4 144/144" in str(fast.plan)
    assert fast.plan.difference < 1e-5
    assert OptimizePlan.from_dict(fast.plan.to_dict()) == fast.plan
    # Any batch and size, in any layout.
    for shape in ((2, 3, 6, 16, 16), (3, 3, 9, 13, 17)):
        x = torch.randn(shape)
        for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
            assert relative(fast(given), network(given)) < 1e-5


def test_r3d_18():
    import torchvision

    network = settled(torchvision.models.video.r3d_18(num_classes=7))
    fast = tenfold.optimize(network, torch.randn(1, 3, 4, 32, 32), choose="packed")
    assert fused(fast) == {"relu": 5, "add, relu": 8}
    assert len(fast.plan.folded) == 20
    x = torch.randn(2, 3, 4, 24, 40)
    assert relative(fast(x), network(x)) < 1e-5


def test_the_fastest_tile_is_chosen_and_a_slow_one_is_not(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: None)

    def rank(layer, found):
        slow = layer.name == "0"
        times = {Option((2, 4, 4)): 0.5, Option((4, 4, 4)): 0.9, Option((2, 2, 2)): 0.8}
        return Ranking(0.4 if slow else 1.0, times)

    monkeypatch.setattr(choose, "rank", rank)
    times = {"packed": 1.0, "packed, channels_last": 2.0, "dense": 3.0, "dense, channels_last": 3.0}
    monkeypatch.setattr(module, "time_networks", lambda networks, inputs: times)
    network = small()
    fast = tenfold.optimize(network, torch.randn(1, 3, 6, 16, 16))
    rows = {row.layer: row for row in fast.plan.layers}
    assert (rows["0"].chosen, rows["0"].packed_ms, rows["0"].reason) == ("dense", 0.5, None)
    assert (rows["4.conv1"].chosen, rows["4.conv1"].tile) == ("packed", (2, 4, 4))
    assert rows["4.conv1"].dense_ms == 1.0


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum().item() < float("inf") else x


@pytest.mark.parametrize("network", [nn.Conv3d(4, 4, 3), Untraceable()], ids=["alone", "no graph"])
def test_where_nothing_can_be_fused_the_fastest_tile_is_chosen_too(monkeypatch, network):
    monkeypatch.setattr(native, "missing", lambda: None)
    times = {Option((4, 4, 4)): 0.5, Option((2, 4, 4)): 0.7, Option((2, 2, 2)): 0.8}
    monkeypatch.setattr(choose, "rank", lambda layer, found: Ranking(1.0, times))
    monkeypatch.setattr(module, "_fastest", lambda form, *_: (form, "contiguous", {}))
    x = torch.randn(1, 4, 6, 10, 10)
    fast = tenfold.optimize(network.eval(), x)
    assert fast.plan.layers[0].tile == (4, 4, 4)
    assert relative(fast(x), network(x)) < 1e-5


def test_tiles_that_round_too_much_are_given_up_one_level_at_a_time(monkeypatch):
    original = PackedWinogradConv3d._pack_kernel

    def rough(layer):
        original(layer)
        if layer.tile.count(4) > 1:
            layer.packed *= 1.001

    monkeypatch.setattr(PackedWinogradConv3d, "_pack_kernel", rough)
    network = small()
    fast = tenfold.optimize(network, torch.randn(1, 3, 6, 16, 16), choose="packed")
    assert {row.tile.count(4) for row in fast.plan.packed} <= {0, 1}
    assert len(fast.plan.packed) == 3
    assert "given up, packed and fused in tiles of 2x4x4: the outputs differ by" in fast.plan.reason
    x = torch.randn(2, 3, 6, 16, 16)
    assert relative(fast(x), network(x)) < 1e-5


def test_code_that_needs_contiguous_results_gets_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(4, 8, 3, padding=1)
            self.fc = nn.Linear(8 * 4 * 4 * 4, 3)

        def forward(self, x):
            return self.fc(self.conv(x).view(x.shape[0], -1))

    network = Net().eval()
    fast = tenfold.optimize(network, torch.randn(2, 4, 4, 4, 4), choose="packed")
    assert [row.chosen for row in fast.plan.layers] == ["packed", "dense"]
    x = torch.randn(3, 4, 4, 4, 4)
    assert relative(fast(x), network(x)) < 1e-5


def test_pooling_that_the_kernel_does_not_do_stays():
    pools = [
        nn.MaxPool3d(3), nn.MaxPool3d(2, stride=1), nn.MaxPool3d(2, padding=1),
        nn.MaxPool3d(2, ceil_mode=True), nn.MaxPool3d((2, 1, 3)), nn.AvgPool3d(2),
    ]  # fmt: skip
    for pool in pools:
        network = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), pool).eval()
        x = torch.randn(1, 4, 7, 7, 7)
        fast = tenfold.optimize(network, x, choose="packed")
        assert fused(fast) == {None: 1}
        assert relative(fast(x), network(x)) < 1e-5
    # An activation behind a pool isn't moved in front of it.
    network = nn.Sequential(nn.Conv3d(4, 8, 3), nn.MaxPool3d(2), nn.GELU()).eval()
    fast = tenfold.optimize(network, x, choose="packed")
    assert fused(fast) == {"max 2x2x2": 1}
    assert relative(fast(x), network(x)) < 1e-5


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_layers_in_the_winograd_domain_keep_their_columns(keep, tmp_path):
    network = convert(small(), (2, 4, 4), keep, calibration=[torch.randn(4, 3, 6, 16, 16)])
    assert sum(isinstance(each, WinogradConv3d) for each in network.modules()) == 2
    x = torch.randn(2, 3, 6, 16, 16)
    fast = tenfold.optimize(network, x[:1], choose="packed")
    rows = {row.layer: row for row in fast.plan.layers}
    kept = 144 if keep == 1 else round(0.4 * 144)
    assert (rows["4.conv1"].tile, rows["4.conv1"].columns) == ((2, 4, 4), (kept, 144))
    assert rows["4.conv2"].fused == "add, relu, max 1x2x2"
    assert rows["4.conv1"].kind == "WinogradConv3d"
    assert relative(fast(x), network(x)) < 1e-5
    again = tenfold.load(tenfold.save(fast, tmp_path / "fast"), model=small())
    assert torch.equal(again(x), fast(x))


def test_a_saved_network_comes_back_as_it_was(tmp_path):
    network = small()
    x = torch.randn(2, 3, 4, 16, 16)  # a depth of 2 behind the pooling: a short axis
    fast = tenfold.optimize(network, x[:1], choose="packed")
    assert any(layer.short[0] for layer in packed_layers(fast))
    path = tenfold.save(fast, tmp_path / "fast")
    again = tenfold.load(path, model=small())
    assert torch.equal(again(x), fast(x))
    assert again.plan == fast.plan
    assert [repr(a) for a in packed_layers(again)] == [repr(b) for b in packed_layers(fast)]
    # The kernels are stored, not their eightfold transforms.
    weights = sum(p.nbytes for p in network.parameters())
    assert (path / "weights.safetensors").stat().st_size < 1.5 * weights


def packed_layers(fast):
    return [each for each in fast.modules() if isinstance(each, PackedWinogradConv3d)]


def test_an_edit_that_does_not_fit_is_refused(tmp_path):
    from tenfold.deploy.edits import replay

    good = {
        "tile": [2, 4, 4], "columns": None, "points": "accurate", "short": [False] * 3,
        "channels_last": True, "bias": True, "add": False, "activation": "relu", "pool": [1, 2, 2],
    }  # fmt: skip
    replay(small(), [{"module": "0", "type": "PackedWinogradConv3d", "arguments": good}])
    bad = [
        ("9", {}, "the network has Linear there"),
        ("5", {}, "stride"),
        ("0", {"tile": [2, 3, 4]}, "tile"),
        ("0", {"columns": [1.5]}, "columns as a list"),
        ("0", {"columns": [3, 3]}, "ascending"),
        ("0", {"points": "no"}, "points"),
        ("0", {"points": "dyadic"}, "pairs of points"),
        ("0", {"short": None}, "three flags"),
        ("0", {"pool": [1, 2, 3]}, "windows"),
        ("0", {"activation": "tanh"}, "activation"),
    ]
    for name, changes, message in bad:
        edit = {"module": name, "type": "PackedWinogradConv3d", "arguments": {**good, **changes}}
        with pytest.raises(UserError, match=message):
            replay(small(), [edit])


def test_what_stays_as_it_is_and_why():
    class Own(nn.Conv3d):
        def forward(self, x):
            return super().forward(x) * 2

    shared = nn.Conv3d(4, 4, 3, padding=1)
    network = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv3d(4, 4, 3, groups=2),
        nn.Conv3d(4, 4, 3, dilation=2), Own(4, 4, 3, padding=1), shared, shared,
        nn.Conv3d(4, 4, (3, 1, 3)), nn.ConvTranspose3d(4, 4, 3),
    ).eval()  # fmt: skip
    fast = tenfold.optimize(network, torch.randn(1, 2, 9, 9, 9), choose="packed")
    reasons = [row.reason for row in fast.plan.layers]
    expected = ["padding_mode", "2 groups", "dilation", "forward of its own", "several names",
                "kernel (3, 1, 3)"]  # fmt: skip
    assert len(reasons) == len(expected)
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason
    double = tenfold.optimize(
        nn.Conv3d(2, 2, 3).double(), torch.randn(1, 2, 3, 3, 3).double(), choose="packed"
    )
    assert "compute in torch.float32" in double.plan.layers[0].reason
    domain = WinogradConv3d(2, 2, 4, points="dyadic")
    kept = tenfold.optimize(domain, torch.randn(1, 2, 6, 6, 6), choose="packed")
    assert "pairs of points" in kept.plan.layers[0].reason


def test_a_packed_layer_by_itself():
    dense = nn.Conv3d(6, 10, 3, padding=(1, 0, 2)).eval()
    layer = PackedWinogradConv3d.from_layer(dense, (4, 2, 4))
    x = torch.randn(2, 6, 5, 6, 7)
    expected = dense(x).detach()
    with torch.no_grad():
        assert relative(layer(x), expected) < 1e-5
        broadcast = torch.randn(10, 1, 1, 1)
        layer.activation, layer.pool = "relu", (1, 2, 2)
        both = F.max_pool3d(F.relu(expected + broadcast), (1, 2, 2))
        assert relative(layer(x, broadcast), both) < 1e-5
        layer.activation, layer.pool = "none", (1, 1, 1)
    assert layer.macs(expected) == 2 * 2 * 2 * 3 * 144 * 60  # tiles of an image: 2 x 2 x 3... of 4
    with pytest.raises(StateError, match="no gradient"):
        layer(x.requires_grad_())
    with pytest.raises(UserError, match=r"expected \(N, 6, D, H, W\)"):
        layer(torch.randn(1, 5, 4, 4, 4))
    with pytest.raises(UserError, match="one type"):
        layer(x.detach().double())
    again = copy.deepcopy(layer)
    assert again.packed.data_ptr() == layer.packed.data_ptr()
    other = PackedWinogradConv3d.like(dense, (4, 2, 4))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.packed, layer.packed)
    again.load_state_dict({**layer.state_dict(), "kernel": torch.zeros(10, 6, 3, 3, 3)})
    assert layer.packed.abs().sum() > 0
    kept = PackedWinogradConv3d(6, 10, 2, columns=range(0, 64, 2))
    with pytest.raises(RuntimeError, match="values"):
        kept.load_state_dict({"bias": torch.zeros(10)})
    with pytest.raises(UserError, match="expected"):
        kept.load_state_dict({"bias": torch.zeros(10), "values": torch.zeros(31, 10, 6)})
    with pytest.raises(UserError, match="all columns"):
        PackedWinogradConv3d(6, 10, 2, columns=[0], short=(True, False, False))


def test_a_short_axis_takes_other_lengths_too():
    dense = nn.Conv3d(6, 10, 3, padding=1).eval()
    layer = PackedWinogradConv3d.from_layer(dense, (2, 4, 4), short=(True, False, False))
    with torch.no_grad():
        for depth in (2, 1, 5):
            x = torch.randn(2, 6, depth, 6, 7)
            assert relative(layer(x), dense(x)) < 1e-5


def test_costs_and_export():
    network = small()
    x = torch.randn(1, 3, 6, 16, 16)
    fast = tenfold.optimize(network, x, choose="packed")
    dense, packed = count_cost(network, x), count_cost(fast, x)
    assert packed.macs < dense.macs / 3
    assert packed.parameters < dense.parameters
    with pytest.raises(UserError, match="packed for this CPU"):
        write_onnx(fast, "unused.onnx", x)
    with pytest.raises(UserError, match="optimized already"):
        tenfold.optimize(fast, x)


def test_options_are_few_and_end_with_the_most_careful():
    conv = nn.Conv3d(8, 8, 3, padding=1)
    network = nn.Sequential(conv).eval()
    layer = module.find_layers(network, (torch.randn(1, 8, 2, 9, 9),))[0]
    found = winograd_options.options(layer)
    assert len(found) <= winograd_options.TIMED + 1
    assert any(option.level == 0 for option in found)
    assert all(option.short == (option.tile[0] == 2, False, False) for option in found)
    ranking = winograd_options.rank(layer, found)
    assert set(ranking.options) == set(found)
    assert ranking.dense_ms > 0
