"""One training run of LTS's benchmark, in a plain loop that can stop and go on after any epoch.

Runs of one seed share the float network that they start from, the order of the data and its
augmentation. `qat` is LTS without freezing: the same quantizers, bounds and recipe.
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

from tenfold import evaluate, load
from tenfold.data import ImageData
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods import LTS
from tenfold.nn import models
from tenfold.tasks.optimization import make_optimizer, make_schedule
from training import Clock

METHODS = ("qat", "lts")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a benchmark have in common."""

    data: str
    images: int | None
    model: str
    float_epochs: int
    epochs: int
    batch_size: int
    float_lr: float
    lr: float
    device: str
    start: str | None = None  # an artifact or run that stands for all float networks

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One run: the float network of a seed, or what is trained from it."""

    seed: int
    method: str = "float"
    bits: int = 32

    @property
    def name(self) -> str:
        bits = "" if self.method == "float" else f"-{self.bits}bit"
        return f"{self.method}{bits}-seed{self.seed}"

    def make_method(self) -> LTS | None:
        if self.method == "float":
            return None
        return LTS(bits=self.bits, threshold="linear" if self.method == "lts" else 0.0)


def build(settings: Settings, data: ImageData, seed: int) -> nn.Module:
    """Build the network with the seed's weights, channels last."""
    torch.manual_seed(seed)
    name = "timm/resnet18" if settings.model == "cifar_resnet18" else settings.model
    model: Any = models.build(
        name, num_classes=data.num_classes, channels=data.channels, size=data.size
    )[0]
    if settings.model == "cifar_resnet18":  # the usual form for 32x32: no early reduction
        model.conv1 = nn.Conv2d(data.channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    placed: nn.Module = model.to(
        device=torch.device(settings.device), memory_format=torch.channels_last
    )
    return placed


class Training:
    """A run under way: what it consists of, and how it is stopped and taken up again.

    Args:
        run: which.
        settings: common to all runs.
        data: made from the settings.
        folder: for checkpoints, of these settings alone.
    """

    def __init__(self, run: Run, settings: Settings, data: ImageData, folder: Path):
        self.run, self.settings, self.data, self.folder = run, settings, data, folder
        floating = run.method == "float"
        self.model = build(settings, data, run.seed)
        self.epochs = settings.float_epochs if floating else settings.epochs
        if floating and settings.start is not None:
            self.model = load(settings.start, model=self.model)
            self.epochs = 0
        self.loader: Any = data.train_loader(batch_size=settings.batch_size, seed=run.seed)
        steps = self.epochs * len(self.loader)
        self.method = run.make_method()
        if self.method is not None:
            start = self.folder / f"float-seed{run.seed}-end.pt"
            if not start.is_file():
                raise UserError(f"{start} is missing: run the float network of seed {run.seed}")
            self.model.load_state_dict(torch.load(start, weights_only=True))
            self.method.attach(self.model, total_steps=steps, steps_per_epoch=len(self.loader))
            parameters: Any = self.method.parameters_for(self.model)
        else:
            parameters = self.model.parameters()
        lr = settings.float_lr if floating else settings.lr
        self.optimizer = make_optimizer("sgd", parameters, lr=lr)
        self.schedule = make_schedule("cosine", self.optimizer, steps)
        self.first, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []

    def load(self, file: Path) -> None:
        """Go on from a checkpoint."""
        device = torch.device(self.settings.device)
        state = torch.load(file, map_location=device, weights_only=True)
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.first, self.seconds = state["epoch"], state["seconds"]
        self.curve = state["curve"]

    def save(self, epoch: int, file: Path) -> None:
        """Write a checkpoint whole or not at all."""
        state = {
            "epoch": epoch,
            "seconds": self.seconds,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "method": None if self.method is None else self.method.state_dict(),
        }
        write(state, file)

    def epoch(self, epoch: int) -> float:
        """Train one epoch; return its mean loss."""
        device = torch.device(self.settings.device)
        total, count = torch.zeros((), device=device), 0
        self.loader.sampler.set_epoch(epoch)
        torch.manual_seed(mix_one(self.run.seed, epoch))
        self.model.train()
        for batch in self.loader:
            image = self.data.normalize(batch["image"].to(device))
            image = image.contiguous(memory_format=torch.channels_last)
            label = batch["label"].to(device)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(image), label)
            loss.backward()
            self.optimizer.step()
            if self.method is not None:
                self.method.step()
            self.schedule.step()
            total += loss.detach() * len(label)
            count += len(label)
        mean = float(total) / count
        if not math.isfinite(mean):
            raise UserError(f"epoch {epoch + 1}: the loss became {mean}: give a smaller --lr")
        return mean


def train(
    run: Run,
    settings: Settings,
    data: ImageData,
    folder: Path,
    clock: Clock,
    keep: tuple[int, ...] = (),
    test: bool = True,
) -> dict[str, Any] | None:
    """Train and evaluate one run, from its last checkpoint if there is one.

    Args:
        run: which.
        settings: common to all runs.
        data: made from the settings.
        folder: for checkpoints, of these settings alone.
        clock: when to stop.
        keep: epochs after which a checkpoint is kept as `<run>-epoch<number>.pt`.
        test: evaluate at the end.

    Returns:
        Accuracy on all held-out images, and what freezing saved; None when the time was up first,
        and a checkpoint of the last whole epoch is in the folder.
    """
    training = Training(run, settings, data, folder)
    file = folder / f"{run.name}.pt"
    if file.is_file():
        training.load(file)
    for epoch in range(training.first, training.epochs):
        if not clock.allows_an_epoch():
            return None
        start = time.monotonic()
        loss = training.epoch(epoch)
        clock.epoch = time.monotonic() - start
        training.seconds += clock.epoch
        figures = {} if training.method is None else training.method.metrics()
        training.curve.append({"loss": loss, "seconds": clock.epoch, **figures})
        shown = "".join(f", {name} {value:.3f}" for name, value in figures.items())
        print(
            f"{run.name}: epoch {epoch + 1}/{training.epochs}, loss {loss:.4f}{shown}, "
            f"{clock.epoch:.1f} s",
            flush=True,
        )
        training.save(epoch + 1, file)
        if epoch + 1 in keep:
            training.save(epoch + 1, folder / f"{run.name}-epoch{epoch + 1}.pt")
    model, method = training.model, training.method
    result: dict[str, Any] = {"seed": run.seed, "method": run.method, "bits": run.bits}
    if method is None:
        write(model.state_dict(), folder / f"{run.name}-end.pt")
    else:
        result["saved"] = {
            "updates": method.savings.updates,
            "backward": method.savings.backward,
            "backward_by_work": method.savings.backward_by_work,
        }
        model = method.finalize(model)
    if test:
        found = evaluate(model, data)
        result |= {
            "accuracy": round(found.accuracy, 6),
            "loss": round(found.loss, 6),
            "test_images": found.images,
        }
    return {**result, "seconds": round(training.seconds, 1), "curve": training.curve}


def write(state: Any, path: Path) -> None:
    """Write a file of tensors whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".writing")
    torch.save(state, draft)
    os.replace(draft, path)
