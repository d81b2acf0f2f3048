"""HQSS: the losses against the sheet's equations, who learns from them, and pseudo pairs."""

import copy
from dataclasses import replace

import pytest
import torch

from tenfold.errors import StateError, UserError
from tenfold.methods import find
from tenfold.methods.hqss import (
    HQSS,
    HQSSRemover,
    HQSSTraining,
    area_loss,
    colour_loss,
    discriminator_losses,
    frozen,
    generator_losses,
    light_loss,
    paint,
    regions_of,
    removal_losses,
    synthesize,
)
from tenfold.nn.focal_frequency import focal_frequency_loss
from tenfold.nn.shadow_codes import lab_codes, linear_to_srgb, rgb_of_codes
from tenfold.nn.shadow_regions import dilated, masked, signed_codes

pytestmark = pytest.mark.unit

SIDE = 32


def network(seed: int = 0, **options) -> HQSS:
    torch.manual_seed(seed)
    return HQSS(width=4, blocks=1, discriminator_width=4, discriminator_layers=2, **options)


def batch(count: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    mask, lit = torch.zeros(2, count, 1, SIDE, SIDE, dtype=torch.uint8)
    for number in range(count):
        mask[number, :, 2 : 14 + number, 3:15] = 1
        lit[number, :, 16:28, 14 : 28 + number] = 1
    return images, mask, lit


def distance(one, other):
    return (one - other).abs().mean()


def test_the_generators_losses_are_those_of_the_sheet():
    """Written out term by term, sample by sample, with copies of E and G."""
    model = network()
    images, mask, lit = batch(2)
    found = generator_losses(
        model, regions_of(images, mask, lit), paint(model, regions_of(images, mask, lit))
    )
    e, g, e_copy, g_copy = (
        model.encoder, model.generator, *copy.deepcopy((model.encoder, model.generator)),
    )  # fmt: skip
    wanted: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for i in range(2):
        signed = signed_codes(lab_codes(images[i : i + 1]))
        m_s, m_n = mask[i : i + 1].float(), lit[i : i + 1].float()
        s, n = masked(signed, m_s), masked(signed, m_n)
        f_s, f_n = e(s), e(n)
        s_again, n_again, p, q = g(f_s, s), g(f_n, n), g(f_s, n), g(f_n, s)
        wanted["self_reconstruction"].append(distance(s_again, s) + distance(n_again, n))
        wanted["self_frequency"].append(
            focal_frequency_loss(s_again, s) + focal_frequency_loss(n_again, n)
        )
        judged = (model.shadow_discriminator(p) - 1) ** 2 + (model.lit_discriminator(q) - 1) ** 2
        wanted["adversarial"].append(judged.squeeze())
        moved = torch.zeros(())
        for c in (1, 2):
            moved = moved + (p[0, c] - n[0, c]).abs()[m_n[0, 0] == 1].mean()
            moved = moved + (q[0, c] - s[0, c]).abs()[m_s[0, 0] == 1].mean()
        wanted["colour"].append(moved)
        n_back, s_back = g_copy(f_n, p), g_copy(f_s, q)
        wanted["cycle"].append(distance(n_back, n) + distance(s_back, s))
        wanted["cycle_frequency"].append(
            focal_frequency_loss(n_back, n) + focal_frequency_loss(s_back, s)
        )
        wanted["feature_cycle"].append(distance(e_copy(p), f_s) + distance(e_copy(q), f_n))
    for name, terms in wanted.items():
        torch.testing.assert_close(found[name], torch.stack(terms).mean(), msg=name)
    parameters = [*e.parameters(), *g.parameters()]
    for name, terms in wanted.items():
        ours = torch.autograd.grad(found[name], parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(
            torch.stack(terms).mean(), parameters, retain_graph=True, allow_unused=True
        )
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3, msg=name)


def test_weights_of_the_sheet_are_the_defaults():
    model, training = network(), HQSSTraining()
    training.attach(model, total_steps=1)
    regions = regions_of(*batch())
    weighted, made = training.generator_step(regions)
    plain = generator_losses(model, regions, made)
    weights = {
        "self_reconstruction": 1, "self_frequency": 1, "adversarial": 0.05, "colour": 0.01,
        "cycle": 0.1, "cycle_frequency": 0.1, "feature_cycle": 0.01,
    }  # fmt: skip
    assert list(weighted) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(weighted[name], weight * plain[name])
    assert training.pool == 200
    assert training.area_reach == 50
    assert training.light == 0


def test_the_discriminators_losses_are_least_squares_without_a_half():
    model = network()
    regions = regions_of(*batch(3))
    pseudo_shadow, pseudo_lit = torch.rand(2, 3, 3, SIDE, SIDE)
    found = discriminator_losses(model, regions, pseudo_shadow, pseudo_lit)
    for judge, real, painted, name in (
        (model.shadow_discriminator, regions.shadow, pseudo_shadow, "shadow_discriminator"),
        (model.lit_discriminator, regions.lit, pseudo_lit, "lit_discriminator"),
    ):
        expected = torch.stack(
            [
                (judge(r[None]) - 1) ** 2 + judge(p[None]) ** 2
                for r, p in zip(real, painted, strict=True)
            ]
        ).mean()
        torch.testing.assert_close(found[name], expected)


def test_a_step_of_e_and_g_leaves_the_discriminators_alone_and_the_reverse():
    model, training = network(), HQSSTraining()
    training.attach(model, total_steps=1)
    regions = regions_of(*batch())
    losses, made = training.generator_step(regions)
    sum(losses.values()).backward()
    judges = [*model.shadow_discriminator.parameters(), *model.lit_discriminator.parameters()]
    painters = [*model.encoder.parameters(), *model.generator.parameters()]
    assert all(parameter.grad is None for parameter in judges)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(bool(p.grad.abs().max() > 0) for p in model.encoder.parameters())
    for parameter in painters:
        parameter.grad = None
    found = training.discriminator_step(regions, made.pseudo_shadow, made.pseudo_lit)
    sum(found.values()).backward()
    assert all(parameter.grad is None for parameter in painters)
    assert all(bool(p.grad.abs().max() > 0) for p in judges if p.ndim > 1)


@pytest.mark.parametrize("term", ["cycle", "cycle_frequency", "feature_cycle"])
def test_cycle_terms_reach_e_and_g_by_what_they_made_but_not_by_the_way_back(term):
    model = network()
    regions = regions_of(*batch())
    made = paint(model, regions)
    loss = generator_losses(model, regions, made)[term]
    loss.backward(retain_graph=True)
    for part in (model.encoder, model.generator):
        assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters())
    # With what was made cut off there is no way left to any weight.
    alone = type(made)(*(getattr(made, name).detach() for name in made.__dataclass_fields__))
    assert not generator_losses(model, regions, alone)[term].requires_grad


