"""Render soft shadows into photos without any, in linear light.

Direct light and ambient light: where something stands in the way of the direct one, of the light
I of a pixel there remains, for each colour c,

    I_shadow = I * (1 - s * (1 - k_c * g))

with a soft matte s in [0, 1] and k_c = ambient / (ambient + direct), see Shor and Lischinski, "The
Shadow Meets the Mask", Eurographics 2008. What is drawn for each image, from ranges that fit
published pairs of photos:

- k of green from U(0.18, 0.55); of red k * (1 - t), of blue k * (1 + t), t from U(0, 0.25), because
  light from the sky is bluer than that of the sun;
- g = 1 plus a linear ramp of up to 0.15: the ambient light varies across the scene;
- the matte: an ellipse, a polygon of 3 to 8 corners, or noise of four octaves above a threshold; it
  covers 8 to 45 % of the image, and a Gaussian of 0.3 to 3 % of the shorter side softens it;
- noise of sigma 0.004 * s in sRGB, then 8 bits.

A shape is the set of pixels where a function lies below a threshold (a radius, a polygon's gauge,
the noise), and the threshold is the quantile that gives the drawn area, whatever lies outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.randomness import below, mix
from tenfold.errors import UserError
from tenfold.nn.shadow_codes import linear_to_srgb, srgb_to_linear

__all__ = ["between", "render_shadow", "shadow_factors", "shadow_mattes"]

Words = NDArray[np.uint64]
Field = NDArray[np.float32]

AREA = (0.08, 0.45)
PENUMBRA = (0.003, 0.03)  # sigma, of the shorter side
AMBIENT = (0.18, 0.55)  # of green
TINT = (0.0, 0.25)
RAMP = (0.0, 0.15)
NOISE = 0.004
OCTAVES = 4

# What a draw is for: the hash's last word. Further numbers of one purpose follow after it.
_KIND, _AREA, _PENUMBRA, _AMBIENT, _TINT, _RAMP, _DIRECTION, _NOISE, _SHAPE = range(9)


def render_shadow(
    images: Tensor, random: torch.Generator | Sequence[int] | NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Render a shadow into each image.

    Args:
        images: sRGB in [0, 1], float `(B, 3, H, W)`, as free of shadows as may be.
        random: a number for each image, which decides all about its shadow, whatever else is in
            the batch; or a CPU generator that draws such numbers.

    Returns:
        The images with shadows, sRGB in [0, 1] in steps of 1/255, and their masks, `(B, 1, H, W)`
        of zeros and ones.

    Raises:
        UserError: no float images of three planes, or not one number for each.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: expected float RGB in "
            "[0, 1], (B, 3, H, W)"
        )
    if isinstance(random, torch.Generator):
        numbers = torch.randint(1 << 62, (len(images),), generator=random).numpy()
    else:
        numbers = np.asarray(random, np.int64)
    if numbers.shape != (len(images),):
        raise UserError(f"{numbers.size} numbers for {len(images)} images: expected one for each")
    height, width = images.shape[2:]
    mattes = shadow_mattes((height, width), numbers)
    factors = shadow_factors(mattes, numbers).to(images)
    soft = mattes.to(images)
    shadowed = linear_to_srgb(srgb_to_linear(images) * factors)
    shadowed += soft * _noise((height, width), numbers).to(images)
    shadowed = shadowed.clamp_(0, 1).mul_(255).round_().div_(255)
    return shadowed, (soft > 0.5).to(images.dtype)


def shadow_mattes(size: tuple[int, int], numbers: NDArray[np.int64]) -> Tensor:
    """Return soft mattes, `(B, 1, H, W)` in [0, 1], 1 in the umbra.

    Args:
        size: (H, W).
        numbers: `(B,)`, one decides all about a matte.
    """
    kinds = below(len(_KINDS), mix(numbers, _KIND))
    areas = between(*AREA, mix(numbers, _AREA))
    hard = np.empty((len(numbers), *size), np.float32)
    for k, number in enumerate(numbers.tolist()):
        field = _KINDS[int(kinds[k])](size, number)
        count = round(float(areas[k]) * field.size)
        limit = np.partition(field, max(count - 1, 0), axis=None)[max(count - 1, 0)]
        hard[k] = field <= limit
    sigmas = between(*PENUMBRA, mix(numbers, _PENUMBRA)) * min(size)
    down, across = (_blurs(side, sigmas) for side in size)
    soft = torch.bmm(torch.bmm(down, torch.from_numpy(hard)), across.transpose(1, 2))
    return soft.clamp_(0, 1)[:, None]


def shadow_factors(mattes: Tensor, numbers: NDArray[np.int64]) -> Tensor:
    """Return what linear light is multiplied by, `(B, 3, H, W)`.

    Args:
        mattes: `(B, 1, H, W)` in [0, 1].
        numbers: `(B,)`, one decides about an image's light.
    """
    green = between(*AMBIENT, mix(numbers, _AMBIENT))
    tint = between(*TINT, mix(numbers, _TINT))
    ambient = np.stack([green * (1 - tint), green, green * (1 + tint)], axis=1)
    slope = between(*RAMP, mix(numbers, _RAMP))
    angle = between(0, 2 * math.pi, mix(numbers, _DIRECTION))
    rows, columns = _places((int(mattes.shape[2]), int(mattes.shape[3])))
    sine, cosine = (values[:, None, None] for values in (np.sin(angle), np.cos(angle)))
    ramp = sine * rows + cosine * columns
    ramp *= (slope / np.abs(ramp).max((1, 2)))[:, None, None]
    share = torch.from_numpy(ambient.astype(np.float32))[:, :, None, None]
    light = share * torch.from_numpy(ramp.astype(np.float32) + 1)[:, None]
    return light.sub_(1).mul_(mattes).add_(1)


def between(low: float, high: float, words: Words) -> NDArray[np.float64]:
    """Turn random bits into numbers in [low, high)."""
    unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    found: NDArray[np.float64] = low + (high - low) * unit
    return found


def _draws(number: int, count: int, low: float, high: float, first: int = 0) -> NDArray[np.float64]:
    """Return further numbers of one image, about its shape."""
    return between(low, high, mix(number, _SHAPE, np.arange(first, first + count)))


def _ellipse(size: tuple[int, int], number: int) -> Field:
    y, x, angle = _draws(number, 3, 0, 1).tolist()
    narrow = float(_draws(number, 1, 0.35, 1, first=3)[0])
    rows, columns = _places(size, (0.1 + 0.8 * y, 0.1 + 0.8 * x))
    sine, cosine = math.sin(math.pi * angle), math.cos(math.pi * angle)
    along, over = sine * rows + cosine * columns, cosine * rows - sine * columns
    over /= np.float32(narrow)
    field: Field = along * along + over * over
    return field


def _polygon(size: tuple[int, int], number: int) -> Field:
    """Return the factor by which a polygon around a place has to grow to reach each pixel."""
    y, x, turn, corners = _draws(number, 4, 0, 1).tolist()
    count = 3 + int(6 * corners)
    # Less than half a turn from corner to corner, so that the place lies inside.
    jitter = _draws(number, count, 0, 0.45, first=4)
    angles = 2 * np.pi * (np.arange(count) + jitter + turn) / count
    radii = _draws(number, count, 0.5, 1, first=4 + count)
    points = np.stack([radii * np.sin(angles), radii * np.cos(angles)], axis=1)
    rows, columns = _places(size, (0.15 + 0.7 * y, 0.15 + 0.7 * x))
    field = np.zeros(size, np.float32)
    for (a, b), (c, d) in zip(points.tolist(), np.roll(points, -1, axis=0).tolist(), strict=True):
        # In the sector between two corners a pixel is a positive mix of both.
        area = a * d - b * c
        first = (d / area) * rows - (c / area) * columns
        second = (a / area) * columns - (b / area) * rows
        inside = (first >= 0) & (second >= 0)
        first += second
        np.copyto(field, first, where=inside)
    return field


def _clouds(size: tuple[int, int], number: int) -> Field:
    """Return noise of four octaves, between the points of ever finer lattices."""
    field = np.zeros(size, np.float32)
    first = 0
    for octave in range(OCTAVES):
        cells = 2 << octave
        lattice = _draws(number, (cells + 1) ** 2, -1, 1, first).astype(np.float32)
        first += (cells + 1) ** 2
        down, across = (_weights(side, cells) for side in size)
        field += np.float32(0.5**octave) * (down @ lattice.reshape(cells + 1, cells + 1) @ across.T)
    return field


_KINDS: tuple[Callable[[tuple[int, int], int], Field], ...] = (_ellipse, _polygon, _clouds)


def _places(size: tuple[int, int], middle: tuple[float, float] = (0.5, 0.5)) -> tuple[Field, Field]:
    """Return the rows `(H, 1)` and columns `(1, W)`, from a place, in shorter sides."""
    rows, columns = (
        ((np.arange(side) + 0.5 - share * side) / min(size)).astype(np.float32)
        for side, share in zip(size, middle, strict=True)
    )
    return rows[:, None], columns[None]


def _weights(side: int, cells: int) -> Field:
    """Return how each of a side's pixels lies between lattice points: `(side, cells + 1)`."""
    place = (np.arange(side) + 0.5) * (cells / side)
    cell = place.astype(np.int64)
    share = place - cell
    share = share * share * (3 - 2 * share)  # no creases at the lattice's lines
    weights = np.zeros((side, cells + 1), np.float32)
    weights[np.arange(side), cell] = 1 - share
    weights[np.arange(side), cell + 1] = share
    return weights


def _blurs(side: int, sigmas: NDArray[np.float64]) -> Tensor:
    """Return matrices `(B, side, side)` that blur along a side by each of the sigmas.

    What would lie beyond the border has no weight.
    """
    apart = torch.arange(side)[:, None] - torch.arange(side)
    spread = torch.from_numpy(2 * np.maximum(sigmas, 0.1) ** 2).float()[:, None, None]
    weights = (-(apart * apart).float() / spread).exp()
    # Without their tails, whose products are too small to be normal numbers, and slow.
    weights[weights < 1e-6] = 0
    return weights / weights.sum(2, keepdim=True)


def _noise(size: tuple[int, int], numbers: NDArray[np.int64]) -> Tensor:
    seeds = mix(numbers, _NOISE)
    made = np.empty((len(numbers), 3, *size), np.float32)
    for k, seed in enumerate(seeds.tolist()):
        np.random.Generator(np.random.SFC64(seed)).standard_normal(dtype=np.float32, out=made[k])
    return torch.from_numpy(made).mul_(NOISE)
