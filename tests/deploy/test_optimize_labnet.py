"""`optimize` and LAB-Net: kernels of ours where they are faster, and all as it was elsewhere."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.deploy import generators
from tenfold.deploy.fold import Folded, eval_copy
from tenfold.errors import StateError, UserError
from tenfold.kernels import native
from tenfold.measure.cost import count_cost
from tenfold.nn.labnet import LABNet
from tenfold.nn.packed_labnet import PackedLABNet, unpackable_labnet
from tenfold.nn.ring_attention import dilate
from tenfold.nn.shadow_remover import ShadowRemover
from tests.deploy.test_winograd_artifact import changed

pytestmark = pytest.mark.unit


class Pipeline(nn.Module):
    """A remover behind a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.remover = LABNet(4, 16)

    def forward(self, codes: Tensor, mask: Tensor) -> Tensor:
        return self.remover(torch.sigmoid(self.norm(self.before(codes))), mask)


def made(**arguments: object) -> tuple[LABNet, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    network = LABNet(**{"width": 4, "attention_size": 16, **arguments}).eval()
    mask = torch.zeros(1, 1, 66, 70)
    mask[..., 20:40, 10:50] = 1
    return network, (torch.rand(1, 3, 66, 70), mask)


def choose_time(monkeypatch: pytest.MonkeyPatch, packed: float, dense: float) -> None:
    monkeypatch.setattr(
        generators, "time_networks",
        lambda forms, inputs: {name: packed if name == "packed" else dense for name in forms},
    )  # fmt: skip


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for no BatchNorm, where there is none: tracing the dense network takes long."""
    # The package has a function of the module's name.
    module = sys.modules["tenfold.deploy.optimize"]
    monkeypatch.setattr(module, "fold_batch_norm", lambda model, _: Folded(eval_copy(model)))


@pytest.mark.parametrize("highpass", ["fixed", "trainable"])
def test_a_remover_is_run_as_a_whole(highpass: str) -> None:
    network, inputs = made(highpass=highpass)
    fast = tenfold.optimize(network, inputs, choose="packed")
    assert isinstance(fast.network, PackedLABNet)
    row = fast.plan.layers[0]
    assert (row.layer, row.kind, row.chosen) == ("", "LABNet", "packed")
    assert row.input == (1, 3, 66, 70)
    assert fast.plan.difference is not None
    assert fast.plan.difference <= 1e-5
    codes, mask = torch.rand(2, 3, 90, 65), torch.zeros(2, 1, 90, 65)
    mask[0, :, 30:, 10:40] = 1
    ring = dilate(mask, 21) - mask
    for given in ((codes, mask), (codes, mask, ring)):  # another size than the example's
        torch.testing.assert_close(fast(*given), network(*given), atol=1e-5, rtol=0)
    assert "(the model)" in str(fast.plan)


@pytest.mark.usefixtures("untraced")
@pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels")
def test_the_faster_form_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = made()
    choose_time(monkeypatch, packed=2.0, dense=1.0)
    slow = tenfold.optimize(network, inputs)
    assert not any(isinstance(each, PackedLABNet) for each in slow.modules())
    row = slow.plan.layers[0]
    assert (row.dense_ms, row.packed_ms, row.chosen) == (1.0, 2.0, "dense")
    choose_time(monkeypatch, packed=1.0, dense=2.0)
    assert isinstance(tenfold.optimize(network, inputs).network, PackedLABNet)


def test_timing_decides_by_default() -> None:
    network, inputs = made()
    fast = tenfold.optimize(network, inputs)
    row = fast.plan.layers[0]
    if fast.plan.instruction_set is None:
        assert (row.chosen, row.reason) == ("dense", "no kernels for it here")
    else:
        assert row.packed_ms is not None
        assert row.dense_ms is not None
        assert (row.packed_ms < row.dense_ms) == (row.chosen == "packed")
        assert fast.plan.network_ms["packed"] == row.packed_ms
    torch.testing.assert_close(fast(*inputs), network(*inputs), atol=1e-5, rtol=0)


def test_a_remover_inside_a_network() -> None:
    torch.manual_seed(0)
    network, (_, inputs) = Pipeline().eval(), made()
    fast = tenfold.optimize(network, inputs, choose="packed")
    assert [row.layer for row in fast.plan.packed] == ["remover"]
    assert {row.layer for row in fast.plan.layers} == {"remover", "before"}
    assert fast.plan.folded == ("norm",)
    torch.testing.assert_close(fast(*inputs), network(*inputs), atol=1e-5, rtol=0)
    assert [edit["type"] for edit in fast.edits] == ["FoldedNorm", "PackedLABNet"]


def test_takes_photos_like_the_network() -> None:
    network, inputs = made()
    fast = tenfold.optimize(network, inputs, choose="packed")
    images, mask = torch.rand(1, 3, 50, 80), torch.zeros(1, 1, 50, 80)
    mask[..., 10:30, 10:60] = 1
    expected = ShadowRemover(network, guess="ring")(images, mask)
    torch.testing.assert_close(
        ShadowRemover(fast, guess="ring")(images, mask), expected, atol=1e-5, rtol=0
    )


@pytest.mark.usefixtures("untraced")
def test_dense_leaves_it() -> None:
    network, inputs = made()
    fast = tenfold.optimize(network, inputs, choose="dense")
    assert fast.plan.layers[0].reason == "dense was asked for"
    assert not fast.plan.packed


@pytest.mark.usefixtures("untraced")
def test_what_cannot_be_packed_says_why() -> None:
    network, inputs = made()
    assert unpackable_labnet(network) is None
    assert unpackable_labnet(nn.Linear(2, 2)) == "it is no LABNet"
    assert unpackable_labnet(network.train()) == "it is in training mode"
    network.eval().block3.x.near.conv.dilation = (2, 2)
    assert unpackable_labnet(network) == "its layers were changed"
    with pytest.raises(UserError, match="can't be packed: its layers were changed"):
        PackedLABNet.from_network(network)
    hooked = made()[0]
    hooked.first.register_forward_hook(lambda *_: None)
    fast = tenfold.optimize(hooked, inputs, choose="packed")
    assert fast.plan.layers[0].reason == "it has hooks"
    double = made()[0].double()
    twice = tuple(x.double() for x in inputs)
    assert not tenfold.optimize(double, twice, choose="packed").plan.packed
    with pytest.raises(UserError, match="width 5"):
        PackedLABNet(5, (16, 16))


@pytest.mark.usefixtures("untraced")
def test_wrong_outputs_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = made()
    right = PackedLABNet.from_network

    def wrong(network: nn.Module) -> PackedLABNet:
        packed = right(network)
        packed.weights *= 1.01
        return packed

    monkeypatch.setattr(PackedLABNet, "from_network", wrong)
    fast = tenfold.optimize(network, inputs, choose="packed")
    assert not fast.plan.packed
    assert "given up, packed generators: the outputs differ" in str(fast.plan.reason)
    torch.testing.assert_close(fast(*inputs), network(*inputs), atol=1e-5, rtol=0)


def test_refuses_what_the_network_refuses() -> None:
    network, (codes, mask) = made()
    packed = PackedLABNet.from_network(network)
    for given in ((codes[..., :64], mask[..., :64]), (codes, mask + 0.5), (codes * 9, mask),
                  (codes, mask[..., 1:]), (codes, mask, mask[..., 1:])):  # fmt: skip
        with pytest.raises(UserError, match="LABNet got") as refused:
            packed(*given)
        with pytest.raises(UserError) as expected:
            network(*given)
        assert str(refused.value) == str(expected.value)
    with pytest.raises(StateError, match="no gradient"):
        packed(codes.clone().requires_grad_(True), mask)


def test_costs_what_the_network_costs() -> None:
    network, inputs = made(width=6)
    packed = PackedLABNet.from_network(network)
    own, found = (count_cost(each, inputs) for each in (network, packed))
    assert found.macs == own.macs
    assert packed.macs(inputs[0]) == own.macs


@pytest.mark.parametrize("inside", [False, True])
def test_comes_back_from_an_artifact(inside: bool, tmp_path: object) -> None:
    torch.manual_seed(0)
    network, (_, inputs) = (Pipeline().eval() if inside else made()[0]), made()
    fast = tenfold.optimize(network, inputs, choose="packed")
    path = tenfold.save(fast, tmp_path / "model")
    fresh = Pipeline() if inside else made()[0]
    loaded = tenfold.load(path, model=fresh)
    assert torch.equal(loaded(*inputs), fast(*inputs))
    assert loaded.plan == fast.plan
    # Once more: what was loaded is saved the same.
    again = tenfold.save(loaded, tmp_path / "again")
    fresh = Pipeline() if inside else made()[0]
    assert torch.equal(tenfold.load(again, model=fresh)(*inputs), fast(*inputs))


@pytest.mark.parametrize(
    ("key", "value"), [("width", 6), ("width", "x"), ("attention_size", [16, 17]), ("more", 1)]
)
def test_refuses_an_artifact_that_was_written_by_others(
    key: str, value: object, tmp_path: object
) -> None:
    network, inputs = made()
    path = tenfold.save(tenfold.optimize(network, inputs, choose="packed"), tmp_path / "model")

    def change(structure: dict) -> None:
        structure["edits"][0]["arguments"][key] = value

    changed(path, change)
    with pytest.raises(UserError, match="PackedLABNet of the model has"):
        tenfold.load(path, model=made()[0])
    with pytest.raises(UserError, match="doesn't fit"):
        tenfold.load(path, model=nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_is_not_optimized_or_exported_twice(tmp_path: object) -> None:
    network, inputs = made()
    fast = tenfold.optimize(network, inputs, choose="packed")
    with pytest.raises(UserError, match="optimized already"):
        tenfold.optimize(fast.network, inputs)
    with pytest.raises(UserError, match="ONNX has no such operators"):
        tenfold.export(fast, tmp_path / "x.onnx", inputs)