def test_frozen_passes_gradients_through_to_the_input_only():
    layer = torch.nn.Conv2d(3, 2, 3)
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    frozen(layer, x).sum().backward()
    assert layer.weight.grad is None
    assert bool(x.grad.abs().max() > 0)


def test_colour_loss_is_of_each_samples_own_region():
    region, mask = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[0, :, 0] = 1  # 4 pixels
    mask[1, :, :3] = 1  # 12 pixels
    painted = region.clone()
    painted[0, 1] = 0.5
    painted[1, 2] = 0.25
    painted[:, 0] = 9  # L doesn't count
    assert colour_loss(painted, region, mask).item() == pytest.approx((0.5 + 0.25) / 2)
    assert colour_loss(painted, region, 0 * mask).item() == 0


def test_light_is_tied_to_the_gain_around_the_photos_own_shadow():
    """A half-lit shadow on even ground: P should have half the light of N, and Q get it back."""
    light = torch.full((1, 3, SIDE, SIDE), 0.6)
    mask, lit = torch.zeros(2, 1, 1, SIDE, SIDE)
    mask[..., 4:16, 4:16] = 1
    lit[..., 18:30, 18:30] = 1
    regions = regions_of(linear_to_srgb(light * (1 - 0.5 * mask)), mask, lit)
    made = paint(network(), regions)
    dark, bright = (
        signed_codes(lab_codes(linear_to_srgb(torch.full((1, 3, 1, 1), share * 0.6))))
        for share in (0.5, 1.0)
    )
    ideal = replace(
        made,
        pseudo_shadow=masked(dark.expand_as(light), lit),
        pseudo_lit=masked(bright.expand_as(light), mask),
    )
    assert light_loss(ideal, regions).item() == pytest.approx(0, abs=1e-4)
    undone = replace(ideal, pseudo_shadow=regions.lit)  # nothing was painted
    expected = (bright - dark)[0, 0].item()
    assert light_loss(undone, regions).item() == pytest.approx(expected, abs=1e-4)
    everywhere = torch.ones_like(mask)
    unknown = regions_of(linear_to_srgb(light), everywhere, lit)
    assert light_loss(made, unknown).item() == 0, "no lit surroundings to compare with"
    training = HQSSTraining(light=2)
    training.attach(network(), total_steps=1)
    losses, again = training.generator_step(regions)
    torch.testing.assert_close(losses["light"], 2 * light_loss(again, regions))
    losses["light"].backward()


