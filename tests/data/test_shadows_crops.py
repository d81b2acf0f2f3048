"""Crops: where each pixel comes from, for photo, mask and target alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage.transform import rotate

from tenfold.data.shadow_crops import Crops, View, crop, whole
from tenfold.data.shadow_set import Triplet

pytestmark = pytest.mark.unit


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def triplet(height: int = 60, width: int = 80) -> Triplet:
    image = smooth(height, width)
    levels = np.where(image[..., 0] > 128, 255, 0).astype(np.uint8)
    return Triplet(image, levels, 255 - image)


def test_a_photo_of_the_crops_size_stays_as_it_is() -> None:
    given = triplet()
    made = crop(given, View(), (60, 80))
    assert np.array_equal(made.image, given.image)
    assert np.array_equal(made.levels, given.levels)
    assert made.target is not None
    assert np.array_equal(made.target, 255 - made.image)


@pytest.mark.parametrize("moves", [(1,), (2,), (1, 2), (2, 1), (2, 2, 1), (0, 2, 0, 2), (2, 2, 2)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_moves_are_those_of_numpy(moves: tuple[int, ...], mirrored: bool) -> None:
    given = triplet()
    expected = [given.image, given.levels]
    for move in moves:
        if move:
            step = np.fliplr if move == 1 else np.rot90
            expected = [step(part) for part in expected]
    height, width = expected[0].shape[:2]
    view = View(moves, short_side=60, top=0.999, left=0.3, mirrored=mirrored)
    size = (40, 40)
    top, left = height - 40, int(0.3 * (width - 40 + 1))
    made = crop(given, view, size)
    for part, whole_part in zip((made.image, made.levels), expected, strict=True):
        cut = whole_part[top : top + 40, left : left + 40]
        assert np.array_equal(part, cut[:, ::-1] if mirrored else cut)


def test_the_size_is_that_of_the_turned_photo() -> None:
    """Not that of the photo before, which would stretch it (no. 10 of the sheet's list)."""
    assert View((0,), short_side=30).scaled((60, 80), (20, 20)) == (30, 40)
    assert View((2,), short_side=30).scaled((60, 80), (20, 20)) == (40, 30)
    assert View((2, 2), short_side=90).scaled((60, 80), (20, 20)) == (90, 120)
    assert View((2,)).scaled((60, 80), (20, 30)) == (40, 30)  # covers the crop


@pytest.mark.parametrize("angle", [-20, 7, 19])
def test_rotation_is_that_of_scikit_image(angle: int) -> None:
    given = triplet()
    made = crop(given, View(angle=angle, short_side=60), (60, 80))
    expected = rotate(given.image, angle, order=1, mode="symmetric", preserve_range=True)
    apart = np.abs(made.image - expected)
    assert apart.max() <= 1.01
    assert int(made.image.min()) > 0 or int(given.image.min()) == 0  # reflected, not filled
    levels = rotate(given.levels, angle, order=0, mode="symmetric", preserve_range=True)
    assert float((made.levels != levels).mean()) < 0.01  # halves are rounded either way


def test_smaller_photos_are_averaged_as_pillow_does() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    given = Triplet(noise, noise[..., 0], noise)
    view = View(short_side=50, top=0.6, left=0.4)
    small = np.asarray(Image.fromarray(noise).resize((67, 50), Image.Resampling.BILINEAR))
    top, left = int(0.6 * 19), int(0.4 * 36)
    made = crop(given, view, (32, 32)).image
    apart = np.abs(made.astype(int) - small[top : top + 32, left : left + 32])
    assert apart.max() <= 1


def test_larger_photos_are_interpolated_and_masks_are_not() -> None:
    given = triplet()
    made = crop(given, View(angle=11, short_side=150), (100, 100))
    assert set(np.unique(made.levels)) <= {0, 255}
    assert made.target is not None
    assert np.abs(made.image.astype(int) + made.target - 255).max() <= 1
    # The mask marks what it marked, but for pixels at the threshold.
    red = made.image[..., 0].astype(int)
    clear = np.abs(red - 128) > 12
    assert np.array_equal((made.levels > 0)[clear], (red > 128)[clear])


def test_every_draw_fits_and_covers_the_range() -> None:
    crops = Crops((40, 56), (56, 90), seed=3)
    ids = np.arange(3000)
    views = crops.draw(np.full(3000, 2), ids)
    assert {view.angle for view in views} == set(range(-20, 20))
    assert {view.short_side for view in views} == set(range(56, 91))
    moves = np.array([view.moves for view in views])
    assert moves.shape == (3000, 4)
    assert np.abs((moves[..., None] == np.arange(3)).mean((0, 1)) - 1 / 3).max() < 0.02
    assert abs(np.mean([view.mirrored for view in views]) - 0.5) < 0.04
    for view in views[:500]:
        height, width = view.scaled((60, 80), crops.size)
        top, left = view.corner((height, width), crops.size)
        assert 0 <= top <= height - 40
        assert 0 <= left <= width - 56
    assert crops.draw(np.array([2]), np.array([17])) == views[17:18]
    assert crops.draw(np.array([3]), np.array([17])) != views[17:18]


def test_held_out_photos_are_stretched_bicubically() -> None:
    given = triplet()
    made = whole(given, (33, 44))
    for before, after in ((given.image, made.image), (given.levels, made.levels)):
        resized = Image.fromarray(before).resize((44, 33), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(resized), after)
    assert whole(given, None) is given
