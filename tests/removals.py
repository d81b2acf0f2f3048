"""Photos with shadows and recipes for tests of the task shadow_removal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SIDES = (80, 100)


class Affine(nn.Module):
    """Adds an affine function of codes and mask to the codes: any network will do."""

    def __init__(self):
        super().__init__()
        self.change = nn.Conv2d(4, 3, 1)

    def forward(self, codes, mask):
        return codes + self.change(torch.cat([codes * mask, mask], 1)) * mask


def scene(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A photo with a shadow, its mask, and the photo without: uint8 `(H, W, 3)`, `(H, W)`."""
    height, width = SIDES
    rows, columns = np.mgrid[0:height, 0:width] / height
    planes = [np.sin(9 * rows + number), np.cos(11 * columns - number), np.sin(rows * columns * 7)]
    free = (np.stack(planes, axis=2) * 50 + 150).clip(0, 255)
    mask = (rows - 0.5) ** 2 + (columns - 0.4 - 0.05 * (number % 5)) ** 2 < 0.07
    gain = np.where(mask[..., None], np.array([0.45, 0.5, 0.55]), 1.0)
    return (free * gain).astype(np.uint8), mask, free.astype(np.uint8)


def make_triplets(folder: Path, train: int = 4, test: int = 3) -> Path:
    """Files as ISTD has them."""
    from PIL import Image

    for split, count, first in (("train", train, 0), ("test", test, 100)):
        for letter in "ABC":
            (folder / split / f"{split}_{letter}").mkdir(parents=True)
        for number in range(first, first + count):
            image, mask, free = scene(number)
            for letter, pixels in zip(
                "ABC", (image, mask.astype(np.uint8) * 255, free), strict=True
            ):
                Image.fromarray(pixels).save(
                    folder / split / f"{split}_{letter}" / f"{number:03d}.png"
                )
    return folder


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds on `make_triplets`."""
    values: dict[str, Any] = {
        "task": "shadow_removal",
        "data": {"name": "triplets", "path": str(folder), "size": 68, "test_size": 72},
        "model": {"name": "labnet", "width": 4, "attention_size": 16},
        "methods": {"labnet": {"start": "identity", "gradient": 0}},
        "train": {"epochs": 2, "batch_size": 2, "lr": 1e-3, "clip_norm": 0.3},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if key in ("train", "data") else value
    return values
