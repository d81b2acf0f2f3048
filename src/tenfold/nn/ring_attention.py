"""Attention of shadow pixels to the lit ring around the shadow: LAB-Net's local spatial attention.

Source: "LAB-Net: LAB Color-Space Oriented Lightweight Network for Shadow Removal" (arXiv
2208.13039) and its released code. For each image on its own, with S the pixels in shadow, R the
ring around it, and queries Q and keys K of c channels:

    K'_i = sum_{j in R} softmax_j(Q_i . K_j / sqrt(c)) K_j    for i in S
    K'_i = K_i                                                elsewhere

An empty ring gives K' = 0 on S, an empty shadow K' = K.

`ring_attention` gathers S and R, so it works on |S| x |R| scores and not on all pairs of pixels,
and stores no more of them than a block, in the backward pass too. It is one operator, as the sizes
of S and R must not show in a compiled graph. Exported graphs consist of plain operators. There are
two forms with the same result:

- `masked_softmax_attention`, a softmax over all pixels under a mask. All shapes are fixed, the
  batch may be free, and the work grows with the square of the pixels: for 64 x 64 or less.
- `gathered_attention`, which gathers as above, so that shapes inside depend on the mask, and the
  size of the batch is fixed. ONNX Runtime and OpenVINO run it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.kernels.attention import attention
from tenfold.nn.labnet_blocks import Conv

__all__ = [
    "RingAttention",
    "attention_macs",
    "dilate",
    "gathered_attention",
    "masked_softmax_attention",
    "resized",
    "ring_attention",
    "ring_of",
]

# Scores of a block: what fits a core's cache, and what keeps a GPU busy.
_BLOCK_SCORES = {"cpu": 1 << 18}
_BLOCK_SCORES_ELSEWHERE = 1 << 24
_LARGEST_SIDE = 4096  # of an image in an exported graph, and one more
_DENSE_SCORES = 1 << 24  # of a block of an exported graph: 64 MB in float32


# -- the ring -------------------------------------------------------------------------------------


def dilate(mask: Tensor, size: int = 11) -> Tensor:
    """Grow masks by a square of ones, borders included: the largest value within the square.

    Args:
        mask: `(B, 1, H, W)`.
        size: side of the square, odd.

    Raises:
        UserError: an even size.

    >>> dot = torch.zeros(1, 1, 32, 32)
    >>> dot[0, 0, 16, 16] = 1
    >>> int(dilate(dot).sum())
    121
    """
    if size < 1 or size % 2 == 0:
        raise UserError(f"a dilation of size {size}: expected an odd size, such as 11")
    border = size // 2  # a square is a row of a column: two passes in half the time
    rows = functional.max_pool2d(mask, (size, 1), stride=1, padding=(border, 0))
    return functional.max_pool2d(rows, (1, size), stride=1, padding=(0, border))


def ring_of(mask: Tensor, size: int = 11) -> Tensor:
    """Return what a dilation adds to masks of zeros and ones, `(B, 1, H, W)`."""
    return dilate(mask, size) - mask


# -- the gathered form ----------------------------------------------------------------------------


def ring_attention(queries: Tensor, keys: Tensor, shadow: Tensor, ring: Tensor) -> Tensor:
    """Replace the keys in shadow by what their queries find on the ring, image by image.

    Images are taken one after the other: each has another number of pixels in shadow and on the
    ring, and padding them to the largest would cost more than it saves.

    Args:
        queries: `(B, N, c)`, for N pixels.
        keys: `(B, N, c)`, which are the values, too.
        shadow: `(B, N)`, booleans.
        ring: `(B, N)`, booleans.

    Returns:
        `(B, N, c)`.
    """
    result: Tensor = torch.ops.tenfold.ring_attention(queries, keys, shadow, ring)
    return result


def attention_macs(shadow: Tensor, ring: Tensor, channels: int) -> int:
    """Return the multiply-adds of one ring attention: two products of |S| x |R| x channels.

    Args:
        shadow: `(B, ...)`, zeros and ones at the size of the attention.
        ring: likewise.
        channels: of queries and keys.
    """
    pixels = (shadow.flatten(1) > 0.5).sum(1) * (ring.flatten(1) > 0.5).sum(1)
    return 2 * channels * int(pixels.sum())


def _places(shadow: Tensor, ring: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the images that have a shadow, with its places and those of the ring."""
    of_shadow, of_ring = (
        torch.split(mask.nonzero()[:, 1], mask.sum(1).tolist()) for mask in (shadow, ring)
    )
    for item, (inside, around) in enumerate(zip(of_shadow, of_ring, strict=True)):
        if len(inside):
            yield item, inside, around


