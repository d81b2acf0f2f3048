"""LAB-Net's weights in the form that the compiled layers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.kernels.labnet_layers import Weight, pack
from tenfold.kernels.labnet_weights import BLOCKS, DILATIONS, SCALES, tensors_of

__all__ = ["PackedAttention", "PackedBlock", "PackedNetwork"]

_Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class PackedBlock:
    """A block's weights.

    Attributes:
        stages: three convolutions and the one that merges them, three times.
        highpass: `(C, 1, 3, 3)` of each stage's result.
        reduce: weight and bias of the gate's first layer.
        expand: of its second.
        merge: of the stages.
        out: the last convolution.
    """

    stages: tuple[tuple[tuple[Weight, ...], Weight], ...]
    highpass: tuple[Tensor, ...]
    reduce: tuple[Tensor, Tensor]
    expand: tuple[Tensor, Tensor]
    merge: Weight
    out: Weight


@dataclass(frozen=True)
class PackedAttention:
    """An attention's weights.

    Attributes:
        looks: queries, then keys.
        whole: the merging convolution of features and keys.
        features: its part for the features, with the bias.
        found: its part for the keys.
    """

    looks: Weight
    whole: Weight
    features: Weight
    found: Weight


class PackedNetwork:
    """A whole network's weights.

    Args:
        weights: in one row, see `tenfold.kernels.labnet_weights`.
        width: channels inside.
    """

    def __init__(self, weights: Tensor, width: int) -> None:
        given = tensors_of(weights, width)
        self.width = width
        self.first = _conv(given, "first")
        self.last = _conv(given, "last")
        self.blocks = tuple(_block(given, f"block{i + 1}", width) for i in range(BLOCKS))
        self.fusions = tuple(
            _side_by_side(given, [f"fuse{i}_l", f"fuse{i}_ab"]) for i in ("12", "34", "56")
        )
        self.attentions = tuple(_attention(given, f"attention{i + 1}", width) for i in range(4))


def _conv(
    given: _Tensors, name: str, dilation: int = 1, sources: tuple[int, ...] | None = None
) -> Weight:
    return pack(given[f"{name}.conv.weight"], given[f"{name}.conv.bias"], dilation, sources)


def _side_by_side(given: _Tensors, names: list[str]) -> Weight:
    weight, bias = (
        torch.cat([given[f"{name}.conv.{part}"] for name in names]) for part in ("weight", "bias")
    )
    return pack(weight, bias)


def _block(given: _Tensors, name: str, width: int) -> PackedBlock:
    stages = []
    for stage, dilations in DILATIONS.items():
        scales = zip(SCALES, dilations, strict=True)
        convs = tuple(_conv(given, f"{name}.{stage}.{scale}", d) for scale, d in scales)
        stages.append((convs, _conv(given, f"{name}.{stage}.merge")))
    at = f"{name}.attention"
    return PackedBlock(
        tuple(stages),
        torch.split(given[f"{at}.highpass.weight"], width),
        (given[f"{at}.reduce.weight"], given[f"{at}.reduce.bias"]),
        (given[f"{at}.expand.weight"], given[f"{at}.expand.bias"]),
        _conv(given, f"{name}.merge", sources=(width,) * 3),
        _conv(given, f"{name}.out"),
    )


def _attention(given: _Tensors, name: str, width: int) -> PackedAttention:
    weight, bias = given[f"{name}.merge.conv.weight"], given[f"{name}.merge.conv.bias"]
    far = 3 * width // 2
    return PackedAttention(
        _side_by_side(given, [f"{name}.query", f"{name}.key"]),
        pack(weight, bias, sources=(width, far)),
        pack(weight[:, :width], bias),
        pack(weight[:, width:], None),
    )
