"""The loss of LAB-Net between LAB codes: perceptual, of gradients, and squared.

Source: the released code of "LAB-Net: LAB Color-Space Oriented Lightweight Network for Shadow
Removal" (arXiv 2208.13039). With o the network's codes, not clamped, and t the true ones:

    L = L_perc + 10 L_grad + 100 L_mse
    L_perc = sum_i mean|phi_i(o) - phi_i(t)| / w_i,  w = 1, 2.6, 4.8, 3.7, 5.6, 0.15
    L_grad = mean|Gx o - Gx t| + mean|Gy o - Gy t|                   Sobel, borders of zeros
    L_mse  = mean (o - t)^2

phi_0 is the image itself. phi_1 to phi_5 are maps of an ImageNet VGG16 that takes the codes for
RGB, without ImageNet's mean and deviation; without its weights they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError

__all__ = ["LabLoss", "VggCuts", "gradient_loss", "lab_loss", "perceptual_loss", "sobel"]

STAGE_WEIGHTS = (1.0, 2.6, 4.8, 3.7, 5.6, 0.15)  # w_0 to w_5, divisors
_SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))

Extractor = Callable[[Tensor], Sequence[Tensor]]


class LabLoss(NamedTuple):
    """The loss and its parts, each without its weight.

    Attributes:
        total: weighted sum, which is what to minimise.
        perceptual: L_perc.
        gradient: L_grad.
        mse: L_mse.
    """

    total: Tensor
    perceptual: Tensor
    gradient: Tensor
    mse: Tensor


def lab_loss(
    output: Tensor,
    target: Tensor,
    extractor: Extractor | None = None,
    perceptual: float = 1.0,
    gradient: float = 10.0,
    mse: float = 100.0,
    weight: Tensor | None = None,
) -> LabLoss:
    """Return the loss between LAB codes, in float32 at least.

    Args:
        output: `(B, 3, H, W)`, not clamped.
        target: likewise.
        extractor: maps codes to the five maps phi_1 to phi_5, such as `VggCuts`; without one,
            L_perc is phi_0 alone, the mean absolute difference.
        perceptual: weight of L_perc.
        gradient: weight of L_grad; short runs learn better with 0.
        mse: weight of L_mse.
        weight: of each pixel in the means of phi_0, L_grad and L_mse, `(B, 1, H, W)`; None: all
            count alike, as published.

    Raises:
        UserError: codes of two shapes, or another number of maps.

    >>> loss = lab_loss(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    >>> [round(float(part), 3) for part in loss]
    [136.0, 1.0, 3.5, 1.0]
    """
    parts = (
        perceptual_loss(output, target, extractor, weight),
        gradient_loss(output, target, weight),
        _mean((_wide(output) - _wide(target)).square(), weight),
    )
    total = perceptual * parts[0] + gradient * parts[1] + mse * parts[2]
    return LabLoss(total, *parts)


def sobel(x: Tensor) -> Tensor:
    """Return both gradients of each channel of `(B, C, H, W)`, as `(B, 2 C, H, W)`.

    The two of a channel are neighbours, across first. Borders are of zeros, so that edges of the
    frame count where the image isn't zero.
    """
    across = torch.tensor(_SOBEL, dtype=x.dtype, device=x.device)
    kernels = torch.stack([across, across.T])[:, None].repeat(x.shape[1], 1, 1, 1)
    return functional.conv2d(x, kernels, padding=1, groups=x.shape[1])


def gradient_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return L_grad, the mean absolute difference of both Sobel gradients, summed.

    Args:
        output: `(B, 3, H, W)`.
        target: likewise.
        weight: of each pixel, `(B, 1, H, W)`.

    Raises:
        UserError: images of two shapes.
    """
    _check(output, target)
    # Sobel is linear: one convolution of the difference does.
    with torch.autocast(output.device.type, enabled=False):
        return 2 * _mean(sobel(_wide(output) - _wide(target)).abs(), weight)


def perceptual_loss(
    output: Tensor,
    target: Tensor,
    extractor: Extractor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Return L_perc: phi_0 always, and phi_1 to phi_5 when there is an extractor.

    Args:
        output: `(B, 3, H, W)`.
        target: likewise.
        extractor: see `lab_loss`.
        weight: of each pixel in phi_0, `(B, 1, H, W)`.

    Raises:
        UserError: images of two shapes, or another number of maps.
    """
    _check(output, target)
    total = _mean((_wide(output) - _wide(target)).abs(), weight)
    if extractor is None:
        return total
    maps = extractor(output)
    with torch.no_grad():
        true = extractor(target)
    divisors = STAGE_WEIGHTS[1:]
    if len(maps) != len(divisors) or len(true) != len(divisors):
        raise UserError(
            f"the extractor gave {len(maps)} maps: expected {len(divisors)}, phi_1 to phi_5; see "
            "VggCuts"
        )
    for divisor, ours, theirs in zip(divisors, maps, true, strict=True):
        total = total + (_wide(ours) - _wide(theirs)).abs().mean() / divisor
    return total


class VggCuts(nn.Module):
    """phi_1 to phi_5 of VGG16: relu1_2, relu2_2, relu3_2, relu4_2, and conv5_2 before its ReLU.

    The released code cuts at convolutions, but the in-place ReLU behind overwrites the first four.

    Args:
        features: the layers of a VGG16 as torchvision has them, `vgg16(weights=...).features`. They
            are frozen in place.

    Raises:
        UserError: other layers.
    """

    CUTS = (3, 8, 13, 20, 26)  # places of the last layers

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        kinds = (nn.ReLU, nn.ReLU, nn.ReLU, nn.ReLU, nn.Conv2d)
        if len(features) <= self.CUTS[-1] or not all(
            isinstance(features[cut], kind) for cut, kind in zip(self.CUTS, kinds, strict=True)
        ):
            raise UserError(
                f"{len(features)} layers that are not those of a VGG16: expected "
                "torchvision.models.vgg16().features"
            )
        self.features = features[: self.CUTS[-1] + 1]
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VggCuts:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, codes: Tensor) -> list[Tensor]:
        """Return the five maps of codes `(B, 3, H, W)` in [0, 1]."""
        maps = []
        for place, layer in enumerate(self.features):
            codes = layer(codes)
            if place in self.CUTS:
                maps.append(codes)
        return maps


def _check(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape or output.ndim != 4:
        raise UserError(
            f"a loss between codes of shapes {tuple(output.shape)} and {tuple(target.shape)}: "
            "expected (B, 3, H, W) twice"
        )


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.mean()
    return (values * weight).sum() / (weight.sum() * values.shape[1])


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
