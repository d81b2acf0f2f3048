"""Gram, style and feature losses, and OMGD's terms, against the sheet and other libraries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.methods.omgd_terms import (
    structural_similarity,
    structural_similarity_map,
    total_variation,
)
from tenfold.methods.perceptual import Perceptual, feature_loss, gram, style_loss

pytestmark = pytest.mark.unit


class Stages(nn.Module):
    """Four maps of different widths and sides, with a batch norm that must not learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in [(3, 4, 1), (4, 8, 2), (8, 8, 2), (8, 16, 2)]
        )

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


def images(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- Gram, style, feature --------------------------------------------------------------------------


def test_gram_is_the_sheets():  # oracle 5
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 1, 2)
    expected = torch.tensor([[[1.25, 2.75], [2.75, 6.25]]])
    assert torch.equal(gram(features), expected)


def test_gram_does_not_mix_images_and_takes_any_layout():
    features = torch.randn(3, 5, 4, 6)
    each = torch.stack([torch.einsum("chw,dhw->cd", f, f) / (5 * 4 * 6) for f in features])
    assert torch.allclose(gram(features), each, atol=1e-6)
    last = features.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(gram(last), each, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_is_float32_whatever_the_autocast(dtype):
    features = torch.full((1, 2, 256, 256), 3.0, dtype=dtype)  # sums of 589,824 overflow float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gram(features)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.full((1, 2, 2), 4.5))


def test_losses_by_hand():
    one, two = torch.ones(1, 1, 2, 2), torch.ones(1, 2, 1, 1)
    student, teacher = [3 * one, 2 * two], [one, -1 * two]
    # Gram matrices 9 and 1; all 2 and all 0.5
    assert style_loss(student, teacher).item() == pytest.approx(8 + 1.5)
    assert feature_loss(student, teacher).item() == pytest.approx(3)  # the second map alone


def test_losses_refuse_what_does_not_fit():
    maps = [torch.zeros(1, 2, 4, 4)] * 2
    with pytest.raises(UserError, match="2 maps of the student and 1 of the teacher"):
        style_loss(maps, maps[:1])
    with pytest.raises(UserError, match="expected equal shapes"):
        style_loss(maps, [torch.zeros(1, 3, 4, 4)] * 2)
    with pytest.raises(UserError, match="expected equal shapes"):
        feature_loss(maps, [torch.zeros(1, 2, 4, 3)] * 2)
    with pytest.raises(UserError, match="second of the extractor's maps"):
        feature_loss(maps[:1], maps[:1])


# -- Perceptual ------------------------------------------------------------------------------------


def test_perceptual_weights_the_two_losses():
    extractor = Stages().eval()
    student, teacher = images(1), images(2)
    found = Perceptual(extractor)(student, teacher)
    maps = extractor(student), extractor(teacher)
    assert found["style"].item() == pytest.approx(1e4 * style_loss(*maps).item(), rel=1e-5)
    assert found["feature"].item() == pytest.approx(1e1 * feature_loss(*maps).item(), rel=1e-5)
    same = Perceptual(extractor)(student, student)
    assert same["style"] == 0
    assert same["feature"] == 0


def test_a_weight_of_zero_gives_zero():
    losses = Perceptual(Stages(), style=0, feature=2)(images(1), images(2))
    assert losses["style"] == 0
    assert losses["feature"] > 0
    losses = Perceptual(Stages(), style=2, feature=0)(images(1), images(2))
    assert losses["style"] > 0
    assert losses["feature"] == 0


def test_gradients_reach_the_student_alone_and_the_extractor_stays():
    extractor = Stages()
    before = {key: value.clone() for key, value in extractor.state_dict().items()}
    perceptual = Perceptual(extractor).train()
    student, teacher = images(1).requires_grad_(), images(2).requires_grad_()
    sum(perceptual(student, teacher).values()).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(parameter.grad is None for parameter in extractor.parameters())
    assert all(torch.equal(before[key], value) for key, value in extractor.state_dict().items())
    assert perceptual.training
    assert not any(module.training for module in extractor.modules())


def test_the_gradient_is_that_of_the_formula():
    perceptual = Perceptual(Stages(), style=30, feature=2)
    student, teacher = images(1).requires_grad_(), images(2)
    losses = perceptual(student, teacher)
    (losses["style"] + losses["feature"]).backward()
    direction = student.grad / student.grad.norm()

    def total(y):
        with torch.no_grad():
            a, b = perceptual.extractor(y), perceptual.extractor(teacher)
            return (30 * style_loss(a, b) + 2 * feature_loss(a, b)).item()

    step = 0.03
    rise = (total(student + step * direction) - total(student - step * direction)) / (2 * step)
    assert student.grad.norm().item() == pytest.approx(rise, rel=0.02)


def test_bfloat16_is_near_and_float32_ignores_the_autocast_around():
    student, teacher = images(1), images(2)
    exact = Perceptual(Stages())(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Perceptual(Stages())(student, teacher)
    low = Perceptual(Stages(), precision="bfloat16")
    assert low.extractor.layers[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    low.extractor.layers[3].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    rough = low(student, teacher)
    assert seen == [torch.bfloat16] * 2
    for name, value in exact.items():
        assert inside[name].item() == value.item()
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(value.item(), rel=0.05)
        assert rough[name].item() != value.item()


@pytest.mark.parametrize("weights", [(0, 0), (-1, 1), (1, -1), (math.nan, 1)])
def test_weights_out_of_range_are_refused(weights):
    with pytest.raises(UserError, match="expected weights of at least 0"):
        Perceptual(Stages(), style=weights[0], feature=weights[1])


def test_other_bad_input_is_refused():
    with pytest.raises(UserError, match="expected 'float32' or 'bfloat16'"):
        Perceptual(Stages(), precision="float16")
    with pytest.raises(UserError, match="expected equal shapes"):
        Perceptual(Stages())(images(1), images(1)[:1])


# -- OMGD's terms ----------------------------------------------------------------------------------


@pytest.mark.parity
def test_structural_similarity_is_torchmetrics_inside():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a = images(1)
    b = (a + 0.3 * images(2)).clamp(-1, 1)
    _, theirs = structural_similarity_index_measure(
        a, b, sigma=1.5, kernel_size=11, data_range=1.0, return_full_image=True
    )
    ours = structural_similarity_map(a, b)
    assert ours.shape == a.shape
    inside = (..., slice(5, -5), slice(5, -5))
    assert torch.allclose(ours[inside], theirs[inside], atol=1e-4)


@pytest.mark.parity
def test_structural_similarity_pads_with_zeros():
    """The whole map, against the definition with a two-dimensional window in float64."""
    a, b = images(1).double(), images(2).double()
    line = torch.exp(-((torch.arange(11.0).double() - 5) ** 2) / 4.5)
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(3, 1, 11, 11)

    def blur(x):
        return nn.functional.conv2d(x, window, padding=5, groups=3)

    mean_a, mean_b = blur(a), blur(b)
    top = (2 * mean_a * mean_b + 1e-4) * (2 * (blur(a * b) - mean_a * mean_b) + 9e-4)
    spread = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    expected = top / ((mean_a**2 + mean_b**2 + 1e-4) * (spread + 9e-4))
    found = structural_similarity_map(a.float(), b.float())
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert structural_similarity(a.float(), b.float()).item() == pytest.approx(
        expected.mean().item(), abs=1e-5
    )


def test_structural_similarity_of_equal_and_opposite_images():
    a = images(1)
    assert structural_similarity(a, a).item() == pytest.approx(1, abs=1e-5)
    assert structural_similarity(0.5 + 0.4 * a, 0.5 - 0.4 * a).item() < 0  # the contrast inverted
    student = a.clone().requires_grad_()
    (1 - structural_similarity(student, images(2))).backward()
    assert student.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert structural_similarity(a, a).dtype == torch.float32
    with pytest.raises(UserError, match="expected equal shapes"):
        structural_similarity(a, a[:1])


def test_total_variation_by_hand():
    image = torch.tensor([[0.0, 1.0, 1.0], [2.0, 1.0, 0.0]]).reshape(1, 1, 2, 3)
    # across: 1 + 0 + 1 + 1; down: 2 + 0 + 1
    assert total_variation(image).item() == 6
    assert total_variation(image.expand(2, 3, 2, 3)).item() == 36
    assert total_variation(torch.ones(1, 3, 4, 4)).item() == 0
