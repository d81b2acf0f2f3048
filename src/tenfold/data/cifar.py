"""CIFAR-10 and CIFAR-100, read (and downloaded, if need be) by torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tenfold.data.base import ArraySet
from tenfold.data.cache import cache_folder
from tenfold.data.images import ImageData
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.errors import UserError

__all__ = ["cifar10", "cifar100"]

# The usual constants, of the 50,000 training images.
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def cifar10(options: DataOptions) -> ImageData:
    """Build CIFAR-10: 50,000 and 10,000 images of 32x32 in 10 classes."""
    from torchvision.datasets import CIFAR10

    return _build(CIFAR10, options, *_CIFAR10)


def cifar100(options: DataOptions) -> ImageData:
    """Build CIFAR-100: 50,000 and 10,000 images of 32x32 in 100 classes."""
    from torchvision.datasets import CIFAR100

    return _build(CIFAR100, options, *_CIFAR100)


def _build(
    source: Any, options: DataOptions, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageData:
    root = options.path or cache_folder() / options.name
    sets: dict[str, ArraySet] = {}
    for title, count in (("train", options.limit), ("test", None)):
        read = _read(source, root, options.name, train=title == "train")
        images = torch.from_numpy(read.data[:count]).permute(0, 3, 1, 2)
        sets[title] = ArraySet(images, read.targets[:count], f"{options.name}/{title}")
    return ImageData(
        name=options.name,
        classes=read.classes,
        train=sets["train"],
        test=sets["test"],
        preprocessing=Preprocessing(
            channels=3,
            size=options.size or (32, 32),
            mean=options.mean or mean,
            std=options.std or std,
        ),
        default_augment="flip_crop",
        workers=options.workers,
    )


def _read(source: Any, root: Path, name: str, *, train: bool) -> Any:
    """Let torchvision read its files; fetch them first if they aren't there.

    CIFAR's own files are pickles. torchvision checks them against their published MD5 sums before
    it reads them; naming this data set is the user's choice to have that done.
    """
    try:
        try:
            return source(root, train=train, download=False)
        except RuntimeError:  # not there, or not the published files
            root.mkdir(parents=True, exist_ok=True)
            return source(root, train=train, download=True)
    except Exception as error:  # the network fails in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name} isn't in {root} and can't be downloaded ({reason}): put {source.filename} or "
            f"its unpacked folder {source.base_folder} there, or give {name}:PATH of the folder "
            "that has it"
        ) from None
