"""LBC in a plain PyTorch loop: three added lines, marked with <--.

    python examples/lbc_plain_pytorch.py

Trains a small network on the handwritten digits inside scikit-learn until 2 of every 4 weights are
zero, and saves it. Nothing of tenfold's engine is used.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.methods import LBC

EPOCHS = 8


def main() -> float:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x_train, x_test, y_train, y_test = train_test_split(
        images, torch.tensor(labels), test_size=0.2, stratify=labels, random_state=0
    )
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 10),
    )
    sparsity = LBC(n=2, m=4)
    model = sparsity.attach(model, total_steps=EPOCHS * len(loader))  # <-- 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    for epoch in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            sparsity.step()  # <-- 2
        print(
            f"epoch {epoch + 1}: loss {loss.item():.4f}, kept {sparsity.metrics()['density']:.0%}"
        )

    model = sparsity.finalize(model).eval()  # <-- 3
    with torch.inference_mode():
        accuracy = (model(x_test).argmax(dim=1) == y_test).float().mean().item()
    kept = [float((m.weight != 0).float().mean()) for m in model if hasattr(m, "weight")]
    shares = ", ".join(f"{share:.0%}" for share in kept)
    print(f"test accuracy {accuracy:.1%}; weights kept by layer: {shares}")
    return accuracy


if __name__ == "__main__":
    main()
