"""StageNet and VGG16 as extractors: shapes, scales, weights, and what is refused."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.nn import models
from tenfold.nn.stagenet import ImageStages, StageNet
from tenfold.nn.vgg_stages import VggStages, read_state_dict

pytestmark = pytest.mark.unit


def vgg_state() -> dict[str, torch.Tensor]:
    """Return random weights by torchvision's own names and shapes, with a layer beyond relu4_3."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    return nn.ModuleDict({"features": make_layers(cfgs["D"])}).state_dict()


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(vgg_state(), path)
    return path


# -- StageNet --------------------------------------------------------------------------------------


def test_stages_stand_at_one_to_an_eighth_and_odd_sides_work():
    network = StageNet(num_classes=7, channels=1, width=4)
    maps = network.stages(torch.randn(2, 1, 37, 41))
    assert [tuple(each.shape) for each in maps] == [
        (2, 4, 37, 41),
        (2, 8, 18, 20),
        (2, 16, 9, 10),
        (2, 32, 4, 5),
    ]
    assert all((each >= 0).all() and (each > 0).any() for each in maps)


def test_logits_come_from_the_mean_of_the_last_map():
    network = StageNet(num_classes=7, width=4).eval()
    image = torch.randn(2, 3, 32, 32)
    features = network.features(image)
    assert torch.equal(features, network.stages(image)[3].mean(dim=(2, 3)))
    assert torch.allclose(network(image), network.classifier(features))
    with pytest.raises(UserError, match="width=0: expected at least 1"):
        StageNet(width=0)


def test_stagenet_is_a_model_of_recipes_and_learns():
    torch.manual_seed(0)
    network, described = models.build(
        "stagenet", num_classes=2, channels=3, size=(16, 16), options={"width": 4}
    )
    assert described.name == "tenfold/stagenet"
    assert models.rebuild(described).state_dict().keys() == network.state_dict().keys()
    # stripes along or across: told apart by edges alone
    image = torch.zeros(16, 3, 16, 16)
    image[:8, :, ::2] = 1
    image[8:, :, :, ::2] = 1
    label = torch.arange(16) // 8
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(image), label).backward()
        optimizer.step()
    assert (network(image).argmax(1) == label).all()


def test_image_stages_normalise_as_training_did():
    network = StageNet(width=4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    stages = ImageStages(network, mean, std)
    stored = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    from tenfold.data.preprocessing import Preprocessing

    trained_on = Preprocessing(3, (16, 16), mean, std).normalize(stored)
    images = stored / 127.5 - 1
    for found, expected in zip(stages(images), network.stages(trained_on), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(stages.features(images), network.features(trained_on), atol=1e-5)


def test_image_stages_are_frozen_and_stay_in_evaluation():
    stages = ImageStages(StageNet(width=4), (0.5,) * 3, (0.5,) * 3).train()
    assert not any(module.training for module in stages.modules())
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    before = stages.network.blocks[0][1].running_mean.clone()
    stages(images)[3].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in stages.parameters())
    assert torch.equal(before, stages.network.blocks[0][1].running_mean)
    with pytest.raises(UserError, match="expected 3 numbers each"):
        ImageStages(StageNet(width=4), (0.5,), (0.5,))


# -- VGG16 -----------------------------------------------------------------------------------------


def test_vgg_has_the_sheets_size_and_cost(vgg_file):
    network = VggStages(vgg_file)
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_635_264
    assert not any(parameter.requires_grad for parameter in network.parameters())
    cost = count_cost(network, torch.zeros(1, 3, 64, 64))
    assert cost.macs * 16 == pytest.approx(18.233e9, rel=1e-3)  # of 256 px


def test_vgg_maps_are_torchvisions_without_imagenets_mean(vgg_file):
    from torchvision.models.vgg import cfgs, make_layers

    reference = nn.ModuleDict({"features": make_layers(cfgs["D"])})
    reference.load_state_dict(vgg_state())
    images = torch.rand(2, 3, 40, 48) * 2 - 1
    x, expected = (images + 1) / 2, []
    for index, layer in enumerate(reference["features"][:23]):
        x = layer(x)
        if index in (3, 8, 15, 22):
            expected.append(x.clone())
    found = VggStages(vgg_file)(images)
    assert [each.shape[1] for each in found] == [64, 128, 256, 512]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_vgg_repeats_grey_images_and_passes_gradients(vgg_file):
    network = VggStages(vgg_file)
    grey = (torch.rand(1, 1, 16, 16) * 2 - 1).requires_grad_()
    maps = network(grey)
    assert torch.equal(maps[1], network(grey.repeat(1, 3, 1, 1))[1])
    maps[3].sum().backward()
    assert grey.grad.abs().sum() > 0


def test_vgg_reads_safetensors_and_files_of_features_alone(tmp_path, vgg_file):
    from safetensors.torch import save_file

    state = {key: value for key, value in vgg_state().items() if int(key.split(".")[1]) < 22}
    save_file(state, tmp_path / "stages.safetensors")
    images = torch.zeros(1, 3, 16, 16)
    ours, theirs = VggStages(tmp_path / "stages.safetensors"), VggStages(vgg_file)
    assert torch.equal(ours(images)[3], theirs(images)[3])


def test_missing_vgg_weights_fail_at_once_in_one_line(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError) as caught:
        VggStages()
    message = str(caught.value)
    assert "\n" not in message
    expected = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    for part in (str(expected), "{name: vgg16, path: FILE}", "stagenet-extractor", "no route"):
        assert part in message


def test_vgg_weights_in_the_cache_are_taken_without_a_network(tmp_path, monkeypatch, vgg_file):
    """The address that we name is torchvision's, and its file is looked for where it puts it."""
    from torchvision.models import VGG16_Weights

    asked = []

    def from_cache(url, **_):
        asked.append(url)
        return torch.load(vgg_file, weights_only=True)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", from_cache)
    VggStages()
    assert asked == [VGG16_Weights.IMAGENET1K_V1.url]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pth does not exist"):
        VggStages(tmp_path / "gone.pth")
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"small\.pth has not the weights of VGG16: .* and 17 more"):
        VggStages(tmp_path / "small.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickled module could run code
    with pytest.raises(UserError, match=r"module\.pth can't be read"):
        read_state_dict(tmp_path / "module.pth", "vgg16")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth holds no state_dict"):
        read_state_dict(tmp_path / "list.pth", "vgg16")
