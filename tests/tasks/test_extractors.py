"""Extractors by name, path and function: what is opened, what it is called, what is refused."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import UserError
from tenfold.measure.generation import generation_distances, state_hash
from tenfold.methods.perceptual import Perceptual
from tenfold.nn import models
from tenfold.nn.stagenet import StageNet
from tenfold.tasks.extractors import open_extractor, open_perceptual

pytestmark = pytest.mark.unit

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]

NETS = """
import torch
from torch import nn

class Stages(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.layer = nn.Conv2d(channels, 4, 3, padding=1)
    def forward(self, images):
        return [nn.functional.avg_pool2d(self.layer(images), 2**stage) for stage in range(4)]

class Detached(Stages):
    def forward(self, images):
        return [each.detach() for each in super().forward(images)]

class Three(Stages):
    def forward(self, images):
        return super().forward(images)[:3]

class Vectors(Stages):
    def forward(self, images):
        return [each.mean(dim=(2, 3)) for each in super().forward(images)]

class NotFinite(Stages):
    def forward(self, images):
        return [each / 0 for each in super().forward(images)]

def broken():
    raise RuntimeError("no such weights")

def number():
    return 3
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run's folder with a stagenet's artifact in it."""
    torch.manual_seed(0)
    network, described = models.build("stagenet", num_classes=4, options={"width": 4})
    network(torch.randn(8, 3, 16, 16))  # so that batch norm has seen something
    folder = tmp_path_factory.mktemp("runs")
    preprocessing = {"channels": 3, "size": [16, 16], "mean": MEAN, "std": STD}
    tenfold.save(network.eval(), folder / "model", described, preprocessing=preprocessing)
    return folder


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vgg.pth"
    torch.save(nn.ModuleDict({"features": make_layers(cfgs["D"])}).state_dict(), path)
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)


# -- for perceptual losses -------------------------------------------------------------------------


def test_a_stagenet_of_a_run(run):
    extractor = open_perceptual(str(run))
    assert extractor.name == "stagenet"
    assert str(extractor) == f"stagenet {extractor.sha256[:12]}"
    network = tenfold.load(run)
    assert isinstance(network, StageNet)
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    expected = network.stages(((images + 1) / 2 - mean) / std)
    for found, map in zip(extractor(images), expected, strict=True):
        assert torch.allclose(found, map, atol=1e-5)
    assert open_perceptual(str(run / "model")).sha256 == extractor.sha256
    student = images.clone().requires_grad_()
    sum(Perceptual(extractor)(student, images.flip(0)).values()).backward()
    assert student.grad.abs().sum() > 0


def test_vgg16_by_mapping_and_by_file(vgg_file):
    by_mapping = open_perceptual({"name": "vgg16", "path": str(vgg_file)})
    by_file = open_perceptual(str(vgg_file))
    assert str(by_mapping) == str(by_file) == f"vgg16 {by_file.sha256[:12]}"
    assert [each.shape[1] for each in by_file(torch.zeros(1, 3, 16, 16))] == [64, 128, 256, 512]


def test_grey_images_are_repeated_and_other_numbers_refused(run, vgg_file, nets):
    grey = torch.rand(1, 1, 16, 16) * 2 - 1
    extractor = open_perceptual(str(run), channels=1)
    assert torch.equal(extractor(grey)[3], extractor(grey.repeat(1, 3, 1, 1))[3])
    with pytest.raises(UserError, match="stagenet takes images of 3 channels, and the data has 6"):
        open_perceptual(str(run), channels=6)
    with pytest.raises(UserError, match="vgg16 takes images of 3 channels"):
        open_extractor(str(vgg_file), channels=4)
    assert len(open_perceptual(f"{nets}:Stages", channels=6)(torch.zeros(1, 6, 16, 16))) == 4


def test_the_users_own_function(nets):
    extractor = open_perceptual(f"{nets}:Stages")
    assert extractor.name == f"{nets}:Stages"
    assert extractor.sha256 == state_hash(extractor.network)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert not any(module.training for module in extractor.train().modules())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Detached", "lets no gradient through"),
        ("Three", "returned 3 maps: expected 4 maps"),
        ("Vectors", r"returned a tensor \(1, 4\): expected 4 maps"),
        ("NotFinite", "values that are not finite"),
        ("broken", "RuntimeError: no such weights"),
        ("number", "returned int: expected an nn.Module"),
        ("Stagse", "did you mean Stages"),
    ],
)
def test_functions_that_return_something_else_are_refused_at_once(nets, name, text):
    with pytest.raises(UserError, match=text):
        open_perceptual(f"{nets}:{name}")


def test_missing_weights_fail_when_opened(offline, tmp_path):
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth nor could they be downloaded"):
        open_perceptual("vgg16")
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth nor could they be downloaded"):
        open_extractor("vgg16")
    with pytest.raises(UserError, match=r"gone\.pth does not exist"):
        open_perceptual(str(tmp_path / "gone.pth"))
    pytest.importorskip("torch_fidelity")
    with pytest.raises(UserError, match=r"6726825d\.pth nor could they be downloaded"):
        open_extractor("inception")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("vgg61", "unknown perceptual extractor 'vgg61': did you mean vgg16"),
        ("runs/gone", "unknown perceptual extractor 'runs/gone'"),
        ({"path": "x.pth"}, "expected a name, a path, or a mapping"),
        ({"name": "vgg16", "file": "x.pth"}, "unknown key of the perceptual extractor 'file'"),
        ({"name": "runs/a", "path": "x.pth"}, "'runs/a' takes no path: expected one with vgg16"),
        (3, "expected a name, a path, or a mapping"),
    ],
)
def test_unknown_specifications(spec, text):
    with pytest.raises(UserError, match=text):
        open_perceptual(spec)


def test_runs_of_other_networks_are_refused(tmp_path):
    network, described = models.build("digitnet", num_classes=4, options={"width": 4})
    tenfold.save(network, tmp_path / "digit", described)
    for opened in (open_perceptual, open_extractor):
        with pytest.raises(UserError, match="holds tenfold/digitnet: expected a stagenet"):
            opened(str(tmp_path / "digit"))
        with pytest.raises(UserError, match="is no artifact"):
            opened(str(tmp_path))
    network, described = models.build("stagenet", num_classes=4, options={"width": 4})
    tenfold.save(network, tmp_path / "bare", described)
    with pytest.raises(UserError, match="doesn't say how its images were normalised"):
        open_perceptual(str(tmp_path / "bare"))


# -- for FID and KID -------------------------------------------------------------------------------


def test_distances_in_a_stagenets_space(run):
    extractor = open_extractor(str(run))
    assert extractor.sha256 == open_perceptual(str(run)).sha256
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    expected = tenfold.load(run).features((images / 255 - mean) / std)
    assert torch.allclose(extractor(images), expected, atol=1e-4)
    found = generation_distances(extractor, [images[:6]], [images[6:]])
    assert str(found).startswith(f"FID[stagenet {extractor.sha256[:12]}, N=6] ")


def test_vgg_and_functions_as_vectors(vgg_file, nets):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert open_extractor(str(vgg_file))(images).shape == (2, 64 + 128 + 256 + 512)
    assert open_extractor({"name": "vgg16", "path": str(vgg_file)}).name == "vgg16"
    extractor = open_extractor(f"{nets}:Vectors")
    assert extractor(images).shape == (2, 16)
    assert extractor.name == f"{nets}:Vectors"
    with pytest.raises(UserError, match="values that are not finite"):
        open_extractor(f"{nets}:NotFinite")
    with pytest.raises(UserError, match="RuntimeError: no such weights"):
        open_extractor(f"{nets}:broken")


def test_files_say_whose_weights_they_hold(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth has not the weights of FID's Inception"):
        open_extractor(str(tmp_path / "resnet.pth"))
    with pytest.raises(UserError, match=r"resnet\.pth has not the weights of VGG16"):
        open_perceptual(str(tmp_path / "resnet.pth"))


def test_unknown_extractors_suggest():
    with pytest.raises(UserError, match="unknown extractor 'incepton': did you mean inception"):
        open_extractor("incepton")
    with pytest.raises(UserError, match="expected one with inception or vgg16"):
        open_extractor({"name": "stagenet", "path": "runs/x"})
