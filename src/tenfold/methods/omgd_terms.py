"""Two terms of OMGD that compare or smooth images: structural similarity and total variation.

Yuxi Ren et al., "Online multi-granularity distillation for GAN compression", ICCV 2021 (arXiv
2108.06908). Structural similarity is that of Wang et al., "Image quality assessment: from error
visibility to structural similarity", 2004, with the window and the constants of OMGD:

    SSIM = (2 mu_a mu_b + C1)(2 sigma_ab + C2)
           / ((mu_a^2 + mu_b^2 + C1)(sigma_a^2 + sigma_b^2 + C2))

where means and (co)variances are taken under an 11x11 Gaussian of deviation 1.5. C1 = 1e-4 and
C2 = 9e-4 belong to images in [0, 1]; OMGD uses them for images in [-1, 1] and pads with zeros, and
so do we: this is a loss, no figure to compare with others' SSIM.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.errors import UserError

__all__ = ["structural_similarity", "structural_similarity_map", "total_variation"]

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 1e-4, 9e-4


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean structural similarity of images, 1 for equal ones.

    OMGD's loss is 1 minus this.

    Args:
        a: `(B, C, H, W)` in [-1, 1].
        b: likewise.

    Raises:
        UserError: shapes that differ.

    >>> image = torch.linspace(-1, 1, 16 * 16).reshape(1, 1, 16, 16)
    >>> round(structural_similarity(image, image).item(), 4)
    1.0
    """
    return structural_similarity_map(a, b).mean()


def structural_similarity_map(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity around each pixel, `(B, C, H, W)` in float32.

    Raises:
        UserError: shapes that differ.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise UserError(
            f"images {tuple(a.shape)} and {tuple(b.shape)}: expected equal shapes (B, C, H, W)"
        )
    with torch.autocast(a.device.type, enabled=False):
        # variances are differences of near-equal numbers: float32 at least
        a, b = a.float(), b.float()
        mean_a, mean_b, square_a, square_b, product = _blurred(
            torch.stack([a, b, a * a, b * b, a * b])
        )
        variance_a = square_a - mean_a * mean_a
        variance_b = square_b - mean_b * mean_b
        covariance = product - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
        similarity: Tensor = luminance * (2 * covariance + _C2) / (variance_a + variance_b + _C2)
        return similarity


def total_variation(images: Tensor) -> Tensor:
    """Return the sum of absolute differences of neighbouring pixels, over rows and columns.

    A sum over images, channels and pixels, as OMGD's weight of 1e-5 assumes; float32.

    Args:
        images: `(B, C, H, W)`.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [3.0, 1.0]]]]))
    tensor(6.)
    """
    images = images.float()
    across = (images[..., 1:] - images[..., :-1]).abs().sum()
    return across + (images[..., 1:, :] - images[..., :-1, :]).abs().sum()


def _blurred(images: Tensor) -> Tensor:
    """Blur the last two axes by the Gaussian, one axis after the other, with zeros around."""
    position = torch.arange(_WINDOW, device=images.device, dtype=images.dtype) - _WINDOW // 2
    weights = torch.exp(-(position**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).reshape(1, 1, 1, -1)
    margin = _WINDOW // 2
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = functional.conv2d(flat, weights, padding=(0, margin))
    flat = functional.conv2d(flat, weights.transpose(2, 3), padding=(margin, 0))
    return flat.reshape(images.shape)
