"""LAB-Net as one operator, `tenfold::labnet`, for inference.

What is computed is the network of "LAB-Net: LAB Color-Space Oriented Lightweight Network for Shadow
Removal" (arXiv 2208.13039), see `tenfold.nn.labnet`. The compiled layers compute each multi-scale
stage, its merging convolution included, while a tile of the image is in the first-level cache;
weights that are zero are left out where enough of them are. Channels are weighed by scaling the
weights that read them, and the attention's keys are merged at their own size, which is smaller.

It is a custom operator of PyTorch with shapes for tracing, and has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.kernels.attention import attention
from tenfold.kernels.labnet_layers import (
    Map,
    Maps,
    layer,
    pixels_of,
    resample,
    variances,
    working_memory,
    write_pixels,
)
from tenfold.kernels.labnet_packing import PackedAttention, PackedBlock, PackedNetwork
from tenfold.kernels.labnet_reference import labnet_reference
from tenfold.kernels.labnet_weights import DILATIONS, SLOPE, deviations_of, size_of

__all__ = ["labnet"]

_FIRST, _LOOKS = 16, 1  # borders that a block, and an attention, reads
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def labnet(
    codes: Tensor, mask: Tensor, ring: Tensor, weights: Tensor, width: int, size: Sequence[int]
) -> Tensor:
    """Return the codes without shadow that a LAB-Net makes, `(B, 3, H, W)`.

    Args:
        codes: `(B, 3, H, W)`, sides larger than the largest dilation, 64.
        mask: `(B, 1, H, W)`, 1 in shadow.
        ring: likewise, 1 where the shadow may look.
        weights: of the whole network, see `tenfold.kernels.labnet_weights`.
        width: channels inside.
        size: height and width of the attention.

    Raises:
        UserError: weights or sizes that don't fit.
    """
    # FLOP counters and their like see operators alone.
    if native.usable(codes) and not torch._C._len_torch_dispatch_stack():
        return _run(codes, mask, ring, weights, width, size)
    result: Tensor = torch.ops.tenfold.labnet(codes, mask, ring, weights, width, list(size))
    return result


def _run(
    codes: Tensor, mask: Tensor, ring: Tensor, weights: Tensor, width: int, size: Sequence[int]
) -> Tensor:
    height, wide = _check(codes, mask, ring, weights, width, size)
    if weights.dtype != torch.float32 or weights.device.type != "cpu":
        return labnet_reference(codes, mask, ring, weights, width, (height, wide)).contiguous()
    network = _packed_network(weights, width)
    out = torch.empty(codes.shape)
    if not out.numel():
        return out
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        shadow, around = (
            F.interpolate(each.float(), (height, wide)).flatten(1) > 0.5 for each in (mask, ring)
        )
        run = _Run(network, (codes.shape[2], codes.shape[3]), (height, wide))
        for item in range(len(codes)):
            places = shadow[item].nonzero()[:, 0], around[item].nonzero()[:, 0]
            out[item] = run.image(codes[item], mask[item], places)
    return out


def _packed_network(weights: Tensor, width: int) -> PackedNetwork:
    """Return the packed form of weights, kept as long as they are as they were."""
    now = (0 if weights.is_inference() else weights._version, weights.data_ptr(), width)
    then, network = _packed.get(weights, (None, None))  # type: ignore[no-untyped-call]
    if then != now:
        network = PackedNetwork(weights.detach(), width)
        _packed[weights] = now, network
    assert isinstance(network, PackedNetwork)
    return network


@dataclass(frozen=True)
class _Layout:
    """Where the maps lie.

    Attributes:
        codes: of the image.
        start: codes after the first convolution, and the mask.
        pair: what the blocks of the two branches read, one behind the other.
        both: what they write.
        change: what the last blocks write.
        result: of the network.
        stages: what the three stages of a block write.
        merged: of a block.
        fused: what the attentions read, one behind the other.
        small: the same of one branch, at the size of the attention.
        looks: queries and keys.
        found: keys, merged.
        grown: the same, at the size of the image.
    """

    codes: Map
    start: Map
    pair: Map
    both: Map
    change: Map
    result: Map
    stages: tuple[Map, Map, Map]
    merged: Map
    fused: Map
    small: Map
    looks: Map
    found: Map
    grown: Map


def _lay_out(maps: Maps, width: int, image: tuple[int, int], size: tuple[int, int]) -> _Layout:
    take = maps.take
    kept = (
        take(3, *image, _LOOKS), take(4, *image, _FIRST), take(2 * width, *image, _FIRST),
        take(2 * width, *image), take(3, *image, 1), take(3, *image),
    )  # fmt: skip
    shared = maps.used  # blocks and attentions take turns
    reads = [dilations[-1] for dilations in DILATIONS.values()]
    x, y, z = (take(width, *image, border) for border in (*reads[1:], 0))
    merged = take(width, *image, 1)
    maps.back_to(shared)
    fused = take(2 * width, *image, _LOOKS)
    resized = size != image
    small = take(width if resized else 0, *size, _LOOKS)
    looks = take(3 * width, *size)
    found = take(width if resized else 0, *size)
    grown = take(width if resized else 0, *image)
    return _Layout(*kept, (x, y, z), merged, fused, small, looks, found, grown)


class _Run:
    """Runs a network on images of one size.

    Args:
        network: packed.
        image: height and width.
        size: of the attention.
    """

    def __init__(
        self, network: PackedNetwork, image: tuple[int, int], size: tuple[int, int]
    ) -> None:
        self.network, self.size = network, size
        counted = Maps(torch.empty(0))
        _lay_out(counted, network.width, image, size)
        # Vectors of the last row may reach beyond it.
        self.maps = _lay_out(Maps(working_memory(counted.most + 256)), network.width, image, size)
        self.resized = image != size
        if self.resized:
            self.down = nearest(image[0], size[0]), nearest(image[1], size[1])
            self.up = nearest(size[0], image[0]), nearest(size[1], image[1])

    def image(self, codes: Tensor, mask: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """Return a view of the result, which the next image overwrites.

        Args:
            codes: `(3, H, W)`.
            mask: `(1, H, W)`.
            places: of the shadow and the ring, at the size of the attention.
        """
        maps, network = self.maps, self.network
        width = network.width
        # Of the branches, light first; at the end they have one channel and two.
        pair, both = (_branches(each, width) for each in (maps.pair, maps.both))
        fused, change = _branches(maps.fused, width), _branches(maps.change, 1)
        maps.codes.fill(codes)
        layer([maps.codes], [network.first], maps.start.part(0, 3))
        maps.start.part(3, 1).fill(mask)
        for block, to in zip(network.blocks[:2], both, strict=True):
            self.block(block, maps.start, to)
        layer([maps.both], [network.fusions[0]], maps.pair)
        for block, source, to in zip(network.blocks[2:4], pair, both, strict=True):
            self.block(block, source, to)
        for turn, out in enumerate((both, change)):
            layer([maps.both], [network.fusions[1 + turn]], maps.fused)
            looks = network.attentions[2 * turn : 2 * turn + 2]
            for look, source, to in zip(looks, fused, pair, strict=True):
                self.attend(look, source, to, places)
            blocks = network.blocks[4 + 2 * turn : 6 + 2 * turn]
            for block, source, to in zip(blocks, pair, out, strict=True):
                self.block(block, source, to)
        maps.change.view().add_(codes)
        maps.change.fill(maps.change.view().clone())
        layer([maps.change], [network.last], maps.result)
        return maps.result.view()

    def block(self, block: PackedBlock, source: Map, out: Map) -> None:
        """Write what a block makes of a map."""
        maps = self.maps
        for (convs, merge), to in zip(block.stages, maps.stages, strict=True):
            layer([source], convs, to, merge)
            source = to
        found = torch.cat(
            [
                variances(each, kernels)
                for each, kernels in zip(maps.stages, block.highpass, strict=True)
            ]
        )
        hidden = F.leaky_relu(F.linear(deviations_of(found), *block.reduce), SLOPE)
        gate = F.linear(hidden, *block.expand).sigmoid()
        # Weights that are scaled stand for the channels.
        layer(maps.stages, [block.merge.scaled(gate)], maps.merged)
        layer([maps.merged], [block.out], out)

    def attend(
        self, look: PackedAttention, source: Map, out: Map, places: tuple[Tensor, Tensor]
    ) -> None:
        """Write what the shadow finds on the ring, merged with the features."""
        maps = self.maps
        small = source
        if self.resized:
            small = maps.small
            resample(source, small, *self.down)
        layer([small], [look.looks], maps.looks)
        depth = maps.looks.channels // 2
        queries, keys = maps.looks.part(0, depth), maps.looks.part(depth, depth)
        inside, around = places
        if len(inside):
            # A softmax over nothing is NaN; the network has zeros there.
            found = torch.zeros(len(inside), depth)
            if len(around):
                known = pixels_of(keys, around)[None, None]
                found = attention(pixels_of(queries, inside)[None, None], known, known)[0, 0]
            write_pixels(keys, inside, found)
        if not self.resized:
            layer([source, keys], [look.whole], out)
            return
        # A 1x1 convolution of enlarged keys is the enlarged convolution.
        layer([keys], [look.found], maps.found, leaky=False)
        resample(maps.found, maps.grown, *self.up)
        layer([source], [look.features], out, add=maps.grown)


def _branches(whole: Map, first: int) -> tuple[Map, Map]:
    """Cut a map's channels in two."""
    return whole.part(0, first), whole.part(first, whole.channels - first)


