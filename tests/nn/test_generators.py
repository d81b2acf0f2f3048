"""Generators and PatchGAN against counts and numbers that the authors' networks give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.measure.paper_macs import paper_macs
from tenfold.nn.discriminators import PatchDiscriminator
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator, UNetGenerator
from tenfold.nn.instance_norm import InstanceNorm2d
from tenfold.nn.taps import forward_with_taps, maps_at, taps_of
from tests.formula_weights import fill, image

pytestmark = pytest.mark.unit
TOLERANCE = 2e-5


def statistics(x: Tensor) -> tuple[float, float]:
    return x.mean().item(), x.std(correction=0).item()


def mobile(ngf: int) -> MobileResNetGenerator:
    return MobileResNetGenerator(ngf)


# -- counts ---------------------------------------------------------------------------------------

# Network, channels of its input, parameters, MACs in G as the papers count them, and true ones.
# Each is of an image of 256 x 256.
COUNTS = [
    (ResNetGenerator, 3, 11_378_179, 56.799, 49.552),
    (lambda: mobile(64), 3, 1_987_075, 18.314, 11.067),
    (lambda: mobile(48), 3, 1_130_883, 10.565, 6.488),
    (lambda: mobile(24), 3, 295_875, 2.904, 1.885),
    (lambda: mobile(16), 3, 137_347, 1.4077, 0.9547),
    (lambda: mobile(12), 3, 80_547, 0.8576, 0.6028),
    (lambda: mobile(8), 3, 38_723, 0.4396, 0.3264),
    (lambda: UNetGenerator(64), 3, 54_413_955, 18.140, 6.048),
    (lambda: UNetGenerator(16), 3, 3_404_451, 1.2187, 0.4063),
    (lambda: UNetGenerator(12), 3, 1_915_899, 0.7068, 0.2356),
    (lambda: UNetGenerator(8), 3, 852_307, 0.3330, 0.1110),
    (PatchDiscriminator, 3, 2_764_737, 3.147, 3.147),
    (lambda: PatchDiscriminator(6, 128), 6, 11_040_641, 12.573, 12.573),
]


@pytest.mark.parametrize(("build", "channels", "parameters", "paper", "true"), COUNTS)
def test_parameters_and_both_counts_of_macs(build, channels, parameters, paper, true):
    network = build()
    assert sum(p.numel() for p in network.parameters()) == parameters
    # A ResNet multiplies alike for each pixel, so a small image tells.
    side = 64 if isinstance(network, ResNetGenerator) else 256
    example, times = torch.zeros(1, channels, side, side), (256 // side) ** 2
    assert times * paper_macs(network, example) / 1e9 == pytest.approx(paper, rel=1e-3)
    counted = times * count_cost(network, example).macs
    assert counted / 1e9 == pytest.approx(true, rel=1e-3)
    # The meta device computes shapes alone, and shapes decide the count.
    whole = torch.zeros(1, channels, 256, 256, device="meta")
    assert counted == count_macs(network.to("meta"), whole)


def count_macs(network: nn.Module, example: Tensor) -> int:
    """Count by hand, layer by layer: another way than `count_cost`'s."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        sites = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        total += module.weight[0].numel() * sites.shape[1] * sites.shape[2] * sites.shape[3]

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(example)
    return total


@pytest.mark.parametrize(("ndf", "channels", "macs"), [(64, 3, 0.1733), (128, 6, 0.6926)])
def test_macs_of_a_discriminator_on_a_map(ndf, channels, macs):
    network = PatchDiscriminator(channels, ndf)
    example = torch.zeros(1, channels, 64, 64)
    assert paper_macs(network, example) / 1e9 == pytest.approx(macs, rel=1e-3)
    assert count_cost(network, example).macs / 1e9 == pytest.approx(macs, rel=1e-3)


def test_true_macs_are_those_of_count_cost_for_one_image_of_several():
    network = mobile(8)
    one, three = torch.zeros(1, 3, 64, 64), torch.zeros(3, 3, 64, 64)
    assert count_cost(network, one).macs == count_macs(mobile(8), one)
    assert count_cost(network, one).macs == pytest.approx(0.3264e9 / 16, rel=1e-3)
    assert paper_macs(network, three) == paper_macs(network, one)
    assert not any(module._forward_hooks for module in network.modules())


