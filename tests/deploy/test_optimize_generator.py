"""`optimize` and generators: one kernel where that is faster, and all as it was elsewhere."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.deploy import generators
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator
from tenfold.nn.packed_generator import PackedGenerator
from tests.deploy.test_winograd_artifact import changed

pytestmark = pytest.mark.unit


class Pipeline(nn.Module):
    """A generator between layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.generator = MobileResNetGenerator(4, blocks=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.generator(torch.tanh(self.norm(self.before(x)))))


def made(kind: type = MobileResNetGenerator, **arguments: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = kind(**{"ngf": 4, "blocks": 2, **arguments}).eval()
    return network, torch.rand(1, 3, 32, 32) * 2 - 1


def choose_time(monkeypatch: pytest.MonkeyPatch, packed: float, dense: float) -> None:
    monkeypatch.setattr(
        generators, "time_networks",
        lambda forms, inputs: {name: packed if name == "packed" else dense for name in forms},
    )  # fmt: skip


@pytest.mark.parametrize("kind", [MobileResNetGenerator, ResNetGenerator])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_generator_becomes_one_kernel(kind: type, norm: str) -> None:
    network, x = made(kind, norm=norm)
    fast = tenfold.optimize(network, x, choose="packed")
    assert isinstance(fast.network, PackedGenerator)
    assert [(row.layer, row.kind, row.chosen) for row in fast.plan.layers] == [
        ("", kind.__name__, "packed")
    ]
    assert fast.plan.difference is not None
    assert fast.plan.difference <= 1e-5
    for shape in ((3, 3, 32, 32), (1, 3, 24, 60)):  # other sizes than the example's
        y = torch.rand(shape) * 2 - 1
        torch.testing.assert_close(fast(y), network(y), atol=1e-5, rtol=0)
    assert "(the model)" in str(fast.plan)


@pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels")
def test_the_faster_form_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made()
    choose_time(monkeypatch, packed=2.0, dense=1.0)
    slow = tenfold.optimize(network, x)
    assert not any(isinstance(each, PackedGenerator) for each in slow.modules())
    row = slow.plan.layers[0]
    assert (row.dense_ms, row.packed_ms, row.chosen) == (1.0, 2.0, "dense")
    choose_time(monkeypatch, packed=1.0, dense=2.0)
    assert isinstance(tenfold.optimize(network, x).network, PackedGenerator)


def test_timing_decides_by_default() -> None:
    network, x = made()
    fast = tenfold.optimize(network, x)
    row = fast.plan.layers[0]
    if fast.plan.instruction_set is None:
        assert (row.chosen, row.reason) == ("dense", "no kernels for it here")
    else:
        assert row.packed_ms is not None
        assert row.dense_ms is not None
        assert (row.packed_ms < row.dense_ms) == (row.chosen == "packed")
        assert fast.plan.network_ms["packed"] == row.packed_ms
    torch.testing.assert_close(fast(x), network(x), atol=1e-5, rtol=0)


def test_a_generator_inside_a_network() -> None:
    torch.manual_seed(0)
    network = Pipeline().eval()
    x = torch.rand(2, 3, 32, 32)
    fast = tenfold.optimize(network, x, choose="packed")
    assert [row.layer for row in fast.plan.packed] == ["generator"]
    # Its layers are no candidates any more; the others are.
    assert {row.layer for row in fast.plan.layers} == {"generator", "before"}
    assert fast.plan.folded == ("norm",)
    torch.testing.assert_close(fast(x), network(x), atol=1e-5, rtol=0)
    assert [edit["type"] for edit in fast.edits] == ["FoldedNorm", "PackedGenerator"]


def test_dense_leaves_it() -> None:
    network, x = made()
    fast = tenfold.optimize(network, x, choose="dense")
    assert fast.plan.layers[0].reason == "dense was asked for"
    assert not fast.plan.packed


def test_what_cannot_be_packed_says_why() -> None:
    network, x = made()
    network.model[2].frozen = torch.zeros(1, 4), torch.ones(1, 4)
    fast = tenfold.optimize(network, x, choose="packed")
    assert fast.plan.layers[0].reason == "its instance norms are frozen"
    torch.testing.assert_close(fast(x), network(x))
    double = made()[0].double()
    assert not tenfold.optimize(double, x.double(), choose="packed").plan.packed


def test_wrong_outputs_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made()
    right = PackedGenerator.from_network

    def wrong(generator: nn.Module) -> PackedGenerator:
        packed = right(generator)
        packed.weights *= 1.01
        return packed

    monkeypatch.setattr(PackedGenerator, "from_network", wrong)
    fast = tenfold.optimize(network, x, choose="packed")
    assert not fast.plan.packed
    assert "given up, packed generators: the outputs differ" in str(fast.plan.reason)
    assert fast.plan.difference == 0.0 or fast.plan.difference < 1e-5
    torch.testing.assert_close(fast(x), network(x))


def test_rounding_alike_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model's own rounding is larger than the usual tolerance, nobody can be closer."""
    network, x = made()
    packed = PackedGenerator.from_network(network)
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["tenfold.deploy.optimize"], "TOLERANCE", 1e-12)
    fast = tenfold.optimize(network, x, choose="packed")
    assert isinstance(fast.network, PackedGenerator)
    assert fast.plan.reason is None
    # The same difference, but from a network that is exact to that degree.
    packed.weights *= 1 + 5e-6
    monkeypatch.setattr(PackedGenerator, "from_network", lambda _: packed)
    assert not tenfold.optimize(network, x, choose="packed").plan.packed


@pytest.mark.parametrize("inside", [False, True])
def test_comes_back_from_an_artifact(inside: bool, tmp_path: object) -> None:
    torch.manual_seed(0)
    network = Pipeline().eval() if inside else made(norm="batch")[0]
    x = torch.rand(2, 3, 32, 32)
    fast = tenfold.optimize(network, x, choose="packed")
    path = tenfold.save(fast, tmp_path / "model")
    fresh = Pipeline() if inside else made(norm="batch")[0]
    loaded = tenfold.load(path, model=fresh)
    assert torch.equal(loaded(x), fast(x))
    assert loaded.plan == fast.plan
    # Once more: what was loaded is saved the same.
    again = tenfold.save(loaded, tmp_path / "again")
    fresh = Pipeline() if inside else made(norm="batch")[0]
    assert torch.equal(tenfold.load(again, model=fresh)(x), fast(x))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("program", [1, 2], "program has 2 numbers"), ("program", "x", "whole numbers"),
        ("size", 1, "needs"), ("size", 10**6, "shape|fit"), ("epsilon", -1.0, "epsilon"),
    ],
)  # fmt: skip
def test_refuses_an_artifact_that_was_written_by_others(
    key: str, value: object, message: str, tmp_path: object
) -> None:
    network, x = made()
    path = tenfold.save(tenfold.optimize(network, x, choose="packed"), tmp_path / "model")

    def change(structure: dict) -> None:
        structure["edits"][0]["arguments"][key] = value

    changed(path, change)
    with pytest.raises(UserError, match=message):
        tenfold.load(path, model=made()[0])
    with pytest.raises(UserError, match="doesn't fit"):
        tenfold.load(path, model=nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_is_not_optimized_or_exported_twice(tmp_path: object) -> None:
    network, x = made()
    fast = tenfold.optimize(network, x, choose="packed")
    with pytest.raises(UserError, match="optimized already"):
        tenfold.optimize(fast.network, x)
    with pytest.raises(UserError, match="ONNX has no such operators"):
        tenfold.export(fast, tmp_path / "x.onnx", x)
