"""Export, check in the engines, and never leave a wrong file behind."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from tenfold.deploy import onnx as deploy_onnx
from tenfold.deploy.onnx import export
from tenfold.errors import UserError
from tenfold.measure.runners import OnnxModel, OpenVinoModel

pytestmark = pytest.mark.path

METADATA = {"classes": ["cat", "dog"], "preprocessing": {"size": 8}}


def small_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def model():
    return small_network()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return export(model, folder / "small.onnx", torch.zeros(1, 3, 8, 8), metadata=METADATA)


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8)


def test_onnx_result_and_untouched_model(model, exported):
    assert model.training
    assert isinstance(model[1], nn.BatchNorm2d)
    assert exported.path.name == "small.onnx"
    assert [file.name for file in exported.path.parent.iterdir()] == ["small.onnx"]
    assert exported.bytes == exported.path.stat().st_size
    assert exported.folded == ["1"]
    assert [(check.runtime, check.batch) for check in exported.checks] == [
        ("onnxruntime", 1), ("onnxruntime", 3), ("openvino", 1), ("openvino", 3),
    ]  # fmt: skip
    assert max(check.max_difference for check in exported.checks) <= 1e-4
    assert json.loads(json.dumps(exported.to_dict()))["format"] == "onnx"


def test_onnx_file_holds_names_metadata_and_opset(exported):
    import onnx

    stored = onnx.load(exported.path)
    assert [value.name for value in stored.graph.input] == ["image"]
    assert [value.name for value in stored.graph.output] == ["logits"]
    assert stored.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert stored.opset_import[0].version >= 20
    assert not any(node.op_type == "BatchNormalization" for node in stored.graph.node)


@pytest.mark.parametrize("runner", [OnnxModel, OpenVinoModel])
def test_runners(model, exported, images, runner):
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images)
    for given in (images, images.numpy()):
        torch.testing.assert_close(runner(exported.path, threads=1)(given), expected)
    torch.testing.assert_close(runner(exported.path, batch=5)(images), expected)
    with pytest.raises(UserError, match="refuses the inputs"):
        runner(exported.path)(images[:, :1])
    with pytest.raises(UserError, match="was given 2 inputs; expected 1"):
        runner(exported.path)(images, images)
    with pytest.raises(UserError, match="threads is 0"):
        runner(exported.path, threads=0)


def test_metadata_comes_back(exported):
    assert OnnxModel(exported.path).metadata == METADATA


@pytest.mark.parametrize("runner", [OnnxModel, OpenVinoModel])
def test_unreadable_files(tmp_path, runner):
    with pytest.raises(UserError, match="does not exist"):
        runner(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="is a folder"):
        runner(tmp_path)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"not a model")
    with pytest.raises(UserError, match="can't be run by"):
        runner(damaged)


def test_wrong_result_is_refused_and_the_old_file_stays(model, tmp_path, monkeypatch):
    old = tmp_path / "model.pt2"
    old.write_bytes(b"old")
    load = deploy_onnx._load_program

    def offset(path):
        runner = load(path)
        return lambda *inputs: runner(*inputs) + 0.01

    monkeypatch.setattr(deploy_onnx, "_load_program", offset)
    with pytest.raises(UserError, match=r"in torch.export at batch 1: difference 0\.0"):
        export(model, tmp_path, torch.zeros(2, 3, 8, 8), to="torch")
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    ("change", "text"),
    [(lambda y: y * torch.nan, "difference nan"), (lambda y: y[:1], "returns shapes")],
)
def test_nan_and_wrong_shape_are_refused(model, tmp_path, monkeypatch, change, text):
    load = deploy_onnx._load_program

    def changed(path):
        runner = load(path)
        return lambda *inputs: change(runner(*inputs))

    monkeypatch.setattr(deploy_onnx, "_load_program", changed)
    with pytest.raises(UserError, match=text):
        export(model, tmp_path, torch.zeros(2, 3, 8, 8), to="torch")
    assert list(tmp_path.iterdir()) == []


def test_torch_format_replaces_the_old_file_and_takes_any_batch(model, tmp_path, images):
    (tmp_path / "model.pt2").write_bytes(b"old")
    result = export(model, tmp_path, torch.zeros(1, 3, 8, 8), to="torch", metadata=METADATA)
    assert result.path == tmp_path / "model.pt2"
    extra = {"tenfold": ""}
    program = torch.export.load(str(result.path), extra_files=extra)
    assert json.loads(extra["tenfold"]) == METADATA
    torch.testing.assert_close(program.module()(images), copy.deepcopy(model).eval()(images))


def test_vision_transformer_to_openvino(tmp_path):
    import timm

    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3
    )
    result = export(
        vit, tmp_path / "new", torch.zeros(1, 3, 32, 32), to="openvino", metadata=METADATA
    )
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == ["model.bin", "model.xml"]
    assert result.path.name == "model.xml"
    assert result.bytes == sum(file.stat().st_size for file in (tmp_path / "new").iterdir())
    runner = OpenVinoModel(result.path)
    assert runner.metadata == METADATA
    assert runner(torch.zeros(4, 3, 32, 32)).shape == (4, 3)


class TwoInTwoOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(a) + b, b * 2


def test_several_inputs_and_outputs(tmp_path):
    example = (torch.zeros(1, 4), torch.zeros(1, 3))
    result = export(TwoInTwoOut(), tmp_path / "two.onnx", example)
    a, b = torch.randn(6, 4), torch.randn(6, 3)
    first, second = OnnxModel(result.path)(a, b)
    assert first.shape == (6, 3)
    torch.testing.assert_close(second, b * 2)


def test_model_that_cannot_be_exported(tmp_path):
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    for to in ("onnx", "torch"):
        with pytest.raises(UserError, match="Branching can't be exported") as caught:
            export(Branching(), tmp_path, torch.zeros(1, 3), to=to)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_model_that_fixes_its_batch(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.shape[0] == 2 else x.flatten(1) * 2

    with pytest.raises(UserError, match="makes the batch size a constant"):
        export(Fixed(), tmp_path, torch.zeros(2, 3, 4))
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(model, tmp_path):
    inputs = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="did you mean onnx"):
        export(model, tmp_path, inputs, to="onx")
    with pytest.raises(UserError, match="does not fit to='onnx'"):
        export(model, tmp_path / "model.xml", inputs)
    with pytest.raises(UserError, match="metadata can't be written as JSON"):
        export(model, tmp_path, inputs, metadata={"model": model})
    with pytest.raises(UserError, match="fails on the example inputs"):
        export(model, tmp_path, torch.zeros(1, 4, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_export_prints_nothing(tmp_path, capfd, recwarn):
    export(nn.Linear(4, 2), tmp_path, torch.zeros(1, 4), to="torch")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
