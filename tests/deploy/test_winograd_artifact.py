"""Winograd layers in artifacts, under folding, and in exported files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tenfold
from tenfold.deploy.artifact import read
from tenfold.deploy.fold import fold_batch_norm
from tenfold.errors import UserError
from tenfold.methods.winograd3d import convert
from tenfold.nn.winograd import WinogradConv3d
from tests import nets
from tests.pruning import settled

pytestmark = pytest.mark.unit


def pruned(tile=2, keep_ratio=0.5):
    torch.manual_seed(0)
    model = settled(nets.volumes(4))
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(4, 1, 5, 8, 6, generator=generator)
    return convert(model, tile, keep_ratio, calibration=[clips], min_channels=4).eval(), clips


def changed(path, change):
    """Rewrite an artifact's description as a stranger's program could, hash and all."""
    from tenfold.deploy import artifact

    structure = json.loads((path / "model.json").read_text())
    change(structure)
    structure["sha256"] = artifact._hash(structure, path / "weights.safetensors")
    (path / "model.json").write_text(json.dumps(structure))
    return path


@pytest.mark.parametrize("tile", [2, 4, (2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bit_identical(tile, dtype, tmp_path):
    model, clips = pruned(tile)
    model, clips = model.to(dtype), clips.to(dtype)
    path = tenfold.save(model, tmp_path / "model")
    kinds = [edit["type"] for edit in read(path).edits]
    assert kinds == ["WinogradConv3d", "WinogradConv3d"]
    loaded = tenfold.load(path, model=nets.volumes(4))
    assert not loaded.training
    assert torch.equal(loaded(clips), model(clips))
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    # Into the finalized network itself, too.
    assert torch.equal(tenfold.load(path, model=pruned(tile)[0])(clips), model(clips))


def test_only_kept_columns_are_stored(tmp_path):
    from tenfold.deploy.artifact import artifact_bytes

    sizes = [
        artifact_bytes(tenfold.save(pruned(2, share)[0], tmp_path / str(share)))
        for share in (1.0, 0.5)
    ]
    per_column = 4 * (8 * 8 + 16 * 8)
    assert sizes[0] - sizes[1] == pytest.approx(32 * per_column, rel=0.05)


def test_what_does_not_fit_is_refused(tmp_path):
    model, _ = pruned()
    path = tenfold.save(model, tmp_path / "model")
    with pytest.raises(UserError, match=r"WinogradConv3d of 3 doesn't fit: .*Conv2d there"):
        tenfold.load(path, model=nets.small(4))
    with pytest.raises(UserError, match="doesn't fit the network"):
        tenfold.load(path, model=nets.volumes(4, width=16))
    other, _ = pruned(4)
    with pytest.raises(UserError, match=r"doesn't fit the network: .*geometry"):
        tenfold.load(path, model=other)
    with pytest.raises(UserError, match=r"3 was trained or pruned in the Winograd domain"):
        read(path).state_dict()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tile": [2, 2, 4]}, "doesn't fit the network"),
        ({"tile": [2, 2, 3]}, "expected 2, 4, or three"),
        ({"tile": None}, "expected 2, 4, or three"),
        ({"columns": "all"}, "expected columns as a list of ints"),
        ({"columns": list(range(32))}, "keeps other columns"),
        ({"columns": [64]}, "from 0 to 63"),
        ({"points": 7}, "unknown set of points"),
        ({"bias": True}, "missing 3.bias"),
    ],
)
def test_a_changed_description_is_refused(change, text, tmp_path):
    path = tenfold.save(pruned()[0], tmp_path / "model")
    changed(path, lambda structure: structure["edits"][0]["arguments"].update(change))
    with pytest.raises(UserError, match=text):
        tenfold.load(path, model=nets.volumes(4))


def test_batch_norm_is_folded_into_winograd_layers():
    model, clips = pruned()
    expected = model(clips)
    folded = fold_batch_norm(model, clips)
    assert folded.folded == ["1", "4"]
    assert not any(isinstance(m, nn.BatchNorm3d) for m in folded.model.modules())
    layer = folded.model[3]
    assert isinstance(layer, WinogradConv3d)
    assert layer.bias is not None
    assert layer.values.is_contiguous()
    torch.testing.assert_close(folded.model(clips), expected, atol=1e-5, rtol=1e-5)
    assert model[3].bias is None  # the given one is as it was


def test_a_layer_that_is_called_twice_keeps_its_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(16, 16, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm3d(16)

        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    model = convert(settled(Twice()), 2)
    folded = fold_batch_norm(model, torch.randn(2, 16, 4, 4, 4))
    assert folded.folded == []


@pytest.mark.parametrize("tile", [2, 4])
def test_the_exported_file_is_made_of_plain_operations(tile, tmp_path):
    import onnx

    model, clips = pruned(tile)
    exported = tenfold.export(model, tmp_path / "model.onnx", clips[:1])
    assert exported.folded == ["1", "4"]
    assert {check.runtime for check in exported.checks} == {"onnxruntime", "openvino"}
    graph = onnx.load(exported.path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert len(products) == 2  # one batched product a layer: the kept columns alone
    shapes = [tuple(t.dims) for t in graph.initializer]
    kept = model[3].values.shape
    assert kept in shapes or (kept[0], kept[2], kept[1]) in shapes


def test_a_training_graph_exports_to_torch_too(tmp_path):
    model, clips = pruned()
    exported = tenfold.export(model, tmp_path, clips[:1], to="torch")
    assert exported.checks[0].max_difference < 1e-5