def test_removal_losses_by_hand():
    target = torch.full((2, 3, 16, 16), 0.5)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, 0, 8, 8] = 1
    mask[1, 0, 0, 0] = 1
    refined = target + 0.1
    found = removal_losses(masked(target, mask) + 0.2, refined, target, mask, reach=2)
    assert found["removal"].item() == pytest.approx(0.2)
    assert found["refinement"].item() == pytest.approx(0.1)
    near = 13 + 6  # a diamond of 2, whole and in a corner
    assert int(dilated(mask, 2).sum()) == near
    assert found["area"].item() == pytest.approx(0.1 * near / (2 * 16 * 16))
    alone = [area_loss(refined[i : i + 1], target[i : i + 1], mask[i : i + 1], 2) for i in (0, 1)]
    assert found["area"].item() == pytest.approx(sum(alone).item() / 2)


def test_pseudo_pairs_paint_a_shadow_and_leave_e_and_g_as_they_are():
    model, training = network(3), HQSSTraining()
    before = copy.deepcopy(model.state_dict())
    training.use_network("synthesizer", model)
    images, mask, lit = batch()
    pseudo, target = training.pseudo_pairs(images, mask, lit)
    assert pseudo.shape == target.shape == (2, 3, SIDE, SIDE)
    assert pseudo.dtype == target.dtype == torch.float32
    torch.testing.assert_close(target, images.float() / 255)
    outside = (lit == 0).expand_as(images)
    assert torch.equal(pseudo[outside], target[outside]), "the photo itself outside the region"
    assert not torch.allclose(pseudo[~outside], target[~outside])
    signed = signed_codes(lab_codes(images))
    p = model(masked(signed, mask.float()), masked(signed, lit.float()))
    expected = rgb_of_codes((p + 1) / 2)
    torch.testing.assert_close(pseudo[~outside], expected[~outside])
    floats = training.pseudo_pairs(images.float() / 255, mask.float(), lit.float())
    torch.testing.assert_close(floats[0], pseudo, atol=1e-5, rtol=0)
    assert not pseudo.requires_grad
    remover = HQSSRemover(4, 1)
    losses = training.removal_losses(remover, lab_codes(pseudo), lab_codes(target), lit.float())
    assert list(losses) == ["removal", "refinement", "area"]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in remover.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_photos_of_any_size_are_painted():
    """Black is added around the photo, which regions are surrounded by anyway."""
    model = network(2)
    images, mask, lit = (each[..., :30] for each in batch(1))
    mask[..., 14:] = 0
    lit[..., 28:] = 0
    made = synthesize(model, images, mask, lit)
    assert made.shape == (1, 3, SIDE, 30)
    wide = [torch.cat([each, torch.zeros_like(each[..., :2])], 3) for each in (images, mask, lit)]
    torch.testing.assert_close(made, synthesize(model, *wide)[..., :30])
    tiny = synthesize(model, images[..., :9, :7], mask[..., :9, :7], lit[..., :9, :7])
    assert tiny.shape == (1, 3, 9, 7)


