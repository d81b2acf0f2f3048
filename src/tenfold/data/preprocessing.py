"""What happens to an image or a clip ahead of the network: resize, centre crop, normalise."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tenfold.data.decode import decode
from tenfold.errors import UserError, unknown_name

__all__ = ["Preprocessing", "load_image", "normalize"]

_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


@dataclass(frozen=True)
class Preprocessing:
    """The facts that travel with a network, so that `predict` sees what training saw.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: (H, W) of the network's input.
        mean: per channel, of images scaled to 0..1.
        std: per channel, likewise.
        resize: short side in pixels ahead of the centre crop; None resizes only images of another
            size, just enough to cover `size`.
        interpolation: bilinear, bicubic or nearest.
        frames: how many a clip has; None: the input is an image.
        stride: every so many frames of a video are taken.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"
    frames: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"channels {self.channels!r}: expected 1 (grey) or 3 (RGB)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UserError(
                    f"{name} {list(values)}: expected {self.channels} numbers, one per channel"
                )
        if any(value <= 0 for value in self.std):
            raise UserError(f"std {list(self.std)}: expected numbers above 0")
        if min(self.size) < 1 or (self.resize is not None and self.resize < min(self.size)):
            raise UserError(
                f"resize {self.resize} and size {list(self.size)}: expected sides of at least 1 and"
                " a resize no smaller than the crop; give resize null to let it follow the size"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise unknown_name("interpolation", self.interpolation, _INTERPOLATIONS)
        if self.stride < 1 or (self.frames is not None and self.frames < 1):
            raise UserError(
                f"frames {self.frames} and stride {self.stride}: expected whole numbers of at "
                "least 1; frames null is for images"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The network's input without the batch: `(C, H, W)`, or `(C, T, H, W)` for clips."""
        frames = () if self.frames is None else (self.frames,)
        return (self.channels, *frames, *self.size)

    @classmethod
    def from_dict(cls, given: Mapping[str, object]) -> Preprocessing:
        """Read the JSON form.

        Raises:
            UserError: a key is missing, or a value is of the wrong kind.
        """
        required = ("channels", "size", "mean", "std")
        missing = [key for key in required if key not in given]
        if missing:
            raise UserError(
                f"preprocessing has no {', '.join(missing)}: expected {', '.join(required)}; "
                "take it from the model's artifact"
            )
        try:
            height, width = cast(Sequence[int], given["size"])
            resize, frames = given.get("resize"), given.get("frames")
            return cls(
                channels=int(cast(int, given["channels"])),
                size=(int(height), int(width)),
                mean=tuple(float(v) for v in cast(Sequence[float], given["mean"])),
                std=tuple(float(v) for v in cast(Sequence[float], given["std"])),
                resize=None if resize is None else int(cast(int, resize)),
                interpolation=str(given.get("interpolation", "bilinear")),
                frames=None if frames is None else int(cast(int, frames)),
                stride=int(cast(int, given.get("stride", 1))),
            )
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(
                f"preprocessing {dict(given)} can't be understood ({error}): expected channels, "
                "size [H, W], and mean and std as lists of numbers; take it from the artifact"
            ) from None

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form; that of images says nothing about frames."""
        clip = {} if self.frames is None else {"frames": self.frames, "stride": self.stride}
        return {
            "channels": self.channels,
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "interpolation": self.interpolation,
            **clip,
        }

    def fit(self, image: Tensor) -> Tensor:
        """Resize and centre-crop uint8 `(C, h, w)` to `(C, H, W)`, or `(C, T, h, w)` likewise."""
        height, width = self.size
        given = (int(image.shape[-2]), int(image.shape[-1]))
        if self.resize is None and given == self.size:
            return image
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transform

        margin = 1.0 if self.resize is None else self.resize / min(self.size)
        scale = max(height / given[0], width / given[1]) * margin
        target = [max(height, round(given[0] * scale)), max(width, round(given[1] * scale))]
        image = transform.resize(image, target, InterpolationMode(self.interpolation))
        return cast(Tensor, transform.center_crop(image, [height, width])).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 `(B, C, H, W)` into normalised float32, on the device that it is on.

        Clips are `(B, C, T, H, W)`.

        Raises:
            UserError: other than uint8, or another number of channels.
        """
        axes = 3 if self.frames is None else 4
        if (
            images.dtype != torch.uint8
            or images.ndim < axes
            or images.shape[-axes] != self.channels
        ):
            what, shape = ("images", "H, W") if self.frames is None else ("clips", "T, H, W")
            raise UserError(
                f"{what} are {images.dtype} of shape {tuple(images.shape)}: expected torch.uint8 "
                f"(B, {self.channels}, {shape}) with values 0..255; normalise raw {what}, once"
            )
        ones = (1,) * (axes - 1)
        mean = torch.tensor(self.mean, device=images.device).reshape(-1, *ones)
        std = torch.tensor(self.std, device=images.device).reshape(-1, *ones)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def normalize(images: Tensor, preprocessing: Mapping[str, object]) -> Tensor:
    """Turn uint8 `(B, C, H, W)` into normalised float32 as an artifact's preprocessing says.

    Where that is for clips, `(B, C, T, H, W)`.

    Raises:
        UserError: `preprocessing` or `images` is not of the expected kind.
    """
    return Preprocessing.from_dict(preprocessing).normalize(images)


def load_image(path: str | os.PathLike[str], preprocessing: Mapping[str, object]) -> Tensor:
    """Read one image file as the network's input before normalisation: uint8 `(C, H, W)`.

    EXIF rotation is applied, the number of channels made right, then resize and centre crop.

    Raises:
        UserError: the file can't be read, or `preprocessing` is not of the expected kind.
    """
    facts = Preprocessing.from_dict(preprocessing)
    return facts.fit(decode(Path(path), facts.channels, str(path)))
