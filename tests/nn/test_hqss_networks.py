"""HQSS's networks: what they hold, what they are blind to, what they take."""

import pytest
import torch

from tenfold.errors import UserError
from tenfold.nn import models
from tenfold.nn.hqss_networks import (
    HQSS,
    HQSSRemover,
    RefinementNetwork,
    RemovalNetwork,
    ShadowDiscriminator,
    ShadowEncoder,
    ShadowGenerator,
)
from tenfold.nn.instance_norm import InstanceNorm2d
from tenfold.nn.shadow_codes import lab_codes
from tenfold.nn.shadow_regions import masked, signed_codes

pytestmark = pytest.mark.unit


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (ShadowEncoder, 11_648),
        (ShadowGenerator, 2_416_259),
        (ShadowDiscriminator, 2_764_737),
        (RemovalNetwork, 11_378_179),
        (RefinementNetwork, 11_381_315),
        (HQSSRemover, 22_759_494),
    ],
)
def test_parameters_are_those_of_the_sheet(build, expected):
    assert count(build()) == expected


def test_reduced_widths_are_those_of_the_short_run():
    assert round(count(ShadowGenerator(width=32, blocks=3)), -3) == 120_000
    assert round(count(ShadowDiscriminator(16, layers=2)), -3) == 43_000
    assert round(count(RemovalNetwork(16, blocks=4)), -3) == 346_000
    assert count(RefinementNetwork()) - count(RemovalNetwork()) == 49 * 64


def test_weights_are_drawn_narrow_and_biases_as_pytorch_does():
    torch.manual_seed(0)
    network = HQSS(width=32, blocks=2, discriminator_width=16)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            assert module.bias is not None, name
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            bound = module.weight[0].numel() ** -0.5
            assert 0 < module.bias.abs().max() <= bound * 1.5, name


def test_the_encoder_is_blind_to_one_gain_and_offset_but_not_to_colour():
    """Regions keep their level by the black around them, which no gain changes."""
    torch.manual_seed(0)
    encoder = ShadowEncoder()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    gains = torch.tensor([0.5, 1.0, 1.0]).reshape(1, 3, 1, 1)
    with torch.no_grad():
        features = encoder(x)
        assert (encoder(0.5 * x + 0.1) - features).abs().max() < 1e-2
        assert (encoder(x * gains) - features).abs().max() > 1


def test_training_and_evaluation_are_the_same_and_samples_are_kept_apart():
    torch.manual_seed(0)
    remover = HQSSRemover(width=4, blocks=1)
    codes, mask = torch.rand(2, 3, 32, 40), (torch.rand(2, 1, 32, 40) > 0.7).float()
    with torch.no_grad():
        both = remover.train()(codes, mask)
        alone = torch.cat([remover.eval()(codes[i : i + 1], mask[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-4)
    assert both.shape == codes.shape
    assert bool(((both >= 0) & (both <= 1)).all())


def test_a_discriminator_gives_one_number_an_image_at_any_batch():
    torch.manual_seed(0)
    judge = ShadowDiscriminator(4)
    regions = torch.rand(3, 3, 48, 40)
    assert judge(regions).shape == (3, 1)
    assert judge(regions[:1]).shape == (1, 1)
    assert judge(torch.rand(1, 3, 24, 24)).shape == (1, 1)
    patches = super(ShadowDiscriminator, judge).forward(regions)
    torch.testing.assert_close(judge(regions), patches.mean((2, 3)))


@pytest.mark.parametrize("compose", ["mask", "add"])
def test_the_remover_does_what_the_sheet_says(compose):
    torch.manual_seed(0)
    remover = HQSSRemover(width=4, blocks=1, compose=compose)
    codes = lab_codes(torch.rand(1, 3, 32, 32))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 4:28] = 1
    signed = signed_codes(codes)
    with torch.no_grad():
        r = remover.removal(masked(signed, mask))
        rest = masked(signed, 1 - mask)
        z = r + rest if compose == "add" else r * mask + rest * (1 - mask)
        o = remover.refinement(z, mask)
        found = remover.both(codes, mask)
        torch.testing.assert_close(found[0], r)
        torch.testing.assert_close(found[1], o)
        torch.testing.assert_close(remover(codes, mask), (o + 1) / 2)


def test_f_sees_the_mask_as_minus_one_and_one():
    torch.manual_seed(0)
    network = RefinementNetwork(4, 1)
    image, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    with torch.no_grad():
        expected = (network.model(torch.cat([image, mask], 1)) + image).tanh()
        assert torch.equal(network(image, mask), expected)
        other = (network.model(torch.cat([image, -mask], 1)) + image).tanh()
        assert torch.equal(network(image, 0 * mask), other)


def test_the_release_s_weights_come_in_by_their_order():
    torch.manual_seed(0)
    source, target = RemovalNetwork(4, 1), RemovalNetwork(4, 1)
    release = {f"module.layer{i}": value for i, value in enumerate(source.state_dict().values())}
    target.load_state_dict(target.adapt_state_dict(release))
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(source(x), target(x))
    assert list(target.adapt_state_dict(source.state_dict())) == list(source.state_dict())
    with pytest.raises(UserError, match=r"layer0 has shape .* give the widths"):
        RemovalNetwork(8, 1).adapt_state_dict(release)
    with pytest.raises(UserError, match="tensors: expected the"):
        RemovalNetwork(4, 2).adapt_state_dict(release)


@pytest.mark.parametrize(
    ("size", "message"),
    [((28, 32), "28x32"), ((34, 32), "34x32: expected sides of at least 32"), ((32, 33), "32x33")],
)
def test_sides_that_do_not_fit_are_refused(size, message):
    network = HQSS(width=4, blocks=1, discriminators=False)
    x = torch.zeros(1, 3, *size)
    with pytest.raises(UserError, match=message):
        network(x, x)
    with pytest.raises(UserError, match=message):
        HQSSRemover(4, 1)(x, torch.zeros(1, 1, *size))


def test_other_wrong_things_are_refused():
    network = HQSS(width=4, blocks=1, discriminators=False)
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match="two regions of one photo"):
        network(x, torch.zeros(1, 3, 32, 36))
    with pytest.raises(UserError, match=r"mask of shape \(1, 3, 32, 32\)"):
        HQSSRemover(4, 1)(x, x)
    with pytest.raises(UserError, match="compose"):
        HQSSRemover(4, 1, compose="plus")
    with pytest.raises(UserError, match="width=0: expected at least 1"):
        HQSS(width=0)


def test_they_are_built_by_name():
    network, described = models.build("hqss", options={"width": 8, "blocks": 1})
    assert isinstance(network, HQSS)
    assert described.arguments == {"width": 8, "blocks": 1}
    remover, described = models.build("hqss_remover", options={"width": 4, "blocks": 1})
    assert isinstance(remover, HQSSRemover)
    assert (remover.space, remover.multiple) == ("lab", 4)
    with pytest.raises(UserError, match="hqss makes images: it is for the task shadow_synthesis"):
        models.build("hqss", num_classes=10)
    with pytest.raises(UserError, match="hqss_remover is for the task shadow_removal"):
        models.build("hqss_remover", outputs=3)
    again = models.rebuild(described)
    assert again.state_dict().keys() == remover.state_dict().keys()
    assert sum(isinstance(m, InstanceNorm2d) for m in again.modules()) == 2 * (5 + 2)
