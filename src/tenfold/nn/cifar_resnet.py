"""Residual networks for small images, of depth 6n + 2 (He et al., 2016, section 4.2).

Three stages of n blocks with 16, 32 and 64 channels; each block is two 3x3 convolutions. Where a
stage halves the image and doubles the channels, the shortcut is either

- option A: every second pixel, the new channels zero. No parameters; the paper's choice on CIFAR.
- option B: a 1x1 convolution with stride 2 and batch norm.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError

__all__ = ["CifarResNet"]


class CifarResNet(nn.Module):
    """A CIFAR ResNet.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110.
        num_classes: outputs.
        channels: input channels.
        shortcut: `A` (parameter-free) or `B` (1x1 convolution).

    Raises:
        UserError: another depth or shortcut.

    >>> import torch
    >>> CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        channels: int = 3,
        shortcut: Literal["A", "B"] = "A",
    ):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth={depth}: expected 6n + 2, such as 20, 32, 44, 56 or 110")
        if shortcut not in ("A", "B"):
            raise UserError(f"shortcut={shortcut!r}: expected 'A' or 'B'")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, shortcut)
        self.layer2 = _stage(16, 32, blocks, 2, shortcut)
        self.layer3 = _stage(32, 64, blocks, 2, shortcut)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        x = functional.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = _Block(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                self.shortcut = _PadShortcut(stride, outputs - inputs)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                    nn.BatchNorm2d(outputs),
                )

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class _PadShortcut(nn.Module):
    def __init__(self, stride: int, new_channels: int):
        super().__init__()
        self.stride = stride
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        half = self.new_channels // 2
        return functional.pad(x, (0, 0, 0, 0, half, self.new_channels - half))
