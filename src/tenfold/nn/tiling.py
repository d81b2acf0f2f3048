"""Run a generator over a huge image in tiles, so that the result is that of one pass.

An instance norm takes mean and variance from the whole map, so that tiles on their own would differ
and show seams. They are found first, and the tiles run with these (`InstanceNorm2d.frozen`). With a
halo of the receptive radius around each tile, and origins on multiples of the network's stride, the
result is that of the whole image, up to rounding.

Which pixels a layer reads is worked out from the layers themselves, for networks that are a chain
of layers (`.model`, an `nn.Sequential`), as the ResNet generators are. A U-Net is none: its deepest
level sees the whole image.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError, unknown_name
from tenfold.nn.generators import ResidualBlock, ResNetGenerator, Separable
from tenfold.nn.instance_norm import InstanceNorm2d

__all__ = ["STATISTICS", "Reach", "reach_of", "receptive_radius", "run_tiled"]

STATISTICS = ("whole", "downscaled")

_POINTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Dropout, nn.Identity, nn.BatchNorm2d,
    InstanceNorm2d,
)  # fmt: skip
_PADDING = (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d)
_COMPOSITE = (nn.Sequential, ResidualBlock, Separable)


@dataclass(frozen=True)
class Reach:
    """Which pixels of its input one pixel of a chain's output depends on.

    Attributes:
        before: how many pixels of the input it reads towards the top and left.
        after: towards the bottom and right.
        step: origins on multiples of it keep their place in every map on the way.
        scale: pixels of the output a pixel of the input, along one side.
    """

    before: Fraction
    after: Fraction
    step: int
    scale: Fraction

    @property
    def halo(self) -> int:
        """Pixels around a tile, a multiple of `step`."""
        return math.ceil(max(self.before, self.after) / self.step) * self.step


def reach_of(layers: Iterable[nn.Module]) -> Reach:
    """Work out the reach of a chain of layers, from what each of them reads.

    Raises:
        UserError: a layer of a kind that isn't known.
    """
    before = after = Fraction(0)
    size = Fraction(1)  # of a pixel of the present map, in pixels of the input
    step = 1
    for layer in _leaves(layers):
        if isinstance(layer, nn.Conv2d):
            kernel, padding = _side(layer.kernel_size), _side(layer.padding)
            before += padding * size
            after += ((kernel - 1) * _side(layer.dilation) - padding) * size
            size *= _side(layer.stride)
        elif isinstance(layer, nn.ConvTranspose2d):
            kernel, padding = _side(layer.kernel_size), _side(layer.padding)
            size /= _side(layer.stride)
            before += ((kernel - 1) * _side(layer.dilation) - padding) * size
            after += padding * size
        elif isinstance(layer, _PADDING):
            before += _side(layer.padding) * size
            after -= _side(layer.padding) * size
        step = math.lcm(step, size.numerator)
    return Reach(before, after, step, 1 / size)


def receptive_radius(network: nn.Module) -> int:
    """Return how many pixels away from its own place an output pixel depends on the input.

    Instance norms, which depend on the whole image, are left out.

    >>> from tenfold.nn.generators import MobileResNetGenerator
    >>> receptive_radius(MobileResNetGenerator(8))
    84

    Raises:
        UserError: not a chain of layers that are known.
    """
    reach = reach_of(_chain(network))
    return math.ceil(max(reach.before, reach.after))


def run_tiled(
    network: nn.Module,
    image: Tensor,
    tile: int,
    statistics: str = "whole",
    statistics_pixels: int = 1_000_000,
) -> Tensor:
    """Return what `network(image)` returns, in less memory.

    There are two ways to the statistics of the norms:

    - "whole": exact. Layers ahead of the residual blocks run tile by tile, once for each norm, and
      keep no map but the last, which is small (a quarter of the sides); the residual blocks run on
      that as a whole; layers behind them run tile by tile again. What is kept is a few maps of the
      residual blocks. (A pass of the whole network for its statistics alone would take as much
      memory as the result without tiles; collecting those of the blocks by tiles would take a sweep
      for each of their norms.)
    - "downscaled": approximate. All statistics are those of a copy of the image of at most
      `statistics_pixels`, and the tiles then go through the whole network, each with its halo. The
      memory is that of a tile, whatever the size of the image. Fine texture has a smaller
      variance in the copy: look at the result.

    Args:
        network: a chain of layers; in eval mode.
        image: `(B, C, H, W)`, with sides that the network takes.
        tile: side of the tiles, in pixels of the image.
        statistics: whole or downscaled.
        statistics_pixels: of the downscaled copy.

    Raises:
        UserError: not a chain of layers that are known, a tile that doesn't fit the network's
            stride, or an unknown kind of statistics.
    """
    layers = _chain(network)
    reach = reach_of(layers)
    if statistics not in STATISTICS:
        raise unknown_name("statistics", statistics, STATISTICS)
    if tile < 1 or tile % reach.step:
        raise UserError(
            f"tile {tile}: expected a multiple of {reach.step}, the network's stride, such as 1024"
        )
    if getattr(network, "clamps", False):
        image = image.clamp(-1, 1)
    with torch.no_grad(), _frozen_norms_undone(layers):
        if statistics == "downscaled":
            _freeze_from_copy(layers, image, reach.step, statistics_pixels)
            return _assembled(layers, image, tile)
        head, trunk, tail = _parts(layers)
        x = _in_sweeps(head, image, tile)
        for layer in trunk:
            x = layer(x)
        # Rounded up: a tile of the image has at least one pixel of the small map.
        return _in_sweeps(tail, x, math.ceil(tile * x.shape[-1] / image.shape[-1]))


def _parts(
    layers: Sequence[nn.Module],
) -> tuple[Sequence[nn.Module], Sequence[nn.Module], Sequence[nn.Module]]:
    """Split a chain into what runs by tiles, what needs its map as a whole, and tiles again.

    Blocks that hold norms inside need the whole map. So may the layers before them that read single
    pixels: the norm among them then takes its statistics from the map that is there.
    """
    blocks = [
        place
        for place, layer in enumerate(layers)
        if not isinstance(layer, InstanceNorm2d) and _norms([layer])
    ]
    if not blocks:
        return layers, (), ()
    first, end = blocks[0], blocks[-1] + 1
    while first > 0 and isinstance(layers[first - 1], _POINTWISE):
        first -= 1
    return layers[:first], layers[first:end], layers[end:]


def _in_sweeps(layers: Sequence[nn.Module], source: Tensor, tile: int) -> Tensor:
    """Run a chain by tiles, after a sweep for each of its norms that finds the statistics."""
    for place, layer in enumerate(layers):
        if isinstance(layer, InstanceNorm2d):
            moments = _Moments()
            for piece, _, _ in _sweep(layers[:place], source, tile):
                moments.add(piece)
            layer.frozen = moments.result(source.dtype)
    return _assembled(layers, source, tile)


def _assembled(layers: Sequence[nn.Module], source: Tensor, tile: int) -> Tensor:
    if not layers:
        return source
    scale = reach_of(layers).scale
    height, width = (int(side * scale) for side in source.shape[-2:])
    whole: Tensor | None = None
    for piece, rows, columns in _sweep(layers, source, tile):
        if whole is None:
            whole = torch.empty(
                (*piece.shape[:2], height, width),
                dtype=piece.dtype, device=piece.device, memory_format=torch.channels_last,
            )  # fmt: skip
        whole[:, :, rows, columns] = piece
    assert whole is not None
    return whole


def _sweep(
    layers: Sequence[nn.Module], source: Tensor, tile: int
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Yield the outputs of a chain tile by tile, each with its rows and columns in the whole."""
    reach = reach_of(layers)
    tile = math.ceil(tile / reach.step) * reach.step
    height, width = source.shape[-2:]
    for rows, outer_rows in _spans(height, tile, reach.halo):
        for columns, outer_columns in _spans(width, tile, reach.halo):
            # A copy: activations may work in place.
            x = source[:, :, outer_rows, outer_columns].clone(memory_format=torch.channels_last)
            for layer in layers:
                x = layer(x)
            inside, place = [], []
            for span, outer in ((rows, outer_rows), (columns, outer_columns)):
                start, stop = (int(edge * reach.scale) for edge in (span.start, span.stop))
                shift = int(outer.start * reach.scale)
                place.append(slice(start, stop))
                inside.append(slice(start - shift, stop - shift))
            yield x[:, :, inside[0], inside[1]], place[0], place[1]


