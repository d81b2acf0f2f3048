"""One run of the comparison of Winograd3d: a trained dense network, fine-tuned in one of many ways.

Runs of one seed are pairs: the same trained dense network, order of the clips and schedule.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resumable import locked
from tenfold import evaluate
from tenfold.data import ClipData
from tenfold.errors import UserError
from tenfold.methods import Winograd3d
from tenfold.nn.c3d import C3D
from tenfold.nn.winograd import WinogradConv3d
from tenfold.tasks.optimization import make_optimizer, make_schedule

# What is fine-tuned, and as which mode and rank of the method.
METHODS: dict[str, tuple[str, int] | None] = {
    "start": None,  # the trained network as it is
    "dense": None,  # its fine-tuning without any method
    "vanilla": ("dense", 1),
    "rank4": ("residual", 4),
    "rank8": ("residual", 8),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of the comparison have in common."""

    train_clips: int
    test_clips: int
    size: int
    width: int
    batch_size: int
    epochs: int  # of the dense network
    lr: float
    tune_epochs: int
    tune_lr: float
    weight_decay: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One run: what is fine-tuned, and with which seed."""

    seed: int
    method: str
    tile: int = 0
    keep: float = 1.0
    compensate: bool = True

    @property
    def setting(self) -> str | None:
        """Return what runs are compared within; None for the dense network, which has no columns.

        Compensation makes no difference where no column goes.
        """
        if not self.tile:
            return None
        plain = "" if self.compensate else " without compensation"
        return f"F({self.tile},3) keep {self.keep}{plain}"

    @property
    def name(self) -> str:
        parts = [self.method]
        if self.tile:
            parts += [f"tile{self.tile}", f"keep{round(100 * self.keep)}"]
            parts += [] if self.compensate else ["plain"]
        return "-".join([*parts, f"seed{self.seed}"])

    def make_method(self) -> Winograd3d | None:
        found = METHODS[self.method]
        if found is None:
            return None
        mode, rank = found
        return Winograd3d(
            tile=self.tile,
            mode=mode,  # type: ignore[arg-type]
            rank=rank,
            keep_ratio=self.keep,
            compensate=self.compensate,
        )


def trained(seed: int, settings: Settings, data: ClipData, folder: Path) -> nn.Module:
    """Return the dense network of a seed, trained now or found in the folder."""
    torch.manual_seed(seed)
    model = C3D(
        data.num_classes,
        frames=8,
        size=(settings.size, settings.size),
        width=settings.width,
        hidden=128,
        dropout=0.0,
        batch_norm=True,
    ).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    file = folder / f"trained-seed{seed}.pt"
    # Another process that needs it waits for it.
    with locked(folder / f"trained-seed{seed}.lock", wait=True):
        if not file.is_file():
            start = time.process_time()
            loss = _train(model, seed, 0, settings.epochs, settings.lr, settings, data, None)
            seconds = time.process_time() - start
            print(f"trained-seed{seed}: loss {loss:.4f}, {seconds:.0f} s of CPU", flush=True)
            draft = file.with_suffix(".writing")
            torch.save(model.state_dict(), draft)
            os.replace(draft, file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def run(of: Run, settings: Settings, data: ClipData, folder: Path) -> dict[str, Any]:
    """Fine-tune, finalize and evaluate.

    Returns:
        Accuracy on all held-out clips, CPU time, and the columns that the layers keep.

    Raises:
        UserError: the loss is not finite, or a layer keeps another number of columns.
    """
    model = trained(of.seed, settings, data, folder)
    start, loss = time.process_time(), math.nan
    if of.method != "start":
        method = of.make_method()
        torch.manual_seed(of.seed)
        loss = _train(
            model,
            of.seed,
            settings.epochs,
            settings.epochs + settings.tune_epochs,
            settings.tune_lr,
            settings,
            data,
            method,
        )
        if method is not None:
            model = method.finalize(model)
    kept = [len(m.kept) for m in model.modules() if isinstance(m, WinogradConv3d)]
    expected = round(of.keep * (of.tile + 2) ** 3) if of.tile else 0
    if bool(kept) != bool(of.tile) or any(count != expected for count in kept):
        raise UserError(f"{of.name}: layers keep {kept} columns: expected {expected} each")
    seconds = time.process_time() - start
    found = evaluate(model, data)
    return {
        "seed": of.seed,
        "method": of.method,
        "setting": of.setting,
        "accuracy": round(found.accuracy, 6),
        "loss": round(found.loss, 6),
        "training_loss": None if math.isnan(loss) else round(loss, 6),
        "test_clips": found.images,
        "cpu_seconds": round(seconds, 1),
        "layers": len(kept),
        "columns": expected,
    }


def _train(
    model: nn.Module,
    seed: int,
    first: int,
    end: int,
    lr: float,
    settings: Settings,
    data: ClipData,
    method: Winograd3d | None,
) -> float:
    """Train through some epochs, the learning rate down to zero; return the last one's loss."""
    loader = data.train_loader(batch_size=settings.batch_size, seed=seed, workers=0)
    steps = (end - first) * len(loader)
    if method is not None:
        model = method.attach(model, total_steps=steps, steps_per_epoch=len(loader))
    optimizer = make_optimizer("sgd", model.parameters(), lr=lr, weight_decay=settings.weight_decay)
    schedule = make_schedule("cosine", optimizer, steps, 0 if first else len(loader) // 2)
    model.train()
    mean = math.nan
    for epoch in range(first, end):
        loader.sampler.set_epoch(epoch)
        total, count = 0.0, 0
        for batch in loader:
            clip = data.normalize(batch["clip"]).contiguous(memory_format=torch.channels_last_3d)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(clip), batch["label"])
            loss.backward()
            optimizer.step()
            if method is not None:
                method.step()
            schedule.step()
            total += loss.item() * len(clip)
            count += len(clip)
        mean = total / count
        if not math.isfinite(mean):
            raise UserError(f"epoch {epoch + 1}: the loss became {mean}: give a smaller --lr")
    return mean
