"""The tiles in which a 3-D convolution may be computed, and how long each takes here.

Larger tiles save more products, but round more, waste more where they don't divide the output, and
their weights are larger. So the tile is chosen by timing, among those that an estimate favours.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenfold.deploy.candidates import Layer
from tenfold.kernels import winograd
from tenfold.kernels.winograd_transforms import TILES
from tenfold.measure.timing import interleave
from tenfold.nn.winograd import WinogradConv3d
from tenfold.nn.winograd_fit import zero_padding
from tenfold.nn.winograd_packed import NO_SHORT, PackedWinogradConv3d

__all__ = ["Option", "Ranking", "options", "pack_option", "rank"]

# Rates of one recent core: multiply-adds, bytes of weights, elements of the domain. They decide
# what is timed, not what is chosen.
MACS_A_SECOND, BYTES_A_SECOND, ELEMENTS_A_SECOND = 45e9, 20e9, 4e9
TIMED = 4
SECONDS = 0.3


@dataclass(frozen=True)
class Option:
    """A way to compute a 3-D convolution in the Winograd domain.

    Attributes:
        tile: outputs of a tile in depth, height and width.
        short: axes of two positions, see `tenfold.kernels.winograd`.
        own: the layer is in the Winograd domain with this tile and has no other.
    """

    tile: tuple[int, int, int]
    short: tuple[bool, bool, bool] = NO_SHORT
    own: bool = False

    @property
    def level(self) -> int:
        """Return how much more it rounds than the layer: the number of axes in tiles of 4."""
        return 0 if self.own else self.tile.count(4)

    @property
    def columns(self) -> int:
        """Return the columns of its domain."""
        return math.prod(winograd.coordinates(self.tile, self.short))


@dataclass(frozen=True)
class Ranking:
    """Milliseconds of a layer as it is, in the better memory format, and of its options."""

    dense_ms: float | None
    options: Mapping[Option, float | None]

    def best(self, level: int) -> Option | None:
        """Return the fastest option of at most this level; None where the layer itself is faster.

        Without times the first one counts.
        """
        allowed = {option: ms for option, ms in self.options.items() if option.level <= level}
        timed = {option: ms for option, ms in allowed.items() if ms is not None}
        if self.dense_ms is None or not timed:
            return next(iter(allowed), None)
        fastest = min(timed, key=timed.__getitem__)
        return fastest if timed[fastest] < self.dense_ms else None


def options(layer: Layer) -> list[Option]:
    """Return the options of a layer, those with the least estimated time first.

    A layer that is in the Winograd domain has one: its own.
    """
    module = layer.module
    if isinstance(module, WinogradConv3d):
        return [Option(module.tile, own=True)]
    assert isinstance(module, nn.Conv3d)
    assert layer.input is not None
    found = []
    for depth, height, width in itertools.product(TILES, repeat=3):
        tile = depth, height, width
        short = tuple(
            m == 2 and n == 2 and p == 1
            for m, n, p in zip(tile, layer.input[2:], zero_padding(module), strict=True)
        )
        found.append(Option(tile, (short[0], short[1], short[2])))
    found.sort(key=lambda option: estimate(layer, option))
    # The least rounding one stays in the race for when the outputs of the others differ.
    careful = min(found, key=lambda option: option.level)
    return [*found[:TIMED], *([careful] if careful not in found[:TIMED] else [])]


def estimate(layer: Layer, option: Option) -> float:
    """Return about how many seconds one thread takes."""
    module = layer.module
    assert isinstance(module, nn.Conv3d)
    assert layer.input is not None
    sizes = zip(layer.input[2:], zero_padding(module), option.tile, strict=True)
    tiles = layer.input[0] * math.prod(-(-(n + 2 * p - 2) // m) for n, p, m in sizes)
    inputs, outputs, columns = module.in_channels, module.out_channels, option.columns
    weights = columns * inputs * outputs
    products = max(tiles * weights / MACS_A_SECOND, 4 * weights / BYTES_A_SECOND)
    return products + tiles * columns * (inputs + outputs) / ELEMENTS_A_SECOND


def pack_option(layer: Layer, option: Option) -> PackedWinogradConv3d:
    """Return a layer's packed form.

    Raises:
        UserError: there is none.
    """
    assert isinstance(layer.module, nn.Conv3d | WinogradConv3d)
    return PackedWinogradConv3d.from_layer(
        layer.module, option.tile, short=option.short, name=layer.name
    )


def rank(layer: Layer, found: Sequence[Option]) -> Ranking:
    """Time a layer and its options, on a channels-last input, in alternation."""
    module = layer.module
    assert isinstance(module, nn.Conv3d | WinogradConv3d)
    x = torch.randn(layer.input or ())
    last = x.contiguous(memory_format=torch.channels_last_3d)
    calls: dict[object, Callable[[], object]] = {"dense": _call(module, x)}
    calls["channels_last"] = _call(_in_channels_last(module), last)
    for option in found:
        calls[option] = _call(_stand_in(module, option), last)
    names = {str(number): each for number, each in enumerate(calls)}
    with torch.no_grad():
        samples = interleave({name: calls[each] for name, each in names.items()}, SECONDS)
    # Other processes only ever add time.
    times = {each: min(samples[name]) for name, each in names.items()}
    dense = min(times["dense"], times["channels_last"])
    return Ranking(dense, {option: times[option] for option in found})


def _in_channels_last(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Conv3d):
        return module
    reordered = copy.deepcopy(module)
    data = module.weight.data
    reordered.weight.data = data.contiguous(memory_format=torch.channels_last_3d)
    return reordered


def _stand_in(module: nn.Conv3d | WinogradConv3d, option: Option) -> nn.Module:
    """Return a layer of the same sizes that needs no transform: speed is not in the values."""
    if isinstance(module, WinogradConv3d):
        columns, points = module.kept, module.points
        made = PackedWinogradConv3d.like(module, option.tile, columns=columns, points=points)
    else:
        made = PackedWinogradConv3d.like(module, option.tile, short=option.short)
    made.packed.fill_(1.0)  # written once: pages that never were are all the same one
    return made


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)
