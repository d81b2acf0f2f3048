"""A small classifier of four stages whose maps serve as a perceptual space.

Style and feature losses and Fréchet distances are usually taken in the spaces of VGG16 and
Inception, whose weights must be downloaded. This network is the offline choice: trained by one of
our own recipes, its four maps stand where VGG16's relu1_2, relu2_2, relu3_3 and relu4_3 stand, at
1, 1/2, 1/4 and 1/8 of the image's side. Its numbers can't be compared with those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tenfold.errors import UserError

__all__ = ["ImageStages", "StageNet"]


class StageNet(nn.Module):
    """A convolutional network of four stages, whose maps serve as a space for perceptual losses.

    A stage is two 3x3 convolutions, each with batch norm and ReLU. Average pooling by 2 stands
    between stages, since maximum pooling passes gradients to a quarter of the pixels only.

    Args:
        num_classes: outputs.
        channels: input channels.
        width: channels of the first stage; doubled three times.

    Raises:
        UserError: a width below 1.

    >>> network = StageNet(num_classes=5, width=4)
    >>> [tuple(map.shape) for map in network.stages(torch.zeros(2, 3, 32, 24))]
    [(2, 4, 32, 24), (2, 8, 16, 12), (2, 16, 8, 6), (2, 32, 4, 3)]
    """

    def __init__(self, num_classes: int = 10, channels: int = 3, width: int = 32):
        super().__init__()
        if width < 1:
            raise UserError(f"width={width}: expected at least 1 channel")
        self.channels = channels
        widths = [width * 2**stage for stage in range(4)]
        self.blocks = nn.ModuleList(
            nn.Sequential(*_convolution(inputs, outputs), *_convolution(outputs, outputs))
            for inputs, outputs in zip([channels, *widths], widths, strict=False)
        )
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images `(B, C, H, W)` to logits `(B, num_classes)`."""
        logits: Tensor = self.classifier(self.features(image))
        return logits

    def stages(self, image: Tensor) -> list[Tensor]:
        """Return the four stages' maps of normalised images `(B, C, H, W)`.

        `ImageStages` takes images in [-1, 1] instead.

        Returns:
            `(B, width * 2**s, H / 2**s, W / 2**s)` for s = 0..3, sides rounded down.
        """
        maps: list[Tensor] = []
        for block in self.blocks:
            image = block(self.pool(maps[-1]) if maps else image)
            maps.append(image)
        return maps

    def features(self, image: Tensor) -> Tensor:
        """Return the mean of the last stage's map, `(B, 8 * width)`."""
        return self.stages(image)[-1].mean(dim=(2, 3))


class ImageStages(nn.Module):
    """A trained `StageNet` as an extractor that takes images in [-1, 1].

    Frozen and always in evaluation mode. Gradients flow through it to the images.

    Args:
        network: the classifier; frozen in place.
        mean: per channel, by which its training data were normalised, of images in [0, 1].
        std: likewise.

    Raises:
        UserError: other numbers of means or deviations than of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: StageNet, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != network.channels or len(std) != network.channels:
            raise UserError(
                f"mean {list(mean)} and std {list(std)}: expected {network.channels} numbers each, "
                "one per channel of the network; take them from its artifact"
            )
        self.network = network
        self.channels = network.channels
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).reshape(-1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> ImageStages:
        """Stay in evaluation mode: batch statistics would make the space a moving one."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the four maps of images `(B, C, H, W)` in [-1, 1]."""
        return self.network.stages(self._normalized(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the mean of the last map of images `(B, C, H, W)` in [-1, 1]: `(B, D)`."""
        return self.network.features(self._normalized(images))

    def _normalized(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - self.mean) / self.std


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
