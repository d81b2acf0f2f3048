"""The accuracy part of benchmarks/supervit.py: one network for all budgets, or one for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paired import difference, spread
from resumable import Results, locked
from tenfold.data import ImageData, create
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods import SuperViT, SuperViTTraining
from tenfold.nn import models
from tenfold.tasks.optimization import make_optimizer, make_schedule, spared_of
from training import Clock

SMALL: dict[str, Any] = {
    "data": "npz:../shared/data/tinyimagenet50",
    "images": 4000,
    "model": "timm/vit_tiny_patch16_224",
    "options": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "sizes": [32, 48, 64],
    "keep_rates": [0.5, 0.7, 1.0],
    "drop_blocks": [1, 2],
    "epochs": 8,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup_epochs": 1,
    "augment": "auto",
    "device": "cpu",
    "precision": "fp32",
}
FULL: dict[str, Any] = {
    **SMALL,
    "images": 0,
    "model": "timm/deit_small_patch16_224",
    "options": {"patch_size": 8, "drop_path_rate": 0.1},
    "sizes": [32, 48, 64],
    "drop_blocks": [3, 6, 9],
    "epochs": 300,
    "batch_size": 512,
    "warmup_epochs": 5,
    "augment": "randaugment",
    "device": "cuda",
    "precision": "bf16",
}


@dataclass(frozen=True)
class Run:
    """One network: a SuperViT, or one that is trained in a single cell."""

    seed: int
    kind: str  # supervit, plain or pruned
    size: int = 0
    rate: float = 1.0

    @property
    def label(self) -> str:
        if self.kind == "supervit":
            return self.kind
        return f"{self.kind} {self.size}" + (f" {self.rate:g}" if self.kind == "pruned" else "")

    @property
    def name(self) -> str:
        return f"{self.label.replace(' ', '-')}-seed{self.seed}"


def grid(settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Run]:
    found = []
    for seed in seeds:
        found.append(Run(seed, "supervit"))
        found += [Run(seed, "plain", size) for size in settings["sizes"]]
        largest = max(settings["sizes"])
        found += [Run(seed, "pruned", largest, rate) for rate in settings["keep_rates"] if rate < 1]
    return found


def train(
    run: Run, settings: Mapping[str, Any], data: ImageData, folder: Path, clock: Clock
) -> dict[str, Any] | None:
    """Train and evaluate one run; None when the time was up: the last epoch is kept."""
    device = torch.device(settings["device"])
    torch.manual_seed(run.seed)
    largest = max(settings["sizes"])
    side = run.size if run.kind == "plain" else largest
    model, _ = models.build(
        settings["model"],
        num_classes=data.num_classes,
        channels=data.channels,
        size=(side, side),
        options=settings["options"],
    )
    nn.init.trunc_normal_(model.cls_token, std=0.02)
    if run.kind != "plain":
        model = SuperViT(
            model,
            sizes=settings["sizes"],
            keep_rates=settings["keep_rates"],
            drop_blocks=settings["drop_blocks"],
            tables="fresh",
        )
    model = model.to(device)
    loader = data.train_loader(
        batch_size=settings["batch_size"], seed=run.seed, augment=settings["augment"]
    )
    steps = settings["epochs"] * len(loader)
    optimizer = make_optimizer(
        "adamw", model.parameters(), lr=settings["lr"], weight_decay=0.05, spared=spared_of(model)
    )
    schedule = make_schedule("cosine", optimizer, steps, settings["warmup_epochs"] * len(loader))
    method = SuperViTTraining(seed=run.seed) if run.kind == "supervit" else None
    if method is not None:
        method.attach(model, total_steps=steps, steps_per_epoch=len(loader))
    checkpoint, first, seconds = folder / f"{run.name}.pt", 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if method is not None:
            method.load_state_dict(state["method"])
        first, seconds = state["epoch"], state["seconds"]

    for epoch in range(first, settings["epochs"]):
        if not clock.allows_an_epoch():
            return None
        start = time.monotonic()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        torch.manual_seed(mix_one(run.seed, epoch))
        model.train()
        for batch in loader:
            images = data.normalize(batch["image"].to(device))
            labels = batch["label"].to(device)
            optimizer.zero_grad()
            with torch.autocast(
                device.type, torch.bfloat16, enabled=settings["precision"] == "bf16"
            ):
                if method is not None:
                    loss = method.loss(model, images, labels)
                else:
                    loss = nn.functional.cross_entropy(_forward(run, model, images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            if method is not None:
                method.step()
        if not math.isfinite(float(loss.detach())):
            raise UserError(f"{run.name}: the loss became {float(loss.detach())}")
        clock.epoch = time.monotonic() - start
        seconds += clock.epoch
        print(
            f"{run.name}: epoch {epoch + 1}/{settings['epochs']}, loss {float(loss):.3f}, "
            f"{clock.epoch:.1f} s",
            flush=True,
        )
        state = {
            "epoch": epoch + 1,
            "seconds": seconds,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "method": None if method is None else method.state_dict(),
        }
        draft = checkpoint.with_suffix(".writing")
        torch.save(state, draft)
        os.replace(draft, checkpoint)

    accuracy, tested = _evaluate(run, model.eval(), data, device)
    checkpoint.unlink(missing_ok=True)
    return {
        "seed": run.seed,
        "label": run.label,
        "accuracy": {key: round(value, 6) for key, value in accuracy.items()},
        "test_images": tested,
        "seconds": round(seconds, 1),
    }


def _forward(run: Run, model: nn.Module, images: Tensor) -> Tensor:
    if run.kind == "plain":
        logits: Tensor = model(_resized(images, run.size))
        return logits
    pruned: Tensor = model(images, run.size, run.rate)
    return pruned


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=True)


def _evaluate(
    run: Run, model: Any, data: ImageData, device: torch.device
) -> tuple[dict[str, float], int]:
    """Return the accuracy of every cell, or of the one that was trained, on held-out images."""
    cells = model.cells if run.kind == "supervit" else [(run.size, run.rate)]
    right, count = dict.fromkeys(cells, 0), 0
    with torch.no_grad():
        for batch in data.test_loader(batch_size=256):
            images, labels = data.normalize(batch["image"]).to(device), batch["label"]
            if run.kind == "supervit":
                outputs = []
                for _, group in itertools.groupby(cells, key=lambda cell: cell[0]):
                    outputs += model(images, cells=list(group))
            else:
                outputs = [_forward(run, model, images)]
            for cell, logits in zip(cells, outputs, strict=True):
                right[cell] += int((logits.argmax(dim=1).cpu() == labels).sum())
            count += len(labels)
    return {f"{size} {rate:g}": right[size, rate] / count for size, rate in cells}, count


def compare(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return each cell's accuracy in the SuperViT, and beside the network trained for it alone."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs.values():
        for cell, accuracy in run["accuracy"].items():
            values.setdefault(run["label"].partition(" ")[0], {}).setdefault(cell, {})[
                run["seed"]
            ] = accuracy
    found: dict[str, Any] = {}
    for cell, ours in values.get("supervit", {}).items():
        alone = {**values.get("plain", {}), **values.get("pruned", {})}.get(cell)
        found[cell] = {
            "supervit": spread(ours),
            "alone": None if alone is None else spread(alone),
            "minus": None if alone is None else difference(ours, alone),
        }
    return found


def macs(settings: Mapping[str, Any], data: ImageData) -> dict[str, int]:
    model = SuperViT(
        settings["model"],
        sizes=settings["sizes"],
        keep_rates=settings["keep_rates"],
        drop_blocks=settings["drop_blocks"],
        num_classes=data.num_classes,
        channels=data.channels,
        options=settings["options"],
    )
    return {f"{size} {rate:g}": model.macs(size, rate) for size, rate in model.cells}


def run_accuracy(
    preset: Mapping[str, Any],
    seeds: Sequence[int],
    minutes: float | None,
    output: str,
    command: str,
) -> int:
    settings = {**preset, "images": preset["images"] or None}
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--full needs a GPU, and PyTorch sees none here")
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    folder = Path("runs") / f"{output}-{digest}"
    limit = {} if settings["images"] is None else {"limit": settings["images"]}
    data = create({"name": settings["data"], **limit})
    costs = macs(settings, data)
    gpu = torch.cuda.get_device_name() if settings["device"] == "cuda" else None
    results = Results(
        output,
        settings,
        command,
        folder,
        lambda runs: {"cells": compare(runs), "macs": costs},
        gpu,
    )
    clock = Clock(minutes)
    for run in grid(settings, seeds):
        with locked(folder / f"{run.name}.lock") as mine:
            if not mine or run.name in results.runs:
                continue
            found = train(run, settings, data, folder, clock)
            if found is None:
                return 0
            results.add(run.name, found)
            print(f"{run.name}: {found['accuracy']}, {found['seconds']} s", flush=True)
    return 0
