"""Errors of images whose shadows were removed: in the shadow, outside it, and over all pixels.

Four figures, each for three regions:

    LAB MAE   mean over the region's pixels of |dL| + |da| + |db|
    LAB RMSE  root of the mean over its pixels and the three channels of d^2
    PSNR      -10 log10 of the mean of (difference of RGB in [0, 1])^2
    SSIM      Wang et al., "Image quality assessment: from error visibility to structural
              similarity", 2004: of each channel of RGB, Gaussian of sigma 1.5 and 11 pixels, over
              windows that lie within the image

**The field's "RMSE" is the first one**, a mean absolute error summed over three channels; the
authors of SP+M-Net and of DC-ShadowNet say so. PSNR and SSIM of a region are the field's as well:
the other region is set to 0 in both images, and the whole frame counts. The equal zeros flatter
them, the more the smaller the region.

Means over a set are of images' own figures (PI, per image), or of all pixels together (PP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.nn.lab import rgb_to_lab

__all__ = ["FIGURES", "REGIONS", "ShadowErrors", "region_ssim", "shadow_errors", "shadow_masks"]

REGIONS = ("shadow", "non-shadow", "all")
FIGURES = ("lab_mae", "lab_rmse", "psnr", "ssim")

RADIUS, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2
# The filter goes over tiles: a product with a small band matrix is quicker than a convolution, and
# most tiles lie in one region, whose maps are then known. 256 pixels are 6 tiles exactly.
TILE = 41
# What is worked on at once, images or strips of a large one: more leaves the processor's cache.
PIXELS_AT_ONCE = 256 * 256


@dataclass(frozen=True)
class ShadowErrors:
    """Sums over N images' pixels by region, from which figures and means are made.

    All are float64 on the CPU; regions are ordered as `REGIONS`.

    Attributes:
        pixels: `(N, 3)`, in each region.
        lab_absolute: `(N, 3)`, sums of |dL| + |da| + |db|.
        lab_squared: `(N, 3)`, sums of squared differences of LAB over the channels too.
        rgb_squared: `(N, 3)`, likewise of RGB in [0, 1].
        ssim: `(N, 3)`, the other region set to 0.
    """

    pixels: Tensor
    lab_absolute: Tensor
    lab_squared: Tensor
    rgb_squared: Tensor
    ssim: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @staticmethod
    def joined(parts: Sequence[ShadowErrors]) -> ShadowErrors:
        """Return those of several batches as one.

        Raises:
            UserError: no parts.
        """
        if not parts:
            raise UserError("no images to compare: expected at least one")
        return ShadowErrors(
            pixels=torch.cat([part.pixels for part in parts]),
            lab_absolute=torch.cat([part.lab_absolute for part in parts]),
            lab_squared=torch.cat([part.lab_squared for part in parts]),
            rgb_squared=torch.cat([part.rgb_squared for part in parts]),
            ssim=torch.cat([part.ssim for part in parts]),
        )

    def per_image(self) -> Tensor:
        """Return `(N, 3, 4)`: images, `REGIONS`, `FIGURES`.

        Figures of a region without pixels are NaN; the PSNR of equal images is infinite.
        """
        return _figures(self, self.pixels[:, 2:])

    def mean_of_images(self) -> Tensor:
        """Return the means of the images' figures (PI), `(3, 4)`.

        Regions without pixels don't count, nor do infinite PSNRs unless all are infinite.
        """
        found = self.per_image()
        mean = found.where(found.isfinite(), torch.nan).nanmean(0)
        return mean.where(~(mean.isnan() & (found == torch.inf).any(0)), torch.inf)

    def pooled(self) -> Tensor:
        """Return the figures of all pixels together (PP), `(3, 4)`; SSIM weighted by frames."""
        # A frame in which the region is empty has no error there, and no pixels for its PSNR.
        frames = self.pixels[:, 2:] * (self.pixels > 0)
        frame = frames.sum(0, keepdim=True)
        total = ShadowErrors(
            pixels=self.pixels.sum(0, keepdim=True),
            lab_absolute=self.lab_absolute.sum(0, keepdim=True),
            lab_squared=self.lab_squared.sum(0, keepdim=True),
            rgb_squared=self.rgb_squared.sum(0, keepdim=True),
            ssim=(self.ssim * frames).sum(0, keepdim=True) / frame,
        )
        return _figures(total, frame)[0]

    def infinite(self) -> Tensor:
        """Return in how many images a region is equal, so that its PSNR is infinite: `(3,)`."""
        return (self.per_image()[..., 2] == torch.inf).sum(0)

    def empty(self) -> Tensor:
        """Return in how many images a region has no pixels: `(3,)`."""
        return (self.pixels == 0).sum(0)


def shadow_errors(results: Tensor, truths: Tensor, masks: Tensor) -> ShadowErrors:
    """Compare results with shadow-free images.

    Args:
        results: `(B, 3, H, W)` RGB, uint8, or float in [0, 1]; sides of at least 11.
        truths: likewise.
        masks: `(B, 1, H, W)` bool, True in the shadow.

    Raises:
        UserError: shapes or types that don't fit.

    >>> truth = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    >>> mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    >>> mask[..., :8] = True
    >>> found = shadow_errors(torch.where(mask, 100, truth), truth, mask)
    >>> [round(value, 2) for value in found.per_image()[0, :, 0].tolist()]
    [11.21, 0.0, 5.61]
    """
    _check(results, truths, masks)
    count = max(1, PIXELS_AT_ONCE // (results.shape[-1] * results.shape[-2]))
    with torch.no_grad():
        parts = [
            _compared(results[at : at + count], truths[at : at + count], masks[at : at + count])
            for at in range(0, len(results), count)
        ]
    return ShadowErrors.joined(parts)


def shadow_masks(levels: Tensor, above: float = 0.0, dilate: int = 0) -> Tensor:
    """Return where masks say shadow, bool of the same shape.

    Args:
        levels: uint8 `(B, 1, H, W)`.
        above: share of white that a pixel has to exceed: 0, any non-zero value, as in most papers'
            scripts; 0.5, the middle.
        dilate: grow the shadow by so many pixels, in a square.

    Raises:
        UserError: values out of range.
    """
    if levels.dtype != torch.uint8 or levels.ndim != 4 or levels.shape[1] != 1:
        raise UserError(
            f"masks are {levels.dtype} of shape {tuple(levels.shape)}: expected uint8 (B, 1, H, W)"
        )
    if not 0 <= above < 1 or dilate < 0:
        raise UserError(f"above={above} and dilate={dilate}: expected 0 <= above < 1, dilate >= 0")
    found = levels > 255 * above
    if dilate:
        grown = found.float()
        for sides in ((2 * dilate + 1, 1), (1, 2 * dilate + 1)):
            padding = [side // 2 for side in sides]
            grown = functional.max_pool2d(grown, sides, stride=1, padding=padding)
        found = grown > 0
    return found


def region_ssim(a: Tensor, b: Tensor, masks: Tensor) -> Tensor:
    """Return SSIM in the shadow, outside, and of the whole, `(B, 3)` float64.

    A region's is that of both images with the other region set to 0. Equal to scikit-image's
    `structural_similarity(gaussian_weights=True, use_sample_covariance=False, data_range=1)`.

    Args:
        a: `(B, C, H, W)` float in [0, 1]; sides of at least 11.
        b: likewise.
        masks: `(B, 1, H, W)` bool.
    """
    batch, _, height, width = a.shape
    inner = (height - 2 * RADIUS, width - 2 * RADIUS)
    rows = TILE * max(1, PIXELS_AT_ONCE // (batch * TILE * width))
    sums = torch.zeros(batch, len(REGIONS), dtype=torch.float64, device=a.device)
    for top in range(0, inner[0], rows):
        strip = slice(top, min(top + rows, inner[0]) + 2 * RADIUS)
        sums += _ssim_sums(a[:, :, strip], b[:, :, strip], masks[:, :, strip])
    return sums / (inner[0] * inner[1])


# -- one part of a batch ---------------------------------------------------------------------------


def _compared(results: Tensor, truths: Tensor, masks: Tensor) -> ShadowErrors:
    rows = max(1, PIXELS_AT_ONCE // (len(results) * results.shape[-1]))
    parts = [
        _error_sums(*(whole[:, :, top : top + rows] for whole in (results, truths, masks)))
        for top in range(0, results.shape[-2], rows)
    ]
    absolute, squared, rgb_squared = torch.stack(parts).sum(0).cpu().unbind(1)
    shadow = masks.flatten(1).sum(1).double().cpu()
    frame = torch.full_like(shadow, masks[0].numel())
    return ShadowErrors(
        pixels=torch.stack([shadow, frame - shadow, frame], dim=1),
        lab_absolute=absolute,
        lab_squared=squared,
        rgb_squared=rgb_squared,
        ssim=region_ssim(_unit(results), _unit(truths), masks).cpu(),
    )


def _error_sums(results: Tensor, truths: Tensor, masks: Tensor) -> Tensor:
    """Return sums by image, kind of error, and region, `(B, 3, 3)`."""
    apart = rgb_to_lab(results).sub_(rgb_to_lab(truths))
    maps = apart.new_empty(3, *masks.shape)
    torch.sum(apart.abs(), 1, keepdim=True, out=maps[0])
    torch.sum(apart.square_(), 1, keepdim=True, out=maps[1])
    torch.sum((_unit(results) - _unit(truths)).square_(), 1, keepdim=True, out=maps[2])
    shadow = masks.to(maps.dtype)
    # Not all less shadow: what is equal outside has an error of 0, not of what rounding leaves.
    return torch.stack(
        [
            _total(of_region.flatten(0, 1)).view(3, -1).T
            for of_region in (maps * shadow, maps * (1 - shadow), maps)
        ],
        dim=2,
    )


def _unit(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _figures(sums: ShadowErrors, frames: Tensor) -> Tensor:
    """Return `(N, 3, 4)` of sums; `frames` are the pixels that PSNR counts, `(N, 1 or 3)`."""
    found = torch.stack(
        [
            sums.lab_absolute / sums.pixels,
            (sums.lab_squared / (3 * sums.pixels)).sqrt(),
            -10 * (sums.rgb_squared / (3 * frames)).log10(),
            sums.ssim,
        ],
        dim=-1,
    )
    return found.where(sums.pixels[..., None] > 0, torch.nan)


def _ssim_sums(a: Tensor, b: Tensor, masks: Tensor) -> Tensor:
    """Return sums of SSIM over the pixels that have a whole window, `(B, 3)` float64."""
    batch = len(a)
    inner = (a.shape[2] - 2 * RADIUS, a.shape[3] - 2 * RADIUS)
    missing = [-side % TILE for side in inner]
    whole_maps = _maps(_tiles(a, missing), _tiles(b, missing))
    shadow = _tiles(masks.to(a.dtype), missing).flatten(0, 2)
    used = _used(inner, missing, batch, a) if any(missing) else None

    share = shadow.mean((1, 2, 3))
    whole = _filtered(whole_maps)
    similar = _similarity(whole, used)
    # Zeros are as alike as can be: 1 each.
    nothing = torch.full_like(similar, TILE * TILE) if used is None else _total(used)
    inside = torch.where(share == 1, similar, nothing)
    outside = torch.where(share == 0, similar, nothing)
    mixed = ((share > 0) & (share < 1)).nonzero().flatten()
    if len(mixed):
        used = None if used is None else used[mixed]
        # A mask of 0 and 1 is its own square, so it may come after the squares and products.
        of_shadow = _filtered(whole_maps.index_select(1, mixed).mul_(shadow[mixed]))
        inside[mixed] = _similarity(of_shadow, used)
        # Sums under a window of both parts are that of the whole.
        outside[mixed] = _similarity(whole.index_select(1, mixed).sub_(of_shadow), used)
    return torch.stack([inside, outside, similar], dim=1).view(batch, -1, len(REGIONS)).sum(1)


def _tiles(planes: Tensor, missing: Sequence[int]) -> Tensor:
    """View planes as tiles with the window's borders, `(B, rows, columns, C, T + 10, T + 10)`."""
    if any(missing):
        planes = functional.pad(planes, (0, missing[1], 0, missing[0]))
    side = TILE + 2 * RADIUS
    return planes.unfold(2, side, TILE).unfold(3, side, TILE).permute(0, 2, 3, 1, 4, 5)


