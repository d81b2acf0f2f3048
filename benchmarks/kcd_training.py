"""One run of the comparison of KCD, epoch by epoch, so that runs of a seed can take turns.

All runs are KCD with other fields: the student alone asks no teacher, plain distillation keeps
every sample, and random dropping keeps as many as KCD, chosen by chance and without mixed images.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tenfold import evaluate
from tenfold.data import ImageData
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods import KCD, TrainingSet
from tenfold.methods.knowledge import KnowledgeSet
from tenfold.nn import models
from tenfold.tasks.callback import begin_epoch
from tenfold.tasks.optimization import make_optimizer, make_schedule
from tenfold.tasks.setup import training_set

METHODS = ("student", "kd", "kcd", "random")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a comparison have in common."""

    data: str
    images: int | None
    teacher: str
    student: str
    epochs: int
    teacher_images: int | None
    teacher_epochs: int
    stages: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: str
    augment: str
    cache: bool
    precision: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One run: which seed, what it trains on, and whether the teacher's answers are kept."""

    seed: int
    method: str
    ratio: float = 1.0
    cached: bool = False

    @property
    def label(self) -> str:
        """The method with its ratio, such as `kcd 0.7`."""
        return self.method if self.ratio == 1 else f"{self.method} {self.ratio:g}"

    @property
    def name(self) -> str:
        return f"{self.label.replace(' ', '-')}{'' if self.cached else '-asking'}-seed{self.seed}"


@dataclass(kw_only=True, eq=False)
class RandomDropping(KCD):
    """KCD's schedule with samples that stay by chance: what the choice itself is worth."""

    seed: int = 0

    def prepare(self, model: nn.Module, data: TrainingSet, epochs: int) -> None:
        super().prepare(model, data, epochs)
        assert self._prepared is not None
        self._prepared.knowledge = RandomSet(data, self.keep_ratio, self.stages, self.seed)


class RandomSet(KnowledgeSet):
    """A knowledge set whose samples stay by chance, and are never mixed."""

    def __init__(self, data: TrainingSet, keep_ratio: float, stages: int, seed: int):
        super().__init__(
            data,
            keep_ratio=keep_ratio,
            stages=stages,
            visit_power=0.0,
            mix_max=0.0,
            revive=False,
            drop_window="step",
            mix_source="current",
            unseen="keep",
        )
        self.seed = seed

    def condense(self) -> None:
        self.done += 1
        self.revived.append(0)
        generator = torch.Generator().manual_seed(mix_one(self.seed, self.done))
        order = torch.randperm(len(self.keep), generator=generator)
        self.keep = self.ids[order[: self.sizes[self.done]]]


def make_method(run: Run, settings: Settings, teacher: nn.Module, cache: Path) -> KCD:
    """Make what a run does to its samples."""
    fields: dict[str, Any] = {"teacher": teacher, "stages": settings.stages}
    if run.method == "student":
        return KCD(**fields, keep_ratio=1.0, label_weight=1.0, logit_weight=0.0)
    if run.cached:
        fields["teacher_cache"] = str(cache)
    if run.method == "random":
        return RandomDropping(**fields, keep_ratio=run.ratio, augment_max=0.0, seed=run.seed)
    return KCD(**fields, keep_ratio=run.ratio)


