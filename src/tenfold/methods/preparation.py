"""What KCD finds out about networks and data ahead of a run, and makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.methods.condensation import check_logits
from tenfold.methods.distillation import Distillation, Weights
from tenfold.methods.distillers import DISTILLERS
from tenfold.methods.feature_loss import FeatureLoss, check_features
from tenfold.methods.features import Taps, evaluated
from tenfold.methods.knowledge import KnowledgeSet
from tenfold.methods.teacher import Teacher
from tenfold.methods.teacher_cache import TeacherCache, open_cache
from tenfold.methods.training_set import TrainingSet

if TYPE_CHECKING:
    from tenfold.methods.kcd import KCD

__all__ = ["Prepared", "loss_weights", "prepare"]

Shapes = Sequence[Sequence[int]]


@dataclass
class Prepared:
    """A student's teacher and data, tried and found to fit.

    Attributes:
        data: the training images.
        epochs: of the run.
        teacher: who answers.
        classes: of both networks.
        knowledge: the samples, none condensed yet.
        shapes: of the features of student and teacher, by layer.
    """

    data: TrainingSet
    epochs: int
    teacher: Teacher
    classes: int
    knowledge: KnowledgeSet
    shapes: tuple[Shapes, Shapes]

    def feature_loss(self, kcd: KCD, model: nn.Module) -> FeatureLoss | None:
        """Make the feature loss, on the student's device; None where logits alone are compared."""
        if not kcd.layers:
            return None
        made = FeatureLoss(kcd.distiller, *self.shapes, self.data.labels, kcd.negatives)
        return made.to(next((p.device for p in model.parameters()), torch.device("cpu")))

    def distillation(
        self, kcd: KCD, model: nn.Module, features: FeatureLoss | None
    ) -> Distillation:
        """Make what turns batches into losses, with its hooks on the student."""
        taps = Taps(model, kcd.layers or [], "student", training_only=True) if features else None
        return Distillation(
            self.teacher, self.knowledge, loss_weights(kcd), kcd.temperature, taps, features
        )

    def facts(self, kcd: KCD) -> dict[str, Any]:
        """Return what a checkpoint must agree in, to be gone on with."""
        return {
            "samples": self.data.size,
            "classes": self.classes,
            "epochs": self.epochs,
            "keep_ratio": kcd.keep_ratio,
            "stages": kcd.stages,
            "teacher": self.teacher.digest(),
        }

    def cache(self, kcd: KCD) -> TeacherCache:
        """Open the cache that the fields name."""
        return open_cache(
            kcd.teacher_cache,
            self.data,
            self.classes,
            teacher=self.teacher.digest(),
            limit=kcd.cache_limit_gib * 2**30,
        )


def prepare(
    kcd: KCD, network: nn.Module | None, model: nn.Module, data: TrainingSet, epochs: int
) -> Prepared:
    """Try both networks on an image, and see whether the data can be condensed.

    Raises:
        UserError: another number of classes, a layer that isn't there, features that can't be
            compared, images that can't be mixed, or views that can't be counted.
    """
    knowledge = KnowledgeSet(
        data,
        keep_ratio=kcd.keep_ratio,
        stages=kcd.stages,
        visit_power=kcd.visit_power,
        mix_max=kcd.augment_max,
        revive=kcd.revive,
        drop_window=kcd.drop_window,
        mix_source=kcd.mix_source,
        unseen=kcd.unseen,
    )
    if kcd.teacher_cache != "off" and data.views is None:
        raise UserError(
            f"teacher_cache={kcd.teacher_cache!r} needs views that can be counted, and augment "
            f"{data.augment!r} makes too many of an image: use none, flip, shift or flip_crop (in "
            "a loop of your own attach(…, views=…)), or teacher_cache: off"
        )
    teacher = _teacher(kcd, network, model)
    try:
        logits, theirs = teacher.answer(data.example.to(teacher.device))
        check_logits(logits)
        if data.num_classes not in (None, logits.shape[1]):
            raise UserError(
                f"the teacher knows {logits.shape[1]} classes, and {data.name} has "
                f"{data.num_classes}: give a teacher that was trained on the same classes"
            )
        ours = evaluated(model, data.example, kcd.layers) if kcd.layers else []
        shapes = [feature.shape for feature in ours], [feature.shape for feature in theirs]
        check_features(kcd.distiller, *shapes)
    except BaseException:
        teacher.remove()
        raise
    return Prepared(data, epochs, teacher, logits.shape[1], knowledge, shapes)


def _teacher(kcd: KCD, network: nn.Module | None, model: nn.Module) -> Teacher:
    if network is None:
        raise UserError(
            f"teacher={kcd.teacher!r} is a name, which a recipe's engine opens: in a loop of your "
            "own give the network itself, such as tenfold.load(path)"
        )
    theirs = {id(parameter) for parameter in network.parameters()}
    if network is model or any(id(parameter) in theirs for parameter in model.parameters()):
        raise UserError("teacher and student share parameters: give two networks")
    layers = kcd.layers if kcd.teacher_layers is None else kcd.teacher_layers
    return Teacher(network, layers or [], kcd.teacher_precision)


def loss_weights(kcd: KCD) -> Weights:
    """Return the weights that were given, and the distiller's own in place of the others."""
    own = DISTILLERS[kcd.distiller]
    return Weights(
        own.label if kcd.label_weight is None else kcd.label_weight,
        own.logit if kcd.logit_weight is None else kcd.logit_weight,
        own.feature if kcd.feature_weight is None else kcd.feature_weight,
    )
