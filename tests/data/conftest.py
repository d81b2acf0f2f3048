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


def moving(number: int, frames: int, size: tuple[int, int] = (32, 40)) -> np.ndarray:
    """A crop of a photo inside scikit-image that moves by 5 pixels a frame: (T, H, W, 3)."""
    from skimage import data

    photo = (data.astronaut, data.coffee, data.chelsea)[number % 3]()
    height, width = size
    top = 40 + 7 * number
    return np.stack(
        [photo[top : top + height, 30 + 5 * k : 30 + 5 * k + width] for k in range(frames)]
    )


@pytest.fixture
def frame_folders(tmp_path: Path) -> Folder:
    """Make PATH/{train,val}/<class>/<clip>/<number>.png, numbers without zeros in front."""

    def make(
        classes: Sequence[str] = ("run", "walk"), train: int = 3, val: int = 2, frames: int = 12
    ) -> Path:
        root = tmp_path / "frames"
        for split, count in (("train", train), ("val", val)):
            for label, name in enumerate(classes):
                for clip in range(count):
                    folder = root / split / name / f"clip{clip}"
                    folder.mkdir(parents=True)
                    for k, picture in enumerate(moving(10 * label + clip, frames)):
                        Image.fromarray(picture).save(folder / f"{k}.png")
        return root

    return make


def write_video(path: Path, pictures: np.ndarray, codec: str = "mpeg4") -> Path:
    """Encode (T, H, W, 3) at 25 frames a second."""
    av = pytest.importorskip("av", reason="comes with the video extra")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Folder:
    """Make PATH/{train,val}/<class>/<number>.mp4 and .avi."""

    def make(
        classes: Sequence[str] = ("run", "walk"), train: int = 3, val: int = 2, frames: int = 12
    ) -> Path:
        root = tmp_path / "videos"
        for split, count in (("train", train), ("val", val)):
            for label, name in enumerate(classes):
                for clip in range(count):
                    file = root / split / name / f"{clip}{('.mp4', '.avi')[clip % 2]}"
                    write_video(file, moving(10 * label + clip, frames))
        return root

    return make


def pack_clips(path: Path, lengths: Sequence[int], **replaced: np.ndarray | None) -> Path:
    """Write a .npz of clips of these many frames, labels 0, 1, 0, 1, …"""
    frames = [
        encoded(Image.fromarray(picture))
        for number, length in enumerate(lengths)
        for picture in moving(number, length)
    ]
    arrays = {
        "bytes": np.frombuffer(b"".join(frames), np.uint8),
        "offsets": np.cumsum([0, *map(len, frames)]),
        "clip_start": np.cumsum([0, *lengths]),
        "labels": np.arange(len(lengths)) % 2,
        "classes": np.array(["run", "walk"]),
        "names": np.array([f"v_{k}" for k in range(len(lengths))]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in {**arrays, **replaced}.items() if v is not None})
    return path
