"""2:4 layers on the sparse tensor cores of a GPU, by PyTorch's `to_sparse_semi_structured`.

A compressed weight is a matrix `(O, K)` with at most two non-zeros in every four neighbours of a
row. A convolution's K runs over (ky, kx, channel), so that four neighbours are four channels, which
is how its blocks are made; `F.unfold` orders (channel, ky, kx), hence the permutation below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.nn.blocks import to_blocks
from tenfold.nn.packable import fixed_padding, pair

__all__ = [
    "SemiStructuredConv2d",
    "SemiStructuredLayer",
    "SemiStructuredLinear",
    "Sizes",
    "columns",
    "compress",
    "matrix",
    "missing",
    "unfit",
]

DTYPES = (torch.float16, torch.bfloat16)
# What both libraries behind PyTorch's operator (CUTLASS, cuSPARSELt) take.
ROWS, COLUMNS = 32, 64
CAPABILITY = (8, 0)


def matrix(weight: Tensor) -> Tensor:
    """Return a weight `(O, I)` or `(O, I, kH, kW)` as `(O, kH * kW * I)`."""
    return weight.detach().movedim(1, -1).reshape(weight.shape[0], -1).contiguous()


@dataclass(frozen=True)
class Sizes:
    """Those of a convolution of one group, in height and width."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Self:
        """Read them from a layer; padding that is no number raises a UserError."""
        return cls(
            pair(layer.kernel_size), pair(layer.stride), fixed_padding(layer),
            pair(layer.dilation),
        )  # fmt: skip

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the result."""
        first, second = (
            (size + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i, size in enumerate((height, width))
        )
        return first, second


def columns(x: Tensor, sizes: Sizes) -> Tensor:
    """Return what each output pixel sees, `(B * OH * OW, kH * kW * C)`, in the order of `matrix`.

    Args:
        x: `(B, C, H, W)`.
        sizes: of the convolution.
    """
    channels = x.shape[1]
    if sizes.kernel_size == (1, 1) and sizes.padding == (0, 0):
        pixels = x[:, :, :: sizes.stride[0], :: sizes.stride[1]]
        return pixels.permute(0, 2, 3, 1).reshape(-1, channels)
    seen = F.unfold(x, sizes.kernel_size, sizes.dilation, sizes.padding, sizes.stride)
    positions = sizes.kernel_size[0] * sizes.kernel_size[1]
    by_channel = seen.reshape(x.shape[0], channels, positions, -1)
    return by_channel.permute(0, 3, 2, 1).reshape(-1, positions * channels)


def unfit(layer: nn.Conv2d | nn.Linear) -> str | None:
    """Say why a layer can't run on 2:4 tensor cores, whatever the device, or None."""
    weight = layer.weight
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}: 2:4 on a GPU needs float16 or bfloat16"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"{layer.groups} groups: 2:4 on a GPU takes convolutions of one group"
    rows, k = weight.shape[0], weight[0].numel()
    if rows % ROWS or k % COLUMNS:
        return f"a matrix of {rows}x{k}: 2:4 on a GPU needs multiples of {ROWS} and {COLUMNS}"
    if weight.shape[1] % 4 or int((to_blocks(weight.detach(), 4) != 0).sum(dim=1).max()) > 2:
        return "its zeros are not 2:4"
    return None


def missing(device: torch.device) -> str | None:
    """Say why a CUDA device can't run 2:4 layers, or None."""
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no 2:4 tensor cores"
    return None


def compress(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Return a layer with its weight compressed for the GPU that it is on.

    Raises:
        UserError: the layer doesn't fit, or the GPU has no 2:4 tensor cores.
    """
    why = unfit(layer)
    if why is None and not layer.weight.is_cuda:
        why = f"it is on {layer.weight.device}: move the model to a GPU first"
    if why is None:
        why = missing(layer.weight.device)
    if why is not None:
        raise UserError(f"{type(layer).__name__} can't be compressed: {why}")
    try:
        compressed = torch.sparse.to_sparse_semi_structured(matrix(layer.weight))
    except Exception as error:
        raise UserError(f"PyTorch refuses to compress it: {error}") from error
    if isinstance(layer, nn.Conv2d):
        return SemiStructuredConv2d(layer, compressed)
    return SemiStructuredLinear(layer, compressed)


class SemiStructuredLayer(nn.Module):
    """Holds the compressed matrix beside the module's state: it belongs to one GPU."""

    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.compressed = weight

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        for name, value in self.__dict__.items():  # nothing here is ever written to
            copied.__dict__[name] = dict(value) if isinstance(value, dict) else value
        return copied


class SemiStructuredLinear(SemiStructuredLayer):
    """A linear layer with a compressed weight.

    Args:
        layer: the dense layer, for its bias.
        weight: `(O, I)`, compressed; any tensor that `F.linear` takes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., I)` to `(..., O)`."""
        rows = F.linear(x.reshape(-1, x.shape[-1]), self.compressed, self.bias)
        return rows.reshape(*x.shape[:-1], -1)


class SemiStructuredConv2d(SemiStructuredLayer):
    """A convolution of one group as a product with a compressed matrix.

    Args:
        layer: the dense layer, for its sizes and bias.
        weight: `(O, kH * kW * I)` as by `matrix`, compressed; any tensor that `F.linear` takes.
    """

    def __init__(self, layer: nn.Conv2d, weight: Tensor) -> None:
        super().__init__(layer, weight)
        self.sizes = Sizes.of(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, O, OH, OW)`, channels last."""
        height, width = self.sizes.output(x.shape[2], x.shape[3])
        rows = F.linear(columns(x, self.sizes), self.compressed, self.bias)
        return rows.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)
