"""Translate a photo of any size: pad it to what the network takes, run, and cut it back.

For networks and for exported files (`OnnxModel`, `OpenVinoModel`, with a dynamic size) alike. Huge
photos run in tiles, with the result of one pass (`tenfold.nn.tiling`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.nn.tiling import run_tiled

__all__ = ["TILE", "default_tile", "translate"]

# Below, the residual blocks' maps of a quarter of the side can't be padded by reflection.
SMALLEST = 8
MULTIPLE = 4
# Pixels up to which a photo runs whole: 0.5 GB with the student of ngf 16.
WHOLE_PIXELS = 4_000_000
TILE = 1024
# How far beyond [-1, 1] a value may be, by rounding.
MARGIN = 1e-3


def default_tile(height: int, width: int) -> int | None:
    """Return the side of tiles for a photo of a size, or None where it should run whole.

    A whole pass is the fastest, and takes about 7.6 bytes a pixel and filter of `ngf`: 120 bytes a
    pixel with ngf 16. Exact tiles take about half of that, and 1.7 times the time.

    >>> default_tile(1080, 1920), default_tile(4000, 6000)
    (None, 1024)
    """
    return None if height * width <= WHOLE_PIXELS else TILE


def translate(
    network: Callable[[Tensor], Any],
    image: Tensor,
    *,
    multiple: int | None = None,
    tile: int | None = None,
    statistics: str = "whole",
) -> Tensor:
    """Run an image-to-image network on an image of any size; return an image of the same size.

    Sides that are no multiples are padded at the bottom and right, by reflection (by repeating the
    edge where the image is smaller than the padding), and cut back.

    >>> from tenfold.nn.generators import MobileResNetGenerator
    >>> translate(MobileResNetGenerator(4), torch.zeros(1, 3, 33, 50)).shape
    torch.Size([1, 3, 33, 50])

    Args:
        network: a network, which runs in eval mode whatever mode it is in, or an exported file as a
            callable, such as `OnnxModel(path)`.
        image: float `(B, C, H, W)` in [-1, 1]; read_photo gives it so.
        multiple: of what the network's sides have to be; None: what the network's `.multiple` says,
            or its file's metadata, else 4.
        tile: side of the tiles in pixels, a multiple of 4, for a huge image; networks that are a
            chain of layers only. None: the image runs as a whole. See `default_tile`.
        statistics: of instance norms when there are tiles: "whole" (exact: the result is that of a
            whole pass but for rounding) or "downscaled" (an approximation from a small copy of the
            image, in memory that doesn't grow with it); see `tenfold.nn.tiling.run_tiled`.

    Raises:
        UserError: an image that isn't in [-1, 1], a network that can't run in tiles, or a tile that
            doesn't fit its stride.
    """
    _check(image)
    if multiple is None:
        multiple = _multiple_of(network)
    if multiple < 1:
        raise UserError(f"multiple {multiple}: expected at least 1")
    if tile is not None and not isinstance(network, nn.Module):
        raise UserError(
            f"{type(network).__name__} can't run in tiles: instance norms in an exported file take "
            "their statistics from each tile; give the network itself, or leave the tile out"
        )
    height, width = image.shape[-2:]
    padded = _padded(image, multiple)
    if not isinstance(network, nn.Module):
        result = network(padded)
    else:
        with torch.no_grad(), _in_eval_mode(network):
            # Less memory and time than in the other order: the norms keep it.
            padded = padded.contiguous(memory_format=torch.channels_last)
            if tile is None:
                result = network(padded)
            else:
                result = run_tiled(network, padded, tile, statistics)
    if not isinstance(result, Tensor) or result.shape[-2:] != padded.shape[-2:]:
        given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise UserError(
            f"the network returns {given} for an image of {padded.shape[-2]}x{padded.shape[-1]}: "
            "expected an image of the same size"
        )
    return result[..., :height, :width].contiguous()


def _check(image: Tensor) -> None:
    if image.ndim != 4 or 0 in image.shape or not image.is_floating_point():
        raise UserError(
            f"the image is {image.dtype} of shape {tuple(image.shape)}: expected float "
            "(1, C, H, W) in [-1, 1]"
        )
    low, high = (float(value) for value in image.aminmax())
    if not (low >= -1 - MARGIN and high <= 1 + MARGIN):  # also true for NaN
        raise UserError(
            f"the image has values from {low:g} to {high:g}: expected -1 to 1; bring 0..255 there "
            "by x / 127.5 - 1"
        )


def _multiple_of(network: object) -> int:
    found = getattr(network, "multiple", None)
    if found is None:
        metadata = getattr(network, "metadata", None)
        found = metadata.get("multiple") if isinstance(metadata, dict) else None
    return found if isinstance(found, int) and found > 0 else MULTIPLE


def _padded(image: Tensor, multiple: int) -> Tensor:
    for axis in (-2, -1):
        side = image.shape[axis]
        amount = -max(side, SMALLEST) % multiple + max(side, SMALLEST) - side
        if amount:
            padding = [0, amount, 0, 0] if axis == -1 else [0, 0, 0, amount]
            image = functional.pad(image, padding, "reflect" if amount < side else "replicate")
    return image


@contextlib.contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
