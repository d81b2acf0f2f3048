"""Photos and shadow masks of every kind of pixels, as 8-bit RGB and 8-bit grey."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tenfold.data.decode import (
    BadImage,
    _opened,
    _upright,
    _without_wide_pixels,
    encoded_size,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["as_colours", "as_levels", "photo_header", "read_levels", "read_pixels"]

Pixels = NDArray[np.uint8]

GREY = ("1", "L", "LA", "La")  # and those of 16 and 32 bits, which begin with I or F
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


def as_colours(image: Image, role: str, notes: list[str]) -> Image:
    """Return a photo as 8-bit RGB, upright; or as RGBA where some of it is transparent.

    Args:
        image: loaded, of any mode.
        role: what the notes call it.
        notes: what was converted is added.
    """
    kind = {"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "CMYK": "CMYK"}.get(image.mode)
    if image.mode.startswith("I;16"):
        kind = "16-bit grey"
    if kind:
        notes.append(f"{role}: {kind} made 8-bit RGB")
    picture = _without_wide_pixels(_upright(image))
    if picture.mode in ("LA", "La", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        least, _ = picture.getchannel("A").getextrema()
        if int(least) < 255:  # type: ignore[arg-type]
            return picture
        notes.append(f"{role}: opaque alpha dropped")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def as_levels(image: Image, notes: list[str]) -> Image:
    """Return a mask's luminance as 8-bit grey, upright; alpha doesn't count.

    Masks of the levels 0 and 1 get 0 and 255.

    Args:
        image: loaded, of any mode.
        notes: what was converted is added.
    """
    from PIL import Image as images

    picture = _upright(image)
    if picture.mode.startswith("I;16"):
        wide = np.asarray(picture)
        if wide.max(initial=0) > 1:
            picture = _without_wide_pixels(picture)
        else:
            picture = images.fromarray(wide.astype(np.uint8))
    picture = _without_wide_pixels(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to grey, Pillow warns
    if picture.mode == "RGBA":
        picture = picture.convert("RGB")
    if picture.mode != "L":
        picture = picture.convert("L")
    if int(picture.getextrema()[1]) == 1:  # type: ignore[arg-type]
        notes.append("masks: levels 0 and 1 taken for 0 and 255")
        picture = picture.point([0] + [255] * 255)
    return picture


def read_pixels(path: Path) -> Pixels:
    """Read a photo: `(H, W, 3)`.

    Raises:
        BadImage: it can't be read, or is transparent in part.
    """
    with _opened(path, str(path)) as image:
        image.load()
        picture = as_colours(image, "", [])
    if picture.mode == "RGBA":
        raise BadImage(str(path), "it is transparent in part, put it on a background")
    return np.asarray(picture)


def read_levels(path: Path) -> Pixels:
    """Read a mask's levels: `(H, W)`.

    Raises:
        BadImage: it can't be read.
    """
    with _opened(path, str(path)) as image:
        image.load()
        picture = as_levels(image, [])
    return np.asarray(picture)


def photo_header(path: Path) -> tuple[tuple[int, int], str]:
    """Return a photo's (H, W), upright, and its kind: `colour`, `grey` or `transparent`.

    `transparent` may turn out opaque; only the pixels tell.

    Raises:
        BadImage: the header can't be read.
    """
    size = encoded_size(path, str(path))
    with _opened(path, str(path)) as image:
        mode, info = image.mode, image.info
        if mode in GREY or mode[0] in "IF":
            return size, "grey"
        transparent = mode in _TRANSPARENT or "transparency" in info
        return size, "transparent" if transparent else "colour"
