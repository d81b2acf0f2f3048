"""Image folders and recipes for tests of the task translation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SIDE = 96


def picture(number: int, side: int = SIDE) -> np.ndarray:
    """A smooth picture of its own colour, with one darker square."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    planes = [np.sin(3 * rows + number), np.cos(4 * columns - number), np.sin(rows * columns * 5)]
    image = np.stack([plane * 60 + 128 for plane in planes], axis=2)
    at = 8 + 7 * number % (side // 2)
    image[at : at + 20, at : at + 20] -= 50
    return image.clip(0, 255).astype(np.uint8)


def edges(image: np.ndarray) -> np.ndarray:
    """White where nothing changes."""
    grey = image.mean(axis=2)
    change = np.abs(np.diff(grey, axis=0, prepend=grey[:1]))
    change += np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
    return np.repeat(np.where(change > 6, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def make_pairs(folder: Path, train: int = 6, test: int = 3) -> Path:
    """A|B side by side: edges and pictures."""
    from PIL import Image

    for split, count, first in (("train", train, 0), ("test", test, 100)):
        (folder / split).mkdir(parents=True)
        for number in range(first, first + count):
            image = picture(number)
            both = np.concatenate([edges(image), image], axis=1)
            Image.fromarray(both).save(folder / split / f"{number:03d}.png")
    return folder


def make_unpaired(folder: Path, train: int = 4, test: int = 2) -> Path:
    """Pictures, and their negatives of other pictures."""
    from PIL import Image

    for domain in "AB":
        for split, count, first in (("train", train, 0), ("test", test, 100)):
            (folder / f"{split}{domain}").mkdir(parents=True)
            for number in range(first, first + count):
                image = picture(number + 17 * (domain == "B"))
                image = 255 - image if domain == "B" else image
                Image.fromarray(image).save(folder / f"{split}{domain}" / f"{number:03d}.png")
    return folder


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds on `make_pairs` or `make_unpaired`."""
    kind = "unpaired" if (folder / "trainA").is_dir() else "pairs"
    values: dict[str, Any] = {
        "task": "translation",
        "data": {"name": kind, "path": str(folder), "size": SIDE},
        "model": {"name": "mobile_resnet_generator", "ngf": 4, "blocks": 3},
        "methods": {},
        "gan": {"teacher": {"ngf": 6, "blocks": 3}, "ndf": 4, "style": 0, "feature": 0,
                "pictures": 2, "round_epochs": 1, "student_epochs": 1, "evaluate_every": 1},
        "train": {"epochs": 2, "batch_size": 2},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if key in ("train", "gan", "data") else value
    return values