def test_parameters_of_a_discriminator_with_batch_norm():
    network = PatchDiscriminator(6, 128, "batch")
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_042_433


def test_the_papers_ratios():
    original, student = ResNetGenerator(), mobile(16)
    example = torch.zeros(1, 3, 64, 64)
    macs = [paper_macs(network, example) for network in (original, student)]
    assert macs[0] / macs[1] == pytest.approx(40.3, abs=0.1)
    parameters = [sum(p.numel() for p in net.parameters()) for net in (original, student)]
    assert parameters[0] / parameters[1] == pytest.approx(82.8, abs=0.1)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parity
def test_mobile_resnet_from_formulas():
    y = fill(mobile(8))(image(3, 64, 64))
    assert statistics(y) == pytest.approx((0.014301, 0.556565), abs=TOLERANCE)
    assert y[0, 0, 5, 7].item() == pytest.approx(0.23041, abs=TOLERANCE)
    assert y[0, 2, 61, 62].item() == pytest.approx(-0.48315, abs=TOLERANCE)


@pytest.mark.parity
def test_resnet_from_formulas():
    network = fill(ResNetGenerator(4))
    y = network(image(3, 64, 64))
    assert statistics(y) == pytest.approx((0.061909, 0.456715), abs=TOLERANCE)
    assert y[0, 0, 5, 7].item() == pytest.approx(-0.71589, abs=TOLERANCE)
    beyond = 3 * image(3, 64, 64)
    torch.testing.assert_close(network(beyond), network(beyond.clamp(-1, 1)))
    student = fill(mobile(4))
    assert not torch.allclose(student(beyond), student(beyond.clamp(-1, 1)), atol=1e-3)


@pytest.mark.parity
def test_discriminator_from_formulas():
    network = fill(PatchDiscriminator(3, 8))
    logits, features = network(image(3, 128, 128)), network.features(image(3, 128, 128))
    assert logits.shape == (1, 1, 14, 14)
    assert statistics(logits) == pytest.approx((0.128606, 0.829101), abs=TOLERANCE)
    assert features.shape == (1, 64, 15, 15)
    assert statistics(features) == pytest.approx((0.320454, 0.644663), abs=TOLERANCE)


@pytest.mark.parity
def test_unet_from_formulas():
    network = fill(UNetGenerator(4))
    with torch.no_grad():
        y = network(image(3, 256, 256))
        assert statistics(y) == pytest.approx((0.032892, 0.189915), abs=TOLERANCE)
        y = network.eval()(image(3, 256, 256))  # with the statistics of that one update
    assert statistics(y) == pytest.approx((0.020812, 0.058729), abs=TOLERANCE)


@pytest.mark.parity
def test_taps_from_formulas():
    network = fill(mobile(8))
    assert network.taps == ("model.9", "model.12", "model.15", "model.18")
    y, maps = network.forward_with_taps(image(3, 64, 64), network.taps)
    torch.testing.assert_close(y, network(image(3, 64, 64)))
    assert list(maps) == list(network.taps)
    spread = (0.589609, 2.339757, 4.565490, 6.890726)
    for found, std in zip(maps.values(), spread, strict=True):
        assert found.shape == (1, 32, 16, 16)
        assert statistics(found) == pytest.approx((0.397384, std), abs=TOLERANCE)
        torch.testing.assert_close(found.mean((2, 3)), maps["model.9"].mean((2, 3)))


# -- taps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_maps_of_the_unet_are_what_the_modules_return(inside):
    network = UNetGenerator(2, levels=5)
    names = ["model.model.1.model.2", "model.model.1.model.3.model.4", "model.model.1"]
    names += ["model.model.0", "model.model.4", *(["model.model.1.model"] if inside else [])]
    x = image(3, 32, 64).expand(2, -1, -1, -1)
    expected: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: expected.__setitem__(name, out.clone())
        )
        for name in names
    ]
    y = network(x)
    for handle in handles:
        handle.remove()
    image_again, maps = network.forward_with_taps(x, names)
    torch.testing.assert_close(image_again, y)
    assert list(maps) == names
    torch.testing.assert_close(maps, {name: expected[name] for name in names})


