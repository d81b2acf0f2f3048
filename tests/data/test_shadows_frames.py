"""Clips of moving shadows: the brightest of each pixel stands for the scene without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.data import create_shadows
from tenfold.data.shadow_frames import pseudo_truth
from tenfold.errors import UserError

pytestmark = pytest.mark.unit

FRAMES = 5


def scene(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(170, 250, (4, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((48, 36), Image.Resampling.BILINEAR))


def shadow(frame: int) -> np.ndarray:
    mask = np.zeros((36, 48), bool)
    mask[8:20, 6 * frame : 6 * frame + 12] = True
    return mask


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two clips of a dark bar that moves; frames are numbered without zeros in front."""
    root = tmp_path / "clips"
    for number, name in enumerate(("north", "south")):
        (root / name).mkdir(parents=True)
        for k in range(FRAMES):
            dark = np.where(shadow(k)[..., None], scene(number) // 3, scene(number))
            Image.fromarray(dark).save(root / name / f"{k + 7}.png")
    return root


def opened(root: Path, **options: object):
    return create_shadows(
        {"name": "shadow_frames", "path": root, "size": 32, "test_size": "native", **options}
    )


def test_the_maximum_stands_for_the_scene(clips: Path) -> None:
    data = opened(clips)
    assert (data.train_size, data.test_size) == (10, 10)
    assert [data.name_of(i) for i in (0, 3, 5)] == ["north/7.png", "north/10.png", "south/7.png"]
    moving = np.any([shadow(k) for k in range(FRAMES)], axis=0)
    for index, batch in enumerate(data.test_loader()):
        truth = torch.from_numpy(scene(index // FRAMES).copy()).permute(2, 0, 1)
        assert torch.equal(batch["target"][0], truth)
        assert torch.equal(batch["region"][0, 0].bool(), torch.from_numpy(moving))
        assert torch.equal(batch["mask"], batch["region"])
        dark = torch.from_numpy(shadow(index % FRAMES))
        assert torch.equal((batch["image"][0] != truth).any(0), dark)
    batch = next(iter(data.train_loader(batch_size=4, seed=0)))
    assert set(batch) == {"image", "mask", "target", "id"}
    assert "target" not in next(
        iter(opened(clips, targets=False).train_loader(batch_size=4, seed=0))
    )


def test_masks_of_the_frames(clips: Path) -> None:
    for name in ("north", "south"):
        for k in range(FRAMES):
            path = clips / "masks" / name / f"{k + 7}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * shadow(k)).astype(np.uint8)).save(path)
    data = opened(clips, limit=7)
    assert (data.train_size, data.test_size) == (7, 10)
    for index, batch in enumerate(data.test_loader()):
        assert torch.equal(batch["mask"][0, 0].bool(), torch.from_numpy(shadow(index % FRAMES)))
        assert int(batch["region"].sum()) > int(batch["mask"].sum())
    for k in (8, 9):
        (clips / "masks" / "south" / f"{k}.png").unlink()
    with pytest.raises(UserError, match=r"2 frames without masks .*: south/8\.png, south/9\.png"):
        opened(clips)


def test_the_threshold_is_of_grey_levels(clips: Path) -> None:
    files = [clips / "north" / f"{k + 7}.png" for k in range(FRAMES)]
    grey = np.stack([np.asarray(Image.open(file).convert("L")).astype(int) for file in files])
    for threshold in (40, 80, 145):
        truth, region, bad = pseudo_truth(files, threshold)
        assert np.array_equal(truth, scene(0))
        assert bad == []
        assert np.array_equal(region > 0, grey.max(0) - grey.min(0) > threshold)
    assert 0 < int((region > 0).sum()) < int(np.any([shadow(k) for k in range(5)], axis=0).sum())
    with pytest.warns(UserWarning, match="2 of 2 clips nowhere vary by more than 200 levels"):
        opened(clips, threshold=200)


def test_clips_that_are_none(clips: Path, tmp_path: Path) -> None:
    (clips / "south" / "9.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"9\.png.*skip_bad true"):
        opened(clips)
    data = opened(clips, skip_bad=True)
    assert (data.test_size, data.skipped) == (9, ["south/9.png"])
    Image.fromarray(scene(1)[:30]).save(clips / "south" / "9.png")
    with pytest.raises(UserError, match=r"9\.png is 30x48, and .*7\.png 36x48"):
        opened(clips)
    for k in (8, 9, 10, 11):
        (clips / "south" / f"{k}.png").unlink()
    with pytest.raises(UserError, match=r"south has 1 frame\(s\): expected at least 2"):
        opened(clips)
    (clips / "south" / "7.png").unlink()
    with pytest.raises(UserError, match="south has no images"):
        opened(clips)
    with pytest.raises(UserError, match="has no folders of frames"):
        opened(clips / "north")
    random = np.random.default_rng(0)
    (tmp_path / "moving" / "a").mkdir(parents=True)
    for k in range(2):
        pixels = random.integers(0, 256, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "moving" / "a" / f"{k}.png")
    with pytest.warns(UserWarning, match="does the camera move"):
        opened(tmp_path / "moving", threshold=20)
