"""Export of generators for images of any size: the graph, every format, and what is refused."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from tenfold.deploy import onnx as deploy_onnx
from tenfold.deploy.onnx import export
from tenfold.errors import UserError
from tenfold.measure.runners import OnnxModel, OpenVinoModel
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator, UNetGenerator

pytestmark = pytest.mark.path


def operators(path):
    import onnx

    return Counter(node.op_type for node in onnx.load(path).graph.node)


def images(batch, height, width):
    generator = torch.Generator().manual_seed(height + width)
    return 2 * torch.rand(batch, 3, height, width, generator=generator) - 1


def assert_same(runner, network, *shapes):
    network = copy.deepcopy(network).eval()
    for shape in shapes:
        given = images(*shape)
        with torch.no_grad():
            expected = network(given)
            found = runner(given)
        assert float((found - expected).abs().max()) <= 1e-4, shape


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return MobileResNetGenerator(4)


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    return export(student, path, images(1, 32, 32), metadata={"multiple": 4}, dynamic_size=4)


def test_checked_at_two_batches_and_two_sizes(exported):
    assert [(check.runtime, check.batch, check.size) for check in exported.checks] == [
        (runtime, batch, size)
        for runtime in ("onnxruntime", "openvino")
        for size in ((32, 32), (36, 40))
        for batch in (1, 3)
    ]
    assert max(check.max_difference for check in exported.checks) <= 1e-4


def test_graph_of_the_mobile_generator_is_clean(exported):
    # The sheet's counts: no shape arithmetic, no norm in pieces.
    assert operators(exported.path) == {
        "InstanceNormalization": 41, "Pad": 20, "Conv": 40, "ConvTranspose": 2, "Tanh": 1,
        "Relu": 14, "Add": 9,
    }  # fmt: skip


def test_sizes_in_the_file_are_multiples(exported):
    import onnx

    for value in (*(graph := onnx.load(exported.path).graph).input, *graph.output):
        names = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        assert names == ["batch", "", "4*height", "4*width"]


@pytest.mark.parametrize("runner", [OnnxModel, OpenVinoModel])
def test_any_size_in_the_engines(student, exported, runner):
    # From 16 px on: the norms of smaller ones, over 2x2 maps, enlarge the rounding itself.
    shapes = [(1, 16, 16), (2, 20, 12), (1, 64, 128)]
    assert_same(runner(exported.path, threads=1), student, *shapes)
    assert_same(runner(exported.path, batch=1), student, shapes[0], shapes[2])


def test_metadata_comes_back(exported):
    assert OnnxModel(exported.path).metadata == {"multiple": 4}


def test_openvino_file(tmp_path):
    network = MobileResNetGenerator(4, blocks=1)
    result = export(network, tmp_path, images(1, 32, 48), to="openvino", dynamic_size=4)
    assert len(result.checks) == 4
    assert_same(OpenVinoModel(result.path), network, (1, 16, 20), (2, 64, 32))


def test_torch_program_of_the_clamping_resnet(tmp_path):
    network = ResNetGenerator(2, blocks=2)
    # The example's sides are once the multiple: none may become a constant.
    result = export(network, tmp_path, images(1, 16, 16), to="torch", dynamic_size=16)
    program = torch.export.load(str(result.path)).module()
    assert_same(program, network, (1, 16, 48), (3, 32, 16))


def test_clamp_is_one_clip(tmp_path):
    result = export(ResNetGenerator(2, blocks=1), tmp_path, images(1, 16, 16), dynamic_size=4)
    found = operators(result.path)
    assert found["Clip"] == 1
    assert set(found) == {
        "Clip", "InstanceNormalization", "Pad", "Conv", "ConvTranspose", "Tanh", "Relu", "Add",
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_unet(tmp_path, norm):
    torch.manual_seed(0)
    network = UNetGenerator(4, norm=norm, levels=5)
    result = export(network, tmp_path, images(1, 32, 64), dynamic_size=network.multiple)
    assert {check.size for check in result.checks} == {(32, 64), (64, 128)}
    found = operators(result.path)
    assert set(found) - {"InstanceNormalization"} == {
        "Conv", "ConvTranspose", "LeakyRelu", "Relu", "Concat", "Tanh",
    }  # fmt: skip
    assert found["InstanceNormalization"] == (0 if norm == "batch" else 7)
    assert_same(OnnxModel(result.path), network, (2, 96, 32))


class Fixed(nn.Module):
    """Make the image size a constant, as positional embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place


def test_refusals(student, tmp_path):
    with pytest.raises(UserError, match="30x32: expected sides that are multiples of 4"):
        export(student, tmp_path, images(1, 30, 32), dynamic_size=4)
    with pytest.raises(UserError, match="dynamic_size 0: expected at least 1"):
        export(student, tmp_path, images(1, 32, 32), dynamic_size=0)
    with pytest.raises(UserError, match=r"\(2, 5\): a dynamic size is for images"):
        export(nn.Linear(5, 2), tmp_path, torch.zeros(1, 5), dynamic_size=4)
    for to, text in {
        "onnx": "of any size if dynamic_size is right, fails",
        "torch": "Fixed can't be exported by torch.export: .*, or leave dynamic_size out",
    }.items():
        with pytest.raises(UserError, match=text) as caught:
            export(Fixed(), tmp_path, images(1, 16, 16), to=to, dynamic_size=4)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_at_the_other_size_alone_is_found(tmp_path, monkeypatch):
    load = deploy_onnx._load_program

    def wrong_where_wide(path):
        runner = load(path)
        return lambda x: runner(x) + 0.01 * (x.shape[-1] > 16)

    monkeypatch.setattr(deploy_onnx, "_load_program", wrong_where_wide)
    network = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(UserError, match=r"at batch 1 and images of 20x24: difference 0\.0"):
        export(network, tmp_path, images(1, 16, 16), to="torch", dynamic_size=4)
    assert list(tmp_path.iterdir()) == []
