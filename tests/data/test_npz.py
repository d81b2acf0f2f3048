from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.data import create
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def test_npz_as_it_should_be(packed) -> None:
    data = create(f"npz:{packed()}")
    assert (len(data.train), len(data.test)) == (20, 7)
    assert (data.name, data.classes, data.channels) == ("packed", ["ant", "bee", "cow"], 3)
    assert (data.size, data.default_augment) == ((16, 16), "flip_crop")
    assert data.preprocessing()["resize"] is None
    assert data.train.name(4) == "packed/train.npz[4]"
    expected = np.random.default_rng(4).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(data.train.image(4).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("held_out", ["test.npz", "val.npz", "validation.npz"])
def test_names_of_the_held_out_file(packed, held_out: str) -> None:
    assert create(f"npz:{packed(held_out=held_out)}").test.name(0) == f"packed/{held_out}[0]"


def test_statistics_are_of_the_training_pixels(packed, own_cache: Path) -> None:
    root = packed()
    data = create(f"npz:{root}")
    pixels = torch.stack([data.train.image(i) for i in range(20)]).double() / 255
    assert data.mean == tuple(round(v, 4) for v in pixels.mean((0, 2, 3)).tolist())
    std = pixels.transpose(0, 1).flatten(1).std(1, unbiased=False)
    assert data.std == tuple(round(v, 4) for v in std.tolist())
    assert list((own_cache / "checked").iterdir())  # remembered
    assert create(f"npz:{root}").mean == data.mean
    files = [file for file in (own_cache / "checked").iterdir() if file.write_text("broken {") or 1]
    assert files
    assert create(f"npz:{root}").mean == data.mean


def test_results_are_forgotten_when_the_file_changes(packed, encode) -> None:
    assert create(f"npz:{packed()}").size == (16, 16)
    assert create(f"npz:{packed([encode(i, (24, 24)) for i in range(20)])}").size == (24, 24)


def test_a_cache_that_cannot_be_written_is_no_error(packed, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "file"))
    assert create(f"npz:{packed()}").size == (16, 16)


def test_unequal_images_take_the_largest_common_square(packed, encode) -> None:
    root = packed([encode(0, (40, 30)), encode(1, (29, 50)), encode(2, (64, 64))])
    data = create(f"npz:{root}")
    assert data.size == (24, 24)  # short sides 30, 29, 64; 29 down to a multiple of 8
    assert data.preprocessing()["resize"] == 24
    assert create({"name": "npz", "path": root, "size": 32}).size == (32, 32)
    for loader in (data.train_loader(batch_size=3, seed=0), data.test_loader(batch_size=7)):
        assert next(iter(loader))["image"].shape[1:] == (3, 24, 24)


def test_large_images_are_augmented_as_photos(packed, encode) -> None:
    data = create(f"npz:{packed([encode(i, (72, 96)) for i in range(4)])}")
    assert (data.size, data.default_augment) == ((72, 96), "imagenet")
    loader = data.train_loader(batch_size=4, seed=0, workers=0)
    assert next(iter(loader))["image"].shape == (4, 3, 72, 96)


def test_grey_images_become_rgb(packed, tmp_path) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "grey.png")
    image = create(f"npz:{packed([(tmp_path / 'grey.png').read_bytes()])}").train.image(0)
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


def test_limit(packed) -> None:
    data = create({"name": "npz", "path": packed(), "limit": 5})
    assert len(data.train) == 5
    ids = [i for b in data.train_loader(batch_size=2, seed=0) for i in b["id"].tolist()]
    assert sorted(ids) == [0, 1, 2, 3, 4]


WRONG = {
    "missing key": ({"labels": None}, r"train.npz has no labels: expected the keys bytes"),
    "bytes type": ({"bytes": np.zeros(9, np.float32)}, "bytes of .* is float32"),
    "bytes width": ({"bytes": np.zeros(9, np.uint16)}, "bytes of .* is uint16"),
    "label type": ({"labels": np.zeros(20)}, "labels of .* is float64"),
    "label shape": ({"labels": np.zeros((20, 3), int)}, r"labels of .* shape \(20, 3\)"),
    "class type": ({"classes": np.arange(3)}, "classes of .* is int64"),
    "object array": ({"classes": np.array(["a", None], object)}, "can't be read"),
    "too few labels": ({"labels": np.zeros(19, int)}, "19 labels and 21 offsets"),
    "no images": (
        {"labels": np.zeros(0, int), "offsets": np.zeros(1, int)},
        "0 labels and 1 offsets",
    ),
    "falling offsets": ({"offsets": np.array([0, 9, 5] + [9] * 18)}, "fall from 9 to 5 at image 1"),
    "negative offset": ({"offsets": np.array([-1] + [9] * 20)}, "go from -1 to 9"),
    "offset outside": ({"offsets": np.arange(21) * 10**6}, "to 20000000: expected them inside its"),
    "label outside": (
        {"labels": np.array([0] * 7 + [3] + [0] * 12)},
        r"image 7 of .*train.npz has label 3: expected 0 to 2, for 3 classes",
    ),
    "negative label": ({"labels": np.array([-1] + [0] * 19)}, "image 0 of .* has label -1"),
    "other classes": ({"classes": np.array(["ant", "bee", "dog"])}, "test.npz aren't those of"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files(packed, what: str) -> None:
    arrays, text = WRONG[what]
    with pytest.raises(UserError, match=text) as error:
        create(f"npz:{packed(**arrays)}")
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files(packed) -> None:
    root: Path = packed()
    content = (root / "train.npz").read_bytes()
    (root / "train.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"train.npz can't be read"):
        create(f"npz:{root}")
    (root / "train.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train.npz can't be read"):
        create(f"npz:{root}")
    (root / "train.npz").write_bytes(content)
    (root / "test.npz").unlink()
    with pytest.raises(UserError, match=r"has no test.npz or val.npz or validation.npz"):
        create(f"npz:{root}")
    (root / "train.npz").unlink()
    with pytest.raises(UserError, match=r"has no train.npz"):
        create(f"npz:{root}")


def test_bad_images_at_the_start_and_later(packed, encode) -> None:
    good = [encode(i) for i in range(4)]
    half = good[0][: len(good[0]) // 2]
    with pytest.raises(UserError) as error:
        create(f"npz:{packed([*good, b'junk', half])}")
    assert "packed/train.npz[4]: not an image format" in str(error.value)
    assert "2 of 6 train images can't be read" in str(error.value)
    assert "packed/train.npz[5]" in str(error.value)
    data = create(f"npz:{packed(good, [*good[:2], half])}")
    with pytest.raises(UserError, match=r"1 of 3 test images can't be read \(packed/test.npz\[2\]"):
        list(data.test_loader(batch_size=2))
