"""The focal frequency loss against its definition, and against values worked out by hand."""

import pytest
import torch

from tenfold.errors import UserError
from tenfold.nn.focal_frequency import focal_frequency_loss

pytestmark = pytest.mark.unit


def impulse() -> torch.Tensor:
    image = torch.zeros(1, 1, 4, 4)
    image[..., 1, 2] = 1
    return image


def plain(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The definition, over the whole spectrum, channel by channel."""
    losses = []
    for one, other in zip(made.flatten(0, 1), wanted.flatten(0, 1), strict=True):
        spectra = [torch.fft.fft2(plane.double(), norm="ortho") for plane in (one, other)]
        distance = (spectra[0] - spectra[1]).abs().square()
        weight = distance.detach().sqrt()
        weight = (weight / weight.max()).nan_to_num(0).clamp(0, 1)
        losses.append((weight * distance).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (impulse(), 0.0625),
        (torch.full((1, 1, 4, 4), 0.5), 0.25),
        ((torch.arange(16.0) / 16).reshape(1, 1, 4, 4), 0.247897),
        (torch.zeros(1, 1, 4, 4), 0.0),
    ],
    ids=["impulse", "constant", "ramp", "equal"],
)
def test_values_of_the_sheet(made, expected):
    loss = focal_frequency_loss(made, torch.zeros_like(made))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [(8, 6), (5, 7), (4, 9), (7, 8), (2, 2)])
def test_half_of_the_spectrum_is_enough(size):
    torch.manual_seed(0)
    made, wanted = torch.randn(2, 3, *size, requires_grad=True), torch.randn(2, 3, *size)
    loss, expected = focal_frequency_loss(made, wanted), plain(made, wanted)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient, wanted_gradient = (torch.autograd.grad(each, made)[0] for each in (loss, expected))
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)


def test_a_batch_has_the_mean_of_its_images_and_equal_ones_have_no_gradient():
    torch.manual_seed(1)
    made, wanted = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    single = [focal_frequency_loss(made[i : i + 1], wanted[i : i + 1]) for i in range(2)]
    both = focal_frequency_loss(made, wanted)
    torch.testing.assert_close(both, torch.stack(single).mean())
    same = made.clone().requires_grad_()
    focal_frequency_loss(same, made).backward()
    assert torch.equal(same.grad, torch.zeros_like(made))


def test_half_precision_is_computed_in_floats_and_nan_is_not_hidden():
    image = torch.rand(1, 1, 8, 8)
    assert focal_frequency_loss(image.bfloat16(), torch.zeros(1, 1, 8, 8)).dtype == torch.float32
    assert focal_frequency_loss(image * torch.nan, image).isnan()


def test_shapes_that_differ_are_refused():
    with pytest.raises(UserError, match=r"\(1, 1, 4, 4\) and \(1, 3, 4, 4\): expected one shape"):
        focal_frequency_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4))
