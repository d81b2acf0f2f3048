"""Instance normalisation without parameters, which keeps channels-last and can be frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError

__all__ = ["InstanceNorm2d"]


class InstanceNorm2d(nn.Module):
    """Normalise every channel of every image by its own mean and variance.

    The function is that of `nn.InstanceNorm2d(channels)` without affine parameters or running
    statistics. It is computed as a group norm of one channel a group, because PyTorch's own
    instance norm brings channels-last maps into another order. An exported graph names it an
    instance norm.

    Args:
        channels: of the map.
        eps: added to the variance.

    Attributes:
        frozen: mean and variance, each `(1, C)` or `(B, C)`, to use in place of the image's own;
            this is how a tile of a large image gets the statistics of the whole.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.frozen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape.

        Raises:
            UserError: maps of one pixel, which have no variance.
        """
        if self.frozen is not None:
            mean, variance = (each[:, :, None, None] for each in self.frozen)
            return (x - mean) * torch.rsqrt(variance + self.eps)
        if torch.compiler.is_exporting():
            return functional.instance_norm(x, eps=self.eps)
        if x.shape[2] * x.shape[3] == 1:  # a group norm would give zeros without a word
            raise UserError(
                "an instance norm got maps of one pixel: expected more; give larger images"
            )
        if x.device.type == "cpu" and not x.is_contiguous():
            # On a CPU the group norm of channels-last maps is slow, and takes the variance as a
            # difference of large numbers: errors of 0.004 in an image were seen.
            normed = functional.group_norm(x.contiguous(), self.channels, eps=self.eps)
            if x.is_contiguous(memory_format=torch.channels_last):
                return normed.contiguous(memory_format=torch.channels_last)
            return normed
        return functional.group_norm(x, self.channels, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"{self.channels}, eps={self.eps}"
