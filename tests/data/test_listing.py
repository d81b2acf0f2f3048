"""The list of a folder's files: what is in it, when the kept one is used, and when it isn't."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tenfold.data import create
from tenfold.data import listing as listing_module
from tenfold.data.listing import Listing, list_files
from tenfold.errors import UserError

pytestmark = pytest.mark.unit

FILES = ["b/2.jpg", "b/10.JPEG", "a/x.png", "a/deep/er/y.webp", "a b/z.tif", "a/é.bmp", "top.jpg"]
OTHERS = ["a/notes.txt", "a/.hidden.jpg", ".dot/x.jpg", "a/jpg", "b/.thumbs/2.jpg"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*FILES, *OTHERS):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    return tmp_path / "root"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Note every scan."""
    seen: list[Path] = []
    scan = listing_module._scan
    monkeypatch.setattr(
        listing_module, "_scan", lambda at, endings: seen.append(at) or scan(at, endings)
    )
    return seen


def age(root: Path, seconds: float = 60.0) -> None:
    """Let all folders look as if they had last changed some time ago."""
    for where, _, _ in os.walk(root):
        stat = os.stat(where)
        os.utime(where, ns=(stat.st_atime_ns, stat.st_mtime_ns - int(seconds * 1e9)))


def names(listing: Listing) -> list[str]:
    return [listing.relative(i) for i in range(len(listing))]


def kept() -> list[Path]:
    return list((Path(os.environ["TENFOLD_DATA"]) / "listings").glob("*"))


def test_same_files_in_the_same_order_as_paths_have(root: Path) -> None:
    listing = list_files(root)
    assert names(listing) == [p.as_posix() for p in sorted(map(Path, FILES))]
    assert all(listing.path(i).is_file() for i in range(len(listing)))


def test_second_start_reads_no_files(root: Path, scans: list[Path]) -> None:
    age(root)
    first = list_files(root)
    assert len(kept()) == 1
    second = list_files(root)
    assert scans == [root]
    assert names(second) == names(first)
    assert second.folders == first.folders
    assert np.array_equal(second.holder, first.holder)


def test_a_folder_that_has_only_just_changed_is_not_trusted(root: Path, scans: list[Path]) -> None:
    list_files(root)
    list_files(root)
    assert len(scans) == 2
    assert not kept()


@pytest.mark.parametrize("what", ["added", "removed", "renamed", "deep", "new folder", "gone"])
def test_changes_are_noticed(root: Path, scans: list[Path], what: str) -> None:
    age(root)
    before = names(list_files(root))
    if what == "added":
        (root / "b/11.jpg").touch()
    elif what == "removed":
        (root / "b/2.jpg").unlink()
    elif what == "renamed":
        (root / "a/x.png").rename(root / "a/w.png")
    elif what == "deep":
        (root / "a/deep/er/z.jpg").touch()
    elif what == "new folder":
        (root / "c").mkdir()
        (root / "c/1.jpg").touch()
    else:
        (root / "a b/z.tif").unlink()
        (root / "a b").rmdir()
    after = names(list_files(root))
    assert len(scans) == 2
    assert after != before
    found = sorted(
        p.relative_to(root)
        for p in root.rglob("*")
        if p.suffix.lower() in listing_module.ENDINGS and "/." not in f"/{p.relative_to(root)}"
    )
    assert after == [p.as_posix() for p in found]


@pytest.mark.parametrize("damage", ["cut", "empty", "junk", "other arrays", "flipped", "folder"])
def test_damaged_listing_is_made_again(root: Path, scans: list[Path], damage: str) -> None:
    age(root)
    before = names(list_files(root))
    (file,) = kept()
    content = file.read_bytes()
    if damage == "other arrays":
        np.savez(file, folders=np.zeros(3))
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        middle = content.index(b"x.png")
        changed = {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "junk": b"no listing",
            "flipped": content[:middle] + b"w" + content[middle + 1 :],
        }
        file.write_bytes(changed[damage])
    assert names(list_files(root)) == before
    assert len(scans) == 2
    if damage != "folder":
        list_files(root)
        assert len(scans) == 2  # whole again


def test_cache_that_cannot_be_written(root: Path, monkeypatch, tmp_path: Path) -> None:
    age(root)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "file"))  # not a folder
    assert len(list_files(root)) == len(FILES)


def test_links_are_followed_but_not_in_circles(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.jpg").touch()
    (root / "b/linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/deep/up").symlink_to(root)
    (root / "b/broken.d").symlink_to(tmp_path / "nowhere")
    got = names(list_files(root))
    assert "b/linked/1.jpg" in got
    assert len(got) == len(FILES) + 1


def test_folder_that_cannot_be_read(root: Path, monkeypatch) -> None:
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(listing_module.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"can't be read \(Permission denied\)"):
        list_files(root)


def test_names_that_are_no_text(root: Path) -> None:
    try:
        (root / os.fsdecode(b"b/\xff.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes text only")
    age(root)
    for _ in range(2):
        listing = list_files(root)
        assert all(listing.path(i).is_file() for i in range(len(listing)))
        assert len(listing) == len(FILES) + 1


def test_memory_per_file_is_small(tmp_path: Path) -> None:
    """A hundred bytes would already be Python objects again; a Path alone takes several hundred."""
    count = 3000
    (tmp_path / "many/a").mkdir(parents=True)
    for number in range(count):
        (tmp_path / f"many/a/{number:08}.jpg").touch()
    list_files(tmp_path / "many")
    tracemalloc.start()
    listing = list_files(tmp_path / "many")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(listing) == count
    assert held / count < 50


def test_image_folder_starts_from_the_kept_listing(folder, scans: list[Path]) -> None:
    root = folder()
    age(root)
    spec = {"name": "imagefolder", "path": root, "size": 32}
    first, second = create(spec), create(spec)
    assert [at.name for at in scans] == ["train", "val"]
    for data in (first, second):
        assert [data.train.name(i) for i in range(4)] == [
            "train/cat/00.jpg", "train/dog/00.jpg", "train/cat/01.jpg", "train/dog/01.jpg",
        ]  # fmt: skip
        assert data.train.labels().tolist() == [0, 1] * 6
    # A file that changes in place keeps its name: the kept listing holds, and the bad file is met.
    (root / "train/cat/01.jpg").write_bytes(b"junk")
    assert create({**spec, "skip_bad": True}).skipped == ["train/cat/01.jpg"]
    assert len(scans) == 2


def test_images_beside_the_class_folders_belong_to_none(folder) -> None:
    root = folder()
    (root / "train/contact_sheet.jpg").write_bytes((root / "train/cat/00.jpg").read_bytes())
    data = create(f"imagefolder:{root}")
    assert len(data.train) == 12
    assert data.train.labels().tolist() == [0, 1] * 6
