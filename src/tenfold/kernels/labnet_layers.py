"""Layers of LAB-Net on maps, each one call of a compiled kernel; see csrc/labnet.h.

A map is (row, channel, column) in float32. Each row of a channel has room for reflected columns at
both ends, which the layer that writes the map fills.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.kernels import native

__all__ = [
    "Map", "Maps", "Weight", "layer", "pack", "pixels_of", "resample", "variances",
    "write_pixels",
]  # fmt: skip

LINE = 16  # floats of a line of the cache
GROUP = 4  # outputs that have their weights side by side
BAND = 8  # rows that are summed up together in a variance
KEPT_FLOATS = 64 << 20  # larger working memory is given back
# Beyond this share of weights that aren't zero, all of them are as fast.
SPARSE = 0.4
NO_MAP, NO_WEIGHT = [0] * 5, [0] * 7

_kept = threading.local()


@dataclass(frozen=True)
class Map:
    """A map in a larger memory.

    Attributes:
        memory: of all maps, one-dimensional.
        offset: of column 0 of its first row and channel.
        channels: how many.
        height: rows.
        width: columns.
        stride: floats between channels.
        pitch: floats between rows.
        border: columns before and behind each row.
    """

    memory: Tensor
    offset: int
    channels: int
    height: int
    width: int
    stride: int
    pitch: int
    border: int

    def part(self, first: int, channels: int) -> Map:
        """Return some of its channels."""
        return replace(self, offset=self.offset + first * self.stride, channels=channels)

    def view(self, border: int = 0) -> Tensor:
        """Return it as `(C, H, W)`, with as many columns more at both ends."""
        size = self.channels, self.height, self.width + 2 * border
        return self.memory.as_strided(size, (self.stride, self.pitch, 1), self.offset - border)

    def fill(self, x: Tensor) -> None:
        """Copy `(C, H, W)` into it, and reflect its borders."""
        self.view(self.border).copy_(F.pad(x, (self.border,) * 2, "reflect") if self.border else x)

    @property
    def fields(self) -> list[int]:
        """Return what the kernel needs to know."""
        at = self.memory.data_ptr() + 4 * self.offset
        return [at, self.channels, self.stride, self.pitch, self.border]


class Maps:
    """Lays maps out in one memory, one behind the other.

    The first pass counts: `memory` is filled in when all is laid out.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.used = self.most = 0

    def take(self, channels: int, height: int, width: int, border: int = 0) -> Map:
        """Return a map whose contents are undefined.

        Args:
            channels: how many.
            height: rows.
            width: columns.
            border: columns that those who read it need at both ends.
        """
        lead = _whole(border)
        stride = 2 * lead + _whole(width)
        stride += LINE * (stride // LINE % 2 == 0)  # an odd number spreads over the cache's sets
        pitch = channels * stride
        made = Map(self.memory, self.used + lead, channels, height, width, stride, pitch, border)
        self.used += height * pitch
        self.most = max(self.most, self.used)
        return made

    def back_to(self, used: int) -> None:
        """Give the memory behind a place free."""
        self.used = used


def working_memory(floats: int) -> Tensor:
    """Return this thread's memory for maps, whose contents are undefined."""
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < floats:
        _kept.memory = None
        memory = torch.empty(floats)
        native.extension().large_pages(memory.data_ptr(), memory.nbytes)
        if floats <= KEPT_FLOATS:
            _kept.memory = memory
    return memory


@dataclass(frozen=True)
class Weight:
    """A packed convolution.

    Attributes:
        values: in the kernel's order.
        bias: filled up to whole groups, or None.
        places: of the values in their source, where only those that aren't zero are kept.
        counts: of those of each output and source.
        outputs: channels.
        kernel: its side, 1 or 3.
        dilation: of the kernel.
        channels: that each value belongs to.
    """

    values: Tensor
    bias: Tensor | None
    places: Tensor | None
    counts: Tensor | None
    outputs: int
    kernel: int
    dilation: int
    channels: Tensor

    def scaled(self, factors: Tensor) -> Weight:
        """Return the weight for input channels that are multiplied by factors."""
        return replace(self, values=self.values * factors.index_select(0, self.channels))

    @property
    def fields(self) -> list[int]:
        """Return what the kernel needs to know."""
        tensors = self.values, self.bias, self.places, self.counts
        addresses = [0 if each is None else each.data_ptr() for each in tensors]
        return [*addresses, self.outputs, self.kernel, self.dilation]


def pack(
    weight: Tensor,
    bias: Tensor | None,
    dilation: int = 1,
    sources: Sequence[int] | None = None,
    sparse: bool | None = None,
) -> Weight:
    """Pack a convolution of 1x1 or 3x3.

    Args:
        weight: `(O, I, k, k)`.
        bias: `(O,)`, or None.
        dilation: of the kernel.
        sources: input channels of each map that a 1x1 convolution reads; by default one map.
        sparse: keep only what isn't zero; by default where that is faster.
    """
    outputs, inputs, kernel, _ = weight.shape
    if sparse is None:
        sparse = int(torch.count_nonzero(weight)) <= SPARSE * weight.numel()
    if bias is not None:
        bias = F.pad(bias, (0, -outputs % GROUP)).contiguous()
    owner = torch.arange(inputs)[None, :, None, None].expand(weight.shape)
    if not sparse:
        values, channels = (_dense(each) for each in (weight, owner))
        return Weight(values, bias, None, None, outputs, kernel, dilation, channels)
    # (O, source, channel, column): the rows of a kernel, or the maps.
    if kernel == 3:
        parts, owners = (each.unbind(2) for each in (weight, owner))
    else:
        split = [inputs] if sources is None else list(sources)
        parts, owners = (torch.split(each[..., 0], split, 1) for each in (weight, owner))
    values_of, places_of, counts_of, channels_of = [], [], [], []
    for output in range(outputs):
        for part, own in zip(parts, owners, strict=True):
            flat = part[output].flatten()
            places = flat.nonzero()[:, 0]
            values_of.append(flat[places])
            places_of.append(places)
            counts_of.append(len(places))
            channels_of.append(own[output].flatten()[places])
    return Weight(
        torch.cat(values_of),
        bias,
        torch.cat(places_of).int(),
        torch.tensor(counts_of, dtype=torch.int32),
        outputs,
        kernel,
        dilation,
        torch.cat(channels_of),
    )


def _dense(x: Tensor) -> Tensor:
    """Return (four outputs, row, channel, column, output of the four) in a row."""
    outputs, inputs, kernel, _ = x.shape
    filled = x.new_zeros(outputs + -outputs % GROUP, inputs, kernel, kernel)
    filled[:outputs] = x
    groups = filled.reshape(-1, GROUP, inputs, kernel, kernel)
    return groups.permute(0, 3, 2, 4, 1).reshape(-1)


def layer(
    sources: Sequence[Map],
    convs: Sequence[Weight],
    out: Map,
    merge: Weight | None = None,
    add: Map | None = None,
    leaky: bool = True,
) -> None:
    """Write a map by convolutions side by side, or by one of 1x1 over their results.

    Args:
        sources: of a 3x3 convolution one map whose border is at least its dilation; of 1x1 up to
            three.
        convs: up to three.
        out: the map.
        merge: the convolution over the results, or None.
        add: a map that is added ahead of the last leaky ReLU.
        leaky: whether the last leaky ReLU is there.
    """
    fields = [out.height, out.width, int(leaky), torch.get_num_threads(), len(sources), len(convs)]
    fields += out.fields
    fields += NO_MAP if add is None else add.fields
    fields += NO_WEIGHT if merge is None else merge.fields
    fields += [field for source in sources for field in source.fields]
    fields += [field for conv in convs for field in conv.fields]
    native.extension().labnet_layer(fields)


def variances(x: Map, highpass: Tensor) -> Tensor:
    """Return the unbiased variances of the edges of a map's channels, `(C,)`.

    Args:
        x: the map.
        highpass: `(C, 1, 3, 3)`, contiguous.
    """
    bands = -(-(x.height - 2) // BAND)
    memory = torch.empty(2 * x.channels * bands, dtype=torch.float64)
    out = torch.empty(x.channels)
    native.extension().labnet_variances(
        [*x.fields, highpass.data_ptr(), memory.data_ptr(), out.data_ptr(), x.height, x.width,
         torch.get_num_threads()]
    )  # fmt: skip
    return out


def resample(x: Map, out: Map, rows: Tensor, columns: Tensor) -> None:
    """Write a map by rows and columns of another one, both int32."""
    native.extension().labnet_resample(
        [*x.fields, *out.fields, rows.data_ptr(), columns.data_ptr(), out.height, out.width,
         torch.get_num_threads()]
    )  # fmt: skip


def pixels_of(x: Map, places: Tensor) -> Tensor:
    """Return pixels of a map, `(N, C)`, at places row * width + column."""
    rows = torch.empty(len(places), x.channels)
    _move_pixels(x, places, rows, back=False)
    return rows


def write_pixels(x: Map, places: Tensor, rows: Tensor) -> None:
    """Put pixels back into a map; its borders stay as they are."""
    _move_pixels(x, places, rows.contiguous(), back=True)


def _move_pixels(x: Map, places: Tensor, rows: Tensor, back: bool) -> None:
    native.extension().labnet_pixels(
        [*x.fields, places.data_ptr(), rows.data_ptr(), len(places), x.width, int(back),
         torch.get_num_threads()]
    )  # fmt: skip


def _whole(floats: int) -> int:
    return -(-floats // LINE) * LINE
