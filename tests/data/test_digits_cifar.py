from __future__ import annotations

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100

from tenfold.data import create
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def test_digits_are_scikit_learns() -> None:
    data = create("digits")
    source = load_digits()
    assert (data.channels, data.size, data.num_classes) == (1, (8, 8), 10)
    assert data.classes == [str(i) for i in range(10)]
    assert len(data.train) + len(data.test) == 1797
    assert data.default_augment == "shift"
    seen = set()
    for part in (data.train, data.test):
        for i in range(len(part)):
            number = int(part.name(i)[len("digits[") : -1])
            seen.add(number)
            assert part.label(i) == source.target[number]
            expected = np.round(source.images[number] * 255 / 16)
            assert np.array_equal(part.image(i)[0].numpy(), expected)
    assert seen == set(range(1797))


def test_digits_split_is_stratified_and_fixed() -> None:
    data, again = create("digits"), create("digits")
    assert [data.test.name(i) for i in range(20)] == [again.test.name(i) for i in range(20)]
    for label in range(10):
        train, test = (
            sum(part.label(i) == label for i in range(len(part)))
            for part in (data.train, data.test)
        )
        assert 0.18 < test / (train + test) < 0.22


def test_digits_statistics_and_limit() -> None:
    data = create("digits")
    pixels = torch.stack([data.train.image(i) for i in range(len(data.train))]).double() / 255
    assert data.mean == (round(float(pixels.mean()), 4),)
    assert data.std == (round(float(pixels.std(unbiased=False)), 4),)
    few = create({"name": "digits", "limit": 50, "mean": [0.5], "std": [0.25]})
    assert len(few.train) == 50
    assert few.train.name(49) == data.train.name(49)
    assert len(few.test) == len(data.test)
    assert (few.mean, few.std) == ((0.5,), (0.25,))


def test_size_option_enlarges() -> None:
    data = create({"name": "digits", "size": 32, "limit": 10})
    batch = next(iter(data.train_loader(batch_size=10, seed=0)))
    assert batch["image"].shape == (10, 1, 32, 32)
    assert data.preprocessing()["size"] == [32, 32]


@pytest.fixture
def cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make CIFAR-10's files, ten images each, as torchvision reads them (they are pickles)."""
    folder = tmp_path / "cifar" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        content = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": [*range(10)]}
        (folder / name).write_bytes(pickle.dumps(content))
    classes = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(classes))
    for attribute in ("train_list", "test_list"):
        names = getattr(CIFAR10, attribute)
        monkeypatch.setattr(CIFAR10, attribute, [[name, None] for name, _ in names])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    return folder.parent


def test_cifar10_from_a_folder(cifar_files: Path) -> None:
    data = create(f"cifar10:{cifar_files}")
    assert (len(data.train), len(data.test), data.channels, data.size) == (50, 10, 3, (32, 32))
    assert data.classes[3] == "class 3"
    assert data.default_augment == "flip_crop"
    source = CIFAR10(cifar_files, train=True)
    assert np.array_equal(data.train.image(7).permute(1, 2, 0).numpy(), source.data[7])
    assert data.train.label(7) == source.targets[7]
    assert data.train.name(7) == "cifar10/train[7]"
    assert data.train_loader(batch_size=8, seed=0).num_workers == 0
    assert len(create({"name": "cifar10", "path": cifar_files, "limit": 12}).train) == 12


@pytest.mark.parametrize(("name", "source"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_failed_download_says_where_to_put_the_files(name, source, own_cache, monkeypatch) -> None:
    def offline(self: object) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(CIFAR10, "download", offline)  # CIFAR100 inherits it
    with pytest.raises(UserError) as error:
        create(name)
    text = str(error.value)
    assert "\n" not in text
    for part in (own_cache / name, "Temporary failure", source.filename, source.base_folder):
        assert str(part) in text
