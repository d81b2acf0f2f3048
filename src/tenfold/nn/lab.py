"""sRGB to CIE LAB and back, batched, differentiable, on any device.

Constants are those of scikit-image; the formulas are in `tenfold.kernels.lab`. Other programs
differ: MATLAB's `srgb2lab` adapts to D50 (errors of shadow removal come out about 2 % larger), and
OpenCV approximates its curves (up to 0.4 in a channel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels.lab import lab_of_rgb, rgb_of_lab

__all__ = ["check_planes", "lab_to_rgb", "rgb_to_lab"]


def rgb_to_lab(images: Tensor) -> Tensor:
    """Return LAB of sRGB images: L in 0..100, a and b within about -108..108.

    Args:
        images: `(..., 3, H, W)`, float in [0, 1], or uint8 in 0..255, which is quicker.

    Returns:
        The same shape; float32 of uint8 images, else the images' own type. Half precision is
        computed in float32.

    Raises:
        UserError: not three planes, or another type.

    >>> red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    >>> [round(value, 3) for value in rgb_to_lab(red).flatten().tolist()]
    [53.241, 80.092, 67.203]
    """
    check_planes(images, codes=True)
    return lab_of_rgb(images)


def lab_to_rgb(images: Tensor, clip: bool = True) -> Tensor:
    """Return sRGB of LAB images, the inverse of `rgb_to_lab`.

    Args:
        images: float `(..., 3, H, W)`.
        clip: into [0, 1]. Colours that no screen shows lie outside; their gradient is 0 when
            clipped.

    Returns:
        The same shape and type.

    Raises:
        UserError: not three planes, or no float.

    >>> colour = torch.tensor([65.7601, 12.7589, 33.5647]).reshape(1, 3, 1, 1)
    >>> (255 * lab_to_rgb(colour)).round().flatten().tolist()
    [200.0, 150.0, 100.0]
    """
    check_planes(images, codes=False)
    return rgb_of_lab(images, clip=clip)


def check_planes(images: Tensor, codes: bool) -> None:
    """Refuse what is no colours.

    Args:
        images: should be `(..., 3, H, W)`, float.
        codes: whether uint8 will do, too.

    Raises:
        UserError: not three planes, or another type.
    """
    known = images.is_floating_point() or (codes and images.dtype == torch.uint8)
    if images.ndim < 3 or images.shape[-3] != 3 or not known:
        raise UserError(
            f"colours are {images.dtype} of shape {tuple(images.shape)}: expected float"
            f"{' in [0, 1] or uint8' if codes else ''}, (B, 3, H, W)"
        )
