"""Batches that an optimized network takes in parts, because that is faster."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import tenfold
from tenfold.deploy import choose
from tenfold.deploy import optimize as module
from tenfold.deploy.optimized import in_parts, reopen
from tenfold.deploy.plan import OptimizePlan
from tenfold.errors import UserError
from tenfold.kernels import native
from tests.pruning import pruned, relative

pytestmark = pytest.mark.parity


class Net(nn.Module):
    """A network with an N:M layer; `end` makes something of what it computes."""

    def __init__(self, end=lambda x: x):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3)
        self.end = end

    def forward(self, x):
        return self.end(self.second(torch.relu(self.first(x))))


@pytest.fixture
def parts_are_faster(monkeypatch):
    """Packed layers win, and one sample at once does."""
    torch.manual_seed(0)
    seen = []

    def times(networks, inputs):
        seen.append(set(networks))
        for network in networks.values():
            network(*inputs)
        return {name: 1.0 if name.endswith(" 1 at once") else 2.0 for name in networks}

    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(choose, "time_layer", lambda layer, packed: (2.0, 1.0))
    monkeypatch.setattr(module, "time_networks", times)
    return seen


def test_the_fastest_part_is_taken_saved_and_loaded(parts_are_faster, tmp_path):
    network, x = pruned(Net().eval(), (2, 4)), torch.randn(6, 4, 9, 9)
    fast = tenfold.optimize(network, x)
    assert parts_are_faster[-1] == {"all", "packed, 1 at once", "packed, 4 at once"}
    assert fast.plan.at_once == 1
    assert "of a batch 1 at once" in str(fast.plan)
    assert OptimizePlan.from_dict(fast.plan.to_dict()) == fast.plan
    lengths = []
    fast.network.register_forward_pre_hook(lambda _, given: lengths.append(len(given[0])))
    for samples in (6, 1, 3):
        y = torch.randn(samples, 4, 7, 11)
        assert relative(fast(y), network(y)) < 1e-5
    assert lengths == [1] * 10
    path = tenfold.save(fast, tmp_path / "fast")
    again = tenfold.load(path, Net())
    assert again.plan.at_once == 1
    assert torch.equal(again(x), fast(x))

    with pytest.raises(UserError, match="at_once=0"):
        reopen(Net(), dataclasses.replace(fast.plan, at_once=0), [], {})


def test_one_image_is_not_cut(parts_are_faster):
    fast = tenfold.optimize(pruned(Net().eval(), (2, 4)), torch.randn(1, 4, 9, 9))
    assert fast.plan.at_once is None
    assert not any("at once" in name for names in parts_are_faster for name in names)


@pytest.mark.parametrize(
    "end",
    [
        lambda x: x - x.mean(dim=0),  # samples know of each other
        lambda x: x.mean(),
        lambda x: x.flatten(1).softmax(dim=0),
    ],
)
def test_a_batch_that_belongs_together_stays_together(end, parts_are_faster):
    network, x = pruned(Net(end).eval(), (2, 4)), torch.randn(6, 4, 9, 9)
    fast = tenfold.optimize(network, x)
    assert fast.plan.at_once is None
    assert relative(fast(x), network(x)) < 1e-5


def test_several_outputs_are_joined_one_by_one():
    x = torch.arange(10.0).reshape(5, 2)
    network = Net()
    network.forward = lambda x: {"a": x + 1, "b": (x.sum(1), [x])}
    found, expected = in_parts(network, (x,), 2), network(x)
    assert torch.equal(found["a"], expected["a"])
    assert torch.equal(found["b"][0], expected["b"][0])
    assert torch.equal(found["b"][1][0], x)


def test_inputs_without_a_common_batch_go_in_whole():
    network = Net()
    network.forward = lambda x, y: (len(x), y)
    assert in_parts(network, (torch.zeros(4), 3), 1) == (4, 3)
    assert in_parts(network, (torch.zeros(4), torch.tensor(3)), 1)[0] == 4
    assert in_parts(network, (torch.zeros(0), torch.zeros(0)), 1)[0] == 0


def test_it_is_exported_whole(parts_are_faster):
    fast = tenfold.optimize(pruned(Net().eval(), (2, 4)), torch.randn(6, 4, 9, 9))
    assert fast.plan.at_once == 1
    x = torch.randn(3, 4, 9, 9)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(fast, (x,), dynamic_shapes=((({0: batch}),),))
    y = torch.randn(7, 4, 9, 9)
    assert relative(program.module()(y), fast(y)) < 1e-5
