"""What shadow removers see of a photo: LAB codes, and linear light.

LAB codes are L / 100, (a + 128) / 255 and (b + 128) / 255, all about [0, 1], as LAB-Net has them.
HQSS's own are 2 x codes - 1. Light adds up in linear values, not in sRGB's: a shadow is a gain
there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.kernels.lab import lab_of_rgb, rgb_of_lab
from tenfold.nn.lab import check_planes

__all__ = ["lab_codes", "linear_to_srgb", "rgb_of_codes", "srgb_to_linear"]

CURVED = 0.04045  # sRGB values above follow the power
CURVED_LINEAR = 0.0031308


def lab_codes(images: Tensor) -> Tensor:
    """Return the LAB codes of sRGB images, `(B, 3, H, W)`, float32 for uint8 images.

    Args:
        images: uint8, or float in [0, 1].

    Raises:
        UserError: not three planes, or another type.

    >>> colour = torch.tensor([200, 150, 100], dtype=torch.uint8).reshape(1, 3, 1, 1)
    >>> [round(value, 4) for value in lab_codes(colour).flatten().tolist()]
    [0.6576, 0.552, 0.6336]
    """
    check_planes(images, codes=True)
    return lab_of_rgb(images, codes=True)


def rgb_of_codes(codes: Tensor) -> Tensor:
    """Return the sRGB images of LAB codes, in [0, 1], the inverse of `lab_codes`.

    Colours that no screen shows are clipped.

    Raises:
        UserError: not three planes, or no float.
    """
    check_planes(codes, codes=False)
    return rgb_of_lab(codes, codes=True)


def srgb_to_linear(images: Tensor) -> Tensor:
    """Return linear light, in [0, 1], of sRGB values in [0, 1]."""
    power = ((images.clamp(min=CURVED) + 0.055) / 1.055) ** 2.4
    return torch.where(images > CURVED, power, images / 12.92)


def linear_to_srgb(light: Tensor) -> Tensor:
    """Return sRGB values of linear light; negative light becomes 0."""
    light = light.clamp(min=0)
    power = 1.055 * light.clamp(min=CURVED_LINEAR) ** (1 / 2.4) - 0.055
    return torch.where(light > CURVED_LINEAR, power, 12.92 * light)
