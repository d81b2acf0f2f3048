"""One training run of a comparison, in a plain loop that can stop and go on after any epoch.

Runs of one seed are pairs: the same initial weights, order of the data and augmentation. Magnitude
is dense up to half time; what a dense run kept from there is taken instead of computing it again.
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

from rivals import SRSTE, Magnitude, RandomRemoval
from tenfold import evaluate
from tenfold.data import ImageData
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods import LBC, Method
from tenfold.nn import models
from tenfold.nn.blocks import to_blocks
from tenfold.tasks.optimization import make_optimizer, make_schedule

METHODS = ("dense", "magnitude", "srste", "lbc")
CONTROL = "random"  # run when asked for by name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a comparison have in common."""

    data: str
    images: int | None
    model: str
    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    preset: str
    precision: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One run: what is done to the network, and with which seed."""

    seed: int
    method: str
    n: int = 0
    m: int = 0

    @property
    def pattern(self) -> str | None:
        return None if self.method == "dense" else f"{self.n}:{self.m}"

    @property
    def name(self) -> str:
        pattern = "" if self.pattern is None else f"-{self.n}of{self.m}"
        return f"{self.method}{pattern}-seed{self.seed}"

    def make_method(self, preset: str) -> Method | None:
        if self.method == "magnitude":
            return Magnitude(n=self.n, m=self.m)
        if self.method == "srste":
            return SRSTE(n=self.n, m=self.m)
        if self.method == CONTROL:
            return RandomRemoval(n=self.n, m=self.m, preset=preset)
        if self.method == "lbc":
            return LBC(n=self.n, m=self.m, preset=preset)
        return None


class Clock:
    """Tells whether another epoch fits into the minutes that are left."""

    def __init__(self, minutes: float | None = None):
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.epoch = 0.0

    def allows_an_epoch(self) -> bool:
        return time.monotonic() + self.epoch < self.end


def train(
    run: Run, settings: Settings, data: ImageData, folder: Path, clock: Clock
) -> dict[str, Any] | None:
    """Train, finalize and evaluate one run, from its last checkpoint if there is one.

    Args:
        run: which.
        settings: common to all runs.
        data: made from the settings.
        folder: for checkpoints, of these settings alone.
        clock: when to stop.

    Returns:
        Accuracy on all held-out images, and how full the treated layers' blocks are; None when the
        time was up first, and a checkpoint of the last whole epoch is in the folder.

    Raises:
        UserError: the loss is not finite, or a block has more than N weights that are not zero.
    """
    device = torch.device(settings.device)
    torch.manual_seed(run.seed)
    model, _ = models.build(
        settings.model, num_classes=data.num_classes, channels=data.channels, size=data.size
    )
    model = model.to(device=device, memory_format=torch.channels_last)
    loader = data.train_loader(batch_size=settings.batch_size, seed=run.seed)
    optimizer = make_optimizer(settings.optimizer, model.parameters(), lr=settings.lr)
    schedule = make_schedule("cosine", optimizer, settings.epochs * len(loader))
    method = run.make_method(settings.preset)
    half = settings.epochs // 2
    attach_at = half if run.method == "magnitude" else 0
    treated = [layer.name for layer in method.plan(model) if layer.treatment] if method else []
    active: Method | None = None

    def attach() -> Method | None:
        if method is not None:
            steps = (settings.epochs - attach_at) * len(loader)
            method.attach(model, total_steps=steps, steps_per_epoch=len(loader))
        return method

    own, dense = folder / f"{run.name}.pt", folder / f"dense-seed{run.seed}-half.pt"
    first, seconds = 0, 0.0
    source = own if own.is_file() or run.method != "magnitude" else dense
    if source.is_file():
        state = torch.load(source, map_location=device, weights_only=True)
        if state["method"] is not None:
            active = attach()
            active.load_state_dict(state["method"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds = state["epoch"], state["seconds"]

    for epoch in range(first, settings.epochs):
        if not clock.allows_an_epoch():
            return None
        if active is None and epoch >= attach_at:
            active = attach()
        start = time.monotonic()
        torch.manual_seed(mix_one(run.seed, epoch))  # for networks with dropout
        loss = _epoch(model, loader, epoch, data, settings, optimizer, schedule, active)
        clock.epoch = time.monotonic() - start
        seconds += clock.epoch
        print(
            f"{run.name}: epoch {epoch + 1}/{settings.epochs}, loss {loss:.4f}, "
            f"{clock.epoch:.1f} s",
            flush=True,
        )
        state = {
            "epoch": epoch + 1,
            "seconds": seconds,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "method": None if active is None else active.state_dict(),
        }
        _save(state, own)
        if run.method == "dense" and epoch + 1 == half:
            _save(state, dense)

    if active is not None:
        model = active.finalize(model)
    blocks = count_blocks(model, treated, run.m)
    fullest = max((kind["most"] for kind in blocks.values()), default=0)
    if fullest > run.n:
        raise UserError(f"{run.name}: a block of {run.m} has {fullest} weights: expected {run.n}")
    found = evaluate(model, data)
    return {
        "seed": run.seed,
        "method": run.method,
        "pattern": run.pattern,
        "accuracy": round(found.accuracy, 6),
        "loss": round(found.loss, 6),
        "test_images": found.images,
        "seconds": round(seconds, 1),
        "blocks": blocks,
    }


def _epoch(
    model: nn.Module,
    loader: Any,
    epoch: int,
    data: ImageData,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    method: Method | None,
) -> float:
    """Train one epoch; return its mean loss."""
    device = torch.device(settings.device)
    total, count = torch.zeros((), device=device), 0
    loader.sampler.set_epoch(epoch)
    model.train()
    for batch in loader:
        image = data.normalize(batch["image"].to(device))
        image = image.contiguous(memory_format=torch.channels_last)
        label = batch["label"].to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        if method is not None:
            method.step()
        schedule.step()
        total += loss.detach() * len(label)
        count += len(label)
    mean = float(total) / count
    if not math.isfinite(mean):
        raise UserError(f"epoch {epoch + 1}: the loss became {mean}: give a smaller --lr")
    return mean


def count_blocks(model: nn.Module, names: list[str], m: int) -> dict[str, dict[str, int]]:
    """Count the weights of blocks of `m` that are not zero, by the last part of layers' names."""
    found: dict[str, dict[str, int]] = {}
    for name in names:
        weight: Any = model.get_submodule(name).weight
        filled = to_blocks(weight.detach() != 0, m).sum(dim=1)
        kind = found.setdefault(name.rpartition(".")[2], {"layers": 0, "least": m, "most": 0})
        kind["layers"] += 1
        kind["least"] = min(kind["least"], int(filled.min()))
        kind["most"] = max(kind["most"], int(filled.max()))
    return found


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".writing")
    torch.save(state, draft)
    os.replace(draft, path)
