"""Ask a shadow detector that the user has for the mask of a photo.

It may be an exported file, a function, or a command. Nothing of it ships with this package.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tenfold.data.shadow_mask import ShadowMask, mask_of_values, read_mask
from tenfold.errors import UserError
from tenfold.imports import import_object, is_object_name
from tenfold.measure.runners import OnnxModel

__all__ = ["Detector", "open_detector"]

FORMS = (
    "an .onnx file, file.py:function or package.module:function, or a command with {photo} and "
    "{mask}"
)
# Of a photo's longer side, for files that take images of any size, and what sides are multiples of.
ANY_SIDE, ANY_MULTIPLE = 512, 32

Detector = Callable[[Path, Tensor], ShadowMask]


def open_detector(detector: str | Path | Callable[[Any], Any]) -> Detector:
    """Return a function that finds the mask of a photo, from its file and its pixels.

    It takes the photo's path and uint8 `(1, 3, H, W)`, and raises `UserError` where the detector
    fails or finds nothing.

    Args:
        detector: one of

            - an ONNX file: RGB in [0, 1], `(1, 3, H, W)` resized to the size that the file states,
              becomes one map of logits or of probabilities. A mean and a deviation belong into the
              file. One that takes any size gets the photo with a longer side of at most 512.
            - `file.py:function`, `package.module:function`, or a function: the photo as a uint8
              array `(H, W, 3)` becomes a mask, of booleans, of levels, of probabilities or of
              logits, at any size.
            - a command with `{photo}` and `{mask}`, which reads the one file and writes the other.
              It runs without a shell.

    Raises:
        UserError: none of these, or a file or function that can't be opened.
    """
    if callable(detector):
        return _Function(detector, getattr(detector, "__name__", "the detector"))
    text = str(detector)
    if "{photo}" in text and "{mask}" in text:
        return _Command(text)
    if text.lower().endswith(".onnx"):
        return _File(text)
    if is_object_name(text):
        found = import_object(text, "detector")
        if not callable(found):
            raise UserError(
                f"detector {text!r} is {type(found).__name__}: expected a function of a photo, a "
                "uint8 array (H, W, 3)"
            )
        return _Function(found, text)
    raise UserError(f"detector {text!r}: expected {FORMS}")


class _Function:
    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, file: Path, pixels: Tensor) -> ShadowMask:
        array = np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())
        try:
            found = torch.as_tensor(np.asarray(self.function(array.copy())))
        except Exception as error:  # whatever the user's own function raises
            raise UserError(
                f"detector {self.name} fails on {file}: {type(error).__name__}: {error}"
            ) from error
        return mask_of_values(found, _size(pixels), f"{self.name} for {file}")


class _File:
    def __init__(self, path: str) -> None:
        self.model = OnnxModel(path)
        shapes = self.model.input_shapes
        if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in (3, None):
            shown = ", ".join(
                "x".join("any" if side is None else str(side) for side in shape) for shape in shapes
            )
            raise UserError(
                f"detector {path} takes {shown}: expected one input (1, 3, H, W), RGB in [0, 1]"
            )
        self.stated = shapes[0][2:]

    def __call__(self, file: Path, pixels: Tensor) -> ShadowMask:
        height, width = _size(pixels)
        share = min(1.0, ANY_SIDE / max(height, width))
        size = tuple(
            stated or max(ANY_MULTIPLE, round(side * share / ANY_MULTIPLE) * ANY_MULTIPLE)
            for stated, side in zip(self.stated, (height, width), strict=True)
        )
        colours = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        found = self.model(colours.contiguous().float() / 255)
        # Detectors with side outputs give the final map first, or alone.
        first = found if isinstance(found, Tensor) else found[0]
        return mask_of_values(first, (height, width), f"{self.model.path} for {file}")


class _Command:
    def __init__(self, template: str) -> None:
        try:
            self.words = shlex.split(template)
        except ValueError as error:
            raise UserError(f"detector {template!r}: {error}: expected a command line") from error
        self.template = template

    def __call__(self, file: Path, pixels: Tensor) -> ShadowMask:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "mask.png"
            words = [
                word.replace("{photo}", str(file)).replace("{mask}", str(written))
                for word in self.words
            ]
            try:
                ended = subprocess.run(words, capture_output=True, text=True, check=False)
            except OSError as error:
                raise UserError(
                    f"detector {self.template!r} can't be started: {error.strerror}: expected a "
                    "program's name and its options"
                ) from error
            if ended.returncode != 0:
                said = (ended.stderr or ended.stdout).strip().splitlines()
                raise UserError(
                    f"detector {self.template!r} ended with {ended.returncode} on {file}: "
                    f"{said[-1] if said else 'it said nothing'}"
                )
            if not written.is_file():
                raise UserError(
                    f"detector {self.template!r} wrote no mask for {file}: expected an image file "
                    "at {mask}, a name that ends in .png"
                )
            try:
                found = read_mask(written)
            except UserError as error:
                raise UserError(f"detector {self.template!r} on {file}: {error}") from error
        if found.pixels.shape == _size(pixels):
            return ShadowMask(found.pixels, f"of {self.template}", found.warnings)
        resized = mask_of_values(found.pixels, _size(pixels), f"{self.template} for {file}")
        return ShadowMask(resized.pixels, resized.source, (*found.warnings, *resized.warnings))


def _size(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[-2], pixels.shape[-1]
