"""PVT against the papers' sizes, its authors' parameter names and attention written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import tenfold
from tenfold.deploy.trace import trace
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.nn import models
from tenfold.nn.pvt import DEPTHS, PyramidVisionTransformer

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {
    "num_classes": 5,
    "size": (64, 64),
    "depths": (1, 2, 1, 2),
    "dims": (8, 12, 16, 24),
    "heads": (1, 2, 4, 3),
    "mlp_ratios": (2, 2, 1, 3),
}


def small(**changes: Any) -> PyramidVisionTransformer:
    torch.manual_seed(0)
    model = PyramidVisionTransformer(**{**SMALL, **changes})
    with torch.no_grad():  # biases and norms that are not the neutral ones
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("pvt_tiny", 13.23, 1.93),
        ("pvt_small", 24.49, 3.82),
        ("pvt_medium", 44.21, 6.66),
        ("pvt_large", 61.37, 9.81),
    ],
)
def test_sizes_and_costs_are_the_papers(name: str, parameters: float, macs: float) -> None:
    with torch.device("meta"):
        model, network = models.build(name, num_classes=1000, size=(224, 224))
    assert network.name == f"tenfold/{name}"
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.003)
    blocks = [len(getattr(model, f"block{stage}")) for stage in (1, 2, 3, 4)]
    assert blocks == list(DEPTHS[name.removeprefix("pvt_")])


def test_count_cost_of_tiny() -> None:
    cost = count_cost(PyramidVisionTransformer(), torch.zeros(1, 3, 224, 224))
    assert cost.macs / 1e9 == pytest.approx(1.93, rel=0.003)
    assert cost.parameters == 13_229_288


def test_parameters_are_named_as_the_authors() -> None:
    with torch.device("meta"):
        state = PyramidVisionTransformer().state_dict()
    block = ["norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    reduction = ["attn.sr", "attn.norm"]
    modules = ["norm", "head"]
    for stage in (1, 2, 3, 4):
        modules += [f"patch_embed{stage}.proj", f"patch_embed{stage}.norm"]
        for layer in block + (reduction if stage < 4 else []):
            modules += [f"block{stage}.0.{layer}", f"block{stage}.1.{layer}"]
    tensors = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    tensors += ["cls_token", "pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4"]
    assert set(state) == set(tensors)
    shapes = {
        "patch_embed1.proj.weight": (64, 3, 4, 4),
        "pos_embed1": (1, 3136, 64),
        "block1.0.attn.sr.weight": (64, 64, 8, 8),
        "block1.1.attn.kv.weight": (128, 64),
        "block1.1.mlp.fc1.weight": (512, 64),
        "patch_embed4.proj.weight": (512, 320, 2, 2),
        "pos_embed4": (1, 50, 512),
        "cls_token": (1, 1, 512),
        "block4.1.attn.kv.bias": (1024,),
        "block4.1.mlp.fc2.weight": (512, 2048),
        "head.weight": (1000, 512),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_norms_have_the_authors_epsilons() -> None:
    with torch.device("meta"):
        model = PyramidVisionTransformer()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            inner = "patch_embed" in name or "attn" in name
            assert module.eps == (1e-5 if inner else 1e-6), name


def by_hand(x: Tensor, state: dict[str, Tensor], heads: int, ratio: int) -> Tensor:
    """Attention one image, one head, one patch at a time."""
    outputs = []
    for tokens in x:
        seen = tokens
        if ratio > 1:
            side = math.isqrt(len(tokens))
            rows = []
            for top in range(0, side, ratio):
                for left in range(0, side, ratio):
                    row = state["sr.bias"].clone()
                    for i in range(ratio):
                        for j in range(ratio):
                            row += (
                                state["sr.weight"][:, :, i, j] @ tokens[(top + i) * side + left + j]
                            )
                    rows.append(row)
            seen = torch.stack(rows)
            mean = seen.mean(1, keepdim=True)
            spread = (seen.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            seen = (seen - mean) / spread * state["norm.weight"] + state["norm.bias"]
        query = tokens @ state["q.weight"].T + state["q.bias"]
        both = seen @ state["kv.weight"].T + state["kv.bias"]
        dim = tokens.shape[1]
        width = dim // heads
        mixed = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            key, value = both[:, :dim][:, part], both[:, dim:][:, part]
            scores = (query[:, part] @ key.T / math.sqrt(width)).exp()
            mixed.append(scores / scores.sum(1, keepdim=True) @ value)
        outputs.append(torch.cat(mixed, 1) @ state["proj.weight"].T + state["proj.bias"])
    return torch.stack(outputs)


@pytest.mark.parity
@pytest.mark.parametrize(("stage", "tokens"), [(1, 256), (2, 64), (3, 16), (4, 5)])
def test_attention_is_what_it_is_by_hand(stage: int, tokens: int) -> None:
    model = small().double()
    attention = getattr(model, f"block{stage}")[0].attn
    x = torch.randn(2, tokens, SMALL["dims"][stage - 1], dtype=torch.float64)
    heads, ratio = SMALL["heads"][stage - 1], (8, 4, 2, 1)[stage - 1]
    expected = by_hand(x, attention.state_dict(), heads, ratio)
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parity
def test_the_whole_network_is_what_it_is_by_hand() -> None:
    model = small().double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    state = model.state_dict()

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = images
    for stage in (1, 2, 3, 4):
        proj = f"patch_embed{stage}.proj"
        patch = 4 if stage == 1 else 2
        cut = functional.unfold(x, patch, stride=patch).transpose(1, 2)
        tokens = cut @ state[f"{proj}.weight"].flatten(1).T + state[f"{proj}.bias"]
        tokens = norm(tokens, f"patch_embed{stage}.norm", 1e-5)
        if stage == 4:
            tokens = torch.cat([state["cls_token"].repeat(2, 1, 1), tokens], 1)
        tokens = tokens + state[f"pos_embed{stage}"]
        for number in range(SMALL["depths"][stage - 1]):
            name = f"block{stage}.{number}"
            inner = {
                key.removeprefix(f"{name}.attn."): value
                for key, value in state.items()
                if key.startswith(f"{name}.attn.")
            }
            ratio = (8, 4, 2, 1)[stage - 1]
            heads = SMALL["heads"][stage - 1]
            tokens = tokens + by_hand(norm(tokens, f"{name}.norm1", 1e-6), inner, heads, ratio)
            hidden = linear(norm(tokens, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")
            gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            tokens = tokens + linear(gelu, f"{name}.mlp.fc2")
        side = 64 // 2 ** (stage + 1)
        if stage < 4:
            x = tokens.reshape(2, side, side, -1).permute(0, 3, 1, 2)
    expected = linear(norm(tokens, "norm", 1e-6)[:, 0], "head")
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-11)


def test_the_last_block_can_be_run_by_hand() -> None:
    model = small()
    images = torch.randn(2, 3, 64, 64)
    before = model.forward_before_last_block(images)
    features = model.forward_features(images)
    assert before.shape == features.shape == (2, 1 + 4, 24)
    assert torch.equal(model.norm(model.block4[-1](before)), features)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(model.head(features[:, 0]), model(images))
    assert model.num_prefix_tokens == 1
    attention = model.block4[-1].attn
    assert attention.num_heads == 3
    assert attention.scale == pytest.approx(8**-0.5)


def test_fresh_weights_and_drop_path() -> None:
    torch.manual_seed(0)
    model = PyramidVisionTransformer(10, size=(64, 64), drop_path_rate=0.3)
    drawn = [model.pos_embed1, model.cls_token, model.block3[0].attn.kv.weight, model.head.weight]
    for tensor in drawn:
        assert tensor.std().item() == pytest.approx(0.02, rel=0.12)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
    assert model.no_weight_decay() == {"cls_token"}
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for stage in (1, 2, 3, 4)
        for block in getattr(model, f"block{stage}")
    ]
    assert rates == pytest.approx([0.3 * i / 7 for i in range(8)])


def test_every_parameter_learns() -> None:
    model = small().train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": (64, 96)}, r"size=\(64, 96\): expected square images, .* multiple of 32"),
        ({"size": [48, 48]}, r"size=\(48, 48\): expected square"),
        ({"size": (0, 0)}, "expected square"),
        ({"depths": (1, 1, 1)}, r"depths=\(1, 1, 1\): expected four numbers above 0"),
        ({"depths": (1, 1, 0, 1)}, "expected four numbers above 0"),
        ({"heads": (1, 2, 3, 3)}, r"dims=.*: expected multiples of heads=\(1, 2, 3, 3\)"),
        ({"sr_ratios": (8, 4, 2, 2)}, "expected 1 in the last stage"),
        ({"sr_ratios": (8, 3, 2, 1)}, r"expected divisors of the stages' sides, \[16, 8, 4, 2\]"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0: expected 0 or more"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        PyramidVisionTransformer(**{**SMALL, **changes})


def test_images_of_another_size_are_refused() -> None:
    model = small()
    for wrong in ((2, 3, 96, 96), (2, 3, 64, 32), (3, 64, 64)):
        with pytest.raises(UserError, match=r"expected \(B, C, 64, 64\), .* resize them"):
            model(torch.zeros(wrong))
    with pytest.raises(UserError, match="expected square images"):
        models.build("pvt_tiny", num_classes=3, size=(64, 32))


def test_exports_and_traces(tmp_path: Any) -> None:
    model = small()
    images = torch.randn(2, 3, 64, 64)
    result = tenfold.export(model, tmp_path / "pvt.onnx", images)
    assert {(check.runtime, check.batch) for check in result.checks} == {
        ("onnxruntime", 1), ("onnxruntime", 3), ("openvino", 1), ("openvino", 3),
    }  # fmt: skip
    graph = trace(model, 1)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert {"block1.0.attn.sr", "block4.1.mlp.fc2", "head"} <= called
    assert torch.equal(graph(images[:1]), model(images[:1]))
    with pytest.raises(UserError, match="resize them"):
        graph(torch.zeros(1, 3, 32, 32))
