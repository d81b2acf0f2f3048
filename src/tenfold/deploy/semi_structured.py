"""2:4 layers on the sparse tensor cores of a GPU, by PyTorch's `to_sparse_semi_structured`.

A compressed weight is a matrix `(O, K)` with at most two non-zeros in every four neighbours of a
row. A convolution's K runs over (ky, kx, channel), so that four neighbours are four channels, which
is how its blocks are made; `F.unfold` orders (channel, ky, kx), hence the permutation below.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.nn.blocks import to_blocks

__all__ = [
    "SemiStructuredConv2d", "SemiStructuredLinear", "columns", "compress", "matrix", "unfit",
]  # fmt: skip

DTYPES = (torch.float16, torch.bfloat16)
# What both libraries behind PyTorch's operator (CUTLASS, cuSPARSELt) take.
ROWS, COLUMNS = 32, 64
CAPABILITY = (8, 0)


def matrix(weight: Tensor) -> Tensor:
    """Return a weight `(O, I)` or `(O, I, kH, kW)` as `(O, kH * kW * I)`."""
    return weight.detach().movedim(1, -1).reshape(weight.shape[0], -1).contiguous()


def columns(x: Tensor, layer: nn.Conv2d, padding: tuple[int, int]) -> Tensor:
    """Return what each output pixel sees, `(B * OH * OW, kH * kW * C)`, in the order of `matrix`.

    Args:
        x: `(B, C, H, W)`.
        layer: the convolution, for its sizes.
        padding: zeros at every side.
    """
    channels = x.shape[1]
    if tuple(layer.kernel_size) == (1, 1) and padding == (0, 0):
        pixels = x[:, :, :: layer.stride[0], :: layer.stride[1]]
        return pixels.permute(0, 2, 3, 1).reshape(-1, channels)
    seen = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    positions = layer.kernel_size[0] * layer.kernel_size[1]
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


def compress(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Return a layer with its weight compressed for the GPU that it is on.

    Raises:
        UserError: the layer doesn't fit, or the GPU has no 2:4 tensor cores.
    """
    why = unfit(layer)
    if why is None and not layer.weight.is_cuda:
        why = f"it is on {layer.weight.device}: move the model to a GPU first"
    if why is None and torch.cuda.get_device_capability(layer.weight.device) < CAPABILITY:
        why = "this GPU has no 2:4 tensor cores"
    if why is not None:
        raise UserError(f"{type(layer).__name__} can't be compressed: {why}")
    try:
        compressed = torch.sparse.to_sparse_semi_structured(matrix(layer.weight))
    except Exception as error:
        raise UserError(f"PyTorch refuses to compress it: {error}") from error
    if isinstance(layer, nn.Conv2d):
        return SemiStructuredConv2d(layer, compressed)
    return SemiStructuredLinear(layer, compressed)


class _SemiStructured(nn.Module):
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


class SemiStructuredLinear(_SemiStructured):
    """A linear layer with a compressed weight.

    Args:
        layer: the dense layer, for its bias.
        weight: `(O, I)`, compressed; any tensor that `F.linear` takes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., I)` to `(..., O)`."""
        rows = F.linear(x.reshape(-1, x.shape[-1]), self.compressed, self.bias)
        return rows.reshape(*x.shape[:-1], -1)


class SemiStructuredConv2d(_SemiStructured):
    """A convolution of one group as a product with a compressed matrix.

    Args:
        layer: the dense layer, for its sizes and bias.
        weight: `(O, kH * kW * I)` as by `matrix`, compressed; any tensor that `F.linear` takes.
    """

    def __init__(self, layer: nn.Conv2d, weight: Tensor) -> None:
        super().__init__(layer, weight)
        from tenfold.nn.packed import fixed_padding

        self.padding = fixed_padding(layer)
        self.sizes = nn.Conv2d(
            layer.in_channels, layer.out_channels, _pair(layer.kernel_size),
            _pair(layer.stride), 0, _pair(layer.dilation), device="meta",
        ).requires_grad_(False)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, O, OH, OW)`, channels last."""
        height, width = (
            (x.shape[2 + i] + 2 * self.padding[i] - self.sizes.dilation[i] * (self.sizes.kernel_size[i] - 1) - 1)
            // self.sizes.stride[i] + 1
            for i in (0, 1)
        )  # fmt: skip
        rows = F.linear(columns(x, self.sizes, self.padding), self.compressed, self.bias)
        return rows.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)
