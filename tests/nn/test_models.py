import pytest
import torch

from tenfold.errors import UserError
from tenfold.nn import models
from tenfold.nn.cifar_resnet import CifarResNet

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "parameters"),
    # counted by hand: convolutions, batch norms, classifier
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018)],
)
def test_cifar_resnets_have_the_papers_size(name, parameters):
    model, network = models.build(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert network.name == f"tenfold/{name}"
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet110_and_option_b():
    model, _ = models.build("resnet110", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 1_727_962
    b = CifarResNet(20, shortcut="B")
    extra = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert sum(p.numel() for p in b.parameters()) == 269_722 + extra


def test_option_a_pads_with_zero_channels():
    block = CifarResNet(8).layer2[0]
    x = torch.randn(1, 16, 8, 8)
    out = block.shortcut(x)
    assert out.shape == (1, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert (out[:, :8] == 0).all()
    assert (out[:, 24:] == 0).all()


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("timm/resnet18", (32, 32), 1),
        ("timm/vit_tiny_patch16_224", (64, 64), 3),
        ("torchvision/resnet18", (64, 64), 3),
        ("torchvision/googlenet", (64, 64), 3),
        ("digitnet", (8, 8), 1),
        ("resnet20", (20, 20), 1),
        ("pvt_tiny", (32, 32), 1),
        ("lvvit_small", (32, 32), 1),
    ],
)
def test_networks_run_and_can_be_built_again(name, size, channels):
    model, network = models.build(name, num_classes=7, channels=channels, size=size)
    assert model.eval()(torch.zeros(2, channels, *size)).shape == (2, 7)
    again = models.rebuild(network)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_the_users_own_function_or_file(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def build(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))\n"
        "number = 3\n"
        "def wrong(): return 3\n"
    )
    name = f"{tmp_path / 'nets.py'}:build"
    model, network = models.build(name, num_classes=5, options={"width": 6})
    assert model(torch.zeros(1, 6)).shape == (1, 5)
    assert network.name is None
    for other, text in {
        "number": "is not callable",
        "wrong": "returned int: expected an nn.Module",
        "biuld": "did you mean build",
    }.items():
        with pytest.raises(UserError, match=text):
            models.build(f"{tmp_path / 'nets.py'}:{other}", num_classes=5)
    with pytest.raises(UserError, match=r"gone\.py does not exist"):
        models.build(f"{tmp_path / 'gone.py'}:build", num_classes=5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnt20", "did you mean resnet20"),
        ("timm/resnet81", "did you mean resnet"),
        ("torchvision/resnet81", "did you mean resnet"),
        ("nosuch/model", "known: "),
    ],
)
def test_unknown_names_suggest(name, text):
    with pytest.raises(UserError, match=text):
        models.build(name, num_classes=10)


def test_nothing_is_fetched_or_opened_by_an_argument():
    for key in ("pretrained", "pretrained_cfg", "checkpoint_path", "weights"):
        with pytest.raises(UserError, match="use init: pretrained"):
            models.build("timm/resnet18", num_classes=10, options={key: "x"})
        with pytest.raises(UserError, match="use init: pretrained"):
            models.rebuild(models.Network("timm/resnet18", {key: "x"}))
    with pytest.raises(UserError, match="unknown network 'resnet18'"):
        models.check_name("resnet18")


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match=r"model resnet20 can't be built with .*colour"):
        models.build("resnet20", num_classes=10, options={"colour": 3})
    with pytest.raises(UserError, match="takes 3 channels, and the data has 1"):
        models.build("torchvision/resnet18", num_classes=10, channels=1)
    with pytest.raises(UserError, match="expected 6n \\+ 2"):
        CifarResNet(21)