def _spans(length: int, tile: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Yield each tile's extent along one side, without and with its halo."""
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        yield slice(start, stop), slice(max(start - halo, 0), min(stop + halo, length))


class _Moments:
    """Mean and variance of the channels of a map that comes in pieces.

    Merged as in "Updating formulae and a pairwise algorithm for computing sample variances" (1979),
    in double precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # sum of the squared deviations

    def add(self, piece: Tensor) -> None:
        """Add a piece `(B, C, H, W)`."""
        count = piece.shape[2] * piece.shape[3]
        mean, variance = (value.double() for value in _mean_and_variance(piece))
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = (
            self.squares + variance * count + difference**2 * (self.count * count / total)
        )
        self.count = total

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return mean and variance, each `(B, C)`."""
        return self.mean.to(dtype), (self.squares / self.count).to(dtype)


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    # On channels-last maps this takes half the time of torch.var_mean.
    mean = x.mean((2, 3))
    return mean, (x - mean[:, :, None, None]).square_().mean((2, 3))


def _freeze_from_copy(layers: Sequence[nn.Module], image: Tensor, step: int, pixels: int) -> None:
    """Freeze every norm with the statistics that a small copy of the image has there."""
    height, width = image.shape[-2:]
    shrink = min(1.0, math.sqrt(pixels / (height * width)))
    sides = [max(2, round(side * shrink / step)) * step for side in (height, width)]
    x = functional.interpolate(image, sides, mode="bilinear", antialias=True, align_corners=False)
    x = x.contiguous(memory_format=torch.channels_last)
    found: list[tuple[InstanceNorm2d, tuple[Tensor, Tensor]]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append((cast(InstanceNorm2d, module), _mean_and_variance(inputs[0])))

    handles = [norm.register_forward_pre_hook(keep) for norm in _norms(layers)]
    try:
        for layer in layers:
            x = layer(x)
    finally:
        for handle in handles:
            handle.remove()
    for norm, statistics in found:
        norm.frozen = statistics


@contextlib.contextmanager
def _frozen_norms_undone(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Begin with no norm frozen, and leave each as it was, whatever happens."""
    before = [(norm, norm.frozen) for norm in _norms(layers)]
    try:
        for norm, _ in before:
            norm.frozen = None
        yield
    finally:
        for norm, frozen in before:
            norm.frozen = frozen


def _norms(layers: Iterable[nn.Module]) -> list[InstanceNorm2d]:
    return [
        module
        for layer in layers
        for module in layer.modules()
        if isinstance(module, InstanceNorm2d)
    ]


def _chain(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a network that is a chain of them.

    Raises:
        UserError: it isn't one.
    """
    layers = network if isinstance(network, nn.Sequential) else getattr(network, "model", None)
    known = isinstance(network, nn.Sequential | ResNetGenerator)
    if not known or not isinstance(layers, nn.Sequential):
        raise UserError(
            f"{type(network).__name__} can't run in tiles: expected a chain of layers, as the "
            "ResNet generators are; a U-Net sees the whole image: leave the tile out"
        )
    return list(layers)


def _leaves(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the layers that compute something, in order.

    A residual block counts as the chain of its layers: beside it the image passes unread.
    """
    for layer in layers:
        if isinstance(layer, _COMPOSITE):
            yield from _leaves(layer.children())
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, *_PADDING, *_POINTWISE)):
            yield layer
        else:
            raise UserError(
                f"{type(layer).__name__} in a network that runs in tiles: which pixels it reads "
                "isn't known; leave the tile out"
            )


def _side(value: object) -> int:
    """Return the larger of the values for the two axes, or for the four sides."""
    values = (value,) if isinstance(value, int) else value
    if not isinstance(values, tuple) or not all(isinstance(each, int) for each in values):
        raise UserError(f"padding {value!r} in a network that runs in tiles: expected numbers")
    return max(cast(tuple[int, ...], values))
