"""A pool of made images, from which a discriminator is shown older ones now and then."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.errors import UserError

__all__ = ["ImagePool"]


class ImagePool:
    """Hand on a new image or one from the past, half the time each, once the pool is full.

    Source: "Learning from Simulated and Unsupervised Images through Adversarial Training" (CVPR
    2017), as CycleGAN uses it.

    Args:
        size: images that are kept; 0 hands on the new ones alone.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise UserError(f"pool size {size}: expected at least 0")
        self.size = size
        self.images: list[Tensor] = []

    def exchange(self, images: Tensor) -> Tensor:
        """Return as many images as are given, `(B, C, H, W)`, without their graphs.

        While the pool fills up, images are kept and handed on. Then each is handed on by chance, or
        takes the place of one that is handed on instead.
        """
        images = images.detach()
        if self.size == 0:
            return images
        shown = []
        for image in images:
            if len(self.images) < self.size:
                self.images.append(image.clone())
                shown.append(image)
            elif torch.rand(()) < 0.5:
                place = int(torch.randint(self.size, ()))
                shown.append(self.images[place])
                self.images[place] = image.clone()
            else:
                shown.append(image)
        return torch.stack(shown)

    def state(self) -> Tensor | None:
        """Return what is kept, `(N, C, H, W)`; None where there is nothing yet."""
        return torch.stack(self.images).cpu() if self.images else None

    def restore(self, state: Tensor | None, device: torch.device) -> None:
        """Keep what `state` returned."""
        self.images = [] if state is None else list(state.to(device).unbind())
