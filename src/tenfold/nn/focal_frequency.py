"""The focal frequency loss: images compared by their spectra, hard frequencies counting more.

Source: "Focal Frequency Loss for Image Reconstruction and Synthesis" (ICCV 2021, arXiv 2012.12821),
with alpha 1. Of each channel of each image, with F the two-dimensional orthonormal DFT:

    d = |F(made) - F(wanted)|^2
    w = sqrt(d) / max over the plane of sqrt(d), no gradient, 0 where both are equal
    loss = mean of w d

The spectrum of real values is symmetric: half of it is computed, and counts twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.errors import UserError

__all__ = ["focal_frequency_loss"]


def focal_frequency_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Return the focal frequency loss of images, a scalar in float32.

    Args:
        made: `(B, C, H, W)`.
        wanted: likewise.

    Raises:
        UserError: other shapes, or shapes that differ.

    >>> impulse = torch.zeros(1, 1, 4, 4)
    >>> impulse[..., 0, 0] = 1
    >>> focal_frequency_loss(impulse, torch.zeros_like(impulse)).item()
    0.0625
    """
    if made.ndim != 4 or made.shape != wanted.shape:
        raise UserError(
            f"the focal frequency loss got images of shapes {tuple(made.shape)} and "
            f"{tuple(wanted.shape)}: expected one shape, (B, C, H, W)"
        )
    # One transform of the difference; in float32, as there are no transforms of half precision.
    spectrum = torch.fft.rfft2(made.float() - wanted.float(), norm="ortho")
    distance = spectrum.real.square() + spectrum.imag.square()
    with torch.no_grad():
        root = distance.sqrt()
        weight = (root / root.amax((2, 3), keepdim=True)).nan_to_num(0.0).clamp(0, 1)
    counted: Tensor = weight * distance * _counts(made.shape[3], distance)
    return counted.sum() / made.numel()


def _counts(width: int, half: Tensor) -> Tensor:
    """Return how often each column of the half spectrum occurs in the whole one."""
    counts = half.new_full((half.shape[3],), 2.0)
    counts[0] = 1.0
    if width % 2 == 0:
        counts[-1] = 1.0
    return counts
