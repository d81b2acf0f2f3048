"""Bicubic resizing of 8-bit images against aliasing, bit for bit as Pillow does it, and faster.

A pixel is the mean of those around its place under Keys' kernel of a = -1/2, stretched by the
factor that an axis shrinks by; weights are rounded to 22 bits, and so are the pixels between the
pass along x and the one along y. Source of the kernel: Keys, "Cubic convolution interpolation for
digital image processing", 1981.

Which axis comes first makes a difference of a few levels. Pillow's choice goes by its release and
the sizes; here it is x. So only images for which all releases begin with x are taken: no taller
than wide, and their width shrinks no less than their height. That is what photos in landscape do
when they become square. The rest is left to Pillow.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native

__all__ = ["able", "bicubic"]

A = -0.5
REACH = 2.0  # of the kernel, in pixels of the smaller image
ONE = 1 << 22

Size = tuple[int, int]
Ints = NDArray[np.int32]


def able(before: Size, after: Size) -> bool:
    """Tell whether the compiled kernel resizes images of this (height, width) to that."""
    (height, width), (wanted_height, wanted_width) = before, after
    fits = height <= width and wanted_width * height <= wanted_height * width
    return fits and native.extension() is not None


def bicubic(pixels: NDArray[np.uint8], size: Size) -> Tensor:
    """Return an image of another size, uint8 `(C, H, W)`; call it where `able` holds.

    Args:
        pixels: `(H, W, C)`.
        size: height and width of the result.

    Raises:
        UserError: no image, or what `able` refuses.

    >>> grey = np.full((4, 8, 1), 7, np.uint8)
    >>> bicubic(grey, (2, 3))  # doctest: +SKIP
    tensor([[[7, 7, 7],
             [7, 7, 7]]], dtype=torch.uint8)
    """
    known = pixels.ndim == 3 and pixels.dtype == np.uint8 and min(*pixels.shape, *size) > 0
    if not known or not able((pixels.shape[0], pixels.shape[1]), size):
        raise UserError(
            f"{pixels.dtype} {pixels.shape} to {size}: expected uint8 (H, W, C), no taller than "
            "wide, whose width shrinks no less than its height, and compiled kernels"
        )
    height, width, channels = pixels.shape
    out = torch.empty(channels, *size, dtype=torch.uint8)
    x_first, x_weight = _axis(width, size[1])
    y_first, y_weight = _axis(height, size[0])
    pixels = np.ascontiguousarray(pixels)
    sizes = [height, width, channels, *size, x_weight.shape[1], y_weight.shape[1]]
    native.extension().resize(
        pixels.ctypes.data, out.data_ptr(), sizes,
        *(each.ctypes.data for each in (x_first, x_weight, y_first, y_weight)),
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=64)
def _axis(size: int, wanted: int) -> tuple[Ints, Ints]:
    """Return where each place's pixels begin, and their weights, `(wanted, taps)`."""
    scale = size / wanted
    stretch = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    # Truncated like an integer in C, then cut to the image.
    begin = (centres - REACH * stretch + 0.5).astype(np.int64).clip(min=0)
    end = (centres + REACH * stretch + 0.5).astype(np.int64).clip(max=size)
    taps = int((end - begin).max())
    first = np.minimum(begin, size - taps)
    places = first[:, None] + np.arange(taps)
    inside = (places >= begin[:, None]) & (places < end[:, None])
    weights = _kernel((places - centres[:, None] + 0.5) * (1 / stretch)) * inside
    # One by one, since the order of a sum decides its last bit.
    total = functools.reduce(np.add, weights.T, np.zeros(wanted))
    fixed = weights / total[:, None] * ONE
    rounded = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5))
    return first.astype(np.int32), np.ascontiguousarray(rounded.astype(np.int32))


def _kernel(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((A + 2) * x - (A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