@pytest.mark.parametrize("build", [lambda: mobile(4), lambda: ResNetGenerator(2, blocks=2)])
def test_maps_are_what_the_modules_return(build):
    """Also ahead of a ReLU, which works in place, and inside a block."""
    network = build()
    names = ["model.10.conv_block.2", "model.8", "model.11", "model.1"]
    x = 2 * image(3, 32, 32)
    expected: dict[str, Tensor] = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: expected.__setitem__(name, out.clone())
        )
    y = network(x)
    for chosen in (names, ["model.8", "model.11"], ["model.1"]):
        image_again, maps = network.forward_with_taps(x, chosen)
        torch.testing.assert_close(image_again, y)
        assert list(maps) == chosen
        for name in chosen:
            torch.testing.assert_close(maps[name], expected[name])
    assert expected["model.8"].min() < 0


def test_fewer_blocks_have_taps_at_their_thirds():
    assert ResNetGenerator(2, blocks=6).taps == ("model.9", "model.11", "model.13", "model.15")
    assert MobileResNetGenerator(2, blocks=1).taps == ("model.9", "model.10")


def test_default_taps_of_the_unet():
    network = UNetGenerator(2).eval()
    with torch.no_grad():
        _, maps = network.forward_with_taps(image(3, 256, 256), network.taps)
    shapes = [tuple(found.shape) for found in maps.values()]
    assert shapes == [(1, 4, 64, 64), (1, 16, 16, 16), (1, 32, 16, 16), (1, 8, 64, 64)]
    first = maps[network.taps[0]]  # ahead of the LeakyReLU that follows in place
    assert first.min() < -0.1 * first.max()


def test_taps_of_any_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.Conv2d(4, 3, 3))
    x = image(3, 16, 16)
    y, maps = forward_with_taps(network, x, ["0"])
    torch.testing.assert_close(maps["0"], network[0](x))
    torch.testing.assert_close(y, network(x))
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(UserError, match=r"unknown tap 'model\.9'"):
        forward_with_taps(network, x, ["model.9"])
    with pytest.raises(UserError, match="Sequential doesn't say where to tap it"):
        taps_of(network, None)
    assert taps_of(network, ["0"]) == ("0",)
    assert taps_of(mobile(2), None) == mobile(2).taps


def test_reading_shapes_changes_nothing():
    network = UNetGenerator(2, levels=5).train()
    network.model.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    maps = maps_at(network, network.taps, (64, 96))
    assert [tuple(found.shape[2:]) for found in maps.values()] == [
        (16, 24),
        (4, 6),
        (4, 6),
        (16, 24),
    ]
    assert [module.training for module in network.modules()] == modes
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


# -- names of the authors' code -------------------------------------------------------------------


def resnet_keys(separable: bool, dropout: bool) -> set[str]:
    """The names of a CycleGAN generator with instance norm."""
    places = ["1", "4", "7", "19", "22", "26"]
    for block in range(10, 19):
        for place in ("1", "6" if dropout else "5"):
            inside = [f"{block}.conv_block.{place}"]
            places += [f"{inside[0]}.conv.{i}" for i in (0, 2)] if separable else inside
    return {f"model.{place}.{kind}" for place in places for kind in ("weight", "bias")}


