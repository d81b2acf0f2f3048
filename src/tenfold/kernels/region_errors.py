"""How far two images lie apart in the shadow, outside it, and over all: sums and SSIM by region.

`error_sums` adds up differences of LAB and RGB; `region_ssim` is Wang et al., "Image quality
assessment: from error visibility to structural similarity", 2004. The compiled kernels take uint8
images on the CPU and never hold a map; plain PyTorch takes floats too, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.kernels import native
from tenfold.kernels.lab import compiled, lab_of_rgb

__all__ = ["RADIUS", "able", "error_sums", "region_ssim"]

RADIUS, SIGMA = 5, 1.5  # of SSIM's window
C1, C2 = 0.01**2, 0.03**2
REGIONS = 3
# Plain PyTorch filters tiles: a product with a small band matrix is quicker than a convolution, and
# most tiles lie in one region, whose maps are then known. 256 pixels are 6 tiles exactly.
TILE = 41
# What it works on at once, images or strips of a large one: more leaves the processor's cache.
PIXELS_AT_ONCE = 256 * 256


def able(results: Tensor, truths: Tensor, masks: Tensor) -> bool:
    """Tell whether the compiled kernels take these."""
    return results.dtype == truths.dtype == torch.uint8 and compiled(results, truths, masks)


def error_sums(results: Tensor, truths: Tensor, masks: Tensor) -> Tensor:
    """Return numbers of pixels and sums of errors by image, kind and region, `(B, 4, 3)` float64.

    The kinds: pixels; |dL| + |da| + |db|; dL^2 + da^2 + db^2; dR^2 + dG^2 + dB^2 of RGB in [0, 1].
    The regions: the shadow, outside, and the whole.

    Args:
        results: `(B, 3, H, W)` RGB, uint8, or float in [0, 1].
        truths: likewise.
        masks: `(B, 1, H, W)` bool, True in the shadow.

    >>> black, grey = (torch.full((1, 3, 2, 2), level, dtype=torch.uint8) for level in (0, 51))
    >>> mask = torch.tensor([[[[True, False], [False, False]]]])
    >>> error_sums(black, grey, mask)[0, 3]
    tensor([0.1200, 0.3600, 0.4800], dtype=torch.float64)
    """
    if not able(results, truths, masks):
        return _of_parts(_plain_sums, results, truths, masks)
    given = [each.contiguous() for each in (results, truths, masks)]
    sums = torch.empty(len(results), 4, REGIONS, dtype=torch.float64)
    native.extension().lab_errors(
        *(each.data_ptr() for each in (*given, sums)), len(results), masks[0].numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    sums[:, 3].div_(255**2)
    return sums


def region_ssim(a: Tensor, b: Tensor, masks: Tensor) -> Tensor:
    """Return SSIM in the shadow, outside, and of the whole, `(B, 3)` float64.

    A region's is that of both images with the other region set to 0. Equal to scikit-image's
    `structural_similarity(gaussian_weights=True, use_sample_covariance=False, data_range=1)`: under
    a Gaussian of sigma 1.5 and 11 pixels, mean over channels and over windows within the image.

    Args:
        a: `(B, C, H, W)`, uint8, or float in [0, 1]; sides of at least 11.
        b: likewise.
        masks: `(B, 1, H, W)` bool.
    """
    if not able(a, b, masks):
        return _of_parts(_plain_ssim, a, b, masks)
    given = [each.contiguous() for each in (a, b, masks)]
    found = torch.empty(len(a), REGIONS, dtype=torch.float64)
    native.extension().region_ssim(
        *(each.data_ptr() for each in (*given, found)), *a.shape, torch.get_num_threads()
    )
    return found


# -- plain PyTorch ---------------------------------------------------------------------------------


def _of_parts(
    figures: Callable[[Tensor, Tensor, Tensor], Tensor], a: Tensor, b: Tensor, masks: Tensor
) -> Tensor:
    """Return the figures of some images at a time."""
    count = max(1, PIXELS_AT_ONCE // (a.shape[-1] * a.shape[-2]))
    parts = zip(*(torch.split(whole, count) for whole in (a, b, masks)), strict=True)
    with torch.no_grad():
        return torch.cat([figures(*part) for part in parts])


def _strips(height: int, width: int, step: int, borders: int = 0) -> Iterator[slice]:
    """Yield rows, a multiple of `step` at a time, with the borders that a window needs."""
    rows = step * max(1, PIXELS_AT_ONCE // (step * width))
    for top in range(0, height - borders, rows):
        yield slice(top, min(top + rows, height - borders) + borders)


def _plain_sums(results: Tensor, truths: Tensor, masks: Tensor) -> Tensor:
    batch, _, height, width = results.shape
    sums = [
        _errors_of_strip(*(whole[:, :, strip] for whole in (results, truths, masks)))
        for strip in _strips(height, batch * width, 1)
    ]
    return torch.stack(sums).sum(0)


def _errors_of_strip(results: Tensor, truths: Tensor, masks: Tensor) -> Tensor:
    apart = _lab(results).sub_(_lab(truths))
    maps = apart.new_empty(4, *masks.shape)
    maps[0] = 1
    torch.sum(apart.abs(), 1, keepdim=True, out=maps[1])
    torch.sum(apart.square_(), 1, keepdim=True, out=maps[2])
    torch.sum((_unit(results) - _unit(truths)).square_(), 1, keepdim=True, out=maps[3])
    shadow = masks.to(maps.dtype)
    # Not all less shadow: what is equal outside has an error of 0, not of what rounding leaves.
    return torch.stack(
        [
            _total(of_region.flatten(0, 1)).view(4, -1).T
            for of_region in (maps * shadow, maps * (1 - shadow), maps)
        ],
        dim=2,
    )


def _lab(images: Tensor) -> Tensor:
    return lab_of_rgb(images if images.dtype == torch.uint8 else _unit(images))


def _unit(images: Tensor) -> Tensor:
    """Return images in [0, 1], float64 as they are, else in float32."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    return images if images.dtype == torch.float64 else images.float()


def _plain_ssim(a: Tensor, b: Tensor, masks: Tensor) -> Tensor:
    batch, _, height, width = a.shape
    a, b = _unit(a), _unit(b)
    sums = torch.zeros(batch, REGIONS, dtype=torch.float64, device=a.device)
    for strip in _strips(height, batch * width, TILE, 2 * RADIUS):
        sums += _ssim_of_strip(a[:, :, strip], b[:, :, strip], masks[:, :, strip])
    return sums / ((height - 2 * RADIUS) * (width - 2 * RADIUS))


def _ssim_of_strip(a: Tensor, b: Tensor, masks: Tensor) -> Tensor:
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
    return torch.stack([inside, outside, similar], dim=1).view(batch, -1, REGIONS).sum(1)


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
