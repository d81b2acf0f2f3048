"""Every registered method: train a few steps, finalize, save, load, export, run, and compare."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tenfold
from tenfold.measure import OnnxModel, OpenVinoModel
from tenfold.methods import LBC, Kind, find, registry
from tenfold.nn import models
from tenfold.nn.blocks import nm_pattern
from tests import nets
from tests.methods.test_contract import SAMPLES

pytestmark = pytest.mark.path

# Networks and the sizes of their inputs, for methods that need others than images.
NETWORKS = {"winograd3d": (nets.volumes, (1, 5, 8, 6))}
WEIGHT_METHODS = sorted(key for key, method in registry().items() if method.kind is Kind.WEIGHTS)


def train(model, method, size, optimizer, steps=20):
    for index in range(steps):
        generator = torch.Generator().manual_seed(index)
        images = torch.randn(8, *size, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8) % 10).backward()
        optimizer.step()
        method.step()


@pytest.mark.parametrize("key", WEIGHT_METHODS)
def test_from_training_to_every_runtime(key, tmp_path):
    torch.manual_seed(0)
    method = find(key)(**SAMPLES[key])
    build, size = NETWORKS.get(key, (nets.small, (1, 8, 8)))
    model = method.attach(build(10), total_steps=20)
    train(model, method, size, torch.optim.SGD(method.parameters_for(model), lr=0.05))
    model = method.finalize(model).eval()

    path = tenfold.save(model, tmp_path / "artifact")
    loaded = tenfold.load(path, model=build(10))
    images = torch.randn(5, *size)
    with torch.inference_mode():
        expected = model(images)
        assert torch.equal(loaded(images), expected)

    exported = tenfold.export(loaded, tmp_path / "export", images[:1])
    for runner in (OnnxModel(exported.path), OpenVinoModel(exported.path)):
        torch.testing.assert_close(runner(images), expected, atol=1e-4, rtol=1e-4)


def test_a_vision_transformer_of_timm_with_adamw(tmp_path):
    """qkv, proj, fc1 and fc2 of every block become 2:4; the patches and the head stay dense."""
    torch.manual_seed(0)
    model, network = models.build(
        "timm/vit_tiny_patch16_224", num_classes=10, size=(32, 32), options={"depth": 2}
    )
    sparsity = LBC(n=2, m=4, preset="deit")
    treated = {layer.name for layer in sparsity.plan(model) if layer.treatment}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert treated == {f"blocks.{block}.{part}" for block in range(2) for part in parts}
    model = sparsity.attach(model, total_steps=6)
    train(model, sparsity, (3, 32, 32), torch.optim.AdamW(model.parameters(), lr=1e-3), steps=6)
    model = sparsity.finalize(model).eval()
    assert all(nm_pattern(model.get_submodule(name).weight) == (2, 4) for name in treated)
    loaded = tenfold.load(tenfold.save(model, tmp_path / "artifact", network))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(loaded(images), expected)
    exported = tenfold.export(loaded, tmp_path / "vit.onnx", images)
    torch.testing.assert_close(OnnxModel(exported.path)(images), expected, atol=1e-4, rtol=1e-4)


def test_zeros_survive_folding_and_export(tmp_path):
    """The pattern is still there in the exported file: counted block by block in the ONNX."""
    import onnx
    from onnx import numpy_helper

    torch.manual_seed(0)
    sparsity = LBC(n=1, m=4)
    model = sparsity.attach(nets.small(10, width=16), total_steps=20)
    train(model, sparsity, (1, 8, 8), torch.optim.SGD(model.parameters(), lr=0.05))
    model = sparsity.finalize(model)
    exported = tenfold.export(model, tmp_path, torch.zeros(1, 1, 8, 8))
    assert exported.folded
    weights = [
        torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(exported.path).graph.initializer
    ]
    patterns = [nm_pattern(weight) for weight in weights if weight.ndim == 4]
    assert sorted(patterns, key=str) == [(1, 4), (1, 4), None]
