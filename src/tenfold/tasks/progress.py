"""What a run shows and writes while it goes on: lines or a bar, and `metrics.csv`."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from tenfold.tasks.folder import RunFolder

__all__ = ["EpochLines", "MetricsFile", "progress"]


class MetricsFile(pl.Callback):
    """Keep `metrics.csv`: one row an epoch, without those that a resumed run trains again.

    Lightning's own CSV logger deletes the file when a run is resumed.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._start = 0.0
        self._rate = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the rows of epochs that are done."""
        if trainer.is_global_zero:
            rows = self.folder.metrics()
            self._rows = [dict(r) for r in rows if int(r["epoch"]) < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the time, and the learning rate that the epoch begins with."""
        self._start = time.perf_counter()
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's row."""
        if not trainer.is_global_zero:
            return
        self._rows.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "learning_rate": self._rate,
                **_figures(trainer),
                "seconds": f"{time.perf_counter() - self._start:.3f}",
            }
        )
        self.folder.write_metrics(self._rows)


class EpochLines(pl.Callback):
    """Print one line an epoch, for logs and pipes."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the time."""
        self._start = time.perf_counter()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's line."""
        figures = _figures(trainer)
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        if "train_loss" in figures:
            parts.append(f"loss {figures['train_loss']:.4f}")
        if "test_accuracy" in figures:
            parts.append(f"test accuracy {100 * figures['test_accuracy']:.2f} %")
        if "density" in figures:
            parts.append(f"density {figures['density']:.3f}")
        parts.append(f"{time.perf_counter() - self._start:.1f} s")
        print("   ".join(parts), flush=True)


def progress() -> pl.Callback:
    """Return a progress bar for a terminal, and lines for anything else."""
    return RichProgressBar(leave=True) if sys.stdout.isatty() else EpochLines()


def _figures(trainer: pl.Trainer) -> dict[str, float]:
    order = ("train_loss", "test_loss", "test_accuracy")
    known = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rest = sorted(name for name in known if name not in order)
    return {name: known[name] for name in (*order, *rest) if name in known}
