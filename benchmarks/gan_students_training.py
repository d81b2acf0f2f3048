"""Students of several methods beside one online teacher, in a loop that can stop after any epoch.

A student's step touches neither the teacher nor its discriminators, so that each student learns
exactly what it would learn alone with that teacher. All have the same initial weights, see the same
images, and differ in their losses alone.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data import TranslationData
from tenfold.data.randomness import mix_one
from tenfold.measure.image_features import to_uint8
from tenfold.methods.perceptual import Perceptual
from tenfold.methods.translation import StudentStep
from tenfold.nn.taps import forward_with_taps
from tenfold.tasks.gan_phases import Phase, learning_rate
from tenfold.tasks.gan_teachers import CycleTeacher, Made, PairedTeacher
from tenfold.tasks.translation import gan_optimizer, student_losses
from tenfold.tasks.translation_evaluation import (
    Reference,
    TranslationEvaluation,
    evaluate_generator,
    in_evaluation,
)
from tenfold.tasks.translation_setup import TranslationExperiment, set_up_translation
from training import Clock

# Sets by name: whether they are of pairs, and whether their licence lets pictures be published.
SETS = {"edges2clothes": (True, True), "lemon2orange": (False, False)}
STUDENTS = ("plain", "omgd", "dcd", "crd", "dcd+crd")
# OMGD's weight of channel means: its authors' for pairs, and for horse2zebra.
CHANNEL = {True: 100.0, False: 500.0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of the comparison have in common; `extractor` is the hash of its weights."""

    size: int
    limit: int
    teacher: int
    student: int
    ndf: int
    batch_size: int
    lr: float
    style: float
    feature: float
    pairs_epochs: int
    unpaired_epochs: int
    round_epochs: int
    student_epochs: int
    extractor: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """All students of one set and seed."""

    seed: int
    set: str

    @property
    def name(self) -> str:
        return f"{self.set}-seed{self.seed}"


def recipe_of(student: str, settings: Settings, run: Run, extractor: str) -> dict[str, Any]:
    """Return the recipe that would train one of the students alone."""
    paired, _ = SETS[run.set]
    sections: dict[str, dict[str, Any]] = {"omgd": {"channel": CHANNEL[paired]}}
    methods = {key: sections.get(key, {}) for key in student.split("+") if key != "plain"}
    gan: dict[str, Any] = {
        "teacher": {"ngf": settings.teacher},
        "ndf": settings.ndf,
        "round_epochs": settings.round_epochs,
        "student_epochs": settings.student_epochs,
    }
    if methods:
        gan |= {"style": settings.style, "feature": settings.feature, "perceptual": extractor}
    return {
        "task": "translation",
        "data": run.set,
        "model": {"name": "mobile_resnet_generator", "ngf": settings.student},
        "methods": methods,
        "gan": gan,
        "train": {
            "epochs": settings.pairs_epochs if paired else settings.unpaired_epochs,
            "batch_size": settings.batch_size,
            "lr": settings.lr,
        },
        "seed": run.seed,
    }


