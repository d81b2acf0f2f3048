"""Relighting: what photo and target have to do with each other stays."""

from __future__ import annotations

import numpy as np
import pytest

from tenfold.data import shadow_light
from tenfold.data.randomness import mix
from tenfold.data.shadow_light import relight, rendered, to_bytes, to_light

pytestmark = pytest.mark.unit

WORDS = mix(np.arange(12))


def batch(count: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    targets = random.integers(60, 200, (count, 3, 24, 28), dtype=np.uint8)
    masks = np.zeros((count, 1, 24, 28), np.uint8)
    masks[:, :, 5:15, 6:20] = 1
    images = np.where(masks > 0, (targets * 0.5).astype(np.uint8), targets)
    return images, masks, targets


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Let one change act and switch the others off."""

    def switch(**kept: object) -> None:
        neutral = {"RENDERED": -1.0, "TOWARDS": (0, 0), "EXPOSURE": (0, 0), "COLOUR": (0, 0)}
        for name, value in (neutral | kept).items():
            monkeypatch.setattr(shadow_light, name, value)

    return switch


def test_tables_are_exact_for_every_byte() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_bytes(to_light(levels)), levels)
    assert to_light(levels)[[0, 10, 128, 255]] == pytest.approx(
        [0, 10 / 255 / 12.92, ((128 / 255 + 0.055) / 1.055) ** 2.4, 1], abs=1e-6
    )
    assert to_bytes(np.array([-1, 2], np.float32)).tolist() == [0, 255]


def test_nothing_drawn_changes_nothing(only) -> None:
    only()
    images, masks, targets = batch()
    made = relight(images, masks, targets, WORDS)
    assert made[2] is not None
    for before, after in zip((images, masks, targets), made, strict=True):
        assert np.array_equal(before, after)


def test_exposure_and_colour_are_gains_of_both(only) -> None:
    only(EXPOSURE=(-0.7, 0.5), COLOUR=(-0.2, 0.2))
    images, masks, targets = batch()
    made, same, aims = relight(images, masks, targets, WORDS)
    assert aims is not None
    assert np.array_equal(same, masks)
    clear = (made > 20) & (made < 255) & (aims > 20) & (aims < 255)
    gains = []
    for before, after in ((images, made), (targets, aims)):
        ratio = np.where(clear, to_light(after) / to_light(before), np.nan)
        middle = np.nanmedian(ratio, axis=(2, 3), keepdims=True)
        assert np.nanmax(np.abs(ratio / middle - 1)) < 0.06  # rounding to bytes
        gains.append(middle[..., 0, 0])
    np.testing.assert_allclose(*gains, rtol=0.01)
    assert float(np.std(np.log2(gains[0]))) > 0.1
    assert float((aims == 255).mean()) < 0.02
    # Without a target the photo's own light is changed in the same way.
    alone, _, none = relight(images, masks, None, WORDS)
    assert none is None
    assert float(np.abs(to_light(alone) / to_light(made).clip(1e-3) - 1).mean()) < 0.3


def test_a_photo_moves_along_the_line_to_its_target(only) -> None:
    images, masks, targets = batch()
    for share in (0.5, -0.2):
        only(TOWARDS=(share, share))
        made, _, aims = relight(images, masks, targets, WORDS)
        assert aims is not None
        assert np.array_equal(aims, targets)
        first, last = to_light(images), to_light(targets)
        expected = np.maximum(first + share * (last - first), 0.5 * first)
        np.testing.assert_array_less(np.abs(made - 1.0 * to_bytes(expected)), 1.01)
    only(TOWARDS=(-0.2, -0.2))
    dark = (targets * 0.3).astype(np.uint8)
    made, _, _ = relight(dark, masks, targets, WORDS)
    assert float((to_light(made) / to_light(dark)).min()) > 0.4


def test_some_photos_are_replaced_by_rendered_ones(only) -> None:
    only(RENDERED=0.3)
    images, masks, targets = batch(300)
    words = mix(np.arange(300))
    made, drawn, aims = relight(images, masks, targets, words)
    assert aims is not None
    assert np.array_equal(aims, targets)
    replaced = (drawn != masks).any((1, 2, 3))
    assert 0.2 < replaced.mean() < 0.4
    assert np.array_equal(made[~replaced], images[~replaced])
    lit = (drawn[replaced] == 0).repeat(3, 1)
    near = np.abs(made[replaced].astype(int) - targets[replaced])
    assert np.median(near[lit]) == 0
    assert np.median(near[~lit]) > 20
    # Not without a target: nobody knows what lies below its shadow.
    alone, same, _ = relight(images, masks, None, words)
    assert np.array_equal(alone, images)
    assert np.array_equal(same, masks)


def test_an_image_doesnt_depend_on_its_batch() -> None:
    images, masks, targets = batch()
    together = relight(images, masks, targets, WORDS)
    for k in range(12):
        alone = relight(*(part[k : k + 1] for part in (images, masks, targets)), WORDS[k : k + 1])
        for one, many in zip(alone, together, strict=True):
            assert one is not None
            assert many is not None
            assert np.array_equal(one[0], many[k])
    shadowed, drawn = rendered(targets, WORDS.view(np.int64))
    assert shadowed.dtype == drawn.dtype == np.uint8
    assert set(np.unique(drawn)) == {0, 1}
