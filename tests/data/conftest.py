"""Small data sets made on the spot: noise images, so that crops and flips show."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test away from the user's cache folder."""
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(number: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encode a noise image by number."""
    return lambda number, size=(16, 16), kind="PNG": encoded(noise(number, size), kind)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Make PATH/{train,val}/<class>/<number>.jpg."""

    def make(
        classes: Sequence[str] = ("cat", "dog"),
        train: int = 6,
        val: int = 3,
        held_out: str = "val",
        size: tuple[int, int] = (40, 48),
    ) -> Path:
        root = tmp_path / "pictures"
        for split, count in (("train", train), (held_out, val)):
            for number, name in enumerate(classes):
                (root / split / name).mkdir(parents=True)
                for k in range(count):
                    noise(100 * number + k, size).save(root / split / name / f"{k:02}.jpg")
        return root

    return make


@pytest.fixture
def packed(tmp_path: Path) -> Folder:
    """Make PATH/{train,test}.npz from encoded images; keywords replace arrays of train.npz."""

    def make(
        train: Sequence[bytes] | None = None,
        test: Sequence[bytes] | None = None,
        held_out: str = "test.npz",
        **replaced: np.ndarray | None,
    ) -> Path:
        root = tmp_path / "packed"
        root.mkdir(exist_ok=True)
        train = [encoded(noise(i)) for i in range(20)] if train is None else train
        test = [encoded(noise(900 + i)) for i in range(7)] if test is None else test
        for name, images in (("train.npz", train), (held_out, test)):
            arrays = {
                "bytes": np.frombuffer(b"".join(images), np.uint8),
                "offsets": np.cumsum([0, *map(len, images)]),
                "labels": np.arange(len(images)) % 3,
                "classes": np.array(["ant", "bee", "cow"]),
            }
            if name == "train.npz":
                arrays = {k: v for k, v in {**arrays, **replaced}.items() if v is not None}
            np.savez(root / name, **arrays)
        return root

    return make
