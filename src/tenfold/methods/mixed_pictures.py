"""Pictures of mixed images: the pair, where the network looked, and what was made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.methods.region_mixing import Windows

__all__ = ["mixed_pictures"]

GAP = 4  # white pixels between the parts of a picture
LEAST_SIDE = 96  # small images are enlarged by whole factors, to be seen
TARGET, SOURCE = (77, 208, 255), (255, 221, 51)  # colours of the frames: light blue, yellow
WARM = (0.9, 0.1, 0.1)  # what attention is painted with
HEAT = 0.6  # how much of the picture it may cover
DIM = 0.6  # brightness of the picture below

Scale = tuple[Sequence[float], Sequence[float]]


def mixed_pictures(
    images: Tensor,
    scores: Tensor,
    target: Windows,
    source: Windows,
    side: int,
    mixed: Tensor,
    count: int,
    scale: Scale | None = None,
) -> Tensor:
    """Draw the first images of a batch: target, source, mixture side by side.

    Args:
        images: unmixed, normalised, `(B, C, H, H)`.
        scores: attention that each of their tokens receives, `(B, S, S)`.
        target: windows that are pasted over.
        source: windows of image B-1-b that are pasted into image b.
        side: of the windows, in tokens.
        mixed: `(B, C, H, H)`.
        count: images to draw.
        scale: mean and standard deviation that the images are normalised by; else each picture is
            stretched to the whole range.

    Returns:
        uint8 `(count, 3, h, w)`, on the CPU.
    """
    with torch.no_grad():
        shown = slice(0, min(count, len(images)))
        first, mixture = images[shown].float().cpu(), mixed[shown].float().cpu()
        second = images.flip(0)[shown].float().cpu()
        heat, other_heat = scores[shown].float().cpu(), scores.flip(0)[shown].float().cpu()
        pixels = first.shape[-1] // heat.shape[-1]
        zoom = max(1, -(-LEAST_SIDE // first.shape[-1]))
        first, second, mixture = (
            _enlarged(_in_colour(part, scale), zoom) for part in (first, second, mixture)
        )
        for part, map_of, windows, colour in (
            (first, heat, target, TARGET),
            (second, other_heat, source, SOURCE),
        ):
            _warm(part, map_of)
            _frame(part, windows, side, pixels * zoom, colour)
        _frame(mixture, target, side, pixels * zoom, SOURCE)
        white = torch.ones(*first.shape[:3], GAP)
        drawn = torch.cat([first, white, second, white, mixture], dim=3)
        return (drawn * 255).round().to(torch.uint8)


def _in_colour(images: Tensor, scale: Scale | None) -> Tensor:
    if scale is not None:
        mean, std = (torch.tensor(list(values)).reshape(-1, 1, 1) for values in scale)
        images = images * std + mean
    else:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6)
    return (images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)).clamp(
        0, 1
    )


def _enlarged(images: Tensor, zoom: int) -> Tensor:
    return images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)


def _warm(images: Tensor, scores: Tensor) -> None:
    """Lay attention over dimmed pictures, in place: the more, the redder."""
    low, high = scores.amin(dim=(1, 2), keepdim=True), scores.amax(dim=(1, 2), keepdim=True)
    heat = ((scores - low) / (high - low).clamp(min=1e-12)).unsqueeze(1)
    cover = HEAT * functional.interpolate(heat, size=images.shape[-2:], mode="bilinear")
    images.mul_(DIM * (1 - cover)).add_(cover * torch.tensor(WARM).reshape(3, 1, 1))


def _frame(
    images: Tensor, windows: Windows, side: int, pixels: int, colour: tuple[int, int, int]
) -> None:
    ink = torch.tensor(colour, dtype=torch.float32).reshape(3, 1, 1) / 255
    for image, row, column in zip(
        images, windows.row.tolist(), windows.column.tolist(), strict=False
    ):
        top, left = row * pixels, column * pixels
        bottom, right = top + side * pixels, left + side * pixels
        for rows, columns in (
            (slice(top, top + 2), slice(left, right)),
            (slice(bottom - 2, bottom), slice(left, right)),
            (slice(top, bottom), slice(left, left + 2)),
            (slice(top, bottom), slice(right - 2, right)),
        ):
            image[:, rows, columns] = ink
