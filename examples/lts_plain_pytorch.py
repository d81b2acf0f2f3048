"""LTS in a plain PyTorch loop: train digits in floats, then to 2 bits. Added lines are marked <--.

    python examples/lts_plain_pytorch.py

Trains a small network on the handwritten digits inside scikit-learn, then LTS takes it to 2 bits,
freezes what has settled, and the result is exported for int8 engines. Nothing of tenfold's own
training engine is used.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tenfold
from tenfold.methods import LTS

FLOAT_EPOCHS, EPOCHS = 6, 8


def epoch(model, optimizer, loader, after=lambda: None):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


def accuracy(model, images, labels) -> float:
    model.eval()
    with torch.inference_mode():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def main() -> float:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x_train, x_test, y_train, y_test = train_test_split(
        images, torch.tensor(labels), test_size=0.2, stratify=labels, random_state=0
    )
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(FLOAT_EPOCHS):
        epoch(model, optimizer, loader)
    print(f"in floats: test accuracy {accuracy(model, x_test, y_test):.1%}")

    quantization = LTS(bits=2)
    model = quantization.attach(model, total_steps=EPOCHS * len(loader))  # <-- 1
    parameters = quantization.parameters_for(model)  # the clipping bounds are LTS's own
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    for number in range(EPOCHS):
        epoch(model, optimizer, loader, after=quantization.step)  # <-- 2
        figures = quantization.metrics()
        print(
            f"epoch {number + 1}: {figures['frozen']:.0%} frozen, "
            f"{figures['left_out']:.0%} of the weights' gradients left out"
        )
    for name, text in quantization.record()["facts"]:
        print(f"{name}: {text}")
    model = quantization.finalize(model)  # <-- 3

    found = accuracy(model, x_test, y_test)
    exported = tenfold.export(model, "two-bits", x_test[:1])
    print(f"on 2 bits: test accuracy {found:.1%}; {exported.path}, checked in:")
    for check in exported.checks:
        print(f"  {check.runtime}, batch {check.batch}: equal within {check.max_difference:.0e}")
    return found


if __name__ == "__main__":
    main()
