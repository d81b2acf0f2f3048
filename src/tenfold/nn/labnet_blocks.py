"""The blocks of LAB-Net: convolution, multi-scale block, and attention to channels by their edges.

Source: "LAB-Net: LAB Color-Space Oriented Lightweight Network for Shadow Removal" (arXiv
2208.13039); where only the released code speaks, the code is followed. There is no normalisation,
and each convolution is followed by a leaky ReLU. Modules are defined in the order of the released
code, so that the parameters are, too: its checkpoints are read by their order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BasicBlock", "Conv", "EdgeChannelAttention", "FixedHighPass", "HighPass", "MultiScale"]

HighPass = Literal["fixed", "trainable"]

SLOPE = 0.2  # of each leaky ReLU
REDUCTION = 8  # of the channel attention
STAGES = ((1, 4, 16), (2, 8, 32), (4, 16, 64))  # dilations of a block's stages
LAPLACIAN = ((0.0, -1.0, 0.0), (-1.0, 4.0, -1.0), (0.0, -1.0, 0.0))
_LEAST_VARIANCE = 1e-24  # keeps the gradient of a root finite where a channel is constant


class Conv(nn.Module):
    """Reflected borders, a convolution with a bias, and a leaky ReLU.

    The borders are copied for each convolution. That costs a tenth of its time in channels-last;
    one shared copy with the widest border is slower, as convolutions copy their part out of it, and
    so are zeros as a border with corrections at the four sides.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: side of the kernel, odd.
        dilation: of the kernel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        border = dilation * (kernel - 1) // 2
        self.pad: nn.Module = nn.ReflectionPad2d(border) if border else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, kernel, dilation=dilation)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)  # its gradient needs the result alone

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same height and width."""
        out: Tensor = self.act(self.conv(self.pad(x)))
        return out


class MultiScale(nn.Module):
    """Three 3x3 convolutions of different reach side by side, merged to the block's width.

    Args:
        inputs: channels.
        width: channels of the result, C; the three have C/2, C and 3C/2.
        dilations: of the three.
    """

    def __init__(self, inputs: int, width: int, dilations: tuple[int, int, int]) -> None:
        super().__init__()
        near, middle, far = dilations
        self.near = Conv(inputs, width // 2, 3, near)
        self.middle = Conv(inputs, width, 3, middle)
        self.far = Conv(inputs, 3 * width // 2, 3, far)
        self.merge = Conv(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inputs, H, W)` to `(B, C, H, W)`."""
        out: Tensor = self.merge(torch.cat([self.near(x), self.middle(x), self.far(x)], 1))
        return out


class FixedHighPass(nn.Module):
    """The Laplacian of each channel, as a buffer that no optimizer sees.

    Its name in a checkpoint is that of a trained one, which therefore loads with its own kernels.
    """

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = torch.tensor(LAPLACIAN).repeat(channels, 1, 1, 1)
        self.register_buffer("weight", kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H - 2, W - 2)`."""
        return functional.conv2d(x, self.weight, groups=x.shape[1])


class EdgeChannelAttention(nn.Module):
    """Weigh channels by the deviation of their edges (ECA of LAB-Net), not by their means.

    Args:
        channels: of the map.
        highpass: `fixed` is the Laplacian; `trainable` starts at random, as the released code does.
    """

    def __init__(self, channels: int, highpass: HighPass = "fixed") -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // REDUCTION)
        self.expand = nn.Linear(channels // REDUCTION, channels)
        # A child with the kernel inside, as a bare parameter would be listed before the others.
        self.highpass: nn.Module = (
            FixedHighPass(channels)
            if highpass == "fixed"
            else nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
        )

    def deviations(self, x: Tensor) -> Tensor:
        """Return the unbiased standard deviations of the edges, `(B, C)`, in float32 at least.

        In two passes over the map: PyTorch's own takes several times as long over these two axes,
        and the difference of two moments loses its digits where the mean is large.
        """
        edges = self.highpass(x)
        edges = edges.float() if edges.dtype in (torch.float16, torch.bfloat16) else edges
        centred = edges - edges.mean((2, 3), keepdim=True)
        variance = centred.square().sum((2, 3)) / (edges.shape[2] * edges.shape[3] - 1)
        deviations: Tensor = variance.clamp_min(_LEAST_VARIANCE).sqrt()
        return deviations

    def gate(self, x: Tensor) -> Tensor:
        """Return the weights of the channels of `(B, C, H, W)`, `(B, C)`, in (0, 1)."""
        hidden = functional.leaky_relu(self.reduce(self.deviations(x).to(x.dtype)), SLOPE)
        return torch.sigmoid(self.expand(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape; it is the input that is weighed."""
        return x * self.gate(x)[:, :, None, None]


class BasicBlock(nn.Module):
    """Three multi-scale stages one after the other, weighed by channel, and two convolutions.

    Args:
        inputs: channels.
        outputs: channels.
        width: channels inside, C.
        highpass: of the channel attention.
    """

    def __init__(self, inputs: int, outputs: int, width: int, highpass: HighPass = "fixed") -> None:
        super().__init__()
        first, second, third = STAGES
        self.x = MultiScale(inputs, width, first)
        self.y = MultiScale(width, width, second)
        self.z = MultiScale(width, width, third)
        self.merge = Conv(3 * width, width, 1)
        self.out = Conv(width, outputs, 3)
        # Applied ahead of the last two convolutions, but listed after them.
        self.attention = EdgeChannelAttention(3 * width, highpass)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(B, inputs, H, W)` to `(B, outputs, H, W)`."""
        x = self.x(features)
        y = self.y(x)
        z = self.z(y)
        out: Tensor = self.out(self.merge(self.attention(torch.cat([x, y, z], 1))))
        return out
