"""From a network that maps codes to something that takes photos and masks.

Around the network: a first guess, the change to codes and back, borders for images that are too
small or of no fitting size, and the blend with the photo, which keeps what lies outside the shadow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError, unknown_name
from tenfold.nn.labnet import LEAST_SIDE
from tenfold.nn.shadow_codes import lab_codes, rgb_of_codes
from tenfold.nn.shadow_gain import Guess, ring_guess, soft_mask

__all__ = ["SPACES", "ShadowRemover"]

SPACES = ("lab", "rgb")
GUESSES = ("none", "ring")


class ShadowRemover:
    """Take shadows out of photos by a network.

    Args:
        network: called with codes `(B, 3, H, W)` and a mask `(B, 1, H, W)`, and gives codes back.
            An exported file as a callable will do. Sides are brought to its `multiple`.
        guess: what it is given: the photo (`none`), or one whose shadow is already brightened by
            the gain of its surroundings (`ring`).
        composite: keep the photo outside the shadow, by a mask that fades at its border; else the
            whole output is used, as the paper has it.
        space: of the codes: lab, or rgb. By default the network's own attribute.
        side: shorter side of what the network should see of a photo; None: any. It is heeded by
            `tenfold.deploy.shadow_photo`, and here larger images are taken as they are.

    Raises:
        UserError: an unknown guess or space.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        *,
        guess: Guess = "none",
        composite: bool = True,
        space: str | None = None,
        side: int | None = None,
    ) -> None:
        self.network = network
        self.guess = guess
        self.composite = composite
        self.side = side
        self.space = space or str(getattr(network, "space", "lab"))
        self.multiple = int(getattr(network, "multiple", 1))
        for name, value, known in (("guess", guess, GUESSES), ("space", self.space, SPACES)):
            if value not in known:
                raise unknown_name(name, value, known)

    def inputs(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the codes that the network is given.

        Args:
            images: sRGB in [0, 1], `(B, 3, H, W)`.
            mask: `(B, 1, H, W)` of zeros and ones.
        """
        images = ring_guess(images, mask) if self.guess == "ring" else images
        return lab_codes(images) if self.space == "lab" else images

    def codes(self, images: Tensor) -> Tensor:
        """Return the codes of images without shadow, which the network should give."""
        return lab_codes(images) if self.space == "lab" else images

    def images(self, codes: Tensor) -> Tensor:
        """Return the images of codes, in [0, 1]."""
        return rgb_of_codes(codes) if self.space == "lab" else codes.clamp(0, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the images without their shadows, sRGB in [0, 1].

        Args:
            images: sRGB in [0, 1], `(B, 3, H, W)`.
            mask: `(B, 1, H, W)` of zeros and ones.

        Raises:
            UserError: images that are no images, or masks of another size.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: expected float RGB in "
                "[0, 1], (B, 3, H, W)"
            )
        if tuple(mask.shape) != (len(images), 1, *images.shape[2:]):
            raise UserError(
                f"the mask has shape {tuple(mask.shape)}: expected "
                f"{(len(images), 1, *images.shape[2:])}, one channel of the images' size"
            )
        mask = mask.to(images.dtype)
        # The guess is of the image alone: borders would count some of its pixels twice.
        codes = self.inputs(images, mask)
        padded, grown = (_padded(each, self.multiple) for each in (codes, mask))
        padded = padded.contiguous(memory_format=torch.channels_last)
        result = self.network(padded, grown)
        height, width = images.shape[2:]
        made = self.images(result[..., :height, :width].float())
        if not self.composite:
            return made
        soft = soft_mask(mask)
        # Where nothing is in shadow the photo stays to the last bit.
        return torch.where(soft > 0, torch.lerp(images, made, soft), images)


def facts_of(
    network: nn.Module, guess: Guess, composite: bool, side: int | None = None
) -> dict[str, object]:
    """Return what an artifact notes, so that a remover can be made of it again."""
    return {
        "space": str(getattr(network, "space", "lab")),
        "guess": guess,
        "composite": composite,
        **({} if side is None else {"side": side}),
    }


def _padded(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column up to a side that the network takes."""
    amounts = []
    for side in (image.shape[-1], image.shape[-2]):
        wanted = max(side, LEAST_SIDE)
        amounts += [0, wanted + -wanted % multiple - side]
    return functional.pad(image, amounts, "replicate") if any(amounts) else image
