"""2:4 on a GPU: shapes and layout here, the compressed product where there is a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tenfold
from tenfold.deploy import semi_structured
from tenfold.deploy.semi_structured import (
    SemiStructuredConv2d,
    SemiStructuredLinear,
    Sizes,
    columns,
    compress,
    matrix,
    unfit,
)
from tenfold.errors import UserError
from tests.pruning import pruned

pytestmark = pytest.mark.unit
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": (1, 2)},
    {"kernel_size": (3, 5), "padding": "same", "dilation": 2, "bias": False},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_the_matrix_product_is_the_convolution(options):
    torch.manual_seed(0)
    layer = pruned(nn.Conv2d(8, 6, **options), (2, 4))
    x = torch.randn(2, 8, 7, 9)
    rows = matrix(layer.weight)
    assert int((rows.reshape(-1, 4) != 0).sum(dim=1).max()) == 2  # 2:4 along a row
    expected = layer(x)
    assert columns(x, Sizes.of(layer)).shape == (expected[:, 0].numel(), rows.shape[1])
    found = SemiStructuredConv2d(layer, rows)(x)
    assert torch.allclose(found, expected, atol=1e-5)
    again = copy.deepcopy(SemiStructuredConv2d(layer, rows))
    assert torch.equal(again(x), found)


def test_linear_layers_take_any_leading_axes():
    layer = pruned(nn.Linear(8, 6), (2, 4))
    packed = SemiStructuredLinear(layer, matrix(layer.weight))
    for shape in ((8,), (3, 8), (2, 5, 8)):
        x = torch.randn(shape)
        assert torch.allclose(packed(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Linear(64, 32), "float32: 2:4 on a GPU needs float16 or bfloat16"),
        (nn.Linear(64, 48).half(), "48x64: 2:4 on a GPU needs multiples of 32 and 64"),
        (nn.Conv2d(16, 32, 3).half(), "32x144"),
        (nn.Conv2d(128, 64, 1, groups=2).bfloat16(), "2 groups"),
        (nn.Linear(64, 32).half(), "its zeros are not 2:4"),
    ],
)
def test_layers_that_do_not_fit_say_why(layer, why):
    assert why in unfit(layer)
    with pytest.raises(UserError, match="can't be compressed"):
        compress(layer)


def test_layers_that_fit():
    assert unfit(pruned(nn.Linear(64, 32), (2, 4)).half()) is None
    assert unfit(pruned(nn.Conv2d(64, 32, 3), (1, 8)).bfloat16()) is None
    with pytest.raises(UserError, match="it is on cpu: move the model to a GPU"):
        compress(pruned(nn.Linear(64, 32), (2, 4)).half())


def test_compressed_models_are_not_saved(tmp_path):
    layer = pruned(nn.Linear(8, 6), (2, 4))
    network = nn.Sequential(SemiStructuredLinear(layer, matrix(layer.weight)))
    with pytest.raises(UserError, match="tensor cores of one GPU"):
        tenfold.save(network, tmp_path / "gpu")


def test_layers_fall_back_one_by_one(monkeypatch):
    """The whole way, with plain matrices in the place of compressed ones."""
    from tenfold.deploy import choose

    def plain(layer):
        if (why := unfit(layer)) is not None:
            raise UserError(why)
        kind = SemiStructuredConv2d if isinstance(layer, nn.Conv2d) else SemiStructuredLinear
        return kind(layer, matrix(layer.weight))

    def pack(self, layer):
        return semi_structured.compress(layer.module)

    monkeypatch.setattr(semi_structured, "compress", plain)
    monkeypatch.setattr(choose.Target, "pack", pack)
    network = nn.Sequential(
        pruned(nn.Conv2d(64, 32, 3), (2, 4)), nn.ReLU(), pruned(nn.Conv2d(32, 32, 1), (2, 4))
    ).bfloat16()
    x = torch.randn(1, 64, 6, 6).bfloat16()
    fast = tenfold.optimize(network, x, choose="packed")
    assert [row.layer for row in fast.plan.packed] == ["0"]
    assert "32x32" in fast.plan.layers[1].reason
    assert fast.plan.difference < 0.05
    assert copy.deepcopy(fast)(x).dtype == torch.bfloat16


@on_a_gpu
@pytest.mark.parametrize("layer", [nn.Linear(64, 32), nn.Conv2d(64, 32, 3), nn.Conv2d(64, 32, 1)])
def test_compressed_layers_are_the_dense_ones(layer):
    layer = pruned(layer, (2, 4)).cuda().half()
    shape = (16, 64) if isinstance(layer, nn.Linear) else (2, 64, 8, 8)
    x = torch.randn(shape, device="cuda").half()
    expected = layer(x).float()
    assert torch.allclose(compress(layer)(x).float(), expected, atol=1e-2)


@on_a_gpu
def test_a_whole_network_on_a_gpu():
    network = nn.Sequential(pruned(nn.Linear(64, 64), (2, 4)), nn.ReLU(), nn.Linear(64, 10))
    network, x = network.cuda().half(), torch.randn(8, 64, device="cuda").half()
    fast = tenfold.optimize(network, x, choose="packed")
    assert [row.layer for row in fast.plan.packed] == ["0"]
    assert torch.allclose(fast(x), network(x), atol=1e-2)
    with pytest.raises(UserError, match="is for a CPU"):
        tenfold.optimize(network, x, "int8")
