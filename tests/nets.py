"""Networks of the tests' own, named in recipes as `tests/nets.py:small`."""

from __future__ import annotations

import math

from torch import Tensor, nn


def small(num_classes: int, channels: int = 1, width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def volumes(num_classes: int, channels: int = 1, width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(),
        nn.Conv3d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(),
        nn.Conv3d(width, 2 * width, 3, padding=(1, 0, 1)),
        nn.ReLU(),
        nn.Conv3d(2 * width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def deep(num_classes: int) -> nn.Module:
    """Takes images of 8 x 8 and reads them as volumes of 4 x 4 x 4."""
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 4, 4, 4)), volumes(num_classes))


class Bomb(nn.Module):
    """Gives NaN from its `fuse`-th training batch on."""

    def __init__(self, num_classes: int, fuse: int = 6):
        super().__init__()
        self.net = small(num_classes)
        self.fuse = fuse
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(image)
        if self.training:
            self.calls += 1
            if self.calls > self.fuse:
                return logits * math.nan
        return logits


def wrong_outputs(num_classes: int) -> nn.Module:
    return small(num_classes + 1)


def plain(num_classes: int) -> nn.Module:
    """No batch norm, no dropout: what it learns doesn't depend on how a batch is shared out."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


def vit(num_classes: int, channels: int = 1, depth: int = 3) -> nn.Module:
    """A vision transformer for images of 8 x 8: 4 x 4 patches, and no dropout."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=16,
        depth=depth,
        num_heads=2,
    )


def supervit(num_classes: int) -> nn.Module:
    """The same in six cells."""
    from tenfold.nn.supervit import SuperViT

    return SuperViT(vit(num_classes), sizes=(4, 8), drop_blocks=(1,))
