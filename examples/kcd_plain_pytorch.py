"""KCD in a plain PyTorch loop: distil from the samples that still teach, marked with <--.

    python examples/kcd_plain_pytorch.py

A wide network learns the handwritten digits inside scikit-learn; a narrow one follows it, from
fewer and fewer samples. Nothing of tenfold's engine is used.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.methods import KCD

EPOCHS = 12


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


def scaled(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 255


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return (model.eval()(scaled(images)).argmax(dim=1) == labels).float().mean().item()


def train_teacher(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    teacher = network(32)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(scaled(x)), y).backward()
            optimizer.step()
    return teacher.eval().requires_grad_(False)


def main() -> float:
    torch.manual_seed(0)
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(
        images, torch.tensor(targets), test_size=0.2, stratify=targets, random_state=0
    )
    teacher = train_teacher(x_train, y_train)
    data = TensorDataset(x_train, y_train)  # raw pixels: KCD mixes them ahead of the transform

    kcd = KCD(teacher=teacher, keep_ratio=0.5)
    student = kcd.attach(network(8), dataset=data, epochs=EPOCHS, transform=scaled)  # <-- 1
    optimizer = torch.optim.SGD(kcd.parameters_for(student), lr=0.05, momentum=0.9)
    loader = DataLoader(kcd.dataset, batch_size=64, sampler=kcd.sampler)  # <-- 2

    for epoch in range(EPOCHS):
        kept = len(kcd.kept)
        for x, y, ids in loader:
            optimizer.zero_grad()
            loss = kcd.loss(x, y, ids)  # <-- 3
            loss.backward()
            optimizer.step()
        kcd.epoch_end()  # <-- 4
        print(f"epoch {epoch + 1}: {kept} samples, loss {loss.item():.4f}")

    student = kcd.finalize(student)  # <-- 5
    found = accuracy(student, x_test, y_test)
    print(
        f"teacher {accuracy(teacher, x_test, y_test):.1%}, student {found:.1%}; forward passes of "
        f"each: {kcd.forwards['student']:,} instead of {EPOCHS * len(data):,}"
    )
    return found


if __name__ == "__main__":
    main()
