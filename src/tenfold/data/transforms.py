"""Augmentations by name.

Crops after padding, and flips, are done on the whole batch at once: through torchvision's v2
transforms with a generator per sample they cost about 250 µs an image (32 ms per 128, a tenth of a
ResNet-20 step on two CPU cores); as one gather with hashed random numbers, under 1 ms per 128. What
is drawn is a function of (seed, epoch, id) either way. The rest is torchvision's v2, per sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.randomness import below, mix, mix_one
from tenfold.errors import unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Augmentation", "BatchTransform", "augmentations", "resolve"]


@dataclass(frozen=True)
class Augmentation:
    """What a training image goes through, in this order.

    Attributes:
        description: one line for people.
        resized_crop: a random part of the stored image, resized (else: resize and centre crop).
        shift: a random crop after padding each side with an eighth of zeros.
        flip: mirror left and right, for half of the samples.
        policy: two random operations of RandAugment.
    """

    description: str
    resized_crop: bool = False
    shift: bool = False
    flip: bool = False
    policy: bool = False

    def views(self, size: tuple[int, int]) -> int | None:
        """Return how many different images come of one of this size; None: too many to count.

        >>> Augmentation("", shift=True, flip=True).views((32, 32))
        162
        """
        if self.resized_crop or self.policy:
            return None
        rows, columns = (2 * pad + 1 for pad in padding(size)) if self.shift else (1, 1)
        return rows * columns * (2 if self.flip else 1)


def padding(size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns that are padded on each side ahead of a shift: an eighth."""
    return max(1, size[0] // 8), max(1, size[1] // 8)


_KNOWN = {
    "none": Augmentation("the image as it is"),
    "flip": Augmentation("mirror left and right, half of the time", flip=True),
    "shift": Augmentation("random crop after padding by 1/8, no flip", shift=True),
    "flip_crop": Augmentation("random crop after padding by 1/8, flip", shift=True, flip=True),
    "imagenet": Augmentation("random resized crop, flip", resized_crop=True, flip=True),
}


def augmentations() -> dict[str, str]:
    """Return the names that `augment` takes, each with one line that describes it."""
    return {
        "auto": "the data set's own default",
        **{name: known.description for name, known in _KNOWN.items()},
        "randaugment": "the data set's default crop, then RandAugment (2 operations, strength 9)",
    }


def resolve(name: str, default: str) -> Augmentation:
    """Return the augmentation of that name, for a data set with this default.

    Raises:
        UserError: the name isn't known.
    """
    if name not in augmentations():
        raise unknown_name("augmentation", name, augmentations())
    if name == "randaugment":
        return replace(_KNOWN[default], policy=True)
    return _KNOWN[default if name == "auto" else name]


def shift_and_flip(
    images: Tensor, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], flip: bool
) -> Tensor:
    """Shift each image by up to an eighth of its size and mirror half of them.

    Args:
        images: uint8 `(B, C, H, W)`, or `(B, C, T, H, W)`, whose frames go the same way; not
            changed.
        seed: the run's seed.
        epochs: `(B,)`.
        ids: `(B,)`.
        flip: whether to mirror.

    Returns:
        uint8 of the same shape, contiguous.
    """
    shape = images.shape
    images = images.flatten(1, -3)
    count, _, height, width = images.shape
    pad_y, pad_x = padding((height, width))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (pad_y, pad_y), (pad_x, pad_x)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    top, left = places((height, width), seed, epochs, ids)
    out = torch.from_numpy(np.ascontiguousarray(windows[np.arange(count), :, top, left]))
    return (mirror(out, seed, epochs, ids) if flip else out).reshape(shape)


def places(
    size: tuple[int, int], seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each image's window begins in the padded one: rows and columns, `(B,)`."""
    pad_y, pad_x = padding(size)
    top = below(2 * pad_y + 1, mix(seed, epochs, ids, 0))
    return top, below(2 * pad_x + 1, mix(seed, epochs, ids, 1))


def mirrored(seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 1 for images that are mirrored, 0 for others, `(B,)`."""
    return below(2, mix(seed, epochs, ids, 2))


def mirror(images: Tensor, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> Tensor:
    """Mirror half of the images `(B, ..., H, W)`, in place, and return them."""
    chosen = mirrored(seed, epochs, ids) == 1
    pixels = images.numpy()
    pixels[chosen] = pixels[chosen][..., ::-1]
    return images


class SampleTransform:
    """The part of an augmentation that torchvision's v2 does, one image at a time."""

    def __init__(self, augmentation: Augmentation, size: tuple[int, int]) -> None:
        self.augmentation = augmentation
        self.size = size
        self._transform: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: Tensor, seed: int, epoch: int, sample: int) -> Tensor:
        """Transform one uint8 image `(C, H, W)`; only (seed, epoch, sample) decide what is drawn.

        A clip's frames `(C, T, H, W)` all go the same way. v2 draws from torch's global generator
        alone; it is put back as it was.
        """
        transform = self._transform = self._transform or self._build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_one(seed, epoch, sample, 3))
            if image.ndim == 3:
                return transform(image)
            # v2 takes the third axis from the end for the channels.
            return transform(image.transpose(0, 1)).transpose(0, 1).contiguous()

    def _build(self) -> Callable[[Tensor], Tensor]:
        from torchvision.transforms import v2

        steps: list[Any] = []
        if self.augmentation.resized_crop:
            steps.append(v2.RandomResizedCrop(self.size, antialias=True))
            if self.augmentation.flip:
                steps.append(v2.RandomHorizontalFlip())
        if self.augmentation.policy:
            steps.append(v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR))
        return cast("Callable[[Tensor], Tensor]", v2.Compose(steps))


class BatchTransform:
    """An augmentation for a batch, whichever way its images come.

    Args:
        augmentation: what to do.
        size: (H, W) of the result.
        seed: the run's seed.
    """

    def __init__(self, augmentation: Augmentation, size: tuple[int, int], seed: int) -> None:
        self.augmentation = augmentation
        self.size = size
        self.seed = seed
        self._sample = SampleTransform(augmentation, size)

    def __call__(
        self,
        epochs: NDArray[np.int64],
        ids: NDArray[np.int64],
        stored: Callable[[int], Tensor],
        fitted: Callable[[], Tensor],
    ) -> Tensor:
        """Return uint8 `(B, C, H, W)`; only the seed and each image's epoch and id decide.

        Clips `(B, C, T, H, W)` go the same way.

        Args:
            epochs: `(B,)`.
            ids: `(B,)`.
            stored: gives the batch's image of that number as it is stored.
            fitted: gives a copy of the batch, resized and cropped.
        """
        todo = self.augmentation
        draws = list(enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)))
        if todo.resized_crop:
            return torch.stack([self._sample(stored(k), self.seed, e, i) for k, (e, i) in draws])
        images = fitted()
        if todo.shift:
            images = shift_and_flip(images, self.seed, epochs, ids, todo.flip)
        elif todo.flip:
            images = mirror(images, self.seed, epochs, ids)
        if todo.policy:
            images = torch.stack([self._sample(images[k], self.seed, e, i) for k, (e, i) in draws])
        return images

    def views(self, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which of its `Augmentation.views` each image is, `(B,)` from 0."""
        found = np.zeros(len(ids), np.int64)
        if self.augmentation.shift:
            top, left = places(self.size, self.seed, epochs, ids)
            found = top * (2 * padding(self.size)[1] + 1) + left
        if self.augmentation.flip:
            found = 2 * found + mirrored(self.seed, epochs, ids)
        return found
