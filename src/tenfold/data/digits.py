"""The 1,797 handwritten digits that come with scikit-learn: 8x8 pixels, nothing to download."""

from __future__ import annotations

import torch

from tenfold.data.base import ArraySet
from tenfold.data.images import ImageData
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split
from tenfold.data.statistics import channel_statistics
from tenfold.errors import UserError

__all__ = ["digits"]


def digits(options: DataOptions) -> ImageData:
    """Build the digits, every fifth image of each class held out, whatever the run's seed."""
    from sklearn.datasets import load_digits

    if options.path is not None:
        raise UserError(f"data path {options.path}: digits comes with the package; leave it out")
    source = load_digits()
    images = torch.from_numpy(source.images)[:, None]  # 0..16
    images = images.mul(255 / 16).round().to(torch.uint8)
    numbers: dict[str, list[int]] = {"train": [], "test": []}
    seen = [0] * 10
    for number, label in enumerate(source.target.tolist()):
        numbers["test" if seen[label] % 5 == 4 else "train"].append(number)
        seen[label] += 1
    numbers["train"] = numbers["train"][: options.limit]

    def part(title: str) -> Split:
        chosen = numbers[title]
        labels = source.target[chosen].tolist()
        return Split(title, ArraySet(images[chosen], labels, "digits", chosen))

    train = part("train")
    mean, std = channel_statistics(train)
    return ImageData(
        name="digits",
        classes=[str(name) for name in source.target_names],
        train=train,
        test=part("test"),
        preprocessing=Preprocessing(
            channels=1,
            size=options.size or (8, 8),
            mean=options.mean or tuple(mean),
            std=options.std or tuple(std),
        ),
        default_augment="shift",
        workers=options.workers,
    )
