"""sRGB to CIE LAB and back, batched, differentiable, on any device.

Constants are those of scikit-image: sRGB's own curve, light D65 seen by the 2 degree observer.
Other programs differ: MATLAB's `srgb2lab` adapts to D50 (errors of shadow removal come out about
2 % larger), and OpenCV approximates its curves (up to 0.4 in a channel).

    linear = u / 12.92                       u <= 0.04045
             ((u + 0.055) / 1.055)^2.4       else
    (x, y, z) = M linear, divided by the white
    f(t) = t^(1/3)                           t > 0.008856
           7.787 t + 16 / 116                else
    L = 116 f(y) - 16,  a = 500 (f(x) - f(y)),  b = 200 (f(y) - f(z))

Both branches of a curve are kept in a range where their gradients are finite, since the one that is
not chosen would else bring NaN into the sum.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from tenfold.errors import UserError

__all__ = ["lab_to_rgb", "rgb_to_lab"]

WHITE = (0.95047, 1.0, 1.08883)
# Rows give X, Y, Z of linear R, G, B; below, the inverse.
XYZ_OF_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
RGB_OF_XYZ = (
    (3.240481343200526, -1.5371515162713185, -0.4985363261688878),
    (-0.9692549499965682, 1.8759900014898907, 0.04155592655829284),
    (0.05564663913517716, -0.20404133836651123, 1.0573110696453443),
)
CURVED = 0.04045  # sRGB values above follow the power
CURVED_LINEAR = 0.0031308
ROOTED = 0.008856  # t above has its cube root taken
ROOTED_F = 0.2068966
SLOPE, OFFSET = 7.787, 16 / 116


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
    _check(images, codes=True)
    kept = torch.float32 if images.dtype == torch.uint8 else images.dtype
    if images.dtype == torch.uint8:
        curve = _linear(torch.arange(256, device=images.device) / 255)
        linear = curve.index_select(0, images.flatten().int()).view(images.shape)
    else:
        linear = _linear(_wide(images))
    ratios = _mix([[m / w for m in row] for row, w in zip(XYZ_OF_RGB, WHITE, strict=True)], linear)
    # exp(log / 3) is a cube root at a quarter of the time of a general power.
    root = ratios.clamp(min=ROOTED).log().div(3).exp()
    x, y, z = torch.where(ratios > ROOTED, root, SLOPE * ratios + OFFSET).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3).to(kept)


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
    _check(images, codes=False)
    lightness, a, b = _wide(images).unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)], dim=-3)
    ratios = torch.where(f > ROOTED_F, f.clamp(min=ROOTED_F) ** 3, (f - OFFSET) / SLOPE)
    linear = _mix([[m * w for m, w in zip(row, WHITE, strict=True)] for row in RGB_OF_XYZ], ratios)
    power = 1.055 * linear.clamp(min=CURVED_LINEAR) ** (1 / 2.4) - 0.055
    colours = torch.where(linear > CURVED_LINEAR, power, 12.92 * linear)
    return (colours.clamp(0, 1) if clip else colours).to(images.dtype)


def _linear(colours: Tensor) -> Tensor:
    power = ((colours.clamp(min=CURVED) + 0.055) / 1.055) ** 2.4
    return torch.where(colours > CURVED, power, colours / 12.92)


def _mix(rows: list[list[float]], planes: Tensor) -> Tensor:
    """Multiply the three planes by a matrix, in their own precision whatever autocast says."""
    kind = planes.device.type
    matrix = torch.tensor(rows, dtype=planes.dtype, device=planes.device)
    lowered = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if lowered else contextlib.nullcontext():
        return (matrix @ planes.flatten(-2)).view(planes.shape)


def _wide(images: Tensor) -> Tensor:
    return images if images.dtype in (torch.float32, torch.float64) else images.float()


def _check(images: Tensor, codes: bool) -> None:
    known = images.is_floating_point() or (codes and images.dtype == torch.uint8)
    if images.ndim < 3 or images.shape[-3] != 3 or not known:
        raise UserError(
            f"colours are {images.dtype} of shape {tuple(images.shape)}: expected float"
            f"{' in [0, 1] or uint8' if codes else ''}, (B, 3, H, W)"
        )