class Training:
    """A run that goes on from its last checkpoint, one epoch at a time.

    Args:
        run: which.
        settings: common to all runs.
        data: made from the settings.
        folder: for checkpoints, of these settings alone.
        teacher: evaluated and frozen; None: the run trains the teacher itself.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        data: ImageData,
        folder: Path,
        teacher: nn.Module | None,
    ):
        self.run, self.settings, self.data = run, settings, data
        self.file = folder / f"{run.name}.pt"
        self.cache = folder / f"{run.name}-answers"
        self.device = torch.device(settings.device)
        self.epochs = settings.epochs if teacher is not None else settings.teacher_epochs
        torch.manual_seed(run.seed)
        name = settings.student if teacher is not None else settings.teacher
        model = build(name, data).to(self.device, memory_format=torch.channels_last)
        self.method = None if teacher is None else make_method(run, settings, teacher, self.cache)
        mixing, views = None, False
        sizes = [data.train_size] * self.epochs
        if self.method is not None:
            self.method.prepare(model, training_set(data, settings.augment), self.epochs)
            mixing, views = self.method.mixing(), self.method.wants_views()
            sizes = self.method.epoch_samples(data.train_size, self.epochs)
        steps = [math.ceil(size / settings.batch_size) for size in sizes]
        if self.method is not None:
            self.method.attach(model, total_steps=sum(steps), steps_per_epoch=steps)
        self.model = model
        self.loader: Any = data.train_loader(
            batch_size=settings.batch_size,
            seed=run.seed,
            augment=settings.augment,
            mixing=mixing,
            views=views,
        )
        self.optimizer = make_optimizer(
            "sgd", model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.schedule = _schedule(settings.schedule, self.optimizer, steps)
        self.done = 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        if self.file.is_file():
            self._resume()
        elif self.cache.is_dir():
            shutil.rmtree(self.cache)  # of an attempt that came to no checkpoint

    def _resume(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.done = state["epoch"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]

    @property
    def finished(self) -> bool:
        return self.done >= self.epochs

    def epoch(self) -> float:
        """Train one epoch, condensing included; return its seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        torch.manual_seed(mix_one(self.run.seed, self.done))
        loss = self._epoch()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(round(time.perf_counter() - wall, 4))
        self.cpu_seconds.append(round(time.process_time() - cpu, 4))
        self.done += 1
        print(
            f"{self.run.name}: epoch {self.done}/{self.epochs}, loss {loss:.4f}, "
            f"{self.seconds[-1]:.1f} s",
            flush=True,
        )
        self._save()
        return self.seconds[-1]

    def _epoch(self) -> float:
        methods = [] if self.method is None else [self.method]
        self.loader.sampler.set_epoch(self.done)
        begin_epoch(methods, self.loader, self.done)
        total, count = torch.zeros((), device=self.device), 0
        self.model.train()
        for batch in self.loader:
            self.optimizer.zero_grad()
            loss = self._loss(batch)
            loss.backward()
            self.optimizer.step()
            if self.method is not None:
                self.method.step()
            self.schedule.step()
            total += loss.detach() * len(batch["label"])
            count += len(batch["label"])
        mean = float(total) / count
        if not math.isfinite(mean):
            raise UserError(f"{self.run.name}: the loss became {mean}: give a smaller --lr")
        return mean

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        image = self.data.normalize(batch["image"].to(self.device, non_blocking=True))
        image = image.contiguous(memory_format=torch.channels_last)
        label = batch["label"].to(self.device, non_blocking=True)
        reduced = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced):
            if self.method is None:
                return nn.functional.cross_entropy(self.model(image), label)
            return self.method.loss(image, label, batch["id"], views=batch.get("view"))

    def _save(self) -> None:
        state = {
            "epoch": self.done,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "method": None if self.method is None else self.method.state_dict(),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".writing")
        torch.save(state, draft)
        os.replace(draft, self.file)

    def result(self) -> dict[str, Any]:
        """Finalize, evaluate on all held-out images, and say what it took."""
        assert self.method is not None
        forwards = self.method.forwards
        expected = sum(self.method.epoch_samples(self.data.train_size, self.epochs))
        if forwards["student"] != expected:
            raise UserError(
                f"{self.run.name}: {forwards['student']} forward passes of the student: expected "
                f"{expected}"
            )
        model = self.method.finalize(self.model)
        found = evaluate(model, self.data)
        return {
            "seed": self.run.seed,
            "method": self.run.label,
            "cached": self.run.cached,
            "accuracy": round(found.accuracy, 6),
            "loss": round(found.loss, 6),
            "test_images": found.images,
            "forwards": forwards,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }

    def clear(self) -> None:
        """Remove checkpoint and answers."""
        self.file.unlink(missing_ok=True)
        shutil.rmtree(self.cache, ignore_errors=True)


def build(name: str, data: ImageData) -> nn.Module:
    model, _ = models.build(
        name, num_classes=data.num_classes, channels=data.channels, size=data.size
    )
    return model


def _schedule(name: str, optimizer: torch.optim.Optimizer, steps: list[int]) -> LambdaLR:
    total = sum(steps)
    if name != "paper":  # in few steps, a ResNet-56 comes to nothing without a warm-up
        return make_schedule(name, optimizer, total, warmup_steps=steps[0])
    # a tenth after 150, 180 and 210 of 240 epochs

    def factor(step: int) -> float:
        return 0.1 ** sum(step >= share * total for share in (150 / 240, 180 / 240, 210 / 240))

    return LambdaLR(optimizer, factor)
