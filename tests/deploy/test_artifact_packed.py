"""Optimized models on disk: equal after loading, small, and safe against damaged files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tenfold
from tenfold.deploy import artifact, edits, optimized
from tenfold.errors import UserError
from tenfold.nn import models
from tenfold.nn.packed import NMConv2d
from tests.nets import small
from tests.pruning import pruned, settled

pytestmark = pytest.mark.unit


def make(name, *patterns, **arguments):
    torch.manual_seed(0)
    network, described = models.build(name, num_classes=10, **arguments)
    return pruned(settled(network), *patterns), described


@pytest.fixture(scope="module")
def optimized_once():
    network, described = make("resnet20", (2, 4), (1, 8))
    return tenfold.optimize(network, torch.randn(2, 3, 32, 32), choose="packed"), described


@pytest.fixture
def saved(optimized_once, tmp_path):
    fast, described = optimized_once
    return fast, tenfold.save(fast, tmp_path / "fast", described, classes=list("abcdefghij"))


def rewrite(path, change_structure=None, change_tensors=None):
    """Change an artifact as somebody would who knows how to sign it again."""
    structure = json.loads((path / "model.json").read_text())
    tensors = load_file(path / "weights.safetensors")
    if change_structure:
        change_structure(structure)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path / "weights.safetensors")
    structure["sha256"] = artifact._hash(structure, path / "weights.safetensors")
    (path / "model.json").write_text(json.dumps(structure))


@pytest.mark.parametrize(
    ("name", "precision"),
    [("torchvision/resnet18", "float32"), ("digitnet", "bfloat16"), ("resnet20", "int8")],
)
def test_round_trip(name, precision, tmp_path):
    network, described = make(name, (2, 4), channels=3)
    fast = tenfold.optimize(network, torch.randn(2, 3, 32, 32), precision, choose="packed")
    path = tenfold.save(fast, tmp_path / "fast", described)
    again = tenfold.load(path)
    assert again.plan == fast.plan
    assert "relu" in {row.fused for row in again.plan.packed}
    assert isinstance(again.network, torch.fx.GraphModule)
    x = torch.randn(3, 3, 40, 32)
    assert torch.equal(again(x), fast(x))
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in fast.state_dict().items())
    # and once more from what was loaded
    third = tenfold.load(tenfold.save(again, tmp_path / "again", described))
    assert torch.equal(third(x), fast(x))


def bytes_of(path, name):
    tensors = load_file(path / "weights.safetensors")
    return sum(tensors[f"{name}.{part}"].nbytes for part in ("values", "index"))


@pytest.mark.parametrize(
    ("pattern", "precision", "share"),
    [
        ((2, 4), "float32", 0.53125),
        ((2, 4), "bfloat16", 0.28125),
        ((2, 4), "int8", 0.15625),
        ((1, 16), "float32", 0.0703125),
    ],
)
def test_bytes(pattern, precision, share, tmp_path):
    network = pruned(nn.Sequential(nn.Conv2d(32, 64, 3)), pattern)
    fast = tenfold.optimize(network, torch.randn(1, 32, 5, 5), precision, choose="packed")
    path = tenfold.save(fast, tmp_path / "fast")
    assert bytes_of(path, "0") == share * 32 * 64 * 9 * 4


def test_a_network_of_ones_own_and_layers_left_dense(tmp_path):
    torch.manual_seed(0)
    network = pruned(settled(small(3)), (1, 2))
    network[3].weight.data.normal_()
    x = torch.randn(2, 1, 8, 8)
    fast = tenfold.optimize(network, x, choose="packed")
    assert [row.layer for row in fast.plan.packed] == ["6", "11"]
    path = tenfold.save(fast, tmp_path / "own")
    structure = json.loads((path / "model.json").read_text())
    kinds = {edit["module"]: edit["type"] for edit in structure["edits"]}
    assert kinds == {
        "1": "FoldedNorm", "4": "FoldedNorm", "0": "Bias", "3": "Bias",
        "6": "NMConv2d", "11": "NMLinear", "": "Replaced",
    }  # fmt: skip
    with pytest.raises(UserError, match="network of your own code"):
        tenfold.load(path)
    again = tenfold.load(path, model=small(3))
    assert torch.equal(again(x), fast(x))
    with pytest.raises(UserError, match="doesn't fit"):
        tenfold.load(path, model=small(3, width=16))
    with pytest.raises(UserError, match="doesn't fit the network"):
        tenfold.load(path, model=nn.Linear(8, 3))


def test_dense_choices_are_kept_too(tmp_path):
    network, described = make("resnet20", (2, 4))
    fast = tenfold.optimize(network, torch.randn(2, 3, 32, 32), choose="dense")
    path = tenfold.save(fast, tmp_path / "dense", described)
    again = tenfold.load(path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), fast(x))
    assert {edit["type"] for edit in artifact.read(path).edits} == {
        "FoldedNorm", "Bias", "NMPacked",
    }  # fmt: skip


def test_the_memory_format_is_kept(saved):
    fast, path = saved

    def last(structure):
        structure["plan"]["memory_format"] = "channels_last"

    rewrite(path, last)
    again = tenfold.load(path)
    assert again.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(again(x), fast(x), atol=1e-4)
    rewrite(path, lambda structure: structure["plan"].update(memory_format="backwards"))
    with pytest.raises(UserError, match="unknown memory format 'backwards'"):
        tenfold.load(path)


def test_another_graph_is_loaded_without_fusion(saved, monkeypatch):
    fast, path = saved
    monkeypatch.setattr(optimized, "apply_epilogues", lambda *_: None)
    again = tenfold.load(path)
    assert "loaded without fusion" in again.plan.reason
    assert {row.fused for row in again.plan.packed} == {None}
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(again(x), fast(x), atol=1e-4)


def test_epilogues_that_the_network_lacks_are_not_made_up(saved):
    fast, path = saved

    def change(structure):
        for edit in structure["edits"]:
            if edit["module"] == "layer1.0.conv1":
                edit["arguments"]["activation"] = "silu"

    rewrite(path, change)
    again = tenfold.load(path)
    assert "loaded without fusion" in again.plan.reason
    layers = [layer for layer in again.modules() if isinstance(layer, NMConv2d)]
    assert {layer.activation for layer in layers} == {"none"}
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(again(x), fast(x), atol=1e-4)


def edit_of(structure, module):
    return next(edit for edit in structure["edits"] if edit["module"] == module)


DAMAGES = {
    "evil type": (
        lambda s: edit_of(s, "layer1.0.conv1").update(type="os.system"),
        r"an edit of type 'os\.system'",
    ),
    "unknown module": (
        lambda s: edit_of(s, "layer1.0.conv1").update(module="layer9.conv1"),
        "doesn't fit the network",
    ),
    "other pattern": (
        lambda s: edit_of(s, "layer1.0.conv1")["arguments"].update(n=2),
        "packed values don't make a 2:8",
    ),
    "no pattern": (
        lambda s: edit_of(s, "layer1.0.conv1")["arguments"].update(n="2"),
        "expected n and m as numbers",
    ),
    "other shape": (
        lambda s: edit_of(s, "layer1.0.conv1")["arguments"].update(shape=[16, 16, 9, 1]),
        r"\[16, 16, 9, 1\] was saved and \[16, 16, 3, 3\] is needed",
    ),
    "huge shape": (
        lambda s: edit_of(s, "layer1.0.conv1")["arguments"].update(shape=[2**40, 16, 3, 3]),
        "was saved and",
    ),
    "other precision": (
        lambda s: edit_of(s, "layer1.0.conv1")["arguments"].update(precision="int8"),
        r"missing layer1\.0\.conv1\.scale",
    ),
    "other layer": (
        lambda s: edit_of(s, "layer1.0.conv1").update(type="NMLinear"),
        "NMLinear of .* doesn't fit: the network has Conv2d there",
    ),
    "unknown activation": (
        lambda s: edit_of(s, "layer1.0.conv1")["arguments"].update(activation="exec"),
        "activation 'exec'",
    ),
    "no plan": (lambda s: s.update(plan={"layers": 3}), "not the plan"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_descriptions_are_refused(damage, saved):
    change, message = DAMAGES[damage]
    rewrite(saved[1], change)
    with pytest.raises(UserError, match=message):
        tenfold.load(saved[1])


def test_damaged_tensors_are_refused(saved, tmp_path):
    _, path = saved

    def shorter(tensors):
        tensors["layer1.0.conv1.index"] = tensors["layer1.0.conv1.index"][:-1].clone()

    rewrite(path, change_tensors=shorter)
    with pytest.raises(UserError, match="don't hold"):
        tenfold.load(path)
    # 3 of 4 places need two bits: the fourth code is a place that isn't there
    network = pruned(nn.Sequential(nn.Linear(6, 4)), (1, 3))
    fast = tenfold.optimize(network, torch.randn(1, 6), choose="packed")
    path = tenfold.save(fast, tmp_path / "thirds")
    rewrite(path, change_tensors=lambda tensors: tensors["0.index"].fill_(255))
    with pytest.raises(UserError, match="outside its block"):
        tenfold.load(path, model=nn.Sequential(nn.Linear(6, 4)))

    def halves(tensors):
        tensors["0.bias"] = tensors["0.bias"].half()
        tensors["0.index"].zero_()

    rewrite(path, change_tensors=halves)
    with pytest.raises(UserError, match=r"bias are torch\.float16: expected torch\.float32"):
        tenfold.load(path, model=nn.Sequential(nn.Linear(6, 4)))


def test_an_optimized_model_starts_no_training(saved):
    with pytest.raises(UserError, match="optimized for one machine"):
        artifact.read(saved[1]).state_dict()


def test_the_edits_are_a_closed_list():
    assert edits.EDITS == (
        "FoldedNorm", "Bias", "Replaced", "NMConv2d", "NMLinear", "PackedWinogradConv3d",
        "WinogradConv3d", "PackedGenerator", "PackedLABNet", "QuantizedConv1d",
        "QuantizedConv2d", "QuantizedConv3d", "QuantizedLinear",
    )  # fmt: skip
