"""From an encoded image to a tensor, by Pillow; whatever can't be read is a `BadImage`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tenfold.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BadClip", "BadImage", "decode", "decode_frames", "encoded_size"]


class BadImage(UserError):
    """An image that can't be read."""

    unit = "image"
    expected = "a whole image file that Pillow reads"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"can't read {self.unit} {name}: {reason}; expected {self.expected}, "
            "replace or remove it"
        )
        self.name = name
        self.reason = reason


class BadClip(BadImage):
    """A clip that can't be read."""

    unit = "clip"
    expected = "a whole video file, or a folder of frames of one size"


def decode(source: Path | bytes, channels: int, name: str) -> Tensor:
    """Decode one image, upright as its EXIF block says, to uint8 `(channels, H, W)`.

    Args:
        source: a file, or its content.
        channels: 3 for RGB, 1 for grey; other pixel types are converted.
        name: what an error calls the image.

    Raises:
        BadImage: not an image, truncated, or a pixel type without a fixed range.
    """
    with _opened(source, name) as image:
        image.load()
        upright = _without_wide_pixels(_upright(image))
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")  # straight to RGB, Pillow warns
        pixels = np.array(upright.convert("L" if channels == 1 else "RGB"))
    # Turned by NumPy: torch would spread this little work over all cores, which takes many times
    # longer than the decoding when they are busy.
    planes = pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes))


def decode_frames(
    source: Callable[[int], tuple[Path | bytes, str]], frames: Sequence[int], name: str
) -> Tensor:
    """Decode some of a clip's frames to uint8 `(3, T, H, W)`.

    Args:
        source: gives the frame of a number, a file or its content, and what an error calls it.
        frames: the numbers; one that comes repeatedly is decoded once.
        name: what an error calls the clip.

    Raises:
        BadClip: a frame can't be read, or isn't of the first one's size.
    """
    decoded: dict[int, Tensor] = {}
    first = ""
    for number in frames:
        if number in decoded:
            continue
        encoded, title = source(number)
        try:
            decoded[number] = decode(encoded, 3, title)
        except BadImage as error:
            raise BadClip(name, f"{title}: {error.reason}") from None
        shape, expected = decoded[number].shape, decoded[frames[0]].shape
        first = first or title
        if shape != expected:
            raise BadClip(
                name,
                f"{title} is {shape[1]}x{shape[2]}, and {first} {expected[1]}x{expected[2]}",
            )
    return torch.stack([decoded[number] for number in frames], dim=1)


def encoded_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """Return (height, width) of the upright image from its header alone.

    Raises:
        BadImage: the header can't be read.
    """
    with _opened(source, name) as image:
        width, height = image.size
        # Orientations 5 to 8 of EXIF tag 0x0112 swap the sides. Without an EXIF block there is
        # nothing to parse, which matters: this runs over whole sets.
        swapped = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
    return (width, height) if swapped else (height, width)


@contextlib.contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            yield image
    except UnidentifiedImageError:
        empty = (source.stat().st_size if isinstance(source, Path) else len(source)) == 0
        reason = "the file is empty" if empty else "not an image format that Pillow knows"
        raise BadImage(name, reason) from None
    except OSError as error:
        raise BadImage(name, _one_line(error.strerror or error)) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise BadImage(name, _one_line(error)) from None


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    # A damaged EXIF block says nothing about the pixels, which are decoded by now.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _without_wide_pixels(image: Image) -> Image:
    """Bring 16-bit grey to 8 bits, which `convert` would clip to white instead of scaling."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed range; save it with 8 or 16 bits")
    return image


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
