"""Images that can't be read: the scan, its memory, and going on without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tenfold.data import ImageSet, create
from tenfold.data import split as split_module
from tenfold.data.decode import BadImage
from tenfold.data.split import Split
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


class Numbers(ImageSet):
    """A hundred images, of which some can't be read."""

    def __init__(self, bad: set[int], stamp: str = "1") -> None:
        self.bad, self.stamp, self.reads = bad, stamp, 0

    def __len__(self) -> int:
        return 100

    def image(self, index: int) -> torch.Tensor:
        self.reads += 1
        if index in self.bad:
            raise BadImage(f"/data/{index}.jpg", "broken")
        return torch.zeros(1, 8, 8, dtype=torch.uint8)

    def label(self, index: int) -> int:
        return index % 2

    def name(self, index: int) -> str:
        return f"{index}.jpg"

    def fingerprint(self) -> str:
        return self.stamp


def test_explanation_counts_and_names_three() -> None:
    split = Split("train", Numbers({3, 5, 70, 99}))
    text = str(split.explain(BadImage("/data/70.jpg", "broken")))
    assert text == (
        "can't read image /data/70.jpg: broken; 4 of 100 train images can't be read "
        "(3.jpg, 5.jpg, 70.jpg, …); pass --data.skip_bad true to go on without them"
    )


def test_scan_that_takes_too_long_is_cut_and_says_so(monkeypatch) -> None:
    clock = iter([0.0, 1.0, 31.0])
    monkeypatch.setattr(split_module.time, "monotonic", lambda: next(clock))
    text = str(Split("test", Numbers({3, 70})).explain(BadImage("70", "broken")))
    assert "1 of the first 64 of 100 test images, checked in 30 s, can't be read (3.jpg)" in text


def test_skip_bad_leaves_them_out_and_remembers() -> None:
    images = Numbers({3, 5, 70, 99})
    split = Split("train", images, skip_bad=True)
    assert split.skipped == ["3.jpg", "5.jpg", "70.jpg", "99.jpg"]
    assert split.ids.tolist() == [i for i in range(100) if i not in images.bad]
    assert images.reads == 100
    assert Split("train", images, skip_bad=True).skipped == split.skipped
    assert images.reads == 100  # known from the first time
    assert Split("train", Numbers({1}, "2"), skip_bad=True).skipped == ["1.jpg"]


def test_nothing_left() -> None:
    with pytest.raises(UserError, match="none of the 100 train images can be read"):
        Split("train", Numbers(set(range(100))), skip_bad=True)


def test_imagefolder_goes_on_without_bad_files(folder) -> None:
    root: Path = folder()
    (root / "train/cat/01.jpg").write_bytes(b"junk")
    (root / "val/dog/02.jpg").write_bytes((root / "val/dog/01.jpg").read_bytes()[:700])
    spec = {"name": "imagefolder", "path": root, "size": 32, "skip_bad": True}
    data = create(spec)
    assert data.skipped == ["train/cat/01.jpg", "val/dog/02.jpg"]
    bad = next(i for i in range(12) if data.train.name(i) == "train/cat/01.jpg")
    loader = data.train_loader(batch_size=4, seed=0, workers=0)
    batches = list(loader)
    ids = torch.cat([batch["id"] for batch in batches]).tolist()
    assert sorted(ids) == sorted(set(range(12)) - {bad}) == data.train_ids.tolist()
    assert len(loader) == len(batches) == 3
    for batch in batches:  # ids still point at the same images
        assert batch["label"].tolist() == [data.train.label(i) for i in batch["id"].tolist()]
    seen = [i for r in range(2) for b in data.test_loader(batch_size=2, rank=r, world_size=2,
            workers=0) for i in b["id"].tolist()]  # fmt: skip
    assert sorted(seen) == data.test_ids.tolist()
    assert len(seen) == 5


def test_a_repaired_file_is_seen(folder) -> None:
    root: Path = folder()
    good = (root / "train/cat/00.jpg").read_bytes()
    (root / "train/cat/01.jpg").write_bytes(b"junk")
    spec = {"name": "imagefolder", "path": root, "skip_bad": True}
    assert create(spec).skipped == ["train/cat/01.jpg"]
    (root / "train/cat/01.jpg").write_bytes(good)
    assert create(spec).skipped == []
    stat = (root / "train/cat/02.jpg").stat()
    (root / "train/cat/02.jpg").write_bytes(b"x" * stat.st_size)  # same size, later
    os.utime(root / "train/cat/02.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert create(spec).skipped == ["train/cat/02.jpg"]


def test_npz_goes_on_without_bad_images(packed, encode) -> None:
    images = [encode(i) for i in range(6)]
    images[1] = b"junk"  # not even a header
    images[4] = images[4][: len(images[4]) // 2]
    data = create({"name": "npz", "path": packed(images), "skip_bad": True})
    assert data.skipped == ["packed/train.npz[1]", "packed/train.npz[4]"]
    assert data.size == (16, 16)
    ids = [i for b in data.train_loader(batch_size=3, seed=0) for i in b["id"].tolist()]
    assert sorted(ids) == [0, 2, 3, 5]
