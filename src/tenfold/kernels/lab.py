"""sRGB to CIE LAB and back: the formulas, and compiled passes over images on the CPU.

Constants are those of scikit-image: sRGB's own curve, light D65 seen by the 2 degree observer.

    linear = u / 12.92                       u <= 0.04045
             ((u + 0.055) / 1.055)^2.4       else
    (x, y, z) = M linear, divided by the white
    f(t) = t^(1/3)                           t > 0.008856
           7.787 t + 16 / 116                else
    L = 116 f(y) - 16,  a = 500 (f(x) - f(y)),  b = 200 (f(y) - f(z))

The formulas run on any device, have gradients, and are what a program is traced into. Both branches
of a curve are kept in a range where their gradients are finite, since the one that is not chosen
would else bring NaN into the sum. The compiled passes take what has no gradient: uint8 images, and
float32 ones where PyTorch computes none at all (`torch.no_grad`).

Networks see LAB as codes, (L / 100, (a + 128) / 255, (b + 128) / 255), all about [0, 1].
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from tenfold.kernels import native

__all__ = ["compiled", "lab_of_rgb", "rgb_of_lab"]

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
CODE_SCALE = (100.0, 255.0, 255.0)
CODE_SHIFT = (0.0, 128.0, 128.0)
HALF = (torch.float16, torch.bfloat16)


def lab_of_rgb(images: Tensor, codes: bool = False) -> Tensor:
    """Return LAB of sRGB images, or its codes.

    Args:
        images: `(..., 3, H, W)`: uint8, or float in [0, 1].
        codes: give codes.

    Returns:
        The same shape; float32 of uint8 images, else the images' own type. Half precision is
        computed in float32.

    >>> white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    >>> [round(value, 2) for value in lab_of_rgb(white, codes=True).flatten().tolist()]
    [1.0, 0.5, 0.5]
    """
    if images.dtype in HALF:
        return lab_of_rgb(images.float(), codes).to(images.dtype)
    if not _takes(images):
        lab = _lab(images)
        return lab.add(_planes(CODE_SHIFT, lab)).div(_planes(CODE_SCALE, lab)) if codes else lab
    images = images.contiguous()
    lab = torch.empty(images.shape, dtype=torch.float32)
    native.extension().lab_of_rgb(
        images.data_ptr(), images.dtype == torch.uint8, lab.data_ptr(), *_sizes(images), codes,
        torch.get_num_threads(),
    )  # fmt: skip
    return lab


def rgb_of_lab(
    lab: Tensor, codes: bool = False, clip: bool = True, as_bytes: bool = False
) -> Tensor:
    """Return the sRGB images of LAB, or of its codes: the inverse of `lab_of_rgb`.

    Args:
        lab: float `(..., 3, H, W)`.
        codes: take codes.
        clip: into [0, 1]. Colours that no screen shows lie outside.
        as_bytes: give uint8 instead, rounded; these are always clipped.

    Returns:
        The same shape and type, or uint8. Half precision is computed in float32.

    >>> white = torch.tensor([100.0, 0, 0]).reshape(1, 3, 1, 1)
    >>> rgb_of_lab(white, as_bytes=True).flatten().tolist()
    [255, 255, 255]
    """
    if lab.dtype in HALF:
        found = rgb_of_lab(lab.float(), codes, clip, as_bytes)
        return found if as_bytes else found.to(lab.dtype)
    if not (clip or as_bytes) or not _takes(lab):
        if codes:
            lab = lab.mul(_planes(CODE_SCALE, lab)).sub(_planes(CODE_SHIFT, lab))
        colours = _rgb(lab)
        colours = colours.clamp(0, 1) if clip or as_bytes else colours
        return colours.mul(255).round().to(torch.uint8) if as_bytes else colours
    lab = lab.contiguous()
    images = torch.empty(lab.shape, dtype=torch.uint8 if as_bytes else torch.float32)
    native.extension().rgb_of_lab(
        lab.data_ptr(), images.data_ptr(), as_bytes, *_sizes(lab), codes, torch.get_num_threads()
    )
    return images


def compiled(*images: Tensor) -> bool:
    """Tell whether the compiled kernels may read all of these: plain tensors on the CPU."""
    return (
        native.extension() is not None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and all(type(each) is Tensor and each.device.type == "cpu" for each in images)
        and all(map(_has_memory, images))
    )


def _takes(images: Tensor) -> bool:
    """Tell whether the compiled passes take these images or LAB."""
    without_gradient = images.dtype == torch.float32 and not torch.is_grad_enabled()
    return (images.dtype == torch.uint8 or without_gradient) and compiled(images)


def _has_memory(images: Tensor) -> bool:
    try:
        return images.data_ptr() != 0
    except RuntimeError:  # within torch.vmap and the like
        return False


def _sizes(images: Tensor) -> tuple[int, int]:
    pixels = images.shape[-2] * images.shape[-1]
    return images.numel() // (3 * pixels), pixels


# -- plain PyTorch ---------------------------------------------------------------------------------


def _lab(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        curve = _linear(torch.arange(256, dtype=torch.float32, device=images.device) / 255)
        linear = curve.index_select(0, images.flatten().int()).view(images.shape)
    else:
        linear = _linear(images)
    ratios = _mix([[m / w for m in row] for row, w in zip(XYZ_OF_RGB, WHITE, strict=True)], linear)
    # exp(log / 3) is a cube root at a quarter of the time of a general power.
    root = ratios.clamp(min=ROOTED).log().div(3).exp()
    x, y, z = torch.where(ratios > ROOTED, root, SLOPE * ratios + OFFSET).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def _rgb(lab: Tensor) -> Tensor:
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)], dim=-3)
    ratios = torch.where(f > ROOTED_F, f.clamp(min=ROOTED_F) ** 3, (f - OFFSET) / SLOPE)
    linear = _mix([[m * w for m, w in zip(row, WHITE, strict=True)] for row in RGB_OF_XYZ], ratios)
    power = 1.055 * linear.clamp(min=CURVED_LINEAR) ** (1 / 2.4) - 0.055
    return torch.where(linear > CURVED_LINEAR, power, 12.92 * linear)


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


def _planes(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
