"""The task that translates images: teacher, discriminators and student in one Lightning module.

An epoch of Lightning's is one phase of `gan_phases`. Each batch brings a step of those who learn in
it, by manual optimization: Lightning keeps precision, checkpoints and devices, the order of the
steps is that of the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from tenfold.data import TranslationData
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods.translation import StudentStep, TranslationMethod
from tenfold.nn.taps import forward_with_taps
from tenfold.tasks.gan_phases import learning_rate
from tenfold.tasks.gan_teachers import CycleTeacher, Made, PairedTeacher, check_losses
from tenfold.tasks.optimization import make_optimizer
from tenfold.tasks.recipe import Train
from tenfold.tasks.translation_setup import TranslationExperiment

__all__ = ["PairDataModule", "Translation", "gan_optimizer", "student_losses"]


def student_losses(
    experiment: TranslationExperiment, step: StudentStep, methods: Sequence[TranslationMethod]
) -> dict[str, Tensor]:
    """Return all losses of a student's step, weighted, by name.

    Args:
        experiment: says which losses there are beside the methods'.
        step: what was made of what.
        methods: add theirs.

    Raises:
        UserError: a loss is not finite; it is named.
    """
    losses: dict[str, Tensor] = {}
    weights = experiment.weights
    if weights["adversarial"]:
        judged = experiment.teacher.judge(step.source, step.student)
        losses["adversarial"] = weights["adversarial"] * judged
    if weights["reconstruction"]:
        wanted = step.teacher if step.target is None else step.target
        distance = (step.student - wanted).abs().mean()
        losses["reconstruction"] = weights["reconstruction"] * distance
    if experiment.perceptual is not None:
        found = experiment.perceptual(step.student, step.teacher)
        losses |= {name: loss for name, loss in found.items() if weights[name]}
    for method in methods:
        losses |= method.student_losses(step)
    check_losses(losses)
    return losses


def gan_optimizer(train: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer of one of the networks, as the recipe's `train` says."""
    return make_optimizer(
        train.optimizer, parameters, lr=train.lr, weight_decay=train.weight_decay or 0.0
    )


