"""A plain convolutional network for 8x8 images: wide enough that its convolutions are the cost."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["DigitNet"]


class DigitNet(nn.Module):
    """Seven 3x3 convolutions of 64 to 256 channels, each with batch norm and ReLU; 33 M MACs.

    Args:
        num_classes: outputs.
        channels: input channels.
        width: channels of the first layers; doubled twice.

    >>> import torch
    >>> DigitNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, width: int = 64):
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(channels, width),
            *_convolution(width, width),
            *_convolution(width, width),
            *_convolution(width, 2 * width),
            *_convolution(2 * width, 2 * width),
            *_convolution(2 * width, 4 * width, stride=2),
            *_convolution(4 * width, 4 * width),
        )
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        logits: Tensor = self.classifier(self.features(image).mean(dim=(2, 3)))
        return logits


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
