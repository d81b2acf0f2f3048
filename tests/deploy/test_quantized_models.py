"""Quantized models on disk and in other engines: b bits, int8 arithmetic, the same outputs."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import tenfold
from tenfold.deploy import artifact
from tenfold.deploy.fold import fold_batch_norm
from tenfold.errors import UserError
from tenfold.measure import OnnxModel, OpenVinoModel, count_cost
from tenfold.measure.cpu import instruction_sets
from tenfold.measure.onnx_write import write_onnx
from tenfold.methods import LBC, LTS
from tenfold.nn import models
from tenfold.nn.blocks import to_blocks
from tenfold.nn.quantized import QuantizedLayer
from tests import nets
from tests.pruning import settled

pytestmark = pytest.mark.path


def trained(model, size=(1, 8, 8), steps=12, *, lbc=None, **fields):
    """Train some steps and finalize; BatchNorm gets statistics as after a long training."""
    torch.manual_seed(0)
    methods = [LTS(**{"bits": 2, **fields})]
    if lbc is not None:
        methods.append(LBC(n=lbc[0], m=lbc[1]))
    for method in methods:
        model = method.attach(model, total_steps=steps)
    optimizer = torch.optim.SGD(methods[0].parameters_for(model), lr=0.02, momentum=0.9)
    for step in range(steps):
        images = torch.randn(8, *size, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8) % 10).backward()
        optimizer.step()
        for method in methods:
            method.step()
    for method in reversed(methods):
        model = method.finalize(model)
    return settled(model)


def small():
    return nets.small(10, width=16)


@pytest.fixture(scope="module")
def two_bits():
    return trained(small())


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


# -- the artifact ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": 8},
        {"bits": 3, "first_last": "same", "rescale": True},
        {"bits": 4, "lbc": (2, 4)},
        {"bits": 8, "lbc": (1, 4)},
    ],
    ids=str,
)
def test_round_trip(fields, tmp_path):
    model = trained(small(), **fields)
    path = tenfold.save(model, tmp_path / "artifact")
    again = tenfold.load(path, model=small())
    assert repr(again) == repr(model)
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_weights_take_their_bits_on_disk(two_bits, tmp_path):
    stored = load_file(tenfold.save(two_bits, tmp_path / "a") / "weights.safetensors")
    assert stored["3.codes"].nbytes * 8 == 2 * two_bits[3].integers.numel()
    assert stored["0.codes"].nbytes == two_bits[0].integers.numel()  # 8 bits
    assert not [name for name in stored if "integers" in name]
    sparse = trained(small(), bits=4, lbc=(1, 4))
    stored = load_file(tenfold.save(sparse, tmp_path / "b") / "weights.safetensors")
    weights = sparse[3].integers.numel()
    assert stored["3.codes"].nbytes * 8 == weights / 4 * 4
    assert stored["3.index"].nbytes * 8 == weights / 4 * 2


def test_a_bare_layer_and_a_shared_module(tmp_path):
    bare = trained(nn.Linear(8, 10), (8,), bits=4)
    assert isinstance(bare, QuantizedLayer)
    again = tenfold.load(tenfold.save(bare, tmp_path / "bare"), model=nn.Linear(8, 10))
    x = torch.randn(3, 8)
    assert torch.equal(again(x), bare(x))

    def twice():
        layer = nn.Linear(10, 10)
        return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(10, 10))

    model = trained(twice(), (10,), bits=4)
    assert model[0] is model[2]
    again = tenfold.load(tenfold.save(model, tmp_path / "twice"), model=twice())
    x = torch.randn(3, 10)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s["edits"][1]["arguments"].update(bits=9), "bits=9"),
        (lambda s: s["edits"][1]["arguments"].update(bits=3), "bytes don't hold"),
        (lambda s: s["edits"][1]["arguments"].update(shape=[16, 16, 3, 1]), "doesn't fit"),
        (lambda s: s["edits"][1]["arguments"].update(shape="all"), "all was saved"),
        (lambda s: s["edits"][1]["arguments"].update(removed=[4, 2]), "4:2"),
        (lambda s: s["edits"][1]["arguments"].update(removed="some"), "removed='some'"),
        (lambda s: s["edits"][1]["arguments"].update(removed="marked"), "3.index"),
        (lambda s: s["edits"][1].update(type="QuantizedLinear"), "the network has Conv2d there"),
        (lambda s: s["edits"][1].update(type="Pickled"), "edit of type 'Pickled'"),
        (lambda s: s["edits"][1].update(type="FoldedNorm"), "edit of type 'FoldedNorm'"),
        (lambda s: s["edits"][1].update(module="30"), "doesn't fit the network"),
    ],
)
def test_damaged_artifacts_are_refused(two_bits, tmp_path, change, text):
    path = tenfold.save(two_bits, tmp_path / "a")
    rewrite(path, change_structure=change)
    with pytest.raises(UserError, match=text):
        tenfold.load(path, model=small())


def test_missing_codes_are_refused(two_bits, tmp_path):
    path = tenfold.save(two_bits, tmp_path / "a")
    rewrite(path, change_tensors=lambda tensors: tensors.pop("3.codes"))
    with pytest.raises(UserError, match=r"lacks the packed weight 3\.codes"):
        tenfold.load(path, model=small())


def test_a_quantized_artifact_is_no_start_for_a_float_network(two_bits, tmp_path):
    found = artifact.read(tenfold.save(two_bits, tmp_path / "a"))
    with pytest.raises(UserError, match="whose weights are integers"):
        found.state_dict()


# -- folding, cost, optimize -----------------------------------------------------------------------


def test_norms_fold_into_scales(two_bits):
    images = torch.randn(4, 1, 8, 8)
    folded = fold_batch_norm(two_bits, images)
    assert folded.folded == ["1", "4"]
    torch.testing.assert_close(folded.model(images), two_bits(images), rtol=1e-4, atol=1e-5)
    for name in ("0", "3"):
        ours, theirs = folded.model.get_submodule(name), two_bits.get_submodule(name)
        assert torch.equal(ours.integers, theirs.integers)


def test_a_layer_that_is_called_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.a, self.b = nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.BatchNorm2d(1)
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.b(self.layer(self.a(self.layer(x)))).flatten(1))

    model = trained(Twice(), bits=4, first_last="same")
    assert fold_batch_norm(model, torch.randn(2, 1, 8, 8)).folded == []


def test_cost_counts_quantized_weights(two_bits):
    images = torch.zeros(1, 1, 8, 8)
    plain, cost = count_cost(small(), images), count_cost(two_bits, images)
    assert cost.macs == plain.macs
    assert cost.parameters == plain.parameters
    assert [row.macs for row in cost.layers] == [row.macs for row in plain.layers]
    sparse = count_cost(trained(small(), bits=4, lbc=(1, 4)), images)
    assert {row.name: row.kept for row in sparse.layers}["3"] == 0.25


def test_optimize_takes_a_quantized_model(two_bits, tmp_path):
    images = torch.randn(4, 1, 8, 8)
    fast = tenfold.optimize(two_bits, images, choose="dense")
    torch.testing.assert_close(fast(images), two_bits(images), rtol=1e-4, atol=1e-5)
    again = tenfold.load(tenfold.save(fast, tmp_path / "fast"), model=small())
    assert torch.equal(again(images), fast(images))


# -- other engines --------------------------------------------------------------------------------


def integers_in(path):
    """Return the weights of an ONNX file that are stored as integers, by shape."""
    graph = onnx.load(path).graph
    return [torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": 3},
        {"bits": 4, "rescale": True},
        {"bits": 8},
        {"bits": 2, "first_last": "same"},
        {"bits": 8, "rescale": True},
        {"bits": 8, "lbc": (2, 4)},
    ],
    ids=str,
)
def test_exported_models_compute_the_same(fields, tmp_path):
    """All images but those of which an input lies in the middle between two codes."""
    model = trained(small(), **fields)
    exported = tenfold.export(model, tmp_path, torch.zeros(1, 1, 8, 8))
    images = torch.randn(256, 1, 8, 8)
    with torch.inference_mode():
        expected = model(images)
    size = float(expected.abs().max())
    for runner in (OnnxModel(exported.path), OpenVinoModel(exported.path)):
        difference = (runner(images) - expected).abs().amax(dim=1) / size
        if any("vnni" in name for name in instruction_sets() or ()):
            # Without such instructions engines add int8 products up in 16 bits, which saturate.
            assert float((difference > 1e-4).float().mean()) < 0.02
        assert float(difference.max()) < 0.1


def test_codes_of_inputs_are_equal_in_all_engines(tmp_path):
    """The fraction that is off by one is at most 1e-5, ties at most: offsets small and large."""
    torch.manual_seed(0)
    images = torch.randn(64, 8, 12, 12)
    for lower in (0.0, -1e-4, -1e-3, 0.002, -0.3, -2.5, 0.4):
        layer = nn.Conv2d(8, 8, 1, bias=False)
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), layer)
        quantization = LTS(bits=4, first_last="same", rescale=False, include=["0", "2"])
        with pytest.warns(UserWarning, match="no norm"):
            model = quantization.attach(model, total_steps=1)
        quantization.calibrate(images)
        with torch.no_grad():
            quantization._bounds.values[1, 2:] = torch.tensor([lower, lower + 1.3])
        optimizer = torch.optim.SGD(quantization.parameters_for(model), lr=0.0)
        model(images).sum().backward()
        optimizer.step()
        quantization.step()
        model = quantization.finalize(model).eval()
        # an identity reads the codes
        model[2].integers.copy_(torch.eye(8).reshape(8, 8, 1, 1))
        model[2].weight_scale.fill_(1.0)
        model[2].input_scale.fill_(1.0)
        path = tmp_path / "codes.onnx"
        write_onnx(model, path, images[:1])
        with torch.inference_mode():
            expected = model(images)
        for runner in (OnnxModel(path), OpenVinoModel(path)):
            difference = (runner(images) - expected).abs().round()
            assert float(difference.max()) <= 1
            assert float((difference != 0).float().mean()) <= 1e-5


def test_engines_multiply_integers(tmp_path, two_bits):
    """OpenVINO runs every convolution as int8; ONNX Runtime does the linear layers of a ViT."""
    import onnxruntime

    from tenfold.measure.runners import openvino_core

    exported = tenfold.export(two_bits, tmp_path, torch.zeros(1, 1, 8, 8))
    compiled = openvino_core().compile_model(str(exported.path), "CPU")
    kinds = [
        operation.get_rt_info()["primitiveType"].astype(str)
        for operation in compiled.get_runtime_model().get_ordered_ops()
        if operation.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    assert len(kinds) >= 3
    assert all("I8" in kind or "i8" in kind for kind in kinds)

    vit, _ = models.build(
        "timm/vit_tiny_patch16_224", num_classes=10, size=(32, 32), options={"depth": 1}
    )
    vit = trained(vit, (3, 32, 32), steps=2, bits=4)
    exported = tenfold.export(vit, tmp_path / "vit", torch.zeros(1, 3, 32, 32))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "inside.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    inside = [node.op_type for node in onnx.load(tmp_path / "inside.onnx").graph.node]
    assert inside.count("MatMulIntegerToFloat") >= 4  # qkv, proj, fc1, fc2


@pytest.mark.parametrize("bits", [2, 4])
def test_zeros_of_a_mask_are_zeros_of_the_exported_integers(bits, tmp_path):
    """Non-zeros of every block counted in the ONNX file: quantized first, then masked."""
    model = trained(small(), bits=bits, lbc=(2, 4))
    exported = tenfold.export(model, tmp_path, torch.zeros(1, 1, 8, 8))
    assert exported.folded == ["1", "4"]
    found = [w for w in integers_in(exported.path) if w.dtype == torch.int8 and w.dim() == 4]
    sparse = [w for w in found if w.shape[1] == 16]
    assert len(sparse) == 2
    for weight in sparse:
        assert (to_blocks(weight != 0, 4).sum(dim=1) == 2).all()
        assert int(weight.abs().max()) <= 2**bits - 1
        assert (weight[weight != 0] % 2 == 1).all()


def test_zeros_of_a_mask_at_eight_bits(tmp_path):
    """No byte holds 256 codes and a zero: these weights stay floats, their zeros exact."""
    model = trained(small(), bits=8, lbc=(2, 4))
    exported = tenfold.export(model, tmp_path, torch.zeros(1, 1, 8, 8))
    sparse = [w for w in integers_in(exported.path) if w.dim() == 4 and w.shape[1] == 16]
    assert [w.dtype for w in sparse] == [torch.float32] * 2
    for weight in sparse:
        assert (to_blocks(weight != 0, 4).sum(dim=1) == 2).all()


def test_a_wrong_file_is_not_written(tmp_path, monkeypatch, two_bits):
    """The tolerance for ties lets no wrong arithmetic pass: codes that are one too low."""
    from tenfold.nn import qdq

    def off_by_one(self, x):
        return original(self, x - self.step)

    original = qdq.QdqLayer.forward
    monkeypatch.setattr(qdq.QdqLayer, "forward", off_by_one)
    with pytest.raises(UserError, match="computes something else in onnxruntime"):
        tenfold.export(two_bits, tmp_path, torch.zeros(1, 1, 8, 8))
    assert not list(tmp_path.glob("*.onnx"))


def test_bench_says_where_integers_pay(two_bits):
    result = tenfold.bench(
        {"dense": small(), "lts": two_bits},
        torch.zeros(1, 1, 8, 8),
        batch_sizes=[1],
        runtimes=["onnxruntime", "openvino"],
        seconds=0.05,
    )
    rows = {(row.runtime, row.model): row for row in result.latency}
    assert len(rows) == 4
    assert rows["onnxruntime", "lts"].verdict in ("faster", "slower", "no gain")
    assert any("lts is" in line or "No gain" in line for line in result.summary)
