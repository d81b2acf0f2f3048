from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tenfold.data import create
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def test_folder_as_it_should_be(folder) -> None:
    root: Path = folder()
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._00.jpg").write_bytes(b"left by a file system")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "dog" / "more").mkdir()
    shutil.copy(root / "train/dog/00.jpg", root / "train/dog/more/06.JPEG")
    data = create(f"imagefolder:{root}")
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.test)) == (13, 6)
    assert (data.channels, data.size, data.default_augment) == (3, (224, 224), "imagenet")
    assert data.preprocessing()["resize"] == 256
    assert data.train.name(0) == "train/cat/00.jpg"
    assert data.train.image(0).shape == (3, 40, 48)  # as stored
    for part in (data.train, data.test):
        for i in range(len(part)):
            assert part.name(i).split("/")[1] == data.classes[part.label(i)]


def test_batches_have_the_size(folder) -> None:
    data = create({"name": "imagefolder", "path": folder(), "size": [24, 32]})
    for loader in (
        data.train_loader(batch_size=12, seed=0, workers=0),
        data.test_loader(batch_size=6, workers=0),
    ):
        assert next(iter(loader))["image"].shape[1:] == (3, 24, 32)
    first = next(iter(data.test_loader(batch_size=6, workers=0)))["image"]
    assert torch.equal(first, next(iter(data.test_loader(batch_size=6, workers=0)))["image"])


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_names_of_the_held_out_split(folder, held_out: str) -> None:
    data = create(f"imagefolder:{folder(held_out=held_out)}")
    assert data.test.name(0) == f"{held_out}/cat/00.jpg"


def test_limit_takes_from_every_class(folder) -> None:
    data = create({"name": "imagefolder", "path": folder(("a", "b", "c")), "limit": 6})
    assert [data.train.label(i) for i in range(len(data.train))] == [0, 1, 2, 0, 1, 2]
    assert len(data.test) == 9


def test_class_missing_from_val_is_fine(folder) -> None:
    root: Path = folder()
    shutil.rmtree(root / "val" / "cat")
    assert {create(f"imagefolder:{root}").test.label(i) for i in range(3)} == {1}


def broken(root: Path, what: str) -> str:
    if what == "no train":
        shutil.move(root / "train", root / "trian")
        return rf"{root} has no folder train"
    if what == "no val":
        shutil.rmtree(root / "val")
        return "has no folder val or validation or test"
    if what == "no classes":
        shutil.rmtree(root / "train" / "cat")
        shutil.rmtree(root / "train" / "dog")
        return r"train has no class folders"
    if what == "unknown class":
        shutil.copytree(root / "val" / "cat", root / "val" / "cow")
        return r"val/cow is a class that .*train doesn't have"
    split = what.split()[-1]
    for file in (root / split / "dog").iterdir():
        file.unlink()
    return rf"{split}/dog has no images"


@pytest.mark.parametrize(
    "what", ["no train", "no val", "no classes", "unknown class", "empty train", "empty val"]
)
def test_broken_folders(folder, what: str) -> None:
    root: Path = folder()
    text = broken(root, what)
    with pytest.raises(UserError, match=text) as error:
        create(f"imagefolder:{root}")
    assert "\n" not in str(error.value)
