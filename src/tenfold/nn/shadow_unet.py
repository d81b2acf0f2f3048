"""A plain U-Net that removes shadows in RGB: the large rival of LAB-Net.

Olaf Ronneberger et al., "U-Net: Convolutional networks for biomedical image segmentation", 2015, as
a baseline of shadow removal: the photo and its mask go in, and what comes out is added to the
photo. Borders are padded, so that sizes stay; upsampling is bilinear and followed by a convolution,
which leaves no checkerboard; group norm suits batches of one and two images.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError

__all__ = ["ShadowUNet"]

DEPTH = 4  # halvings of the image
GROUP = 4  # channels of a group of the norm


class ShadowUNet(nn.Module):
    """Shadow remover in RGB: a U-Net on photo and mask, whose output is added to the photo.

    Its default has 10.9 million parameters, more than ten times a LAB-Net of width 32.

    Args:
        width: channels of the first level, a multiple of 4; each level below has twice as many.

    Raises:
        UserError: another width.
    """

    space = "rgb"
    multiple = 2**DEPTH

    def __init__(self, width: int = 36) -> None:
        super().__init__()
        if width < GROUP or width % GROUP:
            raise UserError(f"width {width}: expected a multiple of {GROUP}, such as 16 or 36")
        self.width = width
        widths = [width * 2**level for level in range(DEPTH + 1)]
        self.first = _pair(4, width)
        self.down = nn.ModuleList(_pair(*sides) for sides in itertools.pairwise(widths))
        self.narrow = nn.ModuleList(
            nn.Conv2d(deep, shallow, 3, padding=1)
            for shallow, deep in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.up = nn.ModuleList(_pair(2 * side, side) for side in widths[-2::-1])
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Map photos in shadow to photos without, of the same shape and not clamped.

        Args:
            images: sRGB `(B, 3, H, W)` in [0, 1], with sides that are multiples of 16.
            mask: `(B, 1, H, W)` of zeros and ones, 1 in shadow.

        Raises:
            UserError: other shapes.
        """
        self.check(images, mask)
        maps = [self.first(torch.cat([images, mask], 1))]
        for block in self.down:
            maps.append(block(functional.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for narrow, block in zip(self.narrow, self.up, strict=True):
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([maps.pop(), narrow(x)], 1))
        change: Tensor = self.last(x)
        return images + change

    @torch.no_grad()
    def identity_start(self) -> None:
        """Make the network give its input back: short runs start from there."""
        self.last.weight.zero_()
        if self.last.bias is not None:
            self.last.bias.zero_()

    def check(self, images: Tensor, mask: Tensor) -> None:
        """Refuse input that the network can't take.

        Raises:
            UserError: other shapes.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"ShadowUNet got images of shape {tuple(images.shape)}: expected RGB (B, 3, H, W)"
            )
        if torch.compiler.is_exporting():  # its sizes may be symbols, and nobody listens
            return
        if images.shape[2] % self.multiple or images.shape[3] % self.multiple:
            raise UserError(
                f"ShadowUNet got images of {images.shape[2]}x{images.shape[3]}: expected sides "
                f"that are multiples of {self.multiple}; pad the images, as ShadowRemover does"
            )
        if tuple(mask.shape) != (images.shape[0], 1, *images.shape[2:]):
            raise UserError(
                f"ShadowUNet got a mask of shape {tuple(mask.shape)}: expected "
                f"{(images.shape[0], 1, *images.shape[2:])}, one channel of the images' size"
            )


def _pair(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions, each with norm and ReLU."""
    layers: list[nn.Module] = []
    for source in (inputs, outputs):
        layers += [
            nn.Conv2d(source, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(outputs // GROUP, outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