@pytest.mark.parametrize(("build", "separable"), [(ResNetGenerator, False), (mobile, True)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_resnet_checkpoints_load(build, separable, prefix):
    source, target = build(2), build(2)
    own = source.state_dict()
    assert set(own) == resnet_keys(separable, dropout=True)
    # Trained without dropout, the second convolution is at 5; old ones have idle statistics.
    theirs = {}
    for key, value in own.items():
        theirs[prefix + key.replace(".conv_block.6.", ".conv_block.5.")] = value
    assert set(theirs) == {prefix + key for key in resnet_keys(separable, dropout=False)}
    for place in ("2", "5", "10.conv_block.2", "10.conv_block.6"):
        theirs[f"{prefix}model.{place}.running_mean"] = torch.zeros(2)
        theirs[f"{prefix}model.{place}.running_var"] = torch.ones(2)
        theirs[f"{prefix}model.{place}.num_batches_tracked"] = torch.tensor(3)
    target.load_state_dict(theirs)
    x = image(3, 32, 32)
    torch.testing.assert_close(target(x), source(x))
    fresh = build(2)
    fresh.load_state_dict(own)
    torch.testing.assert_close(fresh(x), source(x))


def test_a_batch_norm_resnet_without_dropout_loads():
    """There the convolution and its norm both move, one onto the other's place."""
    source, target = ResNetGenerator(2, norm="batch"), ResNetGenerator(2, norm="batch")
    source(image(3, 32, 32))  # so that the statistics are its own
    theirs = {}
    for key, value in source.state_dict().items():
        if "num_batches_tracked" in key:
            continue  # of an old checkpoint
        for ours, there in (("6", "5"), ("7", "6")):
            if f".conv_block.{ours}." in key:
                key = key.replace(f".conv_block.{ours}.", f".conv_block.{there}.")
                break
        theirs[key] = value
    target.load_state_dict(theirs)
    x = image(3, 32, 32)
    torch.testing.assert_close(target.eval()(x), source.eval()(x))


def test_init_of_a_recipe_adapts_checkpoints_too(tmp_path):
    from tenfold.nn.models import Network
    from tenfold.tasks.starting_point import initialize

    source, target = mobile(2), mobile(2)
    theirs = {k.replace("block.6.", "block.5."): v for k, v in source.state_dict().items()}
    torch.save(theirs, tmp_path / "latest_net_G.pth")
    assert initialize(target, Network(None), str(tmp_path / "latest_net_G.pth")) == []
    torch.testing.assert_close(target(image(3, 32, 32)), source(image(3, 32, 32)))


def unet_keys() -> set[str]:
    """The names of a pix2pix U-Net of eight levels with batch norm."""
    keys = {"model.model.0.weight", "model.model.3.weight", "model.model.3.bias"}
    prefix = "model.model.1.model"
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for _ in range(6):
        keys |= {f"{prefix}.1.weight", f"{prefix}.5.weight"}
        keys |= {f"{prefix}.{place}.{kind}" for place in (2, 6) for kind in norm}
        prefix += ".3.model"
    keys |= {f"{prefix}.1.weight", f"{prefix}.3.weight"}
    return keys | {f"{prefix}.4.{kind}" for kind in norm}


def test_unet_names_are_the_authors():
    own = UNetGenerator(2).state_dict()
    # The authors' outermost down convolution has no bias with batch norm, as all of theirs.
    assert set(own) == unet_keys()
    assert "model.model.1.model.3.model.3.model.1.weight" in own


def test_discriminator_names_are_the_authors():
    own = set(PatchDiscriminator(3, 2).state_dict())
    assert own == {f"model.{i}.{kind}" for i in (0, 2, 5, 8, 11) for kind in ("weight", "bias")}
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"model.{i}.{kind}" for i in (0, 11) for kind in ("weight", "bias")}
    expected |= {f"model.{i}.weight" for i in (2, 5, 8)}
    expected |= {f"model.{i}.{kind}" for i in (3, 6, 9) for kind in norms}
    assert set(PatchDiscriminator(3, 2, "batch").state_dict()) == expected
    old = dict(PatchDiscriminator(3, 2).state_dict())
    old["model.3.running_mean"] = torch.zeros(4)
    PatchDiscriminator(3, 2).load_state_dict({f"module.{key}": v for key, v in old.items()})


@pytest.mark.parametrize("build", [lambda: mobile(2), lambda: PatchDiscriminator(3, 2)])
def test_a_checkpoint_of_another_network_is_refused_by_its_names(build):
    network = build()
    state = dict(network.state_dict())
    del state["model.1.weight" if "model.1.weight" in state else "model.2.weight"]
    state["model.99.weight"] = torch.zeros(2)
    state["model.11.bias" if "model.11.bias" in state else "model.4.bias"] = torch.zeros(7)
    with pytest.raises(UserError) as caught:
        network.load_state_dict(state)
    text = str(caught.value)
    assert "\n" not in text
    assert "missing: model." in text
    assert "unexpected: model.99.weight" in text
    assert "bias (7,) for (" in text
    assert type(network).__name__ in text
    with pytest.raises(UserError, match="of another size"):
        network.load_state_dict(state, strict=False)
    state = {k: v for k, v in state.items() if len(v) != 7}
    network.load_state_dict(state, strict=False)


def test_a_wider_generator_is_refused():
    with pytest.raises(UserError, match=r"model\.1\.weight \(4, 3, 7, 7\) for \(2, 3, 7, 7\)"):
        mobile(2).load_state_dict(mobile(4).state_dict())
    with pytest.raises(UserError, match="missing"):
        ResNetGenerator(2).load_state_dict(mobile(2).state_dict())


# -- instance norm --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_is_pytorchs_and_keeps_the_order(memory_format):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 6, 7) + 1).to(memory_format=memory_format).requires_grad_()
    own, theirs = InstanceNorm2d(5)(x), nn.InstanceNorm2d(5)(x)
    torch.testing.assert_close(own, theirs)
    assert own.is_contiguous(memory_format=memory_format)
    weight = torch.randn_like(own)
    gradients = [torch.autograd.grad((weight * y).sum(), x)[0] for y in (own, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert not InstanceNorm2d(5).state_dict()
    assert repr(InstanceNorm2d(5)) == "InstanceNorm2d(5, eps=1e-05)"


@pytest.mark.parametrize("build", [lambda: mobile(4), lambda: ResNetGenerator(4, blocks=2)])
def test_a_generator_keeps_channels_last_throughout(build):
    network = build().to(memory_format=torch.channels_last)
    orders: dict[str, bool] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(
            lambda _, __, out, name=name: orders.__setitem__(
                name, out.is_contiguous(memory_format=torch.channels_last)
            )
        )
    with torch.no_grad():
        network(image(3, 32, 32).to(memory_format=torch.channels_last))
    lost = [name for name, kept in orders.items() if not kept]
    assert not lost
    assert len(orders) > 20


def test_frozen_statistics_replace_the_maps_own():
    norm = InstanceNorm2d(3)
    whole = 2 * torch.randn(2, 3, 8, 8) + 1
    expected = norm(whole)
    norm.frozen = (whole.mean((2, 3)), whole.var((2, 3), correction=0))
    torch.testing.assert_close(norm(whole[..., :4])[..., :3], expected[..., :3])
    norm.frozen = (torch.zeros(1, 3), torch.ones(1, 3))
    torch.testing.assert_close(norm(whole), whole, atol=1e-4, rtol=1e-4)
    norm.frozen = None
    torch.testing.assert_close(norm(whole), expected)


def test_maps_of_one_pixel_are_refused_however_many():
    with pytest.raises(UserError, match="maps of one pixel"):
        InstanceNorm2d(4)(torch.randn(2, 4, 1, 1))
    # 16 -> 8, 4, 2, and the fourth block leaves one pixel.
    with pytest.raises(UserError, match="maps of one pixel"):
        PatchDiscriminator(3, 4).features(torch.randn(2, 3, 16, 16))


# -- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: MobileResNetGenerator(2, blocks=1),
        lambda: ResNetGenerator(2, blocks=1),
        lambda: UNetGenerator(2, levels=5),
        lambda: PatchDiscriminator(3, 2),
    ],
    ids=["mobile", "resnet", "unet", "discriminator"],
)
def test_compiles_to_one_graph(build):
    torch._dynamo.reset()
    network = build().eval()
    x = image(3, 32, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize(
    "build",
    [lambda: MobileResNetGenerator(2, blocks=1), lambda: UNetGenerator(2, levels=5)],
    ids=["mobile", "unet"],
)
def test_taps_compile_to_one_graph(build):
    torch._dynamo.reset()
    network = build().eval()
    x = image(3, 32, 32)
    compiled = torch.compile(network.forward_with_taps, backend="eager", fullgraph=True)
    y, maps = compiled(x, network.taps)
    expected, expected_maps = network.forward_with_taps(x, network.taps)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(maps, expected_maps)


def test_a_compiled_training_step_has_the_same_gradients():
    torch._dynamo.reset()
    network = MobileResNetGenerator(2, blocks=1)
    x = image(3, 16, 16)
    network(x).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    compiled(x).square().mean().backward()
    found = [parameter.grad for parameter in network.parameters()]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


# -- start and refusals ---------------------------------------------------------------------------


def test_weights_start_as_the_authors_do():
    torch.manual_seed(0)
    for network in (mobile(16), ResNetGenerator(8), UNetGenerator(4), PatchDiscriminator(3, 16)):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                if module.bias is not None:
                    assert not module.bias.any()
                if module.weight.numel() > 4000:
                    assert abs(module.weight.mean().item()) < 2e-3
                    assert module.weight.std().item() == pytest.approx(0.02, rel=0.06)
            elif isinstance(module, nn.BatchNorm2d):
                assert not module.bias.any()
    gains = torch.cat(
        [m.weight for m in UNetGenerator(8).modules() if isinstance(m, nn.BatchNorm2d)]
    )
    assert gains.mean().item() == pytest.approx(1, abs=5e-3)
    assert gains.std().item() == pytest.approx(0.02, rel=0.15)


def test_biases_only_where_no_batch_norm_follows():
    for build in (ResNetGenerator, MobileResNetGenerator):
        biased = [k for k in build(2, norm="batch").state_dict() if k.startswith("model.26")]
        assert biased == ["model.26.weight", "model.26.bias"]
        assert "model.1.bias" not in build(2, norm="batch").state_dict()
    inner = MobileResNetGenerator(2, norm="batch").model[10].conv_block[1].conv
    assert isinstance(inner[1], InstanceNorm2d)
    assert inner[0].bias is not None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mobile(0), "ngf 0: expected at least 1"),
        (lambda: ResNetGenerator(4, channels=0), "channels 0: expected at least 1"),
        (lambda: UNetGenerator(4, outputs=0), "outputs 0: expected at least 1"),
        (lambda: ResNetGenerator(4, blocks=0), "blocks 0: expected at least 1"),
        (lambda: UNetGenerator(4, levels=4), "levels 4: expected at least 5"),
        (lambda: ResNetGenerator(4, norm="instanc"), "unknown norm 'instanc': did you mean instan"),
        (lambda: PatchDiscriminator(norm="layer"), "unknown norm 'layer'"),
        (lambda: PatchDiscriminator(ndf=0), "ndf 0: expected at least 1"),
        (lambda: PatchDiscriminator(layers=0), "layers 0: expected at least 1"),
        (lambda: mobile(2)(torch.zeros(1, 3, 32, 34)), "32x34: .* multiples of 4"),
        (lambda: mobile(2)(torch.zeros(1, 1, 32, 32)), r"expected \(B, 3, H, W\)"),
        (lambda: mobile(2)(torch.zeros(3, 32, 32)), r"\(3, 32, 32\): expected \(B, 3, H, W\)"),
        (lambda: UNetGenerator(2)(torch.zeros(1, 3, 128, 256)), "128x256: .* multiples of 256"),
        (lambda: PatchDiscriminator(6, 2)(torch.zeros(1, 3, 64, 64)), r"expected \(B, 6, H, W\)"),
        (
            lambda: mobile(2).forward_with_taps(torch.zeros(1, 3, 32, 30), ["model.9"]),
            "32x30: expected",
        ),
        (
            lambda: mobile(2).forward_with_taps(torch.zeros(1, 3, 32, 32), ["model.9", "model.99"]),
            "unknown tap 'model.99': did you mean model.9",
        ),
        (
            lambda: UNetGenerator(2, levels=5).forward_with_taps(torch.zeros(1, 3, 32, 32), ["up"]),
            "unknown tap 'up'",
        ),
    ],
)  # fmt: skip
def test_refusals(call, text):
    with pytest.raises(UserError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_far_from_zero_is_normed_exactly(layout: torch.memory_format) -> None:
    x = (1000 + torch.randn(2, 8, 48, 40)).contiguous(memory_format=layout)
    expected = nn.InstanceNorm2d(8)(x.double())
    found = InstanceNorm2d(8)(x)
    assert found.is_contiguous(memory_format=layout)
    assert float((found - expected).abs().max()) < 1e-3
