"""Take the shadow out of a photo of any size: work on a small copy, and carry over the light alone.

A network of global statistics can't work on tiles, and takes long on a large photo. But a shadow is
simpler than a photo: it takes away a share of the light. So the network sees a small copy, and what
is carried over is the share of light that was left, in linear light,

    A = (small copy + e) / (network's result + e),    result = (photo + e) / A - e

which keeps the photo's own detail, and with the same e on both sides gives the network's result
back on average. A is a mean of the shares within a pixel of the copy, so that enlarging it
bilinearly is right but for one thing: the shadow's border may be sharper than the copy's pixels.
There the full-size mask helps. In each 3x3 neighbourhood of the copy A is fitted by a line of the
mask m, A = a m + b, as in a guided filter (He, Sun and Tang, "Guided Image Filtering", ECCV 2010);
a and b are enlarged instead of A, and meet the photo's own mask. Here a is scaled down where the
line explains little, as with a mask that is off, and b takes all of the rest: then it is the
bilinear enlargement again. How steep the border is, the photo says: m is the blurred mask, whose
level tells how far a place is from the border, mapped to how the light falls over that distance in
the mean along the whole border. A filter that is guided by the photo itself was tried: it takes the
texture out along the border.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.nn.shadow_codes import linear_to_srgb, srgb_to_linear
from tenfold.nn.shadow_gain import LEAST, MOST, ring_gains, soft_mask
from tenfold.nn.shadow_remover import ShadowRemover

__all__ = ["LARGEST_SIDE", "LEAST_GAIN", "MOST_GAIN", "SMALLEST_SIDE", "Removal", "remove_shadow"]

SMALLEST_SIDE, LARGEST_SIDE = 256, 480  # of the small copy, its shorter side
LEAST_GAIN, MOST_GAIN = LEAST, 8.0
EPSILON = 1e-3  # of full light
EDGE = (
    0.7  # blur of the full-size mask, in pixels of the copy: it sees about that far from the border
)
LEVELS = 17  # of it that the mean light is taken at
LEAST_FALL = 0.1  # of the light, across the border; below, it says nothing
RIDGE = 1e-3  # least variance of the mask in a neighbourhood that counts as a border
TRUST = 8  # power of the explained share
NOTED = 0.01  # of the shadow's pixels: as many limited gains are told
ROWS, COLUMNS = 64, 512  # of a tile that is worked on at once: it stays in a core's cache
STEPS = 65535  # of linear light in the table back to sRGB: an eighth of a level in the darks

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Removal:
    """A photo without its shadow.

    Attributes:
        pixels: uint8 `(1, 3, H, W)`, channels-last.
        seen: (H, W) of what the network saw; that of the photo where it wasn't reduced.
        notes: what the user should know.
    """

    pixels: Tensor
    seen: tuple[int, int]
    notes: tuple[str, ...]


def remove_shadow(
    remover: ShadowRemover,
    pixels: Tensor,
    mask: Tensor,
    *,
    side: int | None = None,
    threads: int | None = None,
) -> Removal:
    """Return a photo of any size without its shadow.

    Where the remover composites, the photo stays as it is a little beyond the mask, to the last
    bit. Memory is that of the photo and its result, one byte a channel, and of a band of rows.

    Args:
        remover: with its network in evaluation mode.
        pixels: uint8 `(1, 3, H, W)`; channels-last isn't copied.
        mask: uint8 `(H, W)` of zeros and ones, 1 in shadow.
        side: shorter side of what the network sees, at most; 256 by default.
        threads: that work on bands; as many as PyTorch's by default.

    Raises:
        UserError: no such pixels or mask, an empty mask, or a side that is too small.
    """
    _check(pixels, mask, side)
    height, width = pixels.shape[-2:]
    scale = (side or SMALLEST_SIDE) / min(height, width)
    if scale >= 1:
        made = remover(pixels.float() / 255, mask[None, None].float())
        whole = made.mul(255).round_().clamp_(0, 255).to(torch.uint8)
        return Removal(whole.contiguous(memory_format=torch.channels_last), (height, width), ())
    seen = (max(1, round(height * scale)), max(1, round(width * scale)))
    shares, notes = _shares(remover, pixels, mask, seen)
    edge = _blurred_mask(mask, EDGE / scale)
    edge = _fall_of_light(pixels, edge).take(edge)
    slope, rest = _fit(shares, _reduced(edge, seen))
    result = _applied(pixels, edge, slope, rest, threads or torch.get_num_threads())
    return Removal(result, seen, notes)


# -- on the small copy ----------------------------------------------------------------------------


def _shares(
    remover: ShadowRemover, pixels: Tensor, mask: Tensor, seen: tuple[int, int]
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the shares of light that were left, `(1, 3, h, w)`, and what to tell of them."""
    small = _reduced(pixels[0].permute(1, 2, 0).contiguous().numpy(), seen)
    cover = _reduced(mask.mul(255).numpy(), seen)
    small_mask = (cover > 0.5).float()
    if not bool(small_mask.any()):  # a shadow thinner than the copy's pixels
        small_mask = (cover > 0).float()
    whole = copy.copy(remover)
    whole.composite = False
    made = whole(small, small_mask)
    gains = (srgb_to_linear(made) + EPSILON) / (srgb_to_linear(small) + EPSILON)
    most, notes = MOST_GAIN, list[str]()
    if remover.guess == "ring":
        needed = float(ring_gains(small, small_mask).max())
        if needed > most:
            most = MOST
            notes.append(
                f"its surroundings are {needed:.1f} times as bright as the shadow: gains of up to "
                f"{most:g} were allowed, expect noise"
            )
    limited = ((gains > most).any(1, keepdim=True) & (small_mask > 0)).sum() / small_mask.sum()
    if float(limited) > NOTED:
        notes.append(f"gains were limited to {most:g} in {float(limited):.0%} of the shadow")
    shares = 1 / gains.clamp(LEAST_GAIN, most)
    if remover.composite:
        soft = soft_mask(small_mask)
        shares = torch.where(soft > 0, torch.lerp(torch.ones_like(shares), shares, soft), 1.0)
    return shares, tuple(notes)


