"""Images of any size: padding, exact tiles, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tenfold.deploy import restore
from tenfold.deploy.restore import default_tile, translate
from tenfold.errors import UserError
from tenfold.nn import tiling
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator, UNetGenerator
from tenfold.nn.instance_norm import InstanceNorm2d
from tenfold.nn.tiling import reach_of, receptive_radius, run_tiled


def picture(height, width, seed=0):
    """Smooth noise with a bright corner: no two tiles have the same statistics."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 3, height // 4 + 2, width // 4 + 2, generator=generator)
    image = functional.interpolate(noise, (height, width), mode="bilinear") * 1.2 - 1
    image[:, :, : height // 3, : width // 3] += 0.7
    return image.clamp(-1, 1)


def trained(network):
    """Give batch norms statistics of their own, as training would; weights large enough to see."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias) if module.bias is not None else None
    return network.eval()


def norms(network):
    return [module for module in network.modules() if isinstance(module, InstanceNorm2d)]


NETWORKS = {
    "mobile": lambda: MobileResNetGenerator(4),
    "resnet": lambda: ResNetGenerator(3, blocks=4),
    "mobile, batch norm": lambda: MobileResNetGenerator(4, norm="batch", blocks=2),
    "resnet, batch norm": lambda: ResNetGenerator(3, norm="batch", blocks=2),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(200, 268), (301, 130)])
def test_exact_tiles_equal_the_whole_pass(name, size):
    # In double precision, where rounding doesn't hide a pixel that a tile lacks.
    network, image = trained(NETWORKS[name]()).double(), picture(*size).double()
    whole = translate(network, image)
    assert float(whole.std()) > 0.1
    for tile in (48, 100):
        tiled = translate(network, image, tile=tile)
        assert float((tiled - whole).abs().max()) <= 1e-6
    assert all(norm.frozen is None for norm in norms(network))


@pytest.mark.parity
@pytest.mark.parametrize("kind", [MobileResNetGenerator, ResNetGenerator])
@pytest.mark.parametrize("statistics", tiling.STATISTICS)
def test_tiles_in_single_precision_differ_by_rounding_alone(kind, statistics):
    torch.manual_seed(2)
    network = kind(8).eval()
    smooth, noise = picture(200, 268), 2 * torch.rand(1, 3, 200, 268) - 1
    for image, bound in ((noise, 2e-5), (smooth, None)):
        whole = translate(network, image)
        tiled = run_tiled(network, image, 64, statistics)  # so few pixels are copied as they are
        if bound is None:
            # Norms of smooth maps enlarge rounding, of the whole pass too: that is the measure.
            exact = translate(copy.deepcopy(network).double(), image.double())
            bound = 4 * float((whole - exact).abs().max())
        assert 0 < float((tiled - whole).abs().max()) <= bound


@pytest.mark.parity
@pytest.mark.parametrize("name", NETWORKS)
def test_two_passes_with_halo_equal_the_whole_pass(name):
    # A copy of the image's own size has exactly its statistics.
    network, image = trained(NETWORKS[name]()).double(), picture(216, 272).double()
    whole = translate(network, image)
    tiled = run_tiled(network, image, 64, "downscaled", statistics_pixels=10**6)
    assert float((tiled - whole).abs().max()) <= 1e-6


@pytest.mark.parity
def test_tiles_without_frozen_statistics_would_differ():
    network, image = trained(MobileResNetGenerator(4)), picture(200, 268)
    whole = translate(network, image)
    alone = torch.cat(
        [translate(network, image[..., :100]), translate(network, image[..., 100:])], -1
    )
    assert float((alone - whole).abs().max()) > 0.05


@pytest.mark.parity
def test_downscaled_statistics_are_near():
    network, image = trained(MobileResNetGenerator(4)), picture(400, 400)
    whole = translate(network, image)
    near = run_tiled(network, image, 128, "downscaled", statistics_pixels=40_000)
    assert 1e-4 < float((near - whole).abs().mean()) < 0.15


@pytest.mark.parity
@pytest.mark.parametrize(
    ("network", "radius"),
    [
        (MobileResNetGenerator(4), 84),  # the sheet's
        (ResNetGenerator(2), 84),
        (ResNetGenerator(2, blocks=2), 28),
        (nn.Sequential(nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.ReLU()), 2),
    ],
)
def test_receptive_radius_is_the_true_one(network, radius):
    assert receptive_radius(network) == radius
    if radius > 60:
        return
    # Against gradients: with frozen norms and positive weights nothing cancels.
    network = network.double().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            nn.init.zeros_(module.bias)
        elif isinstance(module, InstanceNorm2d):
            width = module.channels
            module.frozen = torch.zeros(1, width).double(), torch.ones(1, width).double()
    reached = 0
    for shift in range(4):  # the places of a stride of 4 differ
        image = torch.full((1, 3, 96, 96), 0.1, dtype=torch.double, requires_grad=True)
        network(image)[0, 0, 48 + shift, 48 + shift].backward()
        touched = image.grad[0].abs().sum((0, 2)).nonzero()
        reached = max(reached, 48 + shift - int(touched.min()), int(touched.max()) - 48 - shift)
    assert reached == radius


@pytest.mark.unit
def test_reach_of_the_parts():
    layers = list(MobileResNetGenerator(4).model)
    down, up = reach_of(layers[:8]), reach_of(layers[19:])
    assert (down.halo, down.step, down.scale) == (8, 4, 0.25)
    assert (up.halo, up.step, up.scale) == (2, 1, 4)


@pytest.mark.unit
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 8), (33, 50), (64, 64)])
def test_any_size_comes_back(size):
    network = trained(MobileResNetGenerator(2, blocks=1))
    image = picture(*size)
    result = translate(network, image)
    assert result.shape == image.shape
    assert result.is_contiguous()
    assert bool(result.isfinite().all())


@pytest.mark.unit
def test_padding_is_by_reflection_and_cut_off():
    seen = []

    def network(x):
        seen.append(x)
        return x

    image = picture(10, 13)
    assert torch.equal(translate(network, image), image)
    assert torch.equal(seen[0], functional.pad(image, (0, 3, 0, 2), "reflect"))
    assert torch.equal(translate(network, image, multiple=32), image)
    assert torch.equal(seen[1], functional.pad(image, (0, 19, 0, 22), "replicate"))
    assert torch.equal(translate(network, image[..., :8, :8]), image[..., :8, :8])
    assert seen[2].shape[-2:] == (8, 8)


@pytest.mark.unit
def test_unet_takes_its_own_multiple_and_no_tiles():
    network = trained(UNetGenerator(2, levels=5))
    assert translate(network, picture(40, 70)).shape == (1, 3, 40, 70)
    with pytest.raises(UserError, match="a U-Net sees the whole image: leave the tile out"):
        translate(network, picture(64, 64), tile=32)


@pytest.mark.path
def test_exported_file_of_any_size(tmp_path):
    from tenfold.deploy.onnx import export
    from tenfold.measure.runners import OnnxModel

    network = trained(MobileResNetGenerator(2, blocks=1))
    example = picture(16, 16)
    path = export(network, tmp_path, example, metadata={"multiple": 8}, dynamic_size=8).path
    image = picture(37, 50)
    expected = translate(network, image, multiple=8)
    assert float((translate(OnnxModel(path), image) - expected).abs().max()) <= 1e-4
    with pytest.raises(UserError, match="OnnxModel can't run in tiles"):
        translate(OnnxModel(path), image, tile=16)


@pytest.mark.unit
@pytest.mark.parametrize("statistics", tiling.STATISTICS)
def test_network_is_left_as_it_was_even_on_errors(statistics, monkeypatch):
    network = MobileResNetGenerator(2, blocks=1).train()
    network.model[10].eval()
    modes = [module.training for module in network.modules()]
    image = picture(40, 40)
    translate(network, image, tile=16, statistics=statistics)
    calls = []

    def fails(x):
        calls.append(any(norm.frozen is not None for norm in norms(network)))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(network.model[18], "forward", fails)
    if statistics == "downscaled":  # the first call is that of the copy
        monkeypatch.setattr(tiling, "_freeze_from_copy", lambda layers, *_: [
            setattr(norm, "frozen", (torch.zeros(1, norm.channels), torch.ones(1, norm.channels)))
            for norm in norms(network)
        ])  # fmt: skip
    with pytest.raises(RuntimeError, match="out of memory"):
        translate(network, image, tile=16, statistics=statistics)
    assert calls == [True]
    assert all(norm.frozen is None for norm in norms(network))
    assert not any(norm._forward_pre_hooks for norm in norms(network))
    assert [module.training for module in network.modules()] == modes


@pytest.mark.unit
def test_refusals():
    network, image = MobileResNetGenerator(2, blocks=1), picture(32, 32)
    for given, text in (
        (image.mul(255), "expected -1 to 1; bring 0..255"),
        (torch.full_like(image, torch.nan), "values from nan"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8 of shape"),
        (image[0], r"expected float \(1, C, H, W\)"),
        (torch.zeros(1, 3, 0, 8), "expected float"),
        (image[:, :1], r"expected \(B, 3, H, W\)"),
    ):
        with pytest.raises(UserError, match=text):
            translate(network, given)
    with pytest.raises(UserError, match="tile 30: expected a multiple of 4"):
        translate(network, image, tile=30)
    with pytest.raises(UserError, match="did you mean whole"):
        translate(network, image, tile=16, statistics="whol")
    with pytest.raises(UserError, match="multiple 0"):
        translate(network, image, multiple=0)
    with pytest.raises(UserError, match="Conv3d in a network that runs in tiles"):
        run_tiled(nn.Sequential(nn.Conv3d(3, 3, 1)), image, 16)
    with pytest.raises(UserError, match=r"returns .* expected an image of the same size"):
        translate(lambda x: x[..., 1:], image)


@pytest.mark.unit
def test_default_tile_is_for_large_photos():
    assert default_tile(2000, 2000) is None
    assert default_tile(2000, 2001) == restore.TILE
    assert restore.TILE % 4 == 0
