"""Attention without a mask, as one operator, `tenfold::attention`.

    softmax(q k^T scale) v

The scores are never stored beyond one block of keys. The operator is a custom one of PyTorch with
shapes for tracing. It has no gradient: where one is wanted, PyTorch's own attention runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tenfold.kernels import native

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Return softmax(q k^T scale) v, `(B, H, N, D)`, in the memory order `(B, N, H, D)`.

    So `.transpose(1, 2).flatten(2)` of the result copies nothing.

    >>> q, k, v = torch.randn(2, 3, 5, 3, 8).permute(3, 0, 2, 1, 4)  # (3, B, H, N, D)
    >>> torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    True

    Args:
        q: `(B, H, N, D)`, any strides.
        k: `(B, H, M, D)`.
        v: `(B, H, M, D)`.
        scale: of the scores; 1 / sqrt(D) without one.

    Other shapes that broadcast are PyTorch's, too, in its own memory order.
    """
    if native.differentiated(q, k, v) or not _agree(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # FLOP counters and their like see operators alone.
    if native.usable(q) and not torch._C._len_torch_dispatch_stack():
        return _run(q, k, v, scale)
    result: Tensor = torch.ops.tenfold.attention(q, k, v, scale)
    return result


def _agree(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.dim() == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[-2], q.shape[3])


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    batch, heads, queries, depth = q.shape
    keys = k.shape[2]
    if k.dtype != torch.float32 or v.dtype != torch.float32 or not keys or not depth:
        return _plain(q, k, v, scale)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((batch, queries, heads, depth))
    native.extension().attention(
        q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(),
        *v.stride()[:3], out.data_ptr(), batch, heads, queries, keys, depth,
        depth**-0.5 if scale is None else scale, torch.get_num_threads(),
    )  # fmt: skip
    return out.transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    # Always a tensor of its own, in the one memory order.
    return y.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.custom_op("tenfold::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return (_run if native.fits(q) else _plain)(q, k, v, scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    batch, heads, queries, depth = q.shape
    return q.new_empty(batch, queries, heads, depth).transpose(1, 2)


@register_flop_formula(torch.ops.tenfold.attention)
def _flops(q: Sequence[int], k: Sequence[int], *_: object, **__: object) -> int:
    """Return two for each multiply-add, from the shapes of the inputs."""
    return 4 * math.prod(q) * k[2]
