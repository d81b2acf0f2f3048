"""Change the light of photos with shadows, in linear values: for sets of few scenes.

A photo and its target keep what they have to do with each other:

- exposure and the colour of the light are changed by the same gains in both;
- a photo A moves along the line between itself and its target C, A + t (C - A), which makes its
  shadow weaker (t > 0) or deeper (t < 0), penumbra and colour cast alike; no pixel loses more than
  half of its light;
- at times the photo is replaced by its target with a rendered shadow, for shapes and places that no
  photo of the set has.

Linear values come from a table of 256 and go back by one of 65,536; an image takes a millisecond.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from tenfold.data.randomness import mix
from tenfold.data.shadow_rendering import between, render_shadow
from tenfold.nn.shadow_codes import linear_to_srgb, srgb_to_linear

__all__ = ["relight", "rendered", "to_bytes", "to_light"]

Pixels = NDArray[np.uint8]
Light = NDArray[np.float32]
Words = NDArray[np.uint64]

RENDERED = 0.3
TOWARDS = (-0.2, 0.5)  # t
LEAST = np.float32(0.5)  # of a pixel's light
EXPOSURE = (-0.7, 0.5)  # powers of 2
COLOUR = (-0.2, 0.2)  # likewise, for each channel by itself
BRIGHT = 0.99  # of the pixels, so many are not brought beyond white

_RENDER, _SHADOW, _TOWARDS, _EXPOSURE, _COLOUR = range(5)


def relight(
    images: Pixels, masks: Pixels, targets: Pixels | None, words: Words
) -> tuple[Pixels, Pixels, Pixels | None]:
    """Change the light of a batch, see above; without targets only exposure and colour.

    Args:
        images: `(B, 3, H, W)`.
        masks: `(B, 1, H, W)` of 0 and 1.
        targets: `(B, 3, H, W)`.
        words: `(B,)`, each decides all about one image.
    """
    numbers = words.view(np.int64)
    light = to_light(images)
    aim = None if targets is None else to_light(targets)
    if aim is not None:
        share = between(*TOWARDS, mix(numbers, _TOWARDS)).astype(np.float32)
        moved = light + share[:, None, None, None] * (aim - light)
        # Deeper, a deep shadow would lose a colour altogether.
        light = np.maximum(moved, LEAST * light, out=moved)
    chosen = np.flatnonzero(between(0, 1, mix(numbers, _RENDER)) < RENDERED)
    if targets is not None and len(chosen):
        made, masks = rendered(targets[chosen], numbers[chosen]), masks.copy()
        light[chosen], masks[chosen] = to_light(made[0]), made[1]
    gains = _gains(light if aim is None else aim, numbers)
    return (
        to_bytes(light * gains),
        masks,
        None if aim is None else to_bytes(aim * gains),
    )


def rendered(images: Pixels, numbers: NDArray[np.int64]) -> tuple[Pixels, Pixels]:
    """Render a shadow into each image `(B, 3, H, W)`; return these, and masks of 0 and 1."""
    shadowed, masks = render_shadow(
        torch.from_numpy(np.ascontiguousarray(images)).float().div_(255),
        mix(numbers, _SHADOW).view(np.int64),
    )
    return (
        shadowed.mul_(255).round_().to(torch.uint8).numpy(),
        masks.to(torch.uint8).numpy(),
    )


def to_light(images: Pixels) -> Light:
    """Return the linear light of sRGB bytes, in [0, 1]."""
    light: Light = _tables()[0][images]
    return light


def to_bytes(light: Light) -> Pixels:
    """Return sRGB bytes of linear light, clipped to [0, 1]; `light` is used up."""
    np.clip(light, 0, 1, out=light)
    light *= np.float32(65535)
    light += np.float32(0.5)
    return _tables()[1][light.astype(np.uint16)]


def _gains(aims: Light, numbers: NDArray[np.int64]) -> Light:
    """Return a gain for each image and channel, `(B, 3, 1, 1)`, which makes few pixels white."""
    exposure = between(*EXPOSURE, mix(numbers, _EXPOSURE))[:, None]
    colour = between(*COLOUR, mix(numbers[:, None], _COLOUR, np.arange(3)[None]))
    gains = np.exp2(exposure + colour)
    # Clipping would part a photo from its target. Every fourth pixel tells where it would begin.
    bright = np.quantile(aims[..., ::4, ::4], BRIGHT, axis=(2, 3))
    gains *= np.minimum(1, 1 / np.maximum(gains * bright, 1e-6).max(1, keepdims=True))
    return gains.astype(np.float32)[..., None, None]


@functools.cache
def _tables() -> tuple[Light, Pixels]:
    light = srgb_to_linear(torch.arange(256, dtype=torch.float64) / 255).float().numpy()
    steps = torch.arange(65536, dtype=torch.float64) / 65535
    return light, linear_to_srgb(steps).mul_(255).round_().to(torch.uint8).numpy()
