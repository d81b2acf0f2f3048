"""Regions of photos: blacked out, grown and measured."""

import numpy as np
import pytest
import torch

from tenfold.errors import UserError
from tenfold.nn.shadow_codes import lab_codes
from tenfold.nn.shadow_regions import (
    area_ratios,
    codes_of,
    dilated,
    lit_region,
    masked,
    signed_codes,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((0, 0, 0), (-1, 0.00392, 0.00392)),
        ((200, 150, 100), (0.31520, 0.10399, 0.26717)),
        ((255, 0, 0), (0.06481, 0.63210, 0.53100)),
    ],
)
def test_signed_codes_are_those_of_the_sheet(colour, expected):
    pixel = torch.tensor(colour, dtype=torch.uint8).reshape(1, 3, 1, 1)
    signed = signed_codes(lab_codes(pixel))
    torch.testing.assert_close(signed.flatten(), torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes_of(signed), lab_codes(pixel))


def test_masked_is_the_photo_or_black_and_two_halves_make_a_darker_photo():
    torch.manual_seed(0)
    photo = torch.rand(2, 3, 8, 8) * 2 - 1
    mask = (torch.rand(2, 1, 8, 8) > 0.5).float()
    torch.testing.assert_close(masked(photo, torch.ones_like(mask)), photo, atol=1e-7, rtol=1e-6)
    black = masked(photo, torch.zeros_like(mask))
    assert torch.equal(black[:, 0], torch.full((2, 8, 8), -1.0))
    assert torch.equal(black[:, 1:].abs(), torch.zeros(2, 2, 8, 8))
    both = masked(photo, mask) + masked(photo, 1 - mask)
    torch.testing.assert_close(both[:, :1], photo[:, :1] - 1)
    torch.testing.assert_close(both[:, 1:], photo[:, 1:])


def crosses(mask: torch.Tensor, times: int) -> torch.Tensor:
    """The release's way: dilations by a cross of 3 x 3, one after the other."""
    grown = mask.numpy() > 0
    for _ in range(times):
        padded = np.pad(grown, ((0, 0), (0, 0), (1, 1), (1, 1)))
        grown = (
            padded[..., 1:-1, 1:-1] | padded[..., :-2, 1:-1] | padded[..., 2:, 1:-1]
            | padded[..., 1:-1, :-2] | padded[..., 1:-1, 2:]
        )  # fmt: skip
    return torch.from_numpy(grown.astype(np.float32))


@pytest.mark.parametrize("reach", [0, 1, 3, 50])
def test_dilation_is_that_of_many_crosses(reach):
    torch.manual_seed(reach)
    mask = (torch.rand(2, 1, 33, 47) > 0.995).float()
    grown = dilated(mask, reach)
    assert torch.equal(grown, crosses(mask, reach))
    assert bool((grown >= mask).all()), "the grown mask holds the mask"


def test_one_pixel_grows_to_a_diamond():
    mask = torch.zeros(1, 1, 128, 128, dtype=torch.uint8)
    mask[..., 64, 64] = 1
    assert int(dilated(mask, 50).sum()) == 5101
    assert dilated(mask, 50).dtype == torch.uint8
    assert not bool(dilated(torch.zeros(1, 1, 9, 9), 5).any()), "nothing grows from nothing"
    with pytest.raises(UserError, match="reach=-1"):
        dilated(mask, -1)


def test_lit_regions_leave_the_shadow_out_and_ratios_are_of_areas():
    shadow = torch.zeros(2, 1, 10, 10)
    shadow[0, :, :4, :5] = 1
    other = torch.zeros(2, 1, 10, 10)
    other[:, :, 2:6, :5] = 1
    lit = lit_region(other, shadow)
    assert not bool((lit * shadow).any())
    assert int(lit[0].sum()) == 10
    assert area_ratios(lit, shadow).tolist() == [0.5, torch.inf]
