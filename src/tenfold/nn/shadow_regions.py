"""Regions of photos as HQSS has them: photos with all else black, and what shape regions have.

Images here are *signed codes*, 2 x codes - 1 with the LAB codes of `tenfold.nn.shadow_codes`, about
[-1, 1]. Black is (-1, 0, 0): the release's a and b of black are 0.004, as it blacks out RGB in one
place and codes in another; here it is one filler. Source: "Shadow Removal by High-Quality Shadow
Synthesis" (arXiv 2212.04108) and its released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.errors import UserError

__all__ = ["area_ratios", "codes_of", "dilated", "lit_region", "masked", "signed_codes"]

FAR = 1e6  # further than any pixel is; sums of such distances are exact in float32


def signed_codes(codes: Tensor) -> Tensor:
    """Return codes in [0, 1] as HQSS's networks have them, in [-1, 1]."""
    return 2 * codes - 1


def codes_of(signed: Tensor) -> Tensor:
    """Return signed codes as codes in [0, 1]."""
    return (signed + 1) / 2


def masked(signed: Tensor, mask: Tensor) -> Tensor:
    """Return signed codes with all but a region black: ((L + 1) m - 1, a m, b m).

    Args:
        signed: `(B, 3, H, W)`.
        mask: `(B, 1, H, W)`, 1 in the region.

    >>> grey = torch.full((1, 3, 1, 2), 0.5)
    >>> masked(grey, torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)).squeeze().tolist()
    [[0.5, -1.0], [0.5, 0.0], [0.5, 0.0]]
    """
    dark = torch.tensor([1.0, 0.0, 0.0], dtype=signed.dtype, device=signed.device)[:, None, None]
    return (signed + dark) * mask - dark


def lit_region(other: Tensor, shadow: Tensor) -> Tensor:
    """Return where another photo's shadow would fall on what is lit here: m' minus (m' and m_S).

    Args:
        other: that photo's mask, zeros and ones, any shape.
        shadow: this photo's, of the same shape.
    """
    return other * (1 - shadow)


def area_ratios(lit: Tensor, shadow: Tensor) -> Tensor:
    """Return the areas of lit regions as shares of the shadows', `(B,)`; infinite without shadow.

    Args:
        lit: `(B, 1, H, W)` of zeros and ones.
        shadow: likewise.
    """
    areas = [mask.flatten(1).sum(1, dtype=torch.float64) for mask in (lit, shadow)]
    return torch.where(areas[1] > 0, areas[0] / areas[1], torch.inf)


def dilated(mask: Tensor, reach: int) -> Tensor:
    """Return masks grown by all pixels within a taxicab distance: a diamond around each pixel.

    It is what `reach` dilations by the cross of 3 x 3 give, at a cost that doesn't grow with them.

    Args:
        mask: `(B, 1, H, W)` of zeros and ones.
        reach: in pixels, at least 0.

    Raises:
        UserError: a reach below 0.
    """
    if reach < 0:
        raise UserError(f"reach={reach}: expected at least 0 pixels")
    distance = torch.where(mask > 0, 0.0, FAR).to(torch.float32)
    for axis in (2, 3):
        distance = _spread(distance, axis)
    return (distance <= reach).to(mask.dtype)


def _spread(distance: Tensor, axis: int) -> Tensor:
    """Return the least of distance[j] + |i - j| over all j of an axis, for each i."""
    shape = [1] * distance.ndim
    shape[axis] = -1
    place = torch.arange(distance.shape[axis], device=distance.device, dtype=distance.dtype)
    place = place.reshape(shape)
    before = (distance - place).cummin(axis).values + place
    after = (distance + place).flip(axis).cummin(axis).values.flip(axis) - place
    return torch.minimum(before, after)
