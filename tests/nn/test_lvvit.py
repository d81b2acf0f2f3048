"""LV-ViT-S against its published size and cost, and its formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.deploy.trace import trace
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.nn import models
from tenfold.nn.lvvit import LVViT

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {"num_classes": 5, "size": (32, 32), "depth": 2, "dim": 12, "heads": 3}


def small(**changes: Any) -> LVViT:
    torch.manual_seed(0)
    model = LVViT(**{**SMALL, **changes})
    with torch.no_grad():  # biases and norms that are not the neutral ones
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_size_and_cost_are_the_published() -> None:
    model, network = models.build("lvvit_small", num_classes=1000, size=(224, 224))
    assert network.name == "tenfold/lvvit_small"
    cost = count_cost(model, torch.zeros(1, 3, 224, 224))
    assert cost.macs / 1e9 == pytest.approx(6.551, abs=0.0005)
    # By hand: the stem, the tokens, 16 blocks, the last norm, two heads.
    stem = 64 * 3 * 49 + 2 * 64 * 64 * 9 + 3 * 128 + 384 * 64 * 64 + 384
    attention = 384 * 1152 + 384 * 384 + 384
    block = 2 * 768 + attention + (384 * 1152 + 1152) + (1152 * 384 + 384)
    total = stem + 384 + 197 * 384 + 16 * block + 768 + 2 * 385 * 1000
    assert cost.parameters == total == 26_151_824
    # SuperViT's has four tables in place of this one.
    assert total + (65 + 101 + 145) * 384 == 26_271_248


def test_parameters_are_named_as_the_authors() -> None:
    with torch.device("meta"):
        state = LVViT().state_dict()
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for number in (1, 2, 3):
        expected.add(f"patch_embed.conv{number}.weight")
        kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        expected |= {f"patch_embed.bn{number}.{kind}" for kind in kinds}
    modules = ["norm", "head", "aux_head"]
    for number in range(16):
        expected.add(f"blocks.{number}.attn.qkv.weight")
        for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            modules.append(f"blocks.{number}.{layer}")
    expected |= {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(state) == expected
    shapes = {
        "patch_embed.conv1.weight": (64, 3, 7, 7),
        "patch_embed.conv3.weight": (64, 64, 3, 3),
        "patch_embed.proj.weight": (384, 64, 8, 8),
        "pos_embed": (1, 197, 384),
        "blocks.15.attn.qkv.weight": (1152, 384),
        "blocks.15.mlp.fc1.weight": (1152, 384),
        "aux_head.weight": (1000, 384),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_norms_have_the_authors_epsilon() -> None:
    norms = [module for module in small().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parity
@pytest.mark.parametrize("skip_lam", [2.0, 3.0])
def test_branches_are_divided(skip_lam: float) -> None:
    model = small(skip_lam=skip_lam).double()
    block: Any = model.blocks[1]
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def attention(x: Tensor) -> Tensor:
        query, key, value = (x @ block.attn.qkv.weight.T).chunk(3, dim=-1)
        parts = []
        for head in range(3):
            of = slice(4 * head, 4 * head + 4)
            scores = query[..., of] @ key[..., of].mT / 2
            parts.append(scores.softmax(-1) @ value[..., of])
        return torch.cat(parts, -1) @ block.attn.proj.weight.T + block.attn.proj.bias

    middle = x + attention(block.norm1(x)) / skip_lam
    whole = middle + block.mlp(block.norm2(middle)) / skip_lam
    torch.testing.assert_close(block(x), whole, rtol=1e-10, atol=1e-12)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), middle, rtol=1e-10, atol=1e-12)


@pytest.mark.parity
@torch.no_grad()
def test_logits_of_the_class_token_and_of_the_surest_patches() -> None:
    model = small()
    tokens = torch.randn(3, 5, 12)
    expected = torch.empty(3, 5)
    for image in range(3):
        of_patches = [model.aux_head(tokens[image, patch]) for patch in range(1, 5)]
        for label in range(5):
            surest = max(float(logits[label]) for logits in of_patches)
            expected[image, label] = model.head(tokens[image, 0])[label] + 0.25 * surest
    torch.testing.assert_close(model.forward_head(tokens), expected)
    model.aux_weight = 0.0
    torch.testing.assert_close(model.forward_head(tokens), model.head(tokens[:, 0]))


def test_features_and_logits() -> None:
    model = small()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 1 + 4, 12)
    assert torch.equal(model.forward_head(features), model(images))
    stem = model.patch_embed
    x = images
    for convolution, norm in (
        (stem.conv1, stem.bn1),
        (stem.conv2, stem.bn2),
        (stem.conv3, stem.bn3),
    ):
        x = norm(convolution(x)).clamp(min=0)
    patches = stem.proj(x)
    assert patches.shape == (2, 12, 2, 2)
    tokens = torch.stack([patches[:, :, i, j] for i in (0, 1) for j in (0, 1)], dim=1)
    assert torch.equal(stem(images), tokens)
    x = torch.cat([model.cls_token.repeat(2, 1, 1), tokens], 1) + model.pos_embed
    x = model.norm(model.blocks[1](model.blocks[0](x)))
    torch.testing.assert_close(features, x)
    # Whoever brings other tables can give the stem another size.
    assert stem(torch.zeros(1, 3, 48, 48)).shape == (1, 9, 12)
    assert model.train()(images).shape == (2, 5)


def test_fresh_weights_and_drop_path() -> None:
    torch.manual_seed(0)
    model = LVViT(10, depth=5, drop_path_rate=0.2)
    drawn = [model.pos_embed, model.cls_token, model.blocks[0].attn.qkv.weight, model.head.weight]
    for tensor in [*drawn, model.aux_head.weight]:
        assert tensor.std().item() == pytest.approx(0.02, rel=0.12)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()
    assert model.num_prefix_tokens == 1
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    for number in (1, 2):
        paths = [getattr(block, f"drop_path{number}") for block in model.blocks]
        rates = [getattr(path, "drop_prob", 0.0) for path in paths]
        assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_every_parameter_learns() -> None:
    model = small().train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": (32, 48)}, r"size=\(32, 48\): expected square images, .* multiple of 16"),
        ({"size": [24, 24]}, "multiple of 16"),
        ({"depth": 0}, "depth=0: expected a number above 0"),
        ({"skip_lam": 0.0}, "skip_lam=0.0: expected a number above 0"),
        ({"heads": 5}, "dim=12: expected a multiple of heads=5"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1: expected 0 or more"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        LVViT(**{**SMALL, **changes})


def test_images_of_another_size_are_refused() -> None:
    model = small()
    for wrong in ((2, 3, 48, 48), (2, 3, 32, 16), (3, 32, 32)):
        with pytest.raises(UserError, match=r"expected \(B, C, 32, 32\), .* resize them"):
            model(torch.zeros(wrong))


def test_exports_and_traces(tmp_path: Any) -> None:
    model = small()
    images = torch.randn(2, 3, 32, 32)
    result = tenfold.export(model, tmp_path / "lvvit.onnx", images)
    assert {(check.runtime, check.batch) for check in result.checks} == {
        ("onnxruntime", 1), ("onnxruntime", 3), ("openvino", 1), ("openvino", 3),
    }  # fmt: skip
    assert result.folded == ["patch_embed.bn1", "patch_embed.bn2", "patch_embed.bn3"]
    graph = trace(model, 1)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert {"patch_embed.conv1", "blocks.1.mlp.fc2", "aux_head"} <= called
    assert torch.equal(graph(images[:1]), model(images[:1]))
    with pytest.raises(UserError, match="resize them"):
        graph(torch.zeros(1, 3, 48, 48))
