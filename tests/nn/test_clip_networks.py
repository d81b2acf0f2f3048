"""C3D and the 3-D U-Net against the papers' counts; torchvision's video networks by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.nn import models
from tenfold.nn.c3d import C3D
from tenfold.nn.unet3d import UNet3d

pytestmark = pytest.mark.unit


def macs(model: nn.Module, *shape: int) -> dict[str, float]:
    """Multiply-adds by kind of operator, counted without computing anything."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(shape, device="meta"))
    return {str(name): flops / 2 for name, flops in counter.get_flop_counts()["Global"].items()}


def on_meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, **arguments)[0]  # type: ignore[arg-type]


def test_c3d_is_the_papers() -> None:
    model = on_meta("c3d", num_classes=487)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert {(c.kernel_size, c.stride, c.padding) for c in convolutions} == {
        ((3, 3, 3), (1, 1, 1), (1, 1, 1))
    }
    assert sum(c.weight.numel() for c in convolutions) == 27_653_184  # the sheet's 27.65 M
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (8192, 4096), (4096, 4096), (4096, 487),
    ]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 79_991_015
    assert not any(isinstance(module, nn.BatchNorm3d) for module in model.modules())
    counted = macs(model, 1, 3, 16, 112, 112)
    assert counted["aten.convolution"] / 1e9 == pytest.approx(38.50, abs=0.005)
    assert model(torch.zeros(2, 3, 16, 112, 112, device="meta")).shape == (2, 487)


def test_r3d18_is_the_sheets() -> None:
    model = on_meta("torchvision/r3d_18", num_classes=101)
    assert model.fc.out_features == 101
    eligible = [
        m
        for m in model.modules()
        if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3) and m.stride == (1, 1, 1)
    ]
    assert len(eligible) == 13
    assert sum(c.weight.numel() for c in eligible) / 1e6 == pytest.approx(28.3, abs=0.05)
    everything = macs(model, 1, 3, 16, 112, 112)["aten.convolution"]
    shortcuts = sum(  # 1x1x1 at stride 2: 56 -> 28 -> 14 -> 7, 16 -> 8 -> 4 -> 2
        inputs * 2 * inputs * (n // 2) * s * s
        for inputs, n, s in ((64, 16, 28), (128, 8, 14), (256, 4, 7))
    )
    assert (everything - shortcuts) / 1e9 == pytest.approx(40.61, abs=0.005)


@pytest.mark.parametrize(
    ("frames", "size", "positions"),
    [
        (16, (112, 112), 16),
        (8, (32, 32), 1),
        (4, (20, 12), 1),
        (1, (16, 48), 2),
        (2, (1, 1), 1),
        (17, (96, 128), 12),
    ],
)
def test_c3d_of_any_size(frames: int, size: tuple[int, int], positions: int) -> None:
    model = C3D(5, channels=2, frames=frames, size=size, width=2, hidden=3)
    assert model.classifier[1].in_features == positions * 16
    assert model(torch.randn(2, 2, frames, *size)).shape == (2, 5)
    again = C3D(5, channels=2, frames=frames, size=size, width=2, hidden=3, batch_norm=True)
    assert sum(isinstance(m, nn.BatchNorm3d) for m in again.modules()) == 8
    assert all(m.bias is None for m in again.modules() if isinstance(m, nn.Conv3d))
    assert again(torch.randn(2, 2, frames, *size)).shape == (2, 5)


def test_cost_counts_convolutions_in_three_dimensions() -> None:
    """By hand: outputs x inputs x 27 x positions, layer by layer."""
    model = C3D(4, channels=3, frames=4, size=(8, 8), width=2, hidden=5, batch_norm=True)
    cost = count_cost(model, torch.zeros(1, 3, 4, 8, 8))
    shapes = [
        (3, 2, 4 * 8 * 8), (2, 4, 4 * 4 * 4), (4, 8, 2 * 2 * 2), (8, 8, 2 * 2 * 2),
        (8, 16, 1), (16, 16, 1), (16, 16, 1), (16, 16, 1),
    ]  # fmt: skip
    expected = [inputs * outputs * 27 * positions for inputs, outputs, positions in shapes]
    assert [row.macs for row in cost.layers if row.type == "Conv3d"] == expected
    assert cost.macs == sum(expected) + 16 * 5 + 5 * 5 + 5 * 4


def test_c3d_is_built_for_the_data_and_again_from_its_artifact() -> None:
    model, network = models.build(
        "c3d", num_classes=3, channels=1, size=(16, 24), frames=4, options={"width": 2, "hidden": 4}
    )
    assert network.arguments["size"] == [16, 24]
    assert network.arguments["frames"] == 4
    clip = torch.zeros(2, 1, 4, 16, 24)
    assert model(clip).shape == models.rebuild(network)(clip).shape == (2, 3)
    _, kept = models.build("digitnet", num_classes=3, size=(8, 8))
    assert kept.arguments == {"num_classes": 3, "channels": 3}
    _, network = models.build(
        "c3d",
        num_classes=3,
        size=(16, 16),
        frames=4,
        options={"frames": 8, "width": 1, "hidden": 1},
    )
    assert network.arguments["frames"] == 8


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0}, "width=0: expected at least 1"),
        ({"frames": 0}, "frames and size=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"depth": 3}, "c3d can't be built with .*depth=3"),
    ],
)
def test_wrong_arguments(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        models.build("c3d", num_classes=3, options=options)


@pytest.mark.parametrize("name", ["mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "mvit_v2_s"])
def test_torchvisions_video_networks_by_name(name: str) -> None:
    model = on_meta(f"torchvision/{name}", num_classes=7)
    assert model.eval()(torch.zeros(1, 3, 16, 224, 224, device="meta")).shape == (1, 7)


def test_torchvisions_take_three_channels() -> None:
    with pytest.raises(UserError, match="takes 3 channels, and the data has 1"):
        models.build("torchvision/r3d_18", num_classes=7, channels=1)
    with pytest.raises(UserError, match="did you mean r3d_18"):
        models.build("torchvision/r3d_81", num_classes=7)


def test_unet3d_is_the_papers() -> None:
    model = on_meta("unet3d", num_classes=3, channels=3)
    norms = sum(
        p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters()
    )
    assert sum(p.numel() for p in model.parameters()) - norms == 19_069_955


def test_unet3d_keeps_the_volumes_size() -> None:
    torch.manual_seed(0)
    model = UNet3d(2, channels=1, width=2, levels=3)
    volume = torch.randn(2, 1, 4, 8, 12)
    assert model(volume).shape == (2, 2, 4, 8, 12)
    model(volume).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for wrong in (torch.zeros(1, 1, 4, 8, 10), torch.zeros(1, 1, 8, 8)):
        with pytest.raises(UserError, match="multiples of 4; pad it, or take fewer levels"):
            model(wrong)
    with pytest.raises(UserError, match="levels=0"):
        UNet3d(levels=0)
