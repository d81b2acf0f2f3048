"""One run of the comparison of SMMix, in a plain loop that can stop and go on after any epoch.

Runs of one seed are pairs: the same initial weights, order of the images, augmentation, optimizer
and schedule. What differs is how a batch is mixed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold import evaluate
from tenfold.data import ImageData, create
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods import SMMix
from tenfold.nn import models
from tenfold.tasks.optimization import make_optimizer, make_schedule, spared_of
from training import Clock

# none: labels are smoothed and nothing is mixed; cutmix: timm's Mixup and CutMix by turns of a
# coin, as DeiT is trained; smmix: SMMix in CutMix's place.
METHODS = ("none", "cutmix", "smmix")
SMOOTHING = 0.1

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of the comparison have in common."""

    data: str
    images: int
    size: int
    model: str
    patch: int
    dim: int
    depth: int
    heads: int
    drop_path: float
    epochs: int
    warmup_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    augment: str
    precision: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One run: how batches are mixed, and with which seed."""

    seed: int
    method: str

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}"


def open_data(settings: Settings) -> ImageData:
    options: dict[str, object] = {"name": settings.data}
    if settings.size:
        options["size"] = [settings.size, settings.size]
    if settings.images:
        options["limit"] = settings.images
    return create(options)  # type: ignore[return-value]


def build(settings: Settings, data: ImageData, seed: int) -> nn.Module:
    """Build the network with a seed's weights; a size that is 0 is the network's own."""
    sizes = {
        "patch_size": settings.patch,
        "embed_dim": settings.dim,
        "depth": settings.depth,
        "num_heads": settings.heads,
        "drop_path_rate": settings.drop_path,
    }
    torch.manual_seed(seed)
    model, _ = models.build(
        settings.model,
        num_classes=data.num_classes,
        channels=data.channels,
        size=data.size,
        options={key: value for key, value in sizes.items() if value},
    )
    return model


def cutmix_loss(classes: int) -> Loss:
    """Return the loss of a batch that timm mixes, each time by Mixup or by CutMix."""
    from timm.data import Mixup  # type: ignore[attr-defined]

    mix = Mixup(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        switch_prob=0.5,
        label_smoothing=SMOOTHING,
        num_classes=classes,
    )

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        # timm draws from NumPy's own generator, and mixes in place.
        mixed, targets = mix(images.clone(), labels)
        return nn.functional.cross_entropy(model(mixed), targets)

    return loss


def plain_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)


def train(
    run: Run, settings: Settings, data: ImageData, folder: Path, clock: Clock
) -> dict[str, Any] | None:
    """Train and evaluate one run, from its last checkpoint if there is one.

    Returns:
        Accuracy on all held-out images; None when the time was up first, and a checkpoint of the
        last whole epoch is in the folder.

    Raises:
        UserError: the loss is not finite.
    """
    device = torch.device(settings.device)
    model = build(settings, data, run.seed).to(device)
    loader: Any = data.train_loader(
        batch_size=settings.batch_size, seed=run.seed, augment=settings.augment
    )
    steps = len(loader)
    optimizer = make_optimizer(
        "adamw", model.parameters(), settings.lr, settings.weight_decay, spared_of(model)
    )
    schedule = make_schedule(
        "cosine", optimizer, settings.epochs * steps, settings.warmup_epochs * steps
    )
    mixer = SMMix(seed=run.seed, label_smoothing=SMOOTHING) if run.method == "smmix" else None
    if mixer is not None:
        model = mixer.attach(model, total_steps=settings.epochs * steps, steps_per_epoch=steps)
        loss_of: Loss = mixer.loss
    else:
        loss_of = cutmix_loss(data.num_classes) if run.method == "cutmix" else plain_loss

    file = folder / f"{run.name}.pt"
    first, seconds, curve = 0, 0.0, []
    if file.is_file():
        state = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if mixer is not None:
            mixer.load_state_dict(state["method"])
        first, seconds, curve = state["epoch"], state["cpu_seconds"], state["curve"]

    for epoch in range(first, settings.epochs):
        if not clock.allows_an_epoch():
            return None
        wall, cpu = time.monotonic(), time.process_time()
        torch.manual_seed(mix_one(run.seed, epoch))  # for networks with dropout
        np.random.seed(mix_one(run.seed, epoch) % 2**32)  # for timm's Mixup
        loader.sampler.set_epoch(epoch)
        total, count = torch.zeros((), device=device), 0
        model.train()
        for batch in loader:
            even = len(batch["label"]) // 2 * 2  # pairs; one image may be left out
            image = data.normalize(batch["image"][:even].to(device))
            label = batch["label"][:even].to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = loss_of(model, image, label)
            loss.backward()
            optimizer.step()
            if mixer is not None:
                mixer.step()
            schedule.step()
            total += loss.detach() * len(label)
            count += len(label)
        mean = float(total) / count
        if not math.isfinite(mean):
            raise UserError(f"{run.name}: the loss became {mean}: give a smaller --lr")
        clock.epoch = time.monotonic() - wall
        seconds += time.process_time() - cpu
        curve.append(round(mean, 4))
        print(
            f"{run.name}: epoch {epoch + 1}/{settings.epochs}, loss {mean:.4f}, "
            f"{clock.epoch:.1f} s",
            flush=True,
        )
        _save(
            {
                "epoch": epoch + 1,
                "cpu_seconds": seconds,
                "curve": curve,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "method": None if mixer is None else mixer.state_dict(),
            },
            file,
        )

    if mixer is not None:
        model = mixer.finalize(model)
    found = evaluate(model, data)
    return {
        "seed": run.seed,
        "method": run.method,
        "accuracy": round(found.accuracy, 6),
        "loss": round(found.loss, 6),
        "test_images": found.images,
        "train_images": data.train_size,
        "cpu_seconds": round(seconds, 1),
        "curve": curve,
    }


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".writing")
    torch.save(state, draft)
    os.replace(draft, path)
