"""Read a photo of any kind as a network's input, and write a result as such a photo again.

What isn't pixels of colour is kept aside and put back: transparency, and the colour profile.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tenfold.data.decode import _opened, _upright, _without_wide_pixels
from tenfold.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "WRITTEN",
    "Photo",
    "check_photo_path",
    "read_photo",
    "read_photo_pixels",
    "without_alpha",
    "write_photo",
    "write_photo_pixels",
]

# By suffix: Pillow's name of the format, and whether it holds transparency.
WRITTEN = {
    ".jpg": ("JPEG", False), ".jpeg": ("JPEG", False), ".png": ("PNG", True),
    ".webp": ("WEBP", True), ".tif": ("TIFF", True), ".tiff": ("TIFF", True),
}  # fmt: skip
QUALITY = 95
NAMED_COLOURS = {"white": "#ffffff", "black": "#000000"}


@dataclass(frozen=True)
class Photo:
    """What is known of a photo besides its colours.

    Attributes:
        name: the file it came from.
        mode: Pillow's name for its kind of pixels, before they became RGB.
        size: (H, W), upright.
        alpha: opacity, uint8 `(H, W)`; None: the photo has none.
        profile: its ICC colour profile; None where it has none, or one that isn't for RGB.
    """

    name: str
    mode: str
    size: tuple[int, int]
    alpha: Tensor | None = None
    profile: bytes | None = None


def read_photo(path: str | os.PathLike[str]) -> tuple[Tensor, Photo]:
    """Read an image file of any mode as float32 `(1, 3, H, W)` in [-1, 1], upright, with its facts.

    Grey, palette, CMYK and 16-bit pixels become 8-bit RGB.

    Raises:
        UserError: no image, a damaged one, or pixels without a fixed range.
    """
    pixels, facts = read_photo_pixels(path)
    return pixels.contiguous().to(torch.float32).div_(127.5).sub_(1), facts


def read_photo_pixels(path: str | os.PathLike[str]) -> tuple[Tensor, Photo]:
    """Read as `read_photo` does, but uint8 `(1, 3, H, W)`, channels-last: a quarter of the memory.

    Raises:
        UserError: no image, a damaged one, or pixels without a fixed range.
    """
    path = Path(path)
    with _opened(path, str(path)) as image:
        image.load()
        mode = image.mode
        profile = image.info.get("icc_profile")
        picture = _without_wide_pixels(_upright(image))
        # The palette or grey value that stands for transparent becomes an alpha channel.
        if picture.mode in ("LA", "La", "PA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
        alpha = None
        if picture.mode == "RGBA":
            alpha = torch.from_numpy(np.array(picture.getchannel("A")))
        colours = picture if picture.mode == "RGB" else picture.convert("RGB")
        pixels = torch.from_numpy(np.array(colours))
    facts = Photo(
        name=str(path),
        mode=mode,
        size=(pixels.shape[0], pixels.shape[1]),
        alpha=alpha,
        profile=profile if isinstance(profile, bytes) and profile[16:20] == b"RGB " else None,
    )
    return pixels.permute(2, 0, 1)[None], facts


def without_alpha(
    pixels: Tensor, photo: Photo, background: str | None = None
) -> tuple[Tensor, Photo]:
    """Return a photo and its facts without transparency.

    Args:
        pixels: uint8 `(1, 3, H, W)`.
        photo: its facts.
        background: what shows where it is transparent: white, black or #rrggbb. An alpha channel
            that is opaque everywhere goes without one.

    Raises:
        UserError: transparent pixels and no background, or no such colour.
    """
    colour = None if background is None else _colour(background)
    opaque = replace(photo, alpha=None)
    if photo.alpha is None or int(photo.alpha.min()) == 255:
        return pixels, opaque
    if colour is None:
        share = float((photo.alpha < 255).float().mean())
        raise UserError(
            f"{photo.name} is transparent in {share:.1%} of its pixels: expected an opaque photo; "
            "put it on a background, by --background white, black or #rrggbb"
        )
    over = photo.alpha.to(torch.float32).div_(255)
    plain = torch.tensor(colour, dtype=torch.float32)[None, :, None, None]
    mixed = torch.lerp(plain.expand(pixels.shape), pixels.to(torch.float32), over)
    return mixed.round_().to(torch.uint8), opaque


def check_photo_path(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Refuse a path that `write_photo` wouldn't write to; call it before the work is done.

    Raises:
        UserError: an ending that isn't known, a folder, or a file that is there.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITTEN:
        raise UserError(
            f"can't write {path}: the name ends in {path.suffix or 'nothing'}; expected one of "
            f"{', '.join(WRITTEN)}"
        )
    if path.is_dir():
        raise UserError(f"can't write {path}: it is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise UserError(
            f"can't write {path}: the file is there; give another name, or allow to overwrite it"
        )
    return path


def write_photo(
    path: str | os.PathLike[str],
    image: Tensor,
    photo: Photo | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write `(1, 3, H, W)` in [-1, 1] as an image file, and return its path.

    The ending names the format: JPEG (quality 95), PNG, WebP (quality 95) or TIFF. The photo's
    colour profile goes with it, and its transparency unless the format is JPEG. The file appears
    under its name only when it is whole. Folders are created.

    Args:
        path: the file.
        image: `(1, C, H, W)` or `(C, H, W)`, 3 channels or 1 (grey); values beyond are clipped.
        photo: facts of the photo that the image was made from.
        overwrite: replace a file that is there.

    Raises:
        UserError: a path that can't be written, a file that is there, or no image.
    """
    return _written(check_photo_path(path, overwrite), _picture(image), photo, overwrite)


