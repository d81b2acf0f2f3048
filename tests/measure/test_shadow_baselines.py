"""Baselines without a network, on photos whose shadows are one known gain, or affine map."""

import pytest
import torch

from tenfold.errors import UserError
from tenfold.measure.shadow_baselines import (
    NARROW_REACH,
    LabAffineFit,
    oracle_gain,
    ring_gain,
    untouched,
)
from tenfold.nn.lab import lab_to_rgb, rgb_to_lab
from tenfold.nn.shadow_gain import apply_gains

pytestmark = pytest.mark.unit


@pytest.fixture
def scene():
    """A photo whose shadow takes away one share of the light of each colour."""
    torch.manual_seed(0)
    coarse = torch.rand(2, 3, 6, 6) * 0.5 + 0.35
    truth = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 16:48, 20:44] = 1
    mask[1, :, 5:30, 5:60] = 1
    shares = torch.tensor([[0.3, 0.35, 0.4], [0.5, 0.5, 0.6]])
    return apply_gains(truth, shares, mask), mask, truth


def error(made, truth, mask):
    return float(((made - truth).abs() * mask).sum() / mask.sum() / 3)


def test_untouched_is_the_photo(scene):
    images, mask, _ = scene
    assert untouched(images, mask) is images


def test_the_oracle_undoes_a_shadow_of_one_gain(scene):
    images, mask, truth = scene
    assert error(images, truth, mask) > 0.15
    torch.testing.assert_close(oracle_gain(images, mask, truth), truth, atol=1e-4, rtol=0)


def test_an_oracle_without_shadow_changes_nothing(scene):
    images, mask, truth = scene
    torch.testing.assert_close(
        oracle_gain(images, torch.zeros_like(mask), truth), images, atol=1e-6, rtol=0
    )


def test_the_ring_finds_the_gain_of_a_flat_surface():
    truth = torch.tensor([0.7, 0.5, 0.4])[None, :, None, None].expand(1, 3, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    images = apply_gains(truth, torch.tensor([[0.25, 0.3, 0.35]]), mask)
    torch.testing.assert_close(ring_gain(images, mask), truth, atol=1e-4, rtol=0)


def test_the_ring_helps_and_its_reach_counts(scene):
    images, mask, truth = scene
    made, narrow = ring_gain(images, mask), ring_gain(images, mask, NARROW_REACH, 0.0)
    assert error(made, truth, mask) < 0.5 * error(images, truth, mask)
    assert not torch.equal(made, narrow)
    assert torch.equal(made[mask.expand_as(made) == 0], images[mask.expand_as(made) == 0])


def test_an_affine_fit_finds_the_map_that_made_the_shadow(scene):
    """Lit LAB of shadowed LAB by a known matrix: learnt on one photo, right on another."""
    truth, mask = scene[2], scene[1]
    matrix = torch.tensor([[0.5, 0.02, -0.01], [0.03, 0.8, 0.05], [-0.02, 0.01, 0.9]])
    lab = rgb_to_lab(truth)
    shadowed = (lab.movedim(1, 3) @ matrix + torch.tensor([4.0, 1.0, -3.0])).movedim(3, 1)
    images = torch.where(mask > 0, lab_to_rgb(shadowed), truth)
    fit = LabAffineFit.learnt([(images[:1], mask[:1], truth[:1])])
    assert fit.weights.shape == (4, 3)
    assert error(images[1:], truth[1:], mask[1:]) > 0.1
    torch.testing.assert_close(fit(images[1:], mask[1:]), truth[1:], atol=2e-3, rtol=0)


def test_an_affine_fit_of_batches_is_that_of_all_together(scene):
    images, mask, truth = scene
    whole = LabAffineFit.learnt([(images, mask, truth)])
    parts = LabAffineFit.learnt([(images[i : i + 1], mask[i : i + 1], truth[i : i + 1])
                                 for i in range(2)])  # fmt: skip
    torch.testing.assert_close(whole.weights, parts.weights)
    made = whole(images, mask)
    assert torch.equal(made[mask.expand_as(made) == 0], images[mask.expand_as(made) == 0])


def test_a_fit_without_shadow_is_refused(scene):
    images, mask, truth = scene
    with pytest.raises(UserError, match="no pixel is in shadow"):
        LabAffineFit.learnt([(images, torch.zeros_like(mask), truth)])
