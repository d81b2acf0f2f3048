"""What removes shadows without a network: beside these, a network shows what it is worth.

    untouched      the photo as it is
    LabAffineFit   one affine map of LAB for all photos, learnt from pairs by least squares
    ring_gain      each photo's shadow times the gain of the mean light around it, in linear light
    ring_guess     what removers of `guess: ring` start from: a steadier such gain, soft at its edge
    oracle_gain    each photo's shadow times the gain of the truth itself: the most that one gain a
                   colour and photo can do, and nothing that anybody has without the truth

All take RGB in [0, 1], `(B, 3, H, W)`, and masks of zeros and ones, `(B, 1, H, W)`, and change
nothing outside the mask. The illumination behind gains is that of Shor and Lischinski, "The Shadow
Meets the Mask: Pyramid-Based Shadow Removal", 2008: lit and shadowed light of a surface are
proportional, channel by channel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.nn.lab import lab_to_rgb, rgb_to_lab
from tenfold.nn.shadow_codes import srgb_to_linear
from tenfold.nn.shadow_gain import (
    GAP,
    LEAST,
    LEAST_LIGHT,
    MOST,
    REACH,
    apply_gains,
    mean_gains,
    ring_guess,
)

__all__ = ["NARROW_REACH", "LabAffineFit", "oracle_gain", "ring_gain", "ring_guess", "untouched"]

NARROW_REACH = 5 / 256  # of the shorter side: the ring that LAB-Net looks at


def untouched(images: Tensor, mask: Tensor) -> Tensor:
    """Return the images as they are."""
    return images


def ring_gain(images: Tensor, mask: Tensor, reach: float = REACH, gap: float = GAP) -> Tensor:
    """Return images whose shadows have the mean light of their surroundings.

    Args:
        images: sRGB in [0, 1], `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` of zeros and ones.
        reach: how far from the mask its surroundings go, as a share of the shorter side.
        gap: how far from the mask they begin, likewise, and how deep inside the shadow does: what
            lies between is in the penumbra.
    """
    return apply_gains(images, mean_gains(images, mask, reach, gap), mask)


def oracle_gain(images: Tensor, mask: Tensor, truth: Tensor) -> Tensor:
    """Return images whose shadows have the mean light that the truth has there.

    Args:
        images: sRGB in [0, 1], `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` of zeros and ones.
        truth: the images without shadow.
    """
    count = mask.sum((2, 3)).clamp(min=1)
    inside, lit = ((srgb_to_linear(each) * mask).sum((2, 3)) / count for each in (images, truth))
    gains = (lit / inside.clamp(min=LEAST_LIGHT)).clamp(LEAST, MOST)
    return apply_gains(images, gains, mask)


class LabAffineFit:
    """One affine map from shadowed to lit LAB, learnt from the shadows of training images.

    Args:
        weights: `(4, 3)`: rows of L, a, b and one give columns of L, a, b.

    >>> photo = torch.linspace(0.1, 0.9, 3 * 8 * 8).reshape(1, 3, 8, 8)
    >>> fit = LabAffineFit.learnt([(photo / 2, torch.ones(1, 1, 8, 8), photo)])
    >>> float((fit(photo / 2, torch.ones(1, 1, 8, 8)) - photo).abs().mean()) < 0.05
    True
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @classmethod
    def learnt(cls, triplets: Iterable[tuple[Tensor, Tensor, Tensor]]) -> LabAffineFit:
        """Return the least-squares fit over all pixels in shadow.

        Args:
            triplets: batches of images, masks and truths.

        Raises:
            UserError: no pixel is in shadow.
        """
        square = torch.zeros(4, 4, dtype=torch.float64)
        product = torch.zeros(4, 3, dtype=torch.float64)
        for images, mask, truth in triplets:
            inside = mask[:, 0] > 0
            rows, wanted = (
                rgb_to_lab(each).movedim(1, 3)[inside].double() for each in (images, truth)
            )
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            square += (rows.T @ rows).cpu()
            product += (rows.T @ wanted).cpu()
        if square[3, 3] == 0:
            raise UserError("no pixel is in shadow: expected masks with ones to learn a fit from")
        # Images of one colour alone leave a direction open: the smallest weights will do there.
        return cls(torch.linalg.pinv(square, hermitian=True) @ product)

    def __call__(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the images with the map applied to their shadows, in [0, 1]."""
        lab = rgb_to_lab(images)
        weights = self.weights.to(lab)
        made = (lab.movedim(1, 3) @ weights[:3] + weights[3]).movedim(3, 1)
        return torch.where(mask > 0, lab_to_rgb(made), images)