def _fit(shares: Tensor, cover: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b of shares = a cover + b around each pixel of the copy, exact in the pixel."""
    mean_cover, mean_shares = _mean(cover), _mean(shares)
    covariance = _mean(cover * shares) - mean_cover * mean_shares
    variance = _mean(cover * cover) - mean_cover**2
    deviation = (_mean(shares * shares) - mean_shares**2).clamp(min=0)
    explained = covariance**2 / (variance * deviation).clamp(min=1e-7)
    # A shadow takes light away, and at most all of it.
    slope = (covariance / (variance + RIDGE)).clamp(-1, 0) * explained.clamp(0, 1) ** TRUST
    return slope, shares - slope * cover


def _fall_of_light(pixels: Tensor, edge: Bytes) -> Bytes:
    """Return for each of the 256 levels of a blurred mask how much of its light a place has lost.

    Both ends are kept: 0 has lost none, 255 all that is lost across the border.
    """
    border = np.flatnonzero((edge > 0) & (edge < 255))
    levels = edge.reshape(-1)[border]
    colours = pixels[0].permute(1, 2, 0).reshape(-1, 3).numpy()[border]
    light = _to_light().take(colours).mean(1)
    group = np.arange(256) * LEVELS // 256
    counts = np.bincount(levels, minlength=256)
    sums = np.bincount(levels, light, 256)
    totals, lights, places = (
        np.bincount(group, each) for each in (counts, sums, counts * np.arange(256))
    )
    there = totals > 0
    if there.sum() > 1:
        means = lights[there] / totals[there]
        # Light falls into the shadow; where it doesn't, by texture, half of the way each.
        from_outside = np.minimum.accumulate(means)
        from_inside = np.maximum.accumulate(means[::-1])[::-1]
        falling = (from_outside + from_inside) / 2
        fall = falling[0] - falling[-1]
        if fall >= LEAST_FALL * falling[0]:
            known = [0, *(places[there] / totals[there]), 255]
            lost = [0, *((falling[0] - falling) / fall), 1]
            table: Bytes = (255 * np.interp(np.arange(256), known, lost)).round().astype(np.uint8)
            return table
    return np.arange(256, dtype=np.uint8)


def _mean(x: Tensor) -> Tensor:
    return functional.avg_pool2d(functional.pad(x, [1] * 4, "replicate"), 3, 1)


# -- on the photo ---------------------------------------------------------------------------------


def _applied(pixels: Tensor, edge: Bytes, slope: Tensor, rest: Tensor, threads: int) -> Tensor:
    """Return (photo + e) / (slope edge + rest) - e, the two enlarged to the photo's size."""
    given: Bytes = pixels[0].permute(1, 2, 0).contiguous().numpy()
    height, width = given.shape[:2]
    result = np.empty_like(given)
    # Across at once, which takes as many rows as the copy has; down row by row.
    wide = [_across(each, width) for each in (slope, rest)]
    untouched = ((slope == 0).all(1) & (rest == 1).all(1))[0].numpy()
    flat = (slope == 0).all(1)[0].numpy()
    rows = _places(height, slope.shape[2])
    columns = _places(width, slope.shape[3])

    def work(top: int) -> None:
        band = slice(top, min(height, top + ROWS))
        upper, lower, weight = rows[0][band], rows[1][band], rows[2][band]
        used = slice(int(upper[0]), int(lower[-1]) + 1)
        for left in range(0, width, COLUMNS):
            part = slice(left, min(width, left + COLUMNS))
            seen = slice(int(columns[0][part][0]), int(columns[1][part][-1]) + 1)
            tile = given[band, part]
            if untouched[used, seen].all():
                result[band, part] = tile
                continue
            shares = _down(wide[1][:, part], upper, lower, weight)
            if not flat[used, seen].all():
                border = edge[band, part, None].astype(np.float32) * np.float32(1 / 255)
                shares += _down(wide[0][:, part], upper, lower, weight) * border
            np.clip(shares, 1 / MOST, 1 / LEAST_GAIN, out=shares)
            light = _to_light().take(tile)
            light /= shares
            light -= np.float32(STEPS * EPSILON - 0.5)  # the half rounds
            np.clip(light, 0, STEPS, out=light)
            result[band, part] = _to_srgb().take(light.astype(np.uint16))

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(work, range(0, height, ROWS)):
            pass
    return torch.from_numpy(result).permute(2, 0, 1)[None]


def _places(large: int, small: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Return for each place the two places that it lies between, and how far it is on its way."""
    at = ((np.arange(large) + 0.5) * (small / large) - 0.5).clip(0, small - 1)
    first = np.floor(at).astype(np.intp)
    return first, np.minimum(first + 1, small - 1), (at - first).astype(np.float32)


def _across(x: Tensor, width: int) -> Floats:
    """Enlarge `(1, 3, h, w)` to `(h, width, 3)`."""
    plain = np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())
    left, right, weight = _places(width, plain.shape[1])
    start = plain.take(left, axis=1)
    wide: Floats = start + (plain.take(right, axis=1) - start) * weight[:, None]
    return wide


def _down(wide: Floats, upper: NDArray[np.intp], lower: NDArray[np.intp], weight: Floats) -> Floats:
    """Enlarge `(h, W, 3)` to as many rows as there are places."""
    out = np.empty((len(upper), *wide.shape[1:]), np.float32)
    for first, run in _runs(upper):
        start, step = wide[first], wide[lower[run.start]] - wide[first]
        np.multiply(step, weight[run, None, None], out=out[run])
        out[run] += start
    return out


def _runs(places: NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
    """Yield each place that comes several times in a row, and where."""
    ends = [*(np.flatnonzero(np.diff(places)) + 1).tolist(), len(places)]
    start = 0
    for end in ends:
        yield int(places[start]), slice(start, end)
        start = end


@functools.cache
def _to_light() -> Floats:
    """Return linear light and e of the 256 levels, in steps of the other table."""
    table = srgb_to_linear(torch.arange(256, dtype=torch.float64) / 255)
    return ((table + EPSILON) * STEPS).float().numpy()


@functools.cache
def _to_srgb() -> Bytes:
    table = linear_to_srgb(torch.arange(STEPS + 1, dtype=torch.float64) / STEPS)
    return table.mul(255).round().to(torch.uint8).numpy()


# -- by Pillow, which works on bytes --------------------------------------------------------------


def _reduced(pixels: Bytes, size: tuple[int, int]) -> Tensor:
    """Return the means over the copy's pixels, `(1, C, h, w)` in [0, 1]."""
    from PIL import Image

    small = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BOX)
    planes = torch.from_numpy(np.array(small)).float() / 255
    return planes[None, None] if planes.ndim == 2 else planes.permute(2, 0, 1)[None].contiguous()


def _blurred_mask(mask: Tensor, sigma: float) -> Bytes:
    """Return a mask of zeros and ones as `(H, W)` of 0 to 255 that fades at its border."""
    from PIL import Image, ImageFilter

    levels = Image.fromarray(mask.mul(255).numpy())
    box = levels.getbbox()
    if box is None:
        return np.asarray(levels)
    reach = int(4 * sigma) + 1
    left, top = (max(0, side - reach) for side in box[:2])
    right, bottom = min(levels.width, box[2] + reach), min(levels.height, box[3] + reach)
    around = (left, top, right, bottom)
    levels.paste(levels.crop(around).filter(ImageFilter.GaussianBlur(sigma)), (left, top))
    return np.asarray(levels)


def _check(pixels: Tensor, mask: Tensor, side: int | None) -> None:
    shape = tuple(pixels.shape)
    if pixels.dtype != torch.uint8 or len(shape) != 4 or shape[:2] != (1, 3) or 0 in shape:
        raise UserError(f"a photo is {pixels.dtype} of shape {shape}: expected uint8 (1, 3, H, W)")
    if mask.dtype != torch.uint8 or tuple(mask.shape) != shape[2:]:
        raise UserError(
            f"a mask is {mask.dtype} of shape {tuple(mask.shape)}: expected uint8 {shape[2:]}, the "
            "photo's size"
        )
    if int(mask.max()) != 1:
        raise UserError(
            f"the mask's largest value is {int(mask.max())}: expected zeros, and ones in shadow"
        )
    if side is not None and side < 1:
        raise UserError(f"side {side}: expected at least 1 pixel, such as 256")