def test_stage_two_is_that_of_the_sheet():
    """R gets P in m_N and black elsewhere, F what is put together; targets are N and the photo."""
    torch.manual_seed(0)
    model, remover = network(1), HQSSRemover(4, 1, compose="add")
    images, mask, lit = batch(1)
    training = HQSSTraining(removal=2, refinement=3, area=5, area_reach=4)
    training.use_network("synthesizer", model)
    signed, m_n = signed_codes(lab_codes(images)), lit.float()
    s, n = masked(signed, mask.float()), masked(signed, m_n)
    p = model.generator(model.encoder(s), n)
    p = p * m_n + n * (1 - m_n)
    rest = masked(signed, 1 - m_n)
    r = remover.removal(p)
    o = remover.refinement(r + rest, m_n)
    expected = {
        "removal": 2 * distance(r, n),
        "refinement": 3 * distance(o, signed),
        "area": 5 * distance(masked(o, dilated(m_n, 4)), masked(signed, dilated(m_n, 4))),
    }
    codes = torch.where(lit > 0, (p + 1) / 2, lab_codes(images))
    found = training.removal_losses(remover, codes, lab_codes(images), m_n)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_it_learns_and_finalize_leaves_what_paints():
    model, training = network(), HQSSTraining()
    model = training.attach(model, total_steps=12)
    painters = torch.optim.Adam(
        [*model.encoder.parameters(), *model.generator.parameters()], 2e-3, betas=(0.5, 0.999)
    )
    judges = torch.optim.Adam(
        [*model.shadow_discriminator.parameters(), *model.lit_discriminator.parameters()], 2e-3
    )
    regions = regions_of(*batch(2))
    totals = []
    for _ in range(12):
        losses, made = training.generator_step(regions)
        total = sum(losses.values())
        painters.zero_grad()
        total.backward()
        painters.step()
        judged = sum(
            training.discriminator_step(regions, made.pseudo_shadow, made.pseudo_lit).values()
        )
        judges.zero_grad()
        judged.backward()
        judges.step()
        training.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    finished = training.finalize(model)
    assert finished is model
    assert {name.partition(".")[0] for name in finished.state_dict()} == {"encoder", "generator"}
    made = synthesize(finished, *batch(1))
    assert bool(((made >= 0) & (made <= 1)).all())


def test_wrong_use_is_refused():
    with pytest.raises(UserError, match="adversarial=-1: expected at least 0"):
        HQSSTraining(adversarial=-1)
    with pytest.raises(UserError, match="self_reconstruction and cycle are both 0"):
        HQSSTraining(self_reconstruction=0, cycle=0)
    with pytest.raises(UserError, match="got Linear: expected an HQSS to train"):
        HQSSTraining().attach(torch.nn.Linear(2, 2), total_steps=1)
    with pytest.raises(UserError, match="has no discriminators"):
        HQSSTraining().attach(network(discriminators=False), total_steps=1)
    with pytest.raises(UserError, match="teacher is HQSS: expected the synthesizer"):
        HQSSTraining().use_network("teacher", network())
    with pytest.raises(StateError, match="has no synthesizer: set synthesizer to a run"):
        HQSSTraining().pseudo_pairs(*batch())
    with pytest.raises(StateError, match="attached to no model"):
        HQSSTraining().generator_step(regions_of(*batch()))
    images, mask, lit = batch()
    with pytest.raises(UserError, match=r"lit region has shape \(1, 1, 32, 32\)"):
        regions_of(images, mask, lit[:1])
    assert HQSSTraining().networks() == {}
    assert HQSSTraining(synthesizer="runs/hqss").networks() == {"synthesizer": "runs/hqss"}
    assert find("hqss") is HQSSTraining
