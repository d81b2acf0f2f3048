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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels.region_errors import RADIUS, error_sums, region_ssim

__all__ = ["FIGURES", "REGIONS", "ShadowErrors", "region_ssim", "shadow_errors", "shadow_masks"]

REGIONS = ("shadow", "non-shadow", "all")
FIGURES = ("lab_mae", "lab_rmse", "psnr", "ssim")


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

    Compiled kernels take uint8 images on the CPU, each image in one thread; floats, and images on
    other devices, are compared by PyTorch.

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
    pixels, absolute, squared, rgb_squared = error_sums(results, truths, masks).cpu().unbind(1)
    return ShadowErrors(
        pixels=pixels,
        lab_absolute=absolute,
        lab_squared=squared,
        rgb_squared=rgb_squared,
        ssim=region_ssim(results, truths, masks).cpu(),
    )


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
    # By NumPy: torch would spread this little work over all cores, which takes many times longer
    # when they are busy.
    found = levels.cpu().numpy() > 255 * above
    for axis in (2, 3):
        found = _grown(found, dilate, axis)
    return torch.from_numpy(found).to(levels.device)


def _grown(shadow: NDArray[np.bool_], pixels: int, axis: int) -> NDArray[np.bool_]:
    """Let what is True spread by so many pixels to both sides along an axis."""
    for _ in range(pixels):
        grown = shadow.copy()
        kept, moved = (np.moveaxis(each, axis, 0) for each in (shadow, grown))
        moved[1:] |= kept[:-1]
        moved[:-1] |= kept[1:]
        shadow = grown
    return shadow


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


def _check(results: Tensor, truths: Tensor, masks: Tensor) -> None:
    if not len(results):
        raise UserError("no images to compare: expected at least one")
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
