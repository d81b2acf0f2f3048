"""Bicubic resizing, to the bit what Pillow makes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.kernels.resize import able, bicubic

pytestmark = pytest.mark.parity

compiled = pytest.mark.skipif(native.instruction_set() is None, reason="no compiled kernels")


def by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
    return resized.reshape(*size, -1).transpose(2, 0, 1)


@compiled
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_equals_pillow(data: st.DataObject) -> None:
    draw = data.draw
    width, out_height = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    height = draw(st.integers(1, width))
    out_width = draw(st.integers(1, out_height * width // height))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    pixels = random.integers(0, 256, (height, width, draw(st.sampled_from([1, 3]))), np.uint8)
    kind = draw(st.sampled_from(["noise", "extremes", "flat"]))
    if kind == "extremes":
        pixels = (pixels > 127).astype(np.uint8) * np.uint8(255)
    elif kind == "flat":
        pixels[:] = draw(st.sampled_from([0, 1, 254, 255]))
    if draw(st.booleans()):
        pixels = pixels[:, ::-1]
    size = (out_height, out_width)
    assert able((height, width), size)
    np.testing.assert_array_equal(bicubic(pixels, size).numpy(), by_pillow(pixels, size))


@compiled
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((480, 640), (256, 256)),
        ((16, 16), (16, 16)),
        ((33, 700), (33, 5)),
        ((2, 3000), (300, 7)),
        ((50, 60), (200, 240)),
    ],
)
def test_usual_and_odd_sizes(before: tuple[int, int], after: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    np.testing.assert_array_equal(bicubic(pixels, after).numpy(), by_pillow(pixels, after))


def test_what_pillow_has_to_do_is_refused() -> None:
    assert not able((640, 480), (256, 256))
    assert not able((480, 640), (100, 200))
    assert able((480, 640), (256, 256)) == (native.instruction_set() is not None)
    for pixels, size in (
        (np.zeros((640, 480, 3), np.uint8), (256, 256)),
        (np.zeros((480, 640), np.uint8), (256, 256)),
        (np.zeros((480, 640, 3), np.uint16), (256, 256)),
        (np.zeros((480, 640, 3), np.uint8), (256, 0)),
        (np.zeros((0, 640, 3), np.uint8), (256, 256)),
    ):
        with pytest.raises(UserError, match=r"expected uint8 \(H, W, C\)"):
            bicubic(pixels, size)
