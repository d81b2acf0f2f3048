"""A 3-D U-Net for volumes (Çiçek et al., MICCAI 2016).

The network of "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation", figure 2:
on the way down two 3x3x3 convolutions a level, the second of which doubles the channels ahead of
the pooling; on the way up a 2x2x2 transposed convolution, the level's own features beside it, and
two convolutions more. 19,069,955 parameters for three channels and three classes, as in the paper,
which leaves batch norm out of the count. The convolutions are padded here, so that the output is as
large as the input; the paper's are not, and its output is smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.errors import UserError

__all__ = ["UNet3d"]


class UNet3d(nn.Module):
    """3-D U-Net that gives a class to every voxel, 19 M parameters; not for the task of clips.

    Args:
        num_classes: outputs for each voxel.
        channels: input channels.
        width: channels of the first convolution; 32 in the paper.
        levels: sizes of volumes, 4 in the paper. Each side of the input must be a multiple of
            `2 ** (levels - 1)`.

    Raises:
        UserError: width or levels below 1; while running, sides that don't fit.

    >>> UNet3d(2, channels=1, width=4)(torch.zeros(1, 1, 8, 16, 16)).shape
    torch.Size([1, 2, 8, 16, 16])
    """

    def __init__(self, num_classes: int = 3, channels: int = 3, width: int = 32, levels: int = 4):
        super().__init__()
        for name, value in (("width", width), ("levels", levels)):
            if value < 1:
                raise UserError(f"{name}={value}: expected at least 1")
        self.multiple = 2 ** (levels - 1)
        down: list[nn.Module] = []
        for level in range(levels):
            inner = width * 2**level
            down.append(_pair(channels, inner, 2 * inner))
            channels = 2 * inner
        up: list[nn.Module] = []
        joined: list[nn.Module] = []
        for level in reversed(range(levels - 1)):
            skipped = 2 * width * 2**level
            up.append(nn.ConvTranspose3d(channels, channels, 2, stride=2, bias=False))
            joined.append(_pair(channels + skipped, skipped, skipped))
            channels = skipped
        self.down = nn.ModuleList(down)
        self.up = nn.ModuleList(up)
        self.joined = nn.ModuleList(joined)
        self.pool = nn.MaxPool3d(2)
        self.classifier = nn.Conv3d(channels, num_classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Map volumes `(B, C, D, H, W)` to logits `(B, num_classes, D, H, W)`."""
        sides = tuple(volume.shape[2:])
        if volume.ndim != 5 or any(side % self.multiple for side in sides):
            raise UserError(
                f"the volume is {tuple(volume.shape)}: expected (B, C, D, H, W), all sides "
                f"multiples of {self.multiple}; pad it, or take fewer levels"
            )
        features: list[Tensor] = []
        x = volume
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            features.append(x)
        features.pop()
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(torch.cat([features.pop(), up(x)], dim=1))
        logits: Tensor = self.classifier(x)
        return logits


def _pair(inputs: int, between: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(inputs, between), *_convolution(between, outputs))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU()]
