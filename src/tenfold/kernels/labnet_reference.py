"""What the fused LAB-Net computes, in plain PyTorch: the form without compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.kernels.labnet_weights import DILATIONS, SCALES, SLOPE, deviations_of, tensors_of

__all__ = ["labnet_reference"]

_Tensors = Mapping[str, Tensor]


def labnet_reference(
    codes: Tensor, mask: Tensor, ring: Tensor, weights: Tensor, width: int, size: tuple[int, int]
) -> Tensor:
    """See `tenfold.kernels.labnet.labnet`; in any floating-point type."""
    with torch.autocast(codes.device.type, enabled=False):
        return _network(codes, mask, ring, weights, width, size)


def _network(
    codes: Tensor, mask: Tensor, ring: Tensor, weights: Tensor, width: int, size: tuple[int, int]
) -> Tensor:
    given = tensors_of(weights.to(codes.dtype), width)
    masks = mask, ring
    start = torch.cat([_conv(codes, given, "first"), mask.to(codes.dtype)], 1)
    both = torch.cat([_block(start, given, f"block{i}") for i in (1, 2)], 1)
    both = torch.cat(
        [_block(_conv(both, given, f"fuse12_{name}"), given, f"block{i}")
         for i, name in ((3, "l"), (4, "ab"))], 1
    )  # fmt: skip
    for fusion, first in (("fuse34", 1), ("fuse56", 3)):
        parts = []
        for offset, name in enumerate(("l", "ab")):
            fused = _conv(both, given, f"{fusion}_{name}")
            looked = _attention(fused, masks, given, f"attention{first + offset}", size)
            parts.append(_block(looked, given, f"block{first + offset + 4}"))
        both = torch.cat(parts, 1)
    return _conv(both + codes, given, "last")


def _conv(x: Tensor, given: _Tensors, name: str, dilation: int = 1) -> Tensor:
    weight, bias = given[f"{name}.conv.weight"], given[f"{name}.conv.bias"]
    border = dilation * (weight.shape[2] // 2)
    x = F.pad(x, (border,) * 4, mode="reflect") if border else x
    return F.leaky_relu(F.conv2d(x, weight, bias, dilation=dilation), SLOPE)


def _block(x: Tensor, given: _Tensors, name: str) -> Tensor:
    maps = []
    for stage, dilations in DILATIONS.items():
        at = f"{name}.{stage}"
        scales = zip(SCALES, dilations, strict=True)
        x = torch.cat([_conv(x, given, f"{at}.{scale}", d) for scale, d in scales], 1)
        x = _conv(x, given, f"{at}.merge")
        maps.append(x)
    x = torch.cat(maps, 1)
    at = f"{name}.attention"
    edges = F.conv2d(x, given[f"{at}.highpass.weight"], groups=x.shape[1])
    deviations = deviations_of(edges.flatten(2).var(2, correction=1))
    hidden = F.linear(deviations, given[f"{at}.reduce.weight"], given[f"{at}.reduce.bias"])
    hidden = F.leaky_relu(hidden, SLOPE)
    gate = F.linear(hidden, given[f"{at}.expand.weight"], given[f"{at}.expand.bias"]).sigmoid()
    return _conv(_conv(x * gate[:, :, None, None], given, f"{name}.merge"), given, f"{name}.out")


def _attention(
    x: Tensor, masks: tuple[Tensor, Tensor], given: _Tensors, name: str, size: tuple[int, int]
) -> Tensor:
    small = F.interpolate(x, size)
    queries, keys = (_conv(small, given, f"{name}.{part}").flatten(2) for part in ("query", "key"))
    shadow, ring = (F.interpolate(each.float(), size).flatten(1) > 0.5 for each in masks)
    found = keys.clone()
    for item, inside, around in zip(range(len(x)), shadow, ring, strict=True):
        if not inside.any():
            continue
        known = keys[item][:, around]
        scores = queries[item][:, inside].T @ known * known.shape[0] ** -0.5
        # Of an empty ring the product is zeros, as it should be.
        found[item][:, inside] = known @ torch.softmax(scores, 1).T
    found = F.interpolate(found.reshape(*found.shape[:2], *size), (x.shape[2], x.shape[3]))
    return _conv(torch.cat([x, found], 1), given, f"{name}.merge")
