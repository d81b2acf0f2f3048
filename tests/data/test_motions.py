"""The embedded clips: made from the id alone, on photos of their own side, moving as labelled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold.data import ClipData, create
from tenfold.data import motions as motions_module
from tenfold.data.motions import MOTIONS, PHOTOS
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def make(**options: object) -> ClipData:
    data = create({"name": "motions", **options})
    assert isinstance(data, ClipData)
    return data


def test_motions_as_they_should_be() -> None:
    data = make()
    assert (data.train_size, len(data.test_ids), data.num_classes) == (4000, 1000, 8)
    assert (data.shape, data.default_augment, data.classes) == ((3, 8, 32, 32), "none", [*MOTIONS])
    assert {*Counter(data.test.labels().tolist()).values()} == {125}
    assert len(make(test_clips=4096).test_ids) == 4096
    assert make(limit=24).train_size == 24
    small = make(train_clips=16, test_clips=8, frames=5, size=[24, 20])
    batch = next(iter(small.train_loader(batch_size=16, seed=0)))
    assert batch["clip"].shape == (16, 3, 5, 24, 20)
    assert batch["clip"].dtype == torch.uint8
    assert torch.equal(batch["label"], batch["id"] % 8)


def test_a_clip_is_a_function_of_seed_split_and_id() -> None:
    a, b = make(), make(train_clips=80, test_clips=64)
    for index in (0, 7, 63):
        assert torch.equal(a.train.clip(index, range(8)), b.train.clip(index, range(8)))
        assert torch.equal(a.test.clip(index, range(8)), b.test.clip(index, range(8)))
        for other in (a.test, make(seed=1).train):
            assert not torch.equal(a.train.clip(index, range(8)), other.clip(index, range(8)))
    alone = b.train_loader(batch_size=16, seed=3, workers=0)
    helped = make(train_clips=80, test_clips=64).train_loader(batch_size=16, seed=3, workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("clip", "label", "id"))
    stored = b.train.clip(5, [1, 6])
    assert torch.equal(stored, b.train.clip(5, range(8))[:, [1, 6]])


def test_no_photo_is_on_both_sides_and_none_is_downloaded() -> None:
    from skimage import data

    assert not {*PHOTOS["train"]} & {*PHOTOS["test"]}
    for name in (*PHOTOS["train"], *PHOTOS["test"]):
        assert (Path(data.data_dir) / name).is_file()
    # Each side shows its own photos only: those that the other one has are never asked for.
    for side, other in (("train", "test"), ("test", "train")):
        asked: set[str] = set()
        real = motions_module._photo
        try:
            motions_module._photo = lambda name: (asked.add(name), real(name))[1]  # noqa: B023
            made = motions_module.MotionSet(side, 64, 4, (16, 16), 0)
            for index in range(64):
                made.clip(index, range(4))
        finally:
            motions_module._photo = real
        assert asked == {*PHOTOS[side]}
        assert not asked & {*PHOTOS[other]}


def test_photos_that_are_missing(monkeypatch, tmp_path) -> None:
    from skimage import data

    motions_module._photo.cache_clear()
    monkeypatch.setattr(data, "data_dir", str(tmp_path))
    with pytest.raises(UserError, match=r"scikit-image has no astronaut.png in .*install"):
        make()
    motions_module._photo.cache_clear()


def flow(clip: torch.Tensor) -> np.ndarray:
    """How what is seen moves, by least squares on the grey levels: right, down, clockwise, outward.

    Lucas and Kanade's equation for a similarity, over all pixels and pairs of frames.
    """
    grey = clip.double().mean(0).numpy()  # (T, H, W)
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        grey = np.apply_along_axis(lambda row: np.convolve(row, kernel, "valid"), axis, grey)
    mean = (grey[1:] + grey[:-1]) / 2
    down, right = np.gradient(mean, axis=(1, 2))
    later = grey[1:] - grey[:-1]
    height, width = mean.shape[1:]
    y = (np.arange(height) - (height - 1) / 2)[None, :, None]
    x = (np.arange(width) - (width - 1) / 2)[None, None]
    # A point at (x, y) moves by (shift - turn y + zoom x, shift + turn x + zoom y); y is downwards.
    columns = [right, down, down * x - right * y, right * x + down * y]
    system = np.stack([np.broadcast_to(c, mean.shape).ravel() for c in columns], axis=1)
    found: np.ndarray = np.linalg.lstsq(system, -later.ravel(), rcond=None)[0]
    return found


def test_clips_move_as_their_label_says() -> None:
    """An estimate of the motion that knows nothing of how clips are made, on both sides."""
    data = make()
    expected = {
        "left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1), "clockwise": (2, 1),
        "counter-clockwise": (2, -1), "zoom in": (3, 1), "zoom out": (3, -1),
    }  # fmt: skip
    side = data.size[0]
    as_shift = np.array([1.0, 1.0, side / 3, side / 3])  # so that the four can be compared
    for part in (data.train, data.test):
        right: Counter[str] = Counter()
        for index in range(160):
            found = flow(part.clip(index, range(8))) * as_shift
            which = int(np.abs(found).argmax())
            name = MOTIONS[part.label(index)]
            right[name] += (which, int(np.sign(found[which]))) == expected[name]
        assert min(right[name] for name in MOTIONS) >= 14, right  # of 20; by chance it were 2.5
        assert right.total() > 0.85 * 160


def test_no_single_frame_tells_the_class() -> None:
    """The frames in the middle have the same pixels' statistics whatever the class."""
    data = make(train_clips=800)
    levels = torch.stack(
        [data.train.clip(i, [4])[:, 0].double().flatten(1).mean(1) for i in range(400)]
    )
    by_class = torch.stack([levels[k::8].mean(0) for k in range(8)])
    spread = levels.std(0) / (400 / 8) ** 0.5  # of a class's mean, by chance
    assert ((by_class - levels.mean(0)).abs() < 4 * spread).all()
