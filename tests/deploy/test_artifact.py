import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import tenfold.deploy.artifact as artifact
from tenfold.errors import UserError
from tenfold.methods import LBC
from tenfold.nn import models
from tenfold.nn.blocks import from_blocks, to_blocks

pytestmark = pytest.mark.unit


def make_nm(model, n=2, m=4):
    sparsity = LBC(n=n, m=m)
    for layer in sparsity.plan(model):
        if layer.treatment:
            weight = model.get_submodule(layer.name).weight
            with torch.no_grad():
                blocks = to_blocks(weight, m).abs()
                kept = torch.zeros_like(blocks).scatter_(1, blocks.topk(n, dim=1).indices, 1.0)
                weight.mul_(from_blocks(kept, weight.shape))
    return model


@pytest.fixture
def sparse(tmp_path):
    torch.manual_seed(0)
    model, network = models.build("resnet20", num_classes=10)
    model = make_nm(model).eval()
    path = artifact.save(
        model,
        tmp_path / "model",
        network,
        preprocessing={"mean": [0.5]},
        classes=["a", "b"],
        recipe={"task": "classification"},
    )
    return model, path


def test_round_trip_is_bit_equal_and_small(sparse, tmp_path):
    model, path = sparse
    again = artifact.load(path)
    assert not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), again(x))
    dense, network = models.build("resnet20", num_classes=10)
    whole = artifact.artifact_bytes(artifact.save(dense, tmp_path / "dense", network))
    assert 0.53 < artifact.artifact_bytes(path) / whole < 0.6
    found = artifact.read(path)
    assert found.preprocessing == {"mean": [0.5]}
    assert found.classes == ["a", "b"]
    assert found.recipe == {"task": "classification"}
    assert {edit["type"] for edit in found.edits} == {"NMPacked"}


def test_only_two_files_and_no_pickle(sparse):
    _, path = sparse
    assert sorted(p.name for p in path.iterdir()) == ["model.json", "weights.safetensors"]
    structure = json.loads((path / "model.json").read_text())
    assert list(structure) == [
        "format", "network", "edits", "preprocessing", "classes", "recipe", "sha256",
    ]  # fmt: skip


def test_a_network_of_ones_own_needs_the_module(tmp_path):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))  # noqa: E731
    model = make()
    path = artifact.save(model, tmp_path / "own")
    with pytest.raises(UserError, match="network of your own code: pass a fresh instance"):
        artifact.load(path)
    fresh = make()
    assert artifact.load(path, model=fresh) is fresh
    assert torch.equal(fresh[1].weight, model[1].weight)
    with pytest.raises(UserError, match=r"missing 2\.bias; missing 2\.weight"):
        artifact.load(path, model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 1)))
    with pytest.raises(UserError, match=r"1\.bias \(3,\) instead of \(4,\)"):
        artifact.load(path, model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))


def test_precision_and_tied_weights_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    path = artifact.save(model, tmp_path / "tied")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fresh[1].weight = fresh[0].weight
    again = artifact.load(path, model=fresh)
    assert again[0].weight.dtype == torch.float64
    assert again[0].weight is again[1].weight
    assert torch.equal(again[0].weight, model[0].weight)


def test_changed_files_are_refused(sparse):
    _, path = sparse
    weights = path / "weights.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(UserError, match="was changed after it was written"):
        artifact.load(path)
    weights.write_bytes(original)
    structure = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps({**structure, "classes": ["x"]}))
    with pytest.raises(UserError, match="was changed"):
        artifact.load(path)
    (path / "model.json").write_text(json.dumps({**structure, "format": 2}))
    with pytest.raises(UserError, match="format 2: this version of tenfold reads format 1"):
        artifact.load(path)
    (path / "model.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        artifact.load(path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no artifact: it has no weights\.safetensors"):
        artifact.load(path)


def test_training_form_is_refused(tmp_path):
    model, _ = models.build("resnet20", num_classes=10)
    LBC(n=2, m=4).attach(model, total_steps=10)
    with pytest.raises(UserError, match="still in training form"):
        artifact.save(model, tmp_path / "early")
    assert not (tmp_path / "early").exists()


def test_a_failed_save_leaves_the_old_artifact(sparse):
    model, path = sparse
    with pytest.raises(UserError, match="is not JSON"):
        artifact.save(model, path, recipe={"oops": object()})
    artifact.load(path)


def test_loading_needs_no_training_dependency(sparse):
    _, path = sparse
    code = (
        "import sys, tenfold\n"
        f"model = tenfold.load({str(path)!r})\n"
        "heavy = {'lightning', 'jsonargparse', 'timm', 'torchvision', 'onnx', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