class Translation(pl.LightningModule):
    """Train a student generator beside its teacher.

    Args:
        experiment: the objects of the run.
    """

    def __init__(self, experiment: TranslationExperiment) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.experiment = experiment
        self.teacher: PairedTeacher | CycleTeacher = experiment.teacher
        self.student = experiment.student
        if experiment.perceptual is not None:  # moves between devices with the rest
            self.perceptual = experiment.perceptual
        self.best_teacher = float("inf")
        self.best_student = float("inf")
        self.best_state: dict[str, Tensor] | None = None
        self._attached = False

    @property
    def phase(self) -> Any:
        """The phase that is this epoch."""
        return self.experiment.phases[self.current_epoch]

    # -- methods ----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Attach the methods; checkpoints load after it."""
        if self._attached:
            return
        sizes = self.experiment.student_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_one(self.experiment.recipe.seed, -1))  # of connectors
            for method in self.experiment.methods:
                method.driven_by_engine = True
                self.student = method.attach(
                    self.student, total_steps=sum(sizes), steps_per_epoch=sizes
                )
        self._attached = True

    def finalize(self) -> nn.Module:
        """Take the methods' training state away, and return the student: the last, or the best."""
        if self.best_state is not None and self.experiment.recipe.gan.keep == "best":
            self.student.load_state_dict(self.best_state)
        for method in reversed(self.experiment.methods):
            self.student = method.finalize(self.student)
        return self.student

    # -- optimization -----------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build one optimizer for generators, one for discriminators and one for the student."""
        mine = {id(parameter) for parameter in self.student.parameters()}
        for method in self.experiment.methods:
            mine &= {id(parameter) for parameter in method.parameters_for(self.student)}
        student = [p for p in self.student.parameters() if id(p) in mine and p.requires_grad]
        train = self.experiment.recipe.train
        return [
            gan_optimizer(train, parameters)
            for parameters in (
                self.teacher.parameters_of_generators(),
                self.teacher.parameters_of_discriminators(),
                student,
            )
        ]

    def on_train_epoch_start(self) -> None:
        """Set the rate of the epoch, and draw what is random in it from seed and epoch alone."""
        recipe = self.experiment.recipe
        rate = learning_rate(
            float(recipe.train.lr or 0),
            self.phase.epoch,
            recipe.train.epochs,
            recipe.gan.decay_epochs,
            recipe.train.schedule == "linear",
        )
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        # Training mode throughout, as the authors have it, teachers and batch norms included.
        self.train()
        torch.manual_seed(mix_one(recipe.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Let those learn whose turn it is.

        Raises:
            UserError: a loss is not finite; it is named.
        """
        data = self.experiment.data
        layout = torch.channels_last
        source = data.normalize(batch["source"]).contiguous(memory_format=layout)
        target = data.normalize(batch["target"]).contiguous(memory_format=layout)
        generators, discriminators, student = self._optimizers()
        both = (generators, discriminators)
        try:
            if isinstance(self.teacher, PairedTeacher):
                every = self.experiment.recipe.gan.teacher_every
                made = self.teacher.step(
                    source, target, both, self.experiment.taps, self._backward,
                    learns=batch_idx % every == 0,
                )  # fmt: skip
                losses = made.losses | self._step_student(student, source, target, made)
            elif self.phase.learns == "teacher":
                losses = self.teacher.step(source, target, both, self._backward)
            else:
                made = self.teacher.make(source, self.experiment.taps)
                losses = self._step_student(student, source, None, made)
        except UserError as error:
            if "not finite" not in str(error):
                raise
            ids = batch["id"][:4].tolist()
            raise UserError(
                f"epoch {self.current_epoch}, batch {batch_idx}, first ids {ids}: {error}"
            ) from error
        for name, loss in losses.items():
            self.log(name, loss, on_step=False, on_epoch=True, batch_size=len(source))

    def _step_student(
        self, optimizer: LightningOptimizer, source: Tensor, target: Tensor | None, made: Made
    ) -> dict[str, Tensor]:
        image, maps = forward_with_taps(self.student, source, self.experiment.taps)
        step = StudentStep(
            source=source,
            student=image,
            teacher=made.image,
            student_maps=maps,
            teacher_maps=made.maps,
            discriminator=self.teacher.discriminator,
            paired=self.teacher.paired,
            target=target,
        )
        methods = self.experiment.methods
        losses = student_losses(self.experiment, step, self.experiment.distilling)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        self._backward(total)
        for method in methods:
            method.before_step(optimizer.optimizer)
        optimizer.step()
        for method in methods:
            method.step()
        named = {name: loss.detach() for name, loss in losses.items()}
        return {"train_loss": total.detach(), **named}

    def _optimizers(self) -> list[LightningOptimizer]:
        found: Any = self.optimizers()
        return list(found)

    @property
    def _backward(self) -> Callable[[Tensor], None]:
        return self.manual_backward

    # -- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what weights and optimizers don't hold: pools, the best so far, methods."""
        pools = [pool.state() for pool in getattr(self.teacher, "pools", ())]
        checkpoint["translation"] = {
            "pools": pools,
            "best_teacher": self.best_teacher,
            "best_student": self.best_student,
            "best_state": self.best_state,
            "methods": {m.key(): m.state_dict() for m in self.experiment.methods},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what `on_save_checkpoint` kept."""
        found = checkpoint["translation"]
        for pool, state in zip(getattr(self.teacher, "pools", ()), found["pools"], strict=True):
            pool.restore(state, self.device)
        self.best_teacher, self.best_student = found["best_teacher"], found["best_student"]
        self.best_state = found["best_state"]
        for method in self.experiment.methods:
            method.load_state_dict(found["methods"][method.key()])


class PairDataModule(pl.LightningDataModule):
    """Lend images of two domains to a Trainer.

    Args:
        data: the images.
        train: the recipe's section.
        seed: of the order and the augmentation.
    """

    def __init__(self, data: TranslationData, train: Train, seed: int) -> None:
        super().__init__()
        self.data = data
        self.recipe = train
        self.seed = seed

    def train_dataloader(self) -> Any:
        """Return shuffled, augmented batches, from the epoch that a resumed run begins with."""
        loader: Any = self.data.train_loader(
            batch_size=self.recipe.batch_size, seed=self.seed, augment=self.recipe.augment
        )
        loader.sampler.set_epoch(0 if self.trainer is None else self.trainer.current_epoch)
        return loader
