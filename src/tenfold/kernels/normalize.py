"""Layer norm over the last axis, as one operator, `tenfold::layer_norm`.

It is a custom operator of PyTorch with shapes for tracing. It has no gradient: where one is wanted,
PyTorch's own layer norm runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.kernels import native

__all__ = ["layer_norm"]


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Return (x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis of x.

    >>> layer_norm(torch.tensor([[1.0, 2.0, 3.0]]), epsilon=0.0)
    tensor([[-1.2247,  0.0000,  1.2247]])

    Args:
        x: `(..., D)`.
        weight: `(D,)`, ones without it.
        bias: `(D,)`, zeros without it.
        epsilon: added to the variance.
    """
    if native.differentiated(*(each for each in (x, weight, bias) if each is not None)):
        return _plain(x, weight, bias, epsilon)
    if native.usable(x):
        return _run(x, weight, bias, epsilon)
    result: Tensor = torch.ops.tenfold.layer_norm(x, weight, bias, epsilon)
    return result


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    features = x.shape[-1] if x.dim() else 0
    if not features or not _fits(weight, features) or not _fits(bias, features):
        return _plain(x, weight, bias, epsilon)
    x = x.contiguous()
    out = torch.empty(x.shape)
    native.extension().layer_norm(
        x.data_ptr(), 0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), x.numel() // features, features,
        epsilon, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fits(parameter: Tensor | None, features: int) -> bool:
    return parameter is None or (
        parameter.dtype == torch.float32
        and parameter.dim() == 1
        and parameter.shape[0] == features
        and parameter.is_contiguous()
        and parameter.device.type == "cpu"
    )


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


@torch.library.custom_op("tenfold::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    return (_run if native.fits(x) else _plain)(x, weight, bias, epsilon).contiguous()


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)
