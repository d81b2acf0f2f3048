"""Packed generators: which networks they are made of, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tenfold.errors import StateError, UserError
from tenfold.kernels.generator_program import NOTHING, Norm, Op
from tenfold.measure.cost import count_cost
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator, UNetGenerator
from tenfold.nn.packed_generator import PackedGenerator, unpackable_generator

pytestmark = pytest.mark.unit


def test_the_program_of_a_mobile_generator() -> None:
    packed = PackedGenerator.from_network(MobileResNetGenerator(16).eval())
    steps = packed.steps
    kinds = [step.op for step in steps]
    assert kinds[:3] == [Op.CONVOLUTION, Op.DOWN, Op.DOWN]
    assert kinds[3:-3] == [Op.DEPTHWISE, Op.POINTWISE] * 18
    assert kinds[-3:] == [Op.UP, Op.UP, Op.CONVOLUTION]
    assert all(step.norm == Norm.INSTANCE for step in steps[1:])
    # Every block keeps its input, and the next one reads it while it keeps its own elsewhere.
    keeps = [step.keep for step in steps if step.keep != NOTHING]
    adds = [step.add for step in steps if step.add != NOTHING]
    assert keeps == adds == [2, 3] * 4 + [2]
    # A bias before an instance norm has no effect: the image's alone is left.
    assert [step.bias != NOTHING for step in steps] == [False] * 41 + [True]


def test_costs_what_the_network_costs() -> None:
    for kind in (ResNetGenerator, MobileResNetGenerator):
        network = kind(4, blocks=2).eval()
        x = torch.rand(2, 3, 32, 48)
        packed = PackedGenerator.from_network(network)
        assert count_cost(packed, x).macs == count_cost(network, x).macs


def test_copies_and_states_are_independent() -> None:
    torch.manual_seed(0)
    network = MobileResNetGenerator(4, blocks=1).eval()
    packed = PackedGenerator.from_network(network)
    x = torch.rand(1, 3, 16, 16)
    expected = packed(x)
    network.model[1].weight.data.zero_()
    assert torch.equal(packed(x), expected)
    fresh = PackedGenerator(packed.program, len(packed.weights))
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), expected)
    twin = copy.deepcopy(packed)
    packed.weights.zero_()
    assert torch.equal(twin(x), expected)
    assert not packed(x).any()


def _hooked(network: nn.Module) -> None:
    network.model[4].register_forward_hook(lambda *_: None)


def _frozen(network: nn.Module) -> None:
    network.model[2].frozen = torch.zeros(1, 4), torch.ones(1, 4)


def _changed(network: nn.Module) -> None:
    network.model[3] = nn.GELU()


def _shared(network: nn.Module) -> None:
    block = network.model[10].conv_block
    block[6].conv[2].weight = block[1].conv[2].weight


def _epsilon(network: nn.Module) -> None:
    network.model[2].eps = 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_hooked, "hooks"), (_frozen, "frozen"), (_changed, "were changed"), (_shared, "share"),
        (_epsilon, "several epsilons"), (lambda network: network.train(), "training mode"),
        (lambda network: network.double(), "not torch.float32"),
        (lambda network: network.to("meta"), "not on a CPU"),
    ],
)  # fmt: skip
def test_refuses_what_the_kernel_does_not_compute(change: object, message: str) -> None:
    network = MobileResNetGenerator(4, blocks=1).eval()
    assert unpackable_generator(network) is None
    change(network)
    with pytest.raises(UserError, match=message):
        PackedGenerator.from_network(network)


def test_refuses_other_networks_and_classes_of_its_own() -> None:
    class Own(ResNetGenerator):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1 - super().forward(x)

    for network in (UNetGenerator(4, levels=5), nn.Identity(), Own(4)):
        with pytest.raises(UserError, match="no ResNetGenerator"):
            PackedGenerator.from_network(network.eval())


def test_another_epsilon_is_kept() -> None:
    torch.manual_seed(0)
    network = MobileResNetGenerator(4, blocks=1).eval()
    for module in network.modules():
        if hasattr(module, "eps"):
            module.eps = 0.1
    x = torch.rand(1, 3, 16, 16)
    packed = PackedGenerator.from_network(network)
    assert packed.epsilon == 0.1
    torch.testing.assert_close(packed(x), network(x), atol=1e-5, rtol=1e-5)


def test_refuses_gradients_and_inputs_that_do_not_fit() -> None:
    packed = PackedGenerator.from_network(MobileResNetGenerator(4, blocks=1).eval())
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(StateError, match="no gradient"):
        packed(x.clone().requires_grad_())
    for shape in ((1, 3, 18, 16), (1, 1, 16, 16), (3, 16, 16), (1, 3, 4, 16)):
        with pytest.raises(UserError, match="generator got images"):
            packed(torch.rand(shape))
    with pytest.raises(UserError, match="needs"):
        PackedGenerator(packed.program, 10)
    assert "4" in repr(packed)


def test_fusing_sets_no_activation() -> None:
    packed = PackedGenerator.from_network(MobileResNetGenerator(4, blocks=1).eval())
    packed.activation = "relu"
    assert packed.activation == "tanh"