class OnceATeacher(nn.Module):
    """Run an extractor once on the teacher's images, however many students ask for their maps."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.last: tuple[Tensor, Any] | None = None

    def forward(self, images: Tensor) -> Any:
        if images.requires_grad:
            return self.extractor(images)
        if self.last is None or self.last[0] is not images:
            self.last = (images, self.extractor(images))
        return self.last[1]


class Student:
    """One student with its losses and its optimizer.

    Args:
        experiment: its networks; those of the teacher are shared with the other students.
        seed: of what its methods draw.
    """

    def __init__(self, experiment: TranslationExperiment, seed: int) -> None:
        self.experiment = experiment
        self.methods = experiment.methods
        self.network = experiment.student.to(memory_format=torch.channels_last)
        mine = list(self.network.parameters())
        torch.manual_seed(seed)
        steps = experiment.student_steps
        for method in self.methods:
            method.driven_by_engine = True  # there are several optimizers in the loop
            self.network = method.attach(
                self.network, total_steps=sum(steps), steps_per_epoch=steps
            )
        self.optimizer = gan_optimizer(experiment.recipe.train, mine)
        self.losses: dict[str, float] = {}  # means over the last epoch
        self.sums: dict[str, Tensor] = {}

    def step(self, source: Tensor, target: Tensor | None, made: Made) -> None:
        """Take one step, as the engine does."""
        teacher = self.experiment.teacher
        image, maps = forward_with_taps(self.network, source, self.experiment.taps)
        step = StudentStep(
            source=source,
            student=image,
            teacher=made.image,
            student_maps=maps,
            teacher_maps=made.maps,
            discriminator=teacher.discriminator,
            paired=teacher.paired,
            target=target,
        )
        losses = student_losses(self.experiment, step, self.experiment.distilling)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        for method in self.methods:
            method.before_step(self.optimizer)
        self.optimizer.step()
        for method in self.methods:
            method.step()
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()

    def end_epoch(self, steps: int) -> None:
        self.losses = {name: round(float(total) / steps, 5) for name, total in self.sums.items()}
        self.sums = {}

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "methods": [method.state_dict() for method in self.methods],
            "losses": self.losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(saved)
        self.losses = state["losses"]


class SideBySide:
    """All students of a run and their teacher.

    Args:
        run: the set and the seed.
        settings: common to all runs.
        data: of the set.
        extractor: of the style and feature losses, by path.
        file: of the checkpoint, which is gone on from where there is one.
    """

    def __init__(
        self, run: Run, settings: Settings, data: TranslationData, extractor: str, file: Path
    ) -> None:
        self.run, self.settings, self.data, self.file = run, settings, data, file
        experiments = {
            name: set_up_translation(recipe_of(name, settings, run, extractor), data=data)
            for name in STUDENTS
        }
        first = experiments[STUDENTS[0]]
        self.phases: list[Phase] = first.phases
        self.recipe = first.recipe
        self.teacher: PairedTeacher | CycleTeacher = first.teacher
        self.teacher.to(memory_format=torch.channels_last)
        self.taps = tuple(dict.fromkeys(tap for e in experiments.values() for tap in e.taps))
        once: OnceATeacher | None = None
        for experiment in experiments.values():
            experiment.teacher = self.teacher
            for method in experiment.distilling:
                method.use_network("teacher", self.teacher.generator)
                method.use_network("discriminator", self.teacher.discriminator)
            if experiment.perceptual is not None:
                once = once or OnceATeacher(experiment.perceptual.extractor)
                weights = experiment.weights
                experiment.perceptual = Perceptual(
                    once, style=weights["style"], feature=weights["feature"]
                )
        self.students = {name: Student(e, run.seed) for name, e in experiments.items()}
        self.optimizers = (
            gan_optimizer(self.recipe.train, self.teacher.parameters_of_generators()),
            gan_optimizer(self.recipe.train, self.teacher.parameters_of_discriminators()),
        )
        loader: Any = data.train_loader(batch_size=settings.batch_size, seed=run.seed)
        self.loader = loader
        self.done, self.cpu_seconds = 0, 0.0
        if file.is_file():
            self._restore(torch.load(file, map_location="cpu", weights_only=True))

    @property
    def finished(self) -> bool:
        return self.done == len(self.phases)

    def train(self, clock: Clock) -> bool:
        """Train to the end, or as far as the clock allows; return whether it is the end."""
        while not self.finished:
            if not clock.allows_an_epoch():
                return False
            wall, cpu = time.monotonic(), time.process_time()
            self.epoch()
            clock.epoch = time.monotonic() - wall
            self.cpu_seconds += time.process_time() - cpu
            self._save()
            print(
                f"{self.run.name}: epoch {self.done}/{len(self.phases)} "
                f"({self.phases[self.done - 1].learns}), {clock.epoch:.1f} s",
                flush=True,
            )
        return True

    def epoch(self) -> None:
        """Run one phase: an epoch of the teacher, of the students, or of both."""
        phase, train = self.phases[self.done], self.recipe.train
        rate = learning_rate(float(train.lr or 0), phase.epoch, train.epochs, None, True)
        for optimizer in (*self.optimizers, *(s.optimizer for s in self.students.values())):
            for group in optimizer.param_groups:
                group["lr"] = rate
        if phase.begins_round and isinstance(self.teacher, CycleTeacher):
            self.teacher.take_snapshot()  # of the latest teacher: none is chosen by its figures
        torch.manual_seed(mix_one(self.run.seed, self.done))  # for the pools of made images
        self.teacher.train()
        for student in self.students.values():
            student.network.train()
        self.loader.sampler.set_epoch(self.done)
        for batch in self.loader:
            self._step(phase, batch)
        if phase.has_student:
            for student in self.students.values():
                student.end_epoch(len(self.loader))
        self.done += 1

    def _step(self, phase: Phase, batch: dict[str, Tensor]) -> None:
        source, target = (
            self.data.normalize(batch[name]).contiguous(memory_format=torch.channels_last)
            for name in ("source", "target")
        )
        teacher = self.teacher
        if isinstance(teacher, PairedTeacher):
            made = teacher.step(source, target, self.optimizers, self.taps)
        elif phase.learns == "teacher":
            teacher.step(source, target, self.optimizers)
            return
        else:
            made = teacher.make(source, self.taps)
        for student in self.students.values():
            student.step(source, target if teacher.paired else None, made)

    def evaluate(self, reference: Reference) -> dict[str, TranslationEvaluation]:
        """Return the figures of input, teacher and all students on the held-out images."""
        found = {"input": evaluate_generator(lambda images: images, self.data, reference)}
        for name, network in self._networks().items():
            with in_evaluation(network):
                found[name] = evaluate_generator(network, self.data, reference)
        return found

    def pictures(self, count: int) -> tuple[list[str], Tensor]:
        """Return titles of columns and a grid, uint8 `(3, h, w)`, of some held-out images."""
        chosen = torch.linspace(0, self.data.test_size - 1, count).round().long().tolist()
        networks, rows = self._networks(), []
        paired = self.data.paired
        for number, batch in enumerate(self.data.test_loader(batch_size=1)):
            if number not in chosen:
                continue
            row, source = [batch["source"][0]], self.data.normalize(batch["source"])
            for network in networks.values():
                with in_evaluation(network), torch.no_grad():
                    row.append(to_uint8(network(source))[0])
            rows.append(torch.cat([*row, *([batch["target"][0]] if paired else [])], dim=2))
        return ["input", *networks, *(["target"] if paired else [])], torch.cat(rows, dim=1)

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "teacher": self.teacher.source,
            **{name: student.network for name, student in self.students.items()},
        }

    def _save(self) -> None:
        """Write a checkpoint whole or not at all."""
        pools = [pool.state() for pool in getattr(self.teacher, "pools", ())]
        state = {
            "done": self.done,
            "cpu_seconds": self.cpu_seconds,
            "teacher": self.teacher.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "pools": pools,
            "students": {name: student.state() for name, student in self.students.items()},
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".writing")
        torch.save(state, draft)
        os.replace(draft, self.file)

    def _restore(self, state: dict[str, Any]) -> None:
        self.done, self.cpu_seconds = state["done"], state["cpu_seconds"]
        self.teacher.load_state_dict(state["teacher"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for pool, kept in zip(getattr(self.teacher, "pools", ()), state["pools"], strict=True):
            pool.restore(kept, torch.device("cpu"))
        for name, student in self.students.items():
            student.restore(state["students"][name])