def _used(inner: tuple[int, int], missing: Sequence[int], batch: int, like: Tensor) -> Tensor:
    """Return 1 where a tile's pixel is one of the image, 0 beyond: `(n, 1, T, T)`."""
    ones = functional.pad(like.new_ones(inner), (0, missing[1], 0, missing[0]))
    tiles = ones.unfold(0, TILE, TILE).unfold(1, TILE, TILE).reshape(-1, 1, TILE, TILE)
    return tiles.repeat(batch, 1, 1, 1)


def _maps(a: Tensor, b: Tensor) -> Tensor:
    """Return a, b, a^2 + b^2 and a b of tiles, `(4, n, C, T + 10, T + 10)`."""
    maps = a.new_empty(4, *a.shape)
    maps[0], maps[1] = a, b
    torch.mul(maps[0], maps[0], out=maps[2]).addcmul_(maps[1], maps[1])
    torch.mul(maps[0], maps[1], out=maps[3])
    return maps.flatten(1, 3)


def _filtered(maps: Tensor) -> Tensor:
    """Return means under the window, `(4, n, C, T, T)`, of maps with its borders."""
    band = _band(maps)
    rows = (maps.flatten(0, -2) @ band).view(*maps.shape[:-1], TILE)
    found: Tensor = band.T.contiguous() @ rows
    return found


