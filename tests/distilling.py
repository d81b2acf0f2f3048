"""A small teacher, student and data set, and an epoch of KCD in a plain loop."""

from __future__ import annotations

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tenfold.methods import KCD

SIZE, CLASSES = 48, 3


def network(seed: int, width: int = 8, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


def teacher(seed: int = 1) -> nn.Module:
    return network(seed, width=12).eval().requires_grad_(False)


def images(size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 1, 6, 6), generator=generator, dtype=torch.uint8)


def data(size: int = SIZE) -> TensorDataset:
    return TensorDataset(images(size), torch.arange(size) % CLASSES)


def scaled(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 255 - 0.5


def start(kcd: KCD, *, epochs: int = 6, seed: int = 0, dropout: float = 0.0, **options):
    student = network(0, dropout=dropout)
    options = {"dataset": data(), "transform": scaled, **options}
    student = kcd.attach(student, epochs=epochs, seed=seed, **options)
    optimizer = torch.optim.SGD(kcd.parameters_for(student), lr=0.05, momentum=0.9)
    return student, optimizer


def epoch(kcd: KCD, student: nn.Module, optimizer, workers: int = 0, **loader) -> list[int]:
    """Train one epoch and return the ids that were drawn."""
    drawn: list[int] = []
    loader = loader.get("loader") or DataLoader(kcd.dataset, 8, sampler=kcd.sampler)
    student.train()
    for image, label, ids in loader:
        optimizer.zero_grad()
        kcd.loss(image, label, ids).backward()
        optimizer.step()
        drawn += ids.tolist()
    kcd.epoch_end()
    return drawn


def make(**options) -> KCD:
    return KCD(**{"teacher": teacher(), "keep_ratio": 0.5, "stages": 3, **options})


def same(one: nn.Module, other: nn.Module) -> None:
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


class Pictures(Dataset):
    """As torchvision has them: PIL images, transformed afterwards."""

    def __init__(self, kind: str):
        self.kind = kind

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int):
        pixels = images()[index, 0].numpy()
        image = Image.fromarray(pixels) if self.kind == "pil" else pixels
        return image, index % CLASSES
