"""The embedded pairs: made here, from regions that training and held-out patches never share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold.data import TranslationData, create_translation
from tenfold.data import edges2photo as edges_module
from tenfold.data.edges2photo import PHOTOS, PatchSet, Window, edge_maps, patch_windows
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def data() -> TranslationData:
    return create_translation("edges2photo")


def patches(data: TranslationData, split: str) -> PatchSet:
    images = (data._train if split == "train" else data._test)[0].split.images
    assert isinstance(images, PatchSet)
    return images


def test_the_set_as_it_should_be(data: TranslationData) -> None:
    assert (data.train_size, data.test_size, data.reference_size) == (480, 33, 33)
    assert (data.paired, data.shape, data.size, data.load_size) == (
        True,
        (3, 96, 96),
        (96, 96),
        (107, 107),
    )
    for batch in (
        next(iter(data.train_loader(batch_size=64, seed=0))),
        next(iter(data.test_loader(batch_size=33))),
    ):
        edges, photos = batch["source"], batch["target"]
        assert edges.shape == photos.shape == (len(edges), 3, 96, 96)
        assert edges.dtype == photos.dtype == torch.uint8
        assert set(edges.unique().tolist()) == {0, 255}
        assert torch.equal(edges[:, 0], edges[:, 2])
        ink = (edges == 0).double().mean((1, 2, 3))
        assert 0.005 < float(ink.min()) <= float(ink.max()) < 0.12
        assert float(photos.double().std((2, 3)).mean(1).min()) > 5  # none is flat
    assert data.name_of(0).startswith("coffee[")
    back = create_translation({"name": "edges2photo", "direction": "BtoA", "limit": 10})
    assert back.train_size == 10
    assert set(next(back.test_targets(33)).unique().tolist()) == {0, 255}


def apart(one: Window, other: Window) -> int:
    """How many pixels lie between two windows of a photo; negative where they overlap."""
    return max(
        one.top - other.bottom,
        other.top - one.bottom,
        one.left - other.right,
        other.left - one.right,
    )


@pytest.mark.parametrize("size", [(96, 96), (64, 64), (128, 128), (48, 112)])
def test_no_pixel_is_on_both_sides(size: tuple[int, int]) -> None:
    load = (round(size[0] * 286 / 256), round(size[1] * 286 / 256))
    train, test = patch_windows("train", load), patch_windows("test", size)
    assert {w.photo for w in train} == {w.photo for w in test} == {*range(len(PHOTOS))}
    for window in (*train, *test):
        height, width = PHOTOS[window.photo].size
        assert 0 <= window.top < window.bottom <= height
        assert 0 <= window.left < window.right <= width
    gaps = [apart(a, b) for a in train for b in test if a.photo == b.photo]
    assert min(gaps) >= 16
    assert len({*train}) > 0.98 * len(train)
    assert len({*test}) == len(test)


def test_nothing_beyond_its_window_is_in_a_patch(data: TranslationData, monkeypatch) -> None:
    """With other pixels in what is held out, the training pairs stay the same, and conversely."""
    real = edges_module._photo

    def spoiled(side: str):
        def read(photo):
            pixels = real(photo).copy()
            top, left, bottom, right = photo.held_out
            inside = np.zeros(pixels.shape[1:], bool)
            inside[top:bottom, left:right] = True
            pixels[:, inside if side == "test" else ~inside] = 128
            return pixels

        return read

    for kept, changed in (("train", "test"), ("test", "train")):
        monkeypatch.setattr(edges_module, "_photo", spoiled(changed))
        other = create_translation("edges2photo")
        assert torch.equal(patches(other, kept).images, patches(data, kept).images)
        assert not torch.equal(patches(other, changed).images, patches(data, changed).images)


def test_every_photo_and_scale_is_on_both_sides(data: TranslationData) -> None:
    train, test = (patches(data, split).windows for split in ("train", "test"))
    assert {*Counter(w.photo for w in train).values()} == {160}
    assert min(Counter(w.photo for w in test).values()) >= 6
    for windows, least in ((train, 3), (test, 2)):
        for number in range(len(PHOTOS)):
            assert len({w.bottom - w.top for w in windows if w.photo == number}) >= least
    assert {w.photo for w in train[:3]} == {*range(3)}  # a limit leaves all of them in


def test_it_is_the_same_every_time(data: TranslationData) -> None:
    again = create_translation("edges2photo")
    for split in ("train", "test"):
        assert torch.equal(patches(again, split).images, patches(data, split).images)
    # On another machine too: the windows come from a hash.
    assert data.train_name_of(0) == "coffee[48:155, 96:203]"
    assert data.name_of(32) == "retina[961:1153, 52:244]"


def test_edges_are_drawn_where_they_are() -> None:
    step = np.full((1, 3, 32, 32), 60, np.uint8)
    step[..., 13], step[..., 14:] = 130, 200
    lines = edge_maps(step)[0]
    assert (lines[:, 13] == 0).all()  # one pixel wide
    assert (lines == 0).sum() == 32
    assert np.array_equal(edge_maps(step.transpose(0, 1, 3, 2))[0], lines.T)
    assert (edge_maps(np.full((1, 3, 32, 32), 77, np.uint8)) == 255).all()
    faint = np.full((1, 3, 32, 32), 100, np.uint8)
    faint[..., 13:] = 104  # would be the strongest, but is nothing to see
    assert (edge_maps(faint) == 255).all()
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.where(np.hypot(y, x) < 20, 220, 30).astype(np.uint8)
    lines = edge_maps(disc[None, None].repeat(3, 1))[0]
    assert np.abs(np.hypot(y, x)[lines == 0] - 20).max() < 1.6
    angles = np.arctan2(y, x)[lines == 0]
    assert len(np.unique(np.floor(angles / (np.pi / 18)))) == 36  # the circle is closed


def test_no_photo_is_downloaded_and_missing_ones_are_named(monkeypatch, tmp_path: Path) -> None:
    from skimage import data

    for photo in PHOTOS:
        assert (Path(data.data_dir) / photo.file).is_file()
    monkeypatch.setattr(data, "data_dir", str(tmp_path))
    with pytest.raises(UserError, match=r"scikit-image has no coffee.png in .*install"):
        create_translation("edges2photo")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"path": "x"}, "edges2photo comes with scikit-image; leave it out"),
        ({"size": 98}, r"data.size is \[98, 98\]: expected multiples of 4"),
        ({"size": 176, "load_size": 176}, r"data.size is \[176, 176\]: expected patches that fit"),
        ({"load_size": 480}, r"data.load_size is \[480, 480\]: expected patches that fit"),
        ({"load_size": 64}, "data.load_size is .*expected at least the size"),
        ({"reference": "test"}, "data.reference is 'test': expected it only for unpaired data"),
    ],
)
def test_wrong_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        create_translation({"name": "edges2photo", **options})
