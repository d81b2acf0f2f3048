"""The loss of LAB-Net against worked numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.nn.lab_loss import VggCuts, gradient_loss, lab_loss, perceptual_loss, sobel

pytestmark = pytest.mark.unit


def impulse():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1
    return x


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (impulse(), 0.64),
        (torch.ones(1, 1, 4, 4), 3.5),
        (torch.arange(16.0).reshape(1, 1, 4, 4) / 15, 2.916667),
    ],
)
def test_the_gradient_loss_of_worked_images(image, expected):
    three = image.expand(2, 3, -1, -1)
    for each in (image, three):
        loss = gradient_loss(each, torch.zeros_like(each))
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert gradient_loss(each, each) == 0


def test_sobel_keeps_channels_apart():
    image = torch.zeros(1, 2, 5, 6)
    image[0, 1] = torch.arange(6.0)  # rises to the right
    edges = sobel(image)
    assert edges.shape == (1, 4, 5, 6)
    assert not edges[0, :2].any()
    assert (edges[0, 2, 1:-1, 1:-1].abs() == 8).all()
    assert (edges[0, 3, 1:-1, 1:-1] == 0).all()


def test_the_loss_is_the_weighted_sum_of_its_parts():
    torch.manual_seed(0)
    output, target = torch.rand(2, 3, 8, 9, requires_grad=True), torch.rand(2, 3, 8, 9)
    loss = lab_loss(output, target)
    assert loss.perceptual.item() == pytest.approx((output - target).abs().mean().item())
    assert loss.mse.item() == pytest.approx(nn.functional.mse_loss(output, target).item())
    expected = loss.perceptual + 10 * loss.gradient + 100 * loss.mse
    assert loss.total.item() == pytest.approx(expected.item())
    loss.total.backward()
    assert torch.isfinite(output.grad).all()
    short = lab_loss(output, target, gradient=0)
    assert short.total.item() == pytest.approx((loss.perceptual + 100 * loss.mse).item())


def test_halves_are_summed_in_float32():
    output = torch.full((1, 3, 300, 300), 1.0, dtype=torch.float16)
    loss = lab_loss(output, torch.zeros_like(output))
    assert loss.total.dtype == torch.float32
    assert loss.mse == 1


# -- maps of an extractor -------------------------------------------------------------------------


def test_maps_are_divided_by_their_weights():
    def extractor(x):
        return [(i + 1) * x for i in range(5)]

    loss = perceptual_loss(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), extractor)
    expected = 1 + 1 / 2.6 + 2 / 4.8 + 3 / 3.7 + 4 / 5.6 + 5 / 0.15
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_cuts_of_vgg16():
    from torchvision.models import vgg16

    torch.manual_seed(0)
    features = vgg16().features
    cuts = VggCuts(features).train()
    assert not cuts.training
    assert not any(p.requires_grad for p in cuts.parameters())
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    maps = cuts(x)
    assert [tuple(each.shape[1:]) for each in maps] == [
        (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2),
    ]  # fmt: skip
    assert all((each >= 0).all() for each in maps[:4])
    assert (maps[4] < 0).any()  # ahead of its ReLU
    assert torch.equal(maps[0], features[:4](x))
    perceptual_loss(x, torch.rand(1, 3, 32, 32), cuts).backward()
    assert x.grad.abs().sum() > 0


# -- refusals -------------------------------------------------------------------------------------


def test_refusals():
    one, other = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5)
    for loss in (lab_loss, gradient_loss, perceptual_loss):
        with pytest.raises(UserError, match=r"shapes \(1, 3, 4, 4\) and \(1, 3, 4, 5\)"):
            loss(one, other)
    with pytest.raises(UserError, match="gave 1 maps: expected 5"):
        perceptual_loss(one, one, lambda x: [x])
    with pytest.raises(UserError, match="not those of a VGG16"):
        VggCuts(nn.Sequential(nn.Conv2d(3, 3, 3)))


def test_weights_of_pixels_make_weighted_means():
    generator = torch.Generator().manual_seed(7)
    output, target = torch.rand(2, 2, 3, 9, 8, generator=generator).double()
    weight = torch.rand(2, 1, 9, 8, generator=generator).double()
    found = lab_loss(output, target, weight=weight)
    share = weight / weight.sum()
    assert float(found.mse) == pytest.approx(
        float((share * (output - target).square().mean(1, keepdim=True)).sum())
    )
    assert float(found.perceptual) == pytest.approx(
        float((share * (output - target).abs().mean(1, keepdim=True)).sum())
    )
    # Weights that are all alike are none.
    alike = lab_loss(output, target, weight=torch.full_like(weight, 0.3))
    for ours, plain in zip(alike, lab_loss(output, target), strict=True):
        torch.testing.assert_close(ours, plain)
    # Where the weight is zero nothing counts.
    inside = torch.zeros_like(weight)
    inside[..., 3:6, 3:6] = 1
    other = output.clone()
    other[..., 0, :] += 1
    torch.testing.assert_close(
        lab_loss(other, target, weight=inside).total, lab_loss(output, target, weight=inside).total
    )
