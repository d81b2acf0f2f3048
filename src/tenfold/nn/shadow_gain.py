"""A first guess without a network: brighten a shadow by the gain of its lit surroundings.

Light in a shadow is what is left of the light beside it, so in linear light, for each colour, the
gain that undoes a shadow is about the light around it over the light inside (Shor and Lischinski,
"The Shadow Meets the Mask: Pyramid-Based Shadow Removal", Eurographics 2008). Three estimates are
averaged, as logarithms: the mean around over that of the whole shadow, over that of a strip along
its border, and the median around over that of the shadow.

A shadow that crosses several surfaces needs a gain for each, so near the border the gain is that of
the neighbourhood: light beside the border over light just inside, both averaged by a Gaussian, and
mixed with the gain of the whole by how much border there is.

At the border a shadow fades, by as much as the photo says: the level of a blurred mask tells how
far a place is from the border, and the mean light at each level, along the whole border, which
share of the lost light is lost there. Only so much is given back, so that no bright rim is left
around a sharp shadow, nor a dark one inside a soft shadow. What all this can't know is left to a
network that starts from it, such as surfaces that end at the shadow's edge.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.nn.shadow_codes import linear_to_srgb, srgb_to_linear

__all__ = [
    "Guess",
    "apply_gains",
    "local_gains",
    "lost_shares",
    "mean_gains",
    "ring_gains",
    "ring_guess",
    "soft_mask",
]

Guess = Literal["none", "ring"]

# Of the shorter side: pixels next to the border are in the penumbra, and are left out.
GAP, REACH = 2 / 256, 10 / 256
PENUMBRA = 2 / 256  # sigma by which the mask is blurred
LEVELS = 12  # of the blurred mask at which the mean light is taken
CLEAR = 1.05  # times as light around as inside; below, the border says nothing
NEIGHBOURHOOD = 32 / 256  # sigma of what is near
TRUST = 0.1  # share of pixels at the border, in the neighbourhood, at which it counts half
GRID = 64  # shorter side at which neighbourhoods are averaged
LEAST, MOST = 0.5, 16.0  # gains beyond are no shadow's
LEAST_LIGHT = 1e-4
GROW, SIGMA = 5, 2.0


def ring_gains(images: Tensor, mask: Tensor, reach: float = REACH, gap: float = GAP) -> Tensor:
    """Return the gains in linear light that bring shadows to the light of their surroundings.

    The geometric mean of three estimates, see above.

    Args:
        images: sRGB in [0, 1], `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` of zeros and ones, 1 in shadow.
        reach: how far from the mask its surroundings go, as a share of the shorter side; so deep is
            the strip along the border, too.
        gap: how far from the mask they begin, likewise, and how deep inside the shadow does.

    Returns:
        `(B, 3)`; ones where there is no shadow, or nothing lit around it.
    """
    light = srgb_to_linear(images)
    shadow = mask.to(images.dtype)
    near, far = _pixels(images, reach, gap)
    outer, core = _regions(shadow, near, far)
    strip = core * _grown(1 - shadow, far)
    around, inside = _mean(light, outer), _mean(light, core)
    border = torch.where(strip.sum((2, 3)) > 0, _mean(light, strip), inside)
    estimates = torch.stack(
        [
            _ratio(around, inside),
            _ratio(around, border),
            _ratio(_median(light, outer), _median(light, core)),
        ]
    )
    return _known(estimates.log().mean(0).exp(), outer, core)


def mean_gains(images: Tensor, mask: Tensor, reach: float = REACH, gap: float = GAP) -> Tensor:
    """Return the first of the estimates of `ring_gains` alone, `(B, 3)`: a ring-matched gain.

    Args:
        images: as there.
        mask: as there.
        reach: as there.
        gap: as there.
    """
    outer, core = _regions(mask.to(images.dtype), *_pixels(images, reach, gap))
    light = srgb_to_linear(images)
    return _known(_ratio(_mean(light, outer), _mean(light, core)), outer, core)


def local_gains(images: Tensor, mask: Tensor) -> Tensor:
    """Return the gains in linear light of each pixel, `(B, 3, H, W)`, which vary slowly.

    They are those of `ring_gains` where there is no border near.

    Args:
        images: sRGB in [0, 1], `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` of zeros and ones, 1 in shadow.
    """
    light, shadow = srgb_to_linear(images), mask.to(images.dtype)
    near, far = _pixels(images, REACH, GAP)
    outer, core = _regions(shadow, near, far)
    strip = core * _grown(1 - shadow, far)
    strip = torch.where(strip.sum((2, 3), keepdim=True) > 0, strip, core)
    step = max(1, min(images.shape[-2:]) // GRID)
    sigma = NEIGHBOURHOOD * min(images.shape[-2:]) / step
    sums = torch.cat([light * outer, outer, light * strip, strip], 1)
    sums = functional.avg_pool2d(sums, step, ceil_mode=True, count_include_pad=False)
    sums = _blurred(sums, sigma, "constant")
    around, beside, inside, border = torch.split(sums, [3, 1, 3, 1], 1)
    ratio = _ratio(
        around / beside.clamp(min=LEAST_LIGHT), inside / border.clamp(min=LEAST_LIGHT)
    ).log()
    trust = torch.minimum(beside, border)
    trust = trust / (trust + TRUST)
    whole = ring_gains(images, mask).log()[:, :, None, None]
    gains = _blurred(whole + (ratio - whole) * trust, 2.0, "replicate")
    size = (images.shape[-2], images.shape[-1])
    return functional.interpolate(gains, size, mode="bilinear", align_corners=False).exp()


def ring_guess(images: Tensor, mask: Tensor) -> Tensor:
    """Return images whose shadows are brightened by `local_gains`, `(B, 3, H, W)` in [0, 1].

    With s the share that `lost_shares` gives, light is divided by 1 - s (1 - 1 / gain).

    Args:
        images: sRGB in [0, 1], `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` of zeros and ones.
    """
    lost = lost_shares(images, mask) * (1 - 1 / local_gains(images, mask))
    return linear_to_srgb(srgb_to_linear(images) / (1 - lost)).clamp(0, 1)


def lost_shares(images: Tensor, mask: Tensor) -> Tensor:
    """Return how much of the light that a shadow takes is missing at each pixel, from 0 to 1.

    It is 0 far outside the mask, 1 deep inside, and falls across the border as the photo's light
    does on average.

    Args:
        images: sRGB in [0, 1], `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` of zeros and ones.

    Returns:
        `(B, 1, H, W)`.
    """
    shadow = mask.to(images.dtype)
    soft = soft_mask(shadow, grow=0, sigma=PENUMBRA * min(images.shape[-2:]))
    light = srgb_to_linear(images).mean(1, keepdim=True)
    outer, core = _regions(shadow, *_pixels(images, REACH, GAP))
    around, inside = _mean(light, outer)[:, 0], _mean(light, core)[:, 0]
    found = []
    for place, (level, seen) in enumerate(zip(soft, light, strict=True)):
        border = (level > 0) & (level < 1)
        if not bool(border.any()) or not bool(around[place] > CLEAR * inside[place]):
            found.append(level)
            continue
        found.append(_fall(level, seen, border, around[place], inside[place]))
    return torch.stack(found)


def _fall(level: Tensor, light: Tensor, border: Tensor, around: Tensor, inside: Tensor) -> Tensor:
    """Map the levels of a blurred mask to the shares of light that are lost there."""
    levels, seen = level[border], light[border]
    group = (levels * LEVELS).long().clamp(max=LEVELS - 1)
    totals = torch.stack([torch.ones_like(levels), levels, seen])
    sums = totals.new_zeros(3, LEVELS).index_add(1, group, totals)
    count, places, means = sums[:, sums[0] > 0]
    places, means = places / count, (means / count).clamp(inside, around)
    # Light falls into the shadow; where it doesn't, by texture, half of the way each.
    from_inside = means.flip(0).cummax(0).values.flip(0)
    falling = (means.cummin(0).values + from_inside) / 2
    ends = torch.tensor([0.0, 1.0]).to(level)
    known = torch.cat([ends[:1], places, ends[1:]])
    lost = torch.cat([ends[:1], (around - falling) / (around - inside), ends[1:]])
    above = torch.searchsorted(known, level.flatten().contiguous()).clamp(1, len(known) - 1)
    low, high = known[above - 1], known[above]
    weight = ((level.flatten() - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return torch.lerp(lost[above - 1], lost[above], weight).view(level.shape)


def apply_gains(images: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    """Multiply the light of a region by gains, one a colour.

    Args:
        images: sRGB in [0, 1], `(B, 3, H, W)`.
        gains: `(B, 3)`, or `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` in [0, 1]; between, the gain is between 1 and the full one.
    """
    gains = gains[:, :, None, None] if gains.ndim == 2 else gains
    factor = 1 + (gains - 1) * mask
    return linear_to_srgb(srgb_to_linear(images) * factor).clamp(0, 1)


def soft_mask(mask: Tensor, grow: int = GROW, sigma: float = SIGMA) -> Tensor:
    """Return masks that have grown and fade at their border, to blend a result into its photo.

    Args:
        mask: `(B, 1, H, W)` of zeros and ones.
        grow: pixels by which the mask grows first, as a square.
        sigma: of the Gaussian that fades it, in pixels.

    Returns:
        `(B, 1, H, W)` in [0, 1].
    """
    return _blurred(_grown(mask, grow), sigma, "replicate").clamp(0, 1)


def _blurred(maps: Tensor, sigma: float, border: str) -> Tensor:
    """Blur each channel of `(B, C, H, W)` by a Gaussian of a sigma in pixels."""
    reach = max(1, round(3 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = (-(places**2) / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    planes = functional.pad(maps.flatten(0, 1)[:, None], [reach] * 4, border)
    # In the maps' own precision whatever autocast says: three digits are too few for light.
    kind = maps.device.type
    lowered = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if lowered else contextlib.nullcontext():
        planes = functional.conv2d(planes, kernel[None, None, None])
        planes = functional.conv2d(planes, kernel[None, None, :, None])
    return planes.view(maps.shape)


def _grown(mask: Tensor, pixels: int) -> Tensor:
    if pixels < 1:
        return mask
    size = 2 * pixels + 1  # a square is a row of a column: two passes
    rows = functional.max_pool2d(mask, (size, 1), 1, (pixels, 0))
    return functional.max_pool2d(rows, (1, size), 1, (0, pixels))


def _pixels(images: Tensor, reach: float, gap: float) -> tuple[int, int]:
    side = min(images.shape[-2:])
    near = max(1, round(gap * side)) if gap else 0
    return near, max(near + 1, round(reach * side))


def _regions(shadow: Tensor, near: int, far: int) -> tuple[Tensor, Tensor]:
    """Return what lies around a shadow, and its inside without the penumbra."""
    outer = _grown(shadow, far) - _grown(shadow, near)
    core = 1 - _grown(1 - shadow, near)
    # A shadow thinner than its penumbra has no core: then all of it stands for it.
    return outer, torch.where(core.sum((2, 3), keepdim=True) > 0, core, shadow)


def _ratio(around: Tensor, inside: Tensor) -> Tensor:
    return (around / inside.clamp(min=LEAST_LIGHT)).clamp(LEAST, MOST)


def _known(gains: Tensor, outer: Tensor, core: Tensor) -> Tensor:
    known = (core.sum((1, 2, 3)) > 0) & (outer.sum((1, 2, 3)) > 0)
    return torch.where(known[:, None], gains, torch.ones_like(gains))


def _mean(light: Tensor, where: Tensor) -> Tensor:
    return (light * where).sum((2, 3)) / where.sum((2, 3)).clamp(min=1)


def _median(light: Tensor, where: Tensor) -> Tensor:
    found = []
    for image, region in zip(light, where, strict=True):
        chosen = image[:, region[0] > 0]
        found.append(chosen.median(1).values if chosen.shape[1] else image.new_zeros(3))
    return torch.stack(found)
