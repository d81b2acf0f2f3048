"""LAB-Net in ONNX Runtime and OpenVINO: other masks, other sizes, and inside a remover."""

import pytest
import torch
from torch import nn

from tenfold.deploy.shadow_export import export_remover
from tenfold.measure.runners import OnnxModel, OpenVinoModel
from tenfold.nn.labnet import LABNet
from tenfold.nn.ring_attention import RingAttention, resized
from tenfold.nn.shadow_remover import ShadowRemover

pytestmark = pytest.mark.path

FACTS = {"task": "shadow_removal", "space": "lab", "guess": "ring", "composite": True}
# Attentions of one kind each: of fixed shapes, and gathered.
SIZES = {"masked": 16, "gathered": 66}


def given(height, width, batch=1):
    generator = torch.Generator().manual_seed(height)
    codes = torch.rand(batch, 3, height, width, generator=generator)
    masks = [torch.zeros(batch, 1, height, width) for _ in range(2)]
    masks[0][..., 10:40, 20:50] = 1
    masks[1][..., 5:20, 5:60] = 1
    masks[1][:, :, 50:, 30:] = 1
    return codes, masks


@pytest.fixture(scope="module", params=["masked", "gathered"])
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    network = LABNet(4, SIZES[request.param]).eval()
    form = network.attention1.exported
    folder = tmp_path_factory.mktemp(request.param)
    result = export_remover(network, folder, metadata={"preprocessing": FACTS})
    assert network.attention1.exported == form  # the network is as it was
    return request.param, network, result


def test_the_file_was_checked_where_it_is_used(exported):
    form, _, result = exported
    batches = (1, 3) if form == "masked" else (1,)
    assert [(check.runtime, check.batch, check.size) for check in result.checks] == [
        (runtime, batch, size)
        for runtime in ("onnxruntime", "openvino")
        for size in ((72, 80), (73, 82))
        for batch in batches
    ]
    assert max(check.max_difference for check in result.checks) <= 1e-4


def test_names_sizes_and_facts_stand_in_the_file(exported):
    import onnx

    form, _, result = exported
    graph = onnx.load(result.path).graph
    assert [value.name for value in graph.input] == ["codes", "mask"]
    assert [value.name for value in graph.output] == ["result"]
    for value, channels in zip(graph.input, (3, 1), strict=True):
        first, second, *sides = value.type.tensor_type.shape.dim
        assert (first.dim_param, first.dim_value) == (("batch", 0) if form == "masked" else ("", 1))
        assert second.dim_value == channels
        assert [side.dim_param for side in sides] == ["height", "width"]
    metadata = OnnxModel(result.path).metadata
    assert metadata == {"least_side": 65, "multiple": 1, "preprocessing": FACTS}


@pytest.mark.parametrize("kind", [OnnxModel, OpenVinoModel])
def test_other_masks_and_sizes_give_the_networks_results(exported, kind):
    _, network, result = exported
    runner = kind(result.path, threads=1)
    for size in ((65, 65), (70, 96)):
        codes, masks = given(*size)
        for mask in (*masks, torch.zeros_like(masks[0]), torch.ones_like(masks[0])):
            with torch.no_grad():
                expected = network(codes, mask)
            difference = (runner(codes, mask) - expected).abs().max()
            assert difference <= 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("kind", [OnnxModel, OpenVinoModel])
def test_a_file_is_a_removers_network(exported, kind):
    _, network, result = exported
    ours = ShadowRemover(network, guess="ring")
    theirs = ShadowRemover(kind(result.path, threads=1), guess="ring", space="lab")
    for size in ((50, 70), (80, 67)):  # the first is padded
        images, masks = given(*size)
        for mask in masks:
            torch.testing.assert_close(theirs(images, mask), ours(images, mask), rtol=0, atol=1e-4)


class ThereAndBack(nn.Module):
    """Bring maps to the attention's size and back, as an attention does."""

    def __init__(self, side):
        super().__init__()
        self.attention = RingAttention(4, (side, side))

    def forward(self, x):
        small = resized(x, self.attention.size)
        return small, resized(small, (x.shape[2], x.shape[3]))


@pytest.mark.parametrize("side", [40, 64])
def test_places_on_edges_of_pixels_are_those_of_pytorch(tmp_path, side):
    model, path = ThereAndBack(side).eval(), tmp_path / "a.onnx"
    sides = {axis: torch.export.Dim(name, min=65) for axis, name in ((2, "h"), (3, "w"))}
    torch.onnx.export(
        model, (torch.rand(1, 1, 70, 71),), path, dynamo=True, verbose=False,
        dynamic_shapes=(sides,),
    )  # fmt: skip
    for kind in (OnnxModel, OpenVinoModel):
        runner = kind(path, threads=1)
        for height in (*range(65, 129), 168, 256, 341, 376, 480, 481):
            x = torch.arange(height * 65.0).view(1, 1, height, 65)
            for found, expected in zip(runner(x), model(x), strict=True):
                assert torch.equal(found, expected), (kind.__name__, height)
