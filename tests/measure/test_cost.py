"""Multiply-adds and parameters against numbers worked out by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.flop_counter import register_flop_formula

from tenfold.errors import UserError
from tenfold.measure.cost import count_cost
from tenfold.nn.quantized import QuantizedConv2d

pytestmark = pytest.mark.parity


def test_convolutions_by_hand():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.Conv2d(8, 8, 3, groups=8)
    )
    cost = count_cost(network, torch.zeros(5, 4, 8, 8))
    first = 8 * 4 * 4 * (4 // 2) * 9
    second = 8 * 2 * 2 * 9
    assert [row.macs for row in cost.layers] == [first, second]
    assert cost.macs == first + second
    assert [row.name for row in cost.layers] == ["0", "1"]
    assert cost.layers[0].shape == (8, 2, 3, 3)
    assert [row.parameters for row in cost.layers] == [8 * 2 * 9, 8 * 9 + 8]
    assert cost.parameters == 8 * 2 * 9 + 8 * 9 + 8
    assert cost.bytes == 4 * cost.parameters


def test_conv3d_by_hand():
    cost = count_cost(nn.Conv3d(2, 3, (1, 3, 3)), torch.zeros(2, 2, 4, 6, 6))
    assert cost.macs == 3 * 4 * 4 * 4 * 2 * 9


def test_linear_on_tokens_counts_each_token_for_one_sample():
    assert count_cost(nn.Linear(8, 4), torch.zeros(7, 5, 8)).macs == 5 * 8 * 4


def test_attention_is_in_the_total():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = self.project(x).unflatten(-1, (2, 8)).transpose(1, 2)
            return functional.scaled_dot_product_attention(heads, heads, heads)

    cost = count_cost(Attention(), torch.zeros(1, 10, 16))
    assert cost.layers[0].macs == 10 * 16 * 16
    assert cost.macs == 10 * 16 * 16 + 2 * (2 * 10 * 10 * 8)


def test_multihead_attention_in_eval_is_counted_and_its_projection_attributed():
    network = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).eval()
    cost = count_cost(network, torch.zeros(3, 10, 16))
    by_name = {row.name: row.macs for row in cost.layers}
    assert by_name == {
        "self_attn.out_proj": 10 * 16 * 16,
        "linear1": 10 * 16 * 32,
        "linear2": 10 * 16 * 32,
    }
    assert cost.macs == 10 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * (2 * 10 * 10 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_zero_weights_lower_the_effective_numbers_only():
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        network[0].weight.fill_(1.0)[:, ::2] = 0
        network[1].weight.fill_(1.0)
    cost = count_cost(network, torch.zeros(1, 8))
    assert (cost.macs, cost.effective_macs) == (64 + 16, 32 + 16)
    assert (cost.parameters, cost.nonzero_parameters) == (80, 48)
    assert [row.kept for row in cost.layers] == [0.5, 1.0]


def test_parametrized_weight_counts_as_what_it_yields():
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.ones(3, 2))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            kept = torch.arange(weight.shape[1]) % 4 == 0
            return weight * kept[:, None, None]

    layer = nn.Conv2d(8, 4, 1)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    parametrize.register_parametrization(layer, "weight", Mask())
    cost = count_cost(nn.Sequential(layer), torch.zeros(1, 8, 3, 3))
    (row,) = cost.layers
    assert (row.name, row.type, row.kept, row.macs) == ("0", "Conv2d", 0.25, 9 * 32)
    assert cost.effective_macs == 9 * 8
    assert (cost.parameters, cost.nonzero_parameters) == (36, 12)


def test_shared_layer_and_layers_that_share_a_weight():
    layer = nn.Linear(4, 4, bias=False)
    twin = nn.Linear(4, 4, bias=False)
    twin.weight = layer.weight
    cost = count_cost(nn.Sequential(layer, layer, twin), torch.zeros(1, 4))
    assert {row.name: row.macs for row in cost.layers} == {"0": 32, "2": 16}
    assert cost.parameters == 16


def test_custom_operator_joins_by_its_own_formula():
    @torch.library.custom_op("tenfold_test::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @register_flop_formula(torch.ops.tenfold_test.scaled)
    def _flops(x_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * 1000 * x_shape[0]

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, 0.0]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.tenfold_test.scaled(x)

    cost = count_cost(nn.Sequential(Packed()), torch.zeros(4, 2))
    assert (cost.macs, cost.layers[0].macs, cost.effective_macs) == (1000, 1000, 500)


def test_model_stays_as_it_is():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    network[1].eval()
    network[0].weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    count_cost(network, torch.randn(2, 3, 8, 8))
    assert [module.training for module in network] == [True, False, True]
    assert not network[0].weight.requires_grad
    assert network[0].bias.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network[0]._forward_hooks
    assert not network[0]._forward_pre_hooks


def test_failure_is_a_user_error_and_leaves_no_hooks():
    network = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(UserError, match=r"fails on the example inputs \(1, 7\)"):
        count_cost(network, torch.zeros(2, 7))
    assert not network[0]._forward_hooks
    assert network.training


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), "is empty"),
        ("image", "expected a tensor"),
        ((torch.zeros(2, 3), 5), r"\[1\] is int"),
        (torch.tensor(1.0), "counts the samples"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), r"batch sizes \[2, 3\]"),
    ],
)
def test_example_inputs_are_checked(inputs, text):
    with pytest.raises(UserError, match=text):
        count_cost(nn.Linear(3, 3), inputs)


def test_winograd_layers_count_the_products_of_their_kept_columns():
    from tenfold.nn.winograd import WinogradConv3d

    dense = nn.Conv3d(4, 8, 3, padding=1)
    layer = WinogradConv3d.from_dense(dense, (2, 4, 4), range(0, 144, 2))
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4 * 4, 2))
    cost = count_cost(model, torch.zeros(2, 4, 4, 4, 4))
    row = cost.layers[0]
    assert (row.type, row.shape) == ("WinogradConv3d", (72, 8, 4))
    assert row.macs == row.effective_macs == layer.multiplications(torch.zeros(1, 8, 4, 4, 4))
    assert row.macs == 72 * 2 * 8 * 4
    assert cost.macs == row.macs + 8 * 64 * 2
    assert cost.parameters == 72 * 8 * 4 + 8 + 8 * 64 * 2 + 2


def test_layers_that_make_their_weight_anew_get_their_own_macs():
    """Memory of a weight that is gone may be that of another layer's input or weight."""
    width, side = 16, 24
    net = nn.Sequential(
        *(QuantizedConv2d(nn.Conv2d(width, width, 3, padding=1), 4) for _ in range(8))
    )
    for _ in range(3):
        rows = count_cost(net, torch.zeros(1, width, side, side)).layers
        assert [row.macs for row in rows] == 8 * [side**2 * width**2 * 9]
