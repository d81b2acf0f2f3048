"""sRGB to LAB: the sheet's worked colours, scikit-image, exact round trips, finite gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import lab2rgb, rgb2lab

from tenfold.errors import UserError
from tenfold.nn.lab import lab_to_rgb, rgb_to_lab

pytestmark = pytest.mark.unit

ORACLES = [
    ((200, 150, 100), (65.7601, 12.7589, 33.5647)),
    ((13, 77, 201), (37.1300, 30.9490, -69.0112)),
    ((255, 0, 0), (53.2406, 80.0923, 67.2028)),
]


def every_few_colours(step: int = 5) -> torch.Tensor:
    """uint8 `(2, 3, n, n)` over the whole cube, dark colours and both branches among them."""
    levels = torch.cat([torch.arange(14), torch.arange(14, 256, step), torch.tensor([255])])
    cube = torch.cartesian_prod(levels, levels, levels).to(torch.uint8)
    side = int((len(cube) / 2) ** 0.5)
    return cube[: 2 * side * side].view(2, side, side, 3).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(("colour", "expected"), ORACLES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_worked_colours(colour, expected, dtype):
    codes = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1)
    images = codes if dtype == torch.uint8 else codes.to(dtype) / 255
    found = rgb_to_lab(images)
    assert found.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    torch.testing.assert_close(
        found.flatten().double(), torch.tensor(expected).double(), atol=1e-4, rtol=0
    )
    back = 255 * lab_to_rgb(found)
    torch.testing.assert_close(back, codes.to(back), atol=2e-3, rtol=0)


@pytest.mark.parity
def test_equals_scikit_image():
    codes = every_few_colours()
    pixels = codes.permute(0, 2, 3, 1).numpy()
    expected = torch.from_numpy(rgb2lab(pixels)).permute(0, 3, 1, 2)
    for images, bound in ((codes, 1e-4), (codes.float() / 255, 1e-4), (codes.double() / 255, 1e-9)):
        assert (rgb_to_lab(images) - expected).abs().max() < bound
    lab = np.random.default_rng(0).uniform((0, -100, -100), (100, 100, 100), (40, 40, 3))
    with pytest.warns(UserWarning, match="negative Z values"):
        back = lab2rgb(lab)  # colours beyond the screen's too
    found = lab_to_rgb(torch.from_numpy(lab).permute(2, 0, 1)[None])
    torch.testing.assert_close(found[0].permute(1, 2, 0).numpy(), back, atol=1e-9, rtol=0)


def test_round_trip_of_codes_is_exact():
    codes = every_few_colours(3)
    back = lab_to_rgb(rgb_to_lab(codes)).mul(255).round().to(torch.uint8)
    assert torch.equal(back, codes)


def test_unclipped_colours_go_there_and_back():
    lab = torch.tensor([50.0, 100.0, -100.0]).view(1, 3, 1, 1).double()
    assert lab_to_rgb(lab).max() <= 1
    assert lab_to_rgb(lab, clip=False).max() > 1


def test_gradients_are_right_and_finite_everywhere():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(rgb_to_lab, (images,))
    lab = rgb_to_lab(images.detach()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lab_to_rgb(x, clip=False), (lab,))
    for convert, edge in ((rgb_to_lab, 0.0), (rgb_to_lab, 1.0), (lab_to_rgb, 0.0)):
        flat = torch.full((1, 3, 4, 4), edge).requires_grad_()
        convert(flat).sum().backward()
        assert flat.grad.isfinite().all()


def test_autocast_and_half_keep_the_precision():
    images = every_few_colours(60).float() / 255
    expected = rgb_to_lab(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(rgb_to_lab(images), expected, atol=0, rtol=0)
    half = rgb_to_lab(images.half())
    assert half.dtype == torch.float16
    assert (half - rgb_to_lab(images.half().float())).abs().max() < 0.07


@pytest.mark.parametrize(
    "images",
    [torch.rand(1, 1, 4, 4), torch.rand(4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.int64)],
)
def test_what_is_no_image_is_refused(images):
    with pytest.raises(UserError, match=r"expected float.*\(B, 3, H, W\)"):
        rgb_to_lab(images)
    with pytest.raises(UserError, match=r"expected float"):
        lab_to_rgb(images)