@functools.lru_cache(maxsize=64)
def nearest(given: int, wanted: int) -> Tensor:
    """Return the places that PyTorch's nearest neighbour takes, int32; it rounds in float32."""
    places = torch.arange(given, dtype=torch.float32)
    return F.interpolate(places[None, None], wanted)[0, 0].int()


def _check(
    codes: Tensor, mask: Tensor, ring: Tensor, weights: Tensor, width: int, size: Sequence[int]
) -> tuple[int, int]:
    """Refuse what the kernels don't take: they check nothing. Return the attention's size."""
    if codes.dim() != 4 or codes.shape[1] != 3:
        raise UserError(
            f"a LAB-Net got images of shape {tuple(codes.shape)}: expected (B, 3, H, W)"
        )
    border = max(max(dilations) for dilations in DILATIONS.values())
    if min(codes.shape[2:]) <= border:
        raise UserError(
            f"a LAB-Net got images of {codes.shape[2]}x{codes.shape[3]}: expected sides of at "
            f"least {border + 1}"
        )
    for name, each in (("mask", mask), ("ring", ring)):
        if each.shape != (len(codes), 1, *codes.shape[2:]):
            raise UserError(
                f"a LAB-Net got a {name} of shape {tuple(each.shape)}: expected one channel of "
                "the images' size"
            )
    if width < 4 or width % 2:
        raise UserError(f"a LAB-Net of width {width}: expected an even number of at least 4")
    if len(size) != 2 or min(size) < 2:
        raise UserError(f"an attention of size {tuple(size)}: expected height and width from 2")
    if weights.dim() != 1 or len(weights) != size_of(width):
        raise UserError(
            f"a LAB-Net's weights have shape {tuple(weights.shape)}: expected {size_of(width)} in "
            "a row"
        )
    return size[0], size[1]


@torch.library.custom_op("tenfold::labnet", mutates_args=())
def _labnet(
    codes: Tensor, mask: Tensor, ring: Tensor, weights: Tensor, width: int, size: Sequence[int]
) -> Tensor:
    if native.fits(codes):
        return _run(codes, mask, ring, weights, width, size)
    high, wide = _check(codes, mask, ring, weights, width, size)
    return labnet_reference(codes, mask, ring, weights, width, (high, wide)).contiguous()


@_labnet.register_fake
def _(
    codes: Tensor, mask: Tensor, ring: Tensor, weights: Tensor, width: int, size: Sequence[int]
) -> Tensor:
    return codes.new_empty(codes.shape)
