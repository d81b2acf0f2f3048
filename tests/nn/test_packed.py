"""Packed layers against the dense ones that they were made from."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tenfold.errors import StateError, UserError
from tenfold.nn.packable import unpackable
from tenfold.nn.packed import NMConv2d, NMLinear
from tests.pruning import pruned

pytestmark = pytest.mark.parity

CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "valid", "bias": False},
    {"kernel_size": 3, "groups": 2, "padding": (0, 2)},
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 8), (3, 4)])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_packed_convolution_is_the_dense_one(options, pattern):
    layer = pruned(nn.Conv2d(16, 6, **options), pattern)
    packed = NMConv2d.from_dense(layer, *pattern)
    assert packed.pattern == f"{pattern[0]}:{pattern[1]}"
    assert torch.equal(packed.weight, layer.weight)
    x = torch.randn(2, 16, 9, 7)
    expected = copy.deepcopy(layer).double()(x.double()).float()
    assert torch.allclose(packed(x), expected, rtol=1e-5, atol=1e-5)
    assert not list(packed.parameters())


@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 32), (32,), (0, 32)])
def test_a_packed_linear_layer_is_the_dense_one(shape):
    layer = pruned(nn.Linear(32, 7), (2, 8))
    packed = NMLinear.from_dense(layer, 2, 8)
    assert torch.equal(packed.weight, layer.weight)
    x = torch.randn(shape)
    assert torch.allclose(packed(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "silu"])
def test_what_follows_the_product(activation):
    layer = pruned(nn.Conv2d(8, 4, 3), (1, 4))
    packed = NMConv2d.from_dense(layer, 1, 4)
    packed.activation = activation
    x, add = torch.randn(2, 8, 5, 5) * 5, torch.randn(2, 4, 3, 3)
    expected = getattr(nn.functional, activation)(layer(x) + add)
    assert torch.allclose(packed(x, add), expected, rtol=1e-5, atol=1e-5)
    # what only fits by broadcasting is added outside
    for smaller in (add[:1], add[..., :1], torch.tensor(0.5)):
        expected = getattr(nn.functional, activation)(layer(x) + smaller)
        assert torch.allclose(packed(x, smaller), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2**-7), ("int8", 1 / 127)])
def test_other_precisions(precision, tolerance):
    layer = pruned(nn.Linear(64, 8), (2, 4))
    with torch.no_grad():
        layer.weight[3] = 0.0
    packed = NMLinear.from_dense(layer, 2, 4, precision)
    assert packed.values.dtype == getattr(torch, precision)
    assert not packed.weight[3].any()
    error = (packed.weight - layer.weight).abs().amax(dim=1)
    assert bool((error <= tolerance * layer.weight.abs().amax(dim=1) / 2 + 1e-7).all())
    assert error.max() > 0
    x = torch.randn(5, 64)
    expected = nn.functional.linear(x, packed.weight, layer.bias)
    assert torch.allclose(packed(x), expected, rtol=1e-4, atol=1e-4)


def test_from_shapes_alone_and_back_from_a_state():
    layer = pruned(nn.Conv2d(8, 4, 3, bias=False), (2, 4))
    packed = NMConv2d.from_dense(layer, 2, 4, "int8")
    fresh = NMConv2d.like(layer, 2, 4, "int8")
    x = torch.randn(1, 8, 4, 4)
    assert not fresh(x).any()
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), packed(x))
    assert "pattern=2:4, bias=False, precision=int8" in repr(fresh)


def test_a_damaged_state_is_refused():
    packed = NMLinear.from_dense(pruned(nn.Linear(16, 4), (2, 4)), 2, 4)
    state = packed.state_dict()
    beyond = state["index"].clone()
    beyond.view(-1)[-1] = 255
    with pytest.raises(UserError, match="outside its block"):
        packed.load_state_dict({**state, "index": beyond})


def test_weights_that_are_not_nm_are_refused_with_layer_and_block():
    layer = pruned(nn.Conv2d(8, 4, 1), (2, 4))
    with torch.no_grad():
        layer.weight[2, 4:8] = 1.0
    with pytest.raises(UserError, match=r"stage\.1: not 2:4: output 2.* channels 4 to 7 have 4"):
        NMConv2d.from_dense(layer, 2, 4, name="stage.1")


class Own(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "uneven sides"),
        (nn.Conv2d(4, 4, 2, dtype=torch.complex64), "complex64"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
        (Own(4, 4, 1), "Own has a forward of its own"),
        (hooked(), "hooks"),
        (nn.Conv1d(4, 4, 1), "Conv1d is no Conv2d or Linear"),
    ],
)
def test_what_cannot_be_packed_says_why(layer, why):
    assert why in unpackable(layer)
    with pytest.raises(UserError, match="can't be packed"):
        NMConv2d.from_dense(layer, 2, 4)


def test_a_remembered_call_follows_the_layer_and_its_inputs():
    layer = pruned(nn.Conv2d(8, 4, 1), (1, 4)).requires_grad_(False)
    packed = NMConv2d.from_dense(layer, 1, 4)
    x, add = torch.randn(2, 8, 5, 5), torch.randn(2, 4, 5, 5)
    for _ in range(2):
        assert torch.allclose(packed(x), layer(x), rtol=1e-5, atol=1e-5)
        assert torch.allclose(packed(x, add), layer(x) + add, rtol=1e-5, atol=1e-5)
        strided = add.transpose(2, 3)
        assert torch.allclose(packed(x, strided), layer(x) + strided, rtol=1e-5, atol=1e-5)
        assert torch.allclose(
            packed(x.transpose(2, 3)), layer(x.transpose(2, 3)), rtol=1e-5, atol=1e-5
        )
    packed.activation = "relu"
    assert torch.allclose(packed(x), layer(x).relu(), rtol=1e-5, atol=1e-5)
    packed.activation = "none"
    packed.values = packed.values * 2
    packed.bias.data = packed.bias * 2  # the same tensor, elsewhere
    assert torch.allclose(packed(x), 2 * layer(x), rtol=1e-5, atol=1e-5)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        packed.values.zero_()
        assert torch.allclose(copied(x), 2 * layer(x), rtol=1e-5, atol=1e-5)
        packed.values.copy_(copied.values)
    with pytest.raises(StateError, match="no gradient"):
        packed(x.clone().requires_grad_(True))
    with pytest.raises(UserError, match="expected one type"):
        packed(x.double())
    for batch in range(40):  # more shapes than are remembered
        shape = (batch, 8, 5, 5)
        assert torch.allclose(packed(torch.ones(shape)), 2 * layer(torch.ones(shape)), atol=1e-5)


def test_wrong_inputs_are_refused():
    packed = NMConv2d.from_dense(pruned(nn.Conv2d(8, 4, 1), (2, 4)), 2, 4)
    with pytest.raises(UserError, match=r"expected \(B, 8, H, W\)"):
        packed(torch.zeros(1, 9, 2, 2))
    with pytest.raises(UserError, match=r"expected \(B, 8, H, W\)"):
        packed(torch.zeros(8, 2, 2))
    with pytest.raises(StateError, match="no gradient"):
        packed(torch.zeros(1, 8, 2, 2, requires_grad=True))
    with pytest.raises(UserError, match="expected one type"):
        packed.bfloat16()(torch.zeros(1, 8, 2, 2))
    with pytest.raises(UserError, match=r"\(\.\.\., 16\) features"):
        NMLinear(16, 2, 1, 4)(torch.zeros(2, 8))
    with pytest.raises(UserError, match="unknown precision 'float8'"):
        NMLinear(16, 2, 1, 4, precision="float8")
    with pytest.raises(UserError, match="blocks of 5"):
        NMLinear(16, 2, 1, 5)
