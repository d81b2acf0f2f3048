"""LBC in a LightningModule and Trainer of your own: one callback.

    python examples/lbc_lightning.py

The module below knows nothing of tenfold. The callback attaches LBC when training begins, drives
it, and keeps its state in the Trainer's checkpoints.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.methods import LBC
from tenfold.tasks.callback import MethodCallback


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> nn.Module:
    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    sparsity = MethodCallback([LBC(n=2, m=4)])
    trainer = pl.Trainer(
        max_epochs=5, callbacks=[sparsity], logger=False, enable_checkpointing=False
    )
    module = Digits()
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
    network = sparsity.finalize(module)
    for name, layer in network.named_children():
        if isinstance(layer, nn.Linear):
            print(
                f"layer {name}: {float((layer.weight != 0).float().mean()):.0%} of the weights kept"
            )
    return network


if __name__ == "__main__":
    main()