@torch.library.custom_op("tenfold::ring_attention", mutates_args=())
def _ring_attention(queries: Tensor, keys: Tensor, shadow: Tensor, ring: Tensor) -> Tensor:
    out = keys.clone(memory_format=torch.contiguous_format)
    for item, inside, around in _places(shadow, ring):
        if not len(around):  # a softmax over nothing is NaN; the reference gives zeros
            out[item].index_fill_(0, inside, 0)
            continue
        found = keys[item].index_select(0, around)[None, None]
        asked = queries[item].index_select(0, inside)[None, None]
        with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
            out[item].index_copy_(0, inside, attention(asked, found, found)[0, 0])
    return out


@_ring_attention.register_fake
def _(queries: Tensor, keys: Tensor, shadow: Tensor, ring: Tensor) -> Tensor:
    return torch.empty_like(keys, memory_format=torch.contiguous_format)


@torch.library.custom_op("tenfold::ring_attention_backward", mutates_args=())
def _ring_attention_backward(
    gradient: Tensor, queries: Tensor, keys: Tensor, out: Tensor, shadow: Tensor, ring: Tensor
) -> tuple[Tensor, Tensor]:
    to_queries = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    # Keys outside the shadow are their own result.
    to_keys = gradient.masked_fill(shadow[:, :, None], 0).contiguous()
    scale = keys.shape[2] ** -0.5
    most = _BLOCK_SCORES.get(keys.device.type, _BLOCK_SCORES_ELSEWHERE)
    for item, inside, around in _places(shadow, ring):
        if not len(around):
            continue
        found = _wide(keys[item].index_select(0, around))
        to_found = torch.zeros_like(found)
        for block in torch.split(inside, max(1, most // len(around))):
            asked, given, got = (
                _wide(each[item].index_select(0, block)) for each in (queries, gradient, out)
            )
            shares = torch.softmax(asked @ found.T * scale, 1)
            # d softmax: each share times how far its key's product is above the mean product.
            to_scores = given @ found.T - (given * got).sum(1, keepdim=True)
            to_scores.mul_(shares).mul_(scale)
            to_found.addmm_(shares.T, given).addmm_(to_scores.T, asked)
            to_queries[item].index_copy_(0, block, (to_scores @ found).to(queries.dtype))
        to_keys[item].index_add_(0, around, to_found.to(keys.dtype))
    return to_queries, to_keys


@_ring_attention_backward.register_fake
def _(
    gradient: Tensor, queries: Tensor, keys: Tensor, out: Tensor, shadow: Tensor, ring: Tensor
) -> tuple[Tensor, Tensor]:
    plain = torch.contiguous_format
    return (
        torch.empty_like(queries, memory_format=plain),
        torch.empty_like(keys, memory_format=plain),
    )


def _wide(x: Tensor) -> Tensor:
    """Return halves as float32: sums over a ring of thousands lose their digits otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor):  # type: ignore[no-untyped-def]
    queries, keys, shadow, ring = inputs
    ctx.save_for_backward(queries, keys, output, shadow, ring)


def _differentiate(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
    queries, keys, out, shadow, ring = ctx.saved_tensors
    backward = torch.ops.tenfold.ring_attention_backward
    return *backward(gradient, queries, keys, out, shadow, ring), None, None


_ring_attention.register_autograd(_differentiate, setup_context=_keep)


# -- the forms of exported graphs -----------------------------------------------------------------


def masked_softmax_attention(
    queries: Tensor, keys: Tensor, shadow: Tensor, ring: Tensor, scores: int = _DENSE_SCORES
) -> Tensor:
    """Return what `ring_attention` does, by a softmax over all pixels under a mask.

    It multiplies N x N pairs, in blocks of queries: right for small N alone.

    Args:
        queries: `(B, N, c)`.
        keys: `(B, N, c)`.
        shadow: `(B, N)`, booleans.
        ring: `(B, N)`, booleans.
        scores: of a block, for each image.
    """
    kept = ring[:, None, :]
    least = torch.finfo(keys.dtype).min
    scaled = queries * keys.shape[2] ** -0.5
    parts = []
    for block in torch.split(scaled, max(1, scores // keys.shape[1]), 1):
        products = (block @ keys.transpose(1, 2)).masked_fill(~kept, least)
        # The product with the mask matters where there is no ring at all: zeros are expected.
        parts.append((torch.softmax(products, 2) * kept) @ keys)
    return torch.where(shadow[:, :, None], torch.cat(parts, 1), keys)


def gathered_attention(queries: Tensor, keys: Tensor, shadow: Tensor, ring: Tensor) -> Tensor:
    """Return what `ring_attention` does, in plain operators, for batches of a known size.

    Args:
        queries: `(B, N, c)`.
        keys: `(B, N, c)`.
        shadow: `(B, N)`, booleans.
        ring: `(B, N)`, booleans.
    """
    least = torch.finfo(keys.dtype).min
    scaled = queries * keys.shape[2] ** -0.5
    results = []
    for asked, own, inside, around in zip(scaled, keys, shadow, ring, strict=True):
        places = inside.nonzero()[:, 0]
        # A key of zeros keeps the softmax from being one over nothing, and counts only then.
        found = torch.cat([own.index_select(0, around.nonzero()[:, 0]), torch.zeros_like(own[:1])])
        ignored = torch.zeros_like(own[0, :1]).masked_fill(around.any(), least)
        bias = torch.cat([torch.zeros_like(found[:-1, 0]), ignored])
        shares = torch.softmax(asked.index_select(0, places) @ found.T + bias, 1)
        results.append(own.index_copy(0, places, shares @ found))
    return torch.stack(results)


# -- the layer ------------------------------------------------------------------------------------


class RingAttention(nn.Module):
    """Local spatial attention (LSA) of LAB-Net: shadow pixels look at the ring around the shadow.

    Args:
        width: channels of the features, even.
        size: height and width at which the attention works; features and masks are resized to it
            by nearest neighbour.

    Attributes:
        exported: form in exported graphs, `masked` or `gathered`; see the module.
    """

    exported: Literal["masked", "gathered"] = "masked"

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        channels = 3 * width // 2
        self.size = size
        self.query = Conv(width, channels, 3)
        self.key = Conv(width, channels, 3)
        self.merge = Conv(width + channels, width, 1)
        for side in size:
            _quotients(side)  # made here, as an exporter would trace how

    def forward(self, features: Tensor, mask: Tensor, ring: Tensor) -> Tensor:
        """Map features `(B, C, H, W)` to the same shape.

        Args:
            features: of the image.
            mask: `(B, 1, H, W)`, 1 in shadow.
            ring: `(B, 1, H, W)`, 1 where the shadow may look.
        """
        small = resized(features, self.size)
        queries, keys = (_pixels(part(small)) for part in (self.query, self.key))
        shadow, around = (resized(each, self.size).flatten(1) > 0.5 for each in (mask, ring))
        form = ring_attention
        if torch.compiler.is_exporting():
            form = masked_softmax_attention if self.exported == "masked" else gathered_attention
        found = form(queries, keys, shadow, around).transpose(1, 2)
        found = found.reshape(*found.shape[:2], *self.size)  # a view, channels-last
        found = resized(found, (features.shape[2], features.shape[3]))
        out: Tensor = self.merge(torch.cat([features, found], 1))
        return out

    def extra_repr(self) -> str:
        """Show the size of the attention."""
        return f"size={self.size}"


def _pixels(x: Tensor) -> Tensor:
    """Return a map `(B, C, H, W)` as `(B, H W, C)`: a view, if the map is channels-last."""
    return x.flatten(2).transpose(1, 2)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring `(B, C, H, W)` to another height and width by nearest neighbour."""
    if torch.compiler.is_exporting():
        # The engines round other than PyTorch where a place falls on a pixel's edge, so that a map
        # would be off by a row; chosen places leave nothing to them.
        rows, columns = (_nearest(x.shape[2 + i], size[i], x.device) for i in range(2))
        return x.index_select(2, rows).index_select(3, columns)
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return functional.interpolate(x, size)


def _nearest(given: int, wanted: int, device: torch.device) -> Tensor:
    """Return the places that PyTorch's nearest neighbour takes, which it finds in float32.

    In an exported graph one of the sizes may be a symbol. OpenVINO doesn't round a quotient as
    PyTorch does, which moves places that fall on a pixel's edge; so quotients are looked up.
    """
    scale: float | Tensor = given / wanted
    if not isinstance(wanted, int):
        scale = _quotients(given)[0].to(device).index_select(0, torch.full((1,), wanted))
    elif not isinstance(given, int):
        scale = _quotients(wanted)[1].to(device).index_select(0, torch.full((1,), given))
    places = torch.arange(wanted, dtype=torch.float32, device=device) * scale
    return places.floor().long().clamp_max(given - 1)


@functools.cache
def _quotients(side: int) -> tuple[Tensor, Tensor]:
    """Return side / n and n / side in float32, for n from 0 to 4095."""
    sides = torch.arange(_LARGEST_SIDE, dtype=torch.float32)
    whole = torch.full_like(sides, side)  # a number over a tensor would be its reciprocal's product
    return whole / sides.clamp(min=1), sides / whole