def _band(like: Tensor) -> Tensor:
    """Return the matrix whose product with a row is the row under the Gaussian."""
    places = torch.arange(TILE + 2 * RADIUS, dtype=torch.float64, device=like.device)
    steps = places[:, None] - places[None, :TILE] - RADIUS
    window = (-0.5 * (steps / SIGMA) ** 2).exp().masked_fill_(steps.abs() > RADIUS, 0)
    found: Tensor = (window / window.sum(0)).to(like.dtype)
    return found


def _similarity(means: Tensor, used: Tensor | None) -> Tensor:
    """Return each tile's sum of SSIM over the pixels that are used, mean over channels."""
    a, b, squares, product = means
    both = a * b
    alone = (a * a).addcmul_(b, b)
    found = (product - both).mul_(2).add_(C2)
    below = (squares - alone).add_(C2)
    found.mul_(both.mul_(2).add_(C1)).div_(below.mul_(alone.add_(C1)))
    if used is not None:
        found.mul_(used)
    mean: Tensor = _total(found) / found.shape[1]
    return mean


def _total(maps: Tensor) -> Tensor:
    """Return the sums over all but the first dimension, rows in their own precision."""
    found: Tensor = maps.sum(-1).flatten(1).sum(1, dtype=torch.float64)
    return found


def _check(results: Tensor, truths: Tensor, masks: Tensor) -> None:
    if results.ndim != 4 or results.shape[1] != 3 or results.shape != truths.shape:
        raise UserError(
            f"results are {tuple(results.shape)} and truths {tuple(truths.shape)}: expected both "
            "(B, 3, H, W)"
        )
    if masks.dtype != torch.bool or masks.shape != (len(results), 1, *results.shape[2:]):
        raise UserError(
            f"masks are {masks.dtype} of shape {tuple(masks.shape)}: expected bool "
            f"{(len(results), 1, *results.shape[2:])}"
        )
    if min(results.shape[2:]) < 2 * RADIUS + 1:
        raise UserError(
            f"images are {results.shape[2]}x{results.shape[3]}: SSIM's window needs at least "
            f"{2 * RADIUS + 1} pixels a side"
        )