def write_photo_pixels(
    path: str | os.PathLike[str],
    pixels: Tensor,
    photo: Photo | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write as `write_photo` does, from uint8 `(1, 3, H, W)`, or `(1, 1, H, W)` for grey.

    Channels-last pixels, as `read_photo_pixels` gives them, aren't copied.

    Raises:
        UserError: a path that can't be written, a file that is there, or no image.
    """
    path = check_photo_path(path, overwrite)
    shape = tuple(pixels.shape)
    if pixels.dtype != torch.uint8 or len(shape) != 4 or shape[0] != 1 or shape[1] not in (1, 3):
        raise UserError(
            f"pixels to write are {pixels.dtype} of shape {shape}: expected uint8 (1, 3, H, W), "
            "one image at a time"
        )
    return _written(path, _as_picture(pixels[0].cpu()), photo, overwrite)


def _written(path: Path, picture: Image, photo: Photo | None, overwrite: bool) -> Path:
    settings = dict[str, Any]()
    kind, transparent = WRITTEN[path.suffix.lower()]
    if photo is not None:
        if photo.alpha is not None and transparent:
            _put_alpha(picture, photo.alpha)
        if photo.profile is not None and picture.mode != "L":
            settings["icc_profile"] = photo.profile
    if kind in ("JPEG", "WEBP"):
        settings["quality"] = QUALITY
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".photo-", suffix=path.suffix)
        with os.fdopen(handle, "wb") as file:
            picture.save(file, kind, **settings)
        # mkstemp makes files for the user alone; a photo gets what any new file gets.
        os.chmod(draft, 0o666 & ~_umask())
        _take_name(draft, path, overwrite)
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format takes
        raise UserError(f"can't write {path}: {error}: choose another path or format") from error
    finally:
        if draft is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
    return path


def _picture(image: Tensor) -> Image:
    if (
        image.ndim not in (3, 4)
        or not image.is_floating_point()
        or (image.ndim == 4 and image.shape[0] != 1)
        or image.shape[-3] not in (1, 3)
        or 0 in image.shape
    ):
        raise UserError(
            f"an image to write is {image.dtype} of shape {tuple(image.shape)}: expected float "
            "(1, 3, H, W) in [-1, 1], one image at a time"
        )
    planes = image.detach().reshape(image.shape[-3:]).cpu().float()
    if not bool(torch.isfinite(planes).all()):
        raise UserError("an image to write has values that aren't numbers: nothing was written")
    return _as_picture(planes.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8))


def _as_picture(planes: Tensor) -> Image:
    from PIL import Image

    pixels = planes[0] if len(planes) == 1 else planes.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def _colour(name: str) -> tuple[int, int, int]:
    digits = NAMED_COLOURS.get(name.lower(), name)
    if re.fullmatch("#[0-9a-fA-F]{6}", digits) is None:
        raise UserError(f"background {name!r}: expected white, black or #rrggbb, such as #f0f0f0")
    return int(digits[1:3], 16), int(digits[3:5], 16), int(digits[5:7], 16)


def _put_alpha(picture: Image, alpha: Tensor) -> None:
    from PIL import Image

    opacity = Image.fromarray(alpha.cpu().numpy())
    if opacity.size != picture.size:  # enlarged, say, by a factor
        opacity = opacity.resize(picture.size, Image.Resampling.BICUBIC)
    picture.putalpha(opacity)


def _umask() -> int:
    # There is no way to read it without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _take_name(draft: str, path: Path, overwrite: bool) -> None:
    """Give the finished file its name; one that came there in the meantime stays."""
    if overwrite:
        os.replace(draft, path)
        return
    try:
        os.link(draft, path)  # fails where the name is taken, which a rename doesn't
    except FileExistsError:
        raise UserError(
            f"can't write {path}: a file came there meanwhile; give another name"
        ) from None
    except OSError:  # a file system without links
        os.replace(draft, path)
