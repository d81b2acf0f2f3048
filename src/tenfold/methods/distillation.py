"""The loss of a batch under a teacher, from as few forward passes as that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tenfold.errors import UserError
from tenfold.methods.condensation import (
    check_logits,
    not_finite,
    prediction_entropy,
    several_processes,
    shown,
)
from tenfold.methods.distillers import distillation_loss
from tenfold.methods.feature_loss import FeatureLoss
from tenfold.methods.features import Taps
from tenfold.methods.knowledge import KnowledgeSet
from tenfold.methods.teacher import Teacher, at_least_float32
from tenfold.methods.teacher_cache import TeacherCache

__all__ = ["Distillation", "Weights", "check_ids"]


@dataclass(frozen=True)
class Weights:
    """Weights of the three parts of the loss: gamma, alpha and beta."""

    label: float
    logit: float
    feature: float


class Distillation:
    """What a method does with each batch: loss, value of the samples, count of forward passes.

    Args:
        teacher: who answers.
        knowledge: where values are noted.
        weights: of the loss's parts.
        temperature: of the softened logits.
        taps: on the student's layers; None without a feature loss.
        features: the feature loss, or None.

    Attributes:
        cache: of the teacher's logits, or None.
        forwards: samples that went through `student` and `teacher`, of all processes together
            since the last `share`.
        repeats: ids of this epoch that this process draws in vain, and that don't count as visits.
    """

    def __init__(
        self,
        teacher: Teacher,
        knowledge: KnowledgeSet,
        weights: Weights,
        temperature: float,
        taps: Taps | None,
        features: FeatureLoss | None,
    ):
        self.teacher = teacher
        self.knowledge = knowledge
        self.weights = weights
        self.temperature = temperature
        self.taps = taps
        self.features = features
        self.cache: TeacherCache | None = None
        self.forwards = {"student": 0, "teacher": 0}
        self.repeats = torch.empty(0, dtype=torch.int64)
        self._new = {"student": 0, "teacher": 0}

    def loss(
        self,
        logits: Tensor,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        views: Tensor | None,
        criterion: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the loss of a batch; with gradients on, note what the samples are worth.

        Args:
            logits: the student's, `(B, C)`.
            images: what both networks see, `(B, ...)`.
            labels: `(B,)`, or what else the criterion takes.
            ids: `(B,)`, checked.
            views: `(B,)`, where answers are kept.
            criterion: of logits and labels.

        Raises:
            UserError: logits that are not finite, or of another number of classes than the
                teacher's.
        """
        check_logits(logits)
        training = torch.is_grad_enabled()
        if training:
            self._new["student"] += len(logits)
        with torch.autocast(logits.device.type, enabled=False):
            logits = at_least_float32(logits)
            if training:
                self._record(logits, ids)
            parts = []
            if self.weights.label:
                parts.append(self.weights.label * criterion(logits, labels))
            answer, theirs = self._ask(images, ids, views)
            if answer is not None:
                if answer.shape[1] != logits.shape[1]:
                    raise UserError(
                        f"the teacher knows {answer.shape[1]} classes and the student "
                        f"{logits.shape[1]}: give two networks with the same classes"
                    )
                _check_finite("teacher", answer.sum(dim=1), ids)
                if self.weights.logit:
                    answer = answer.to(logits.device, logits.dtype)
                    parts.append(
                        self.weights.logit * distillation_loss(logits, answer, self.temperature)
                    )
            if self.features is not None and self.taps is not None:
                ours = [at_least_float32(feature) for feature in self.taps.take()]
                parts.append(self.weights.feature * self.features(ours, theirs, ids))
            return torch.stack(parts).sum()

    def _record(self, logits: Tensor, ids: Tensor) -> None:
        entropies = prediction_entropy(logits.detach())
        _check_finite("student", entropies, ids)
        if len(self.repeats):
            counted = ~torch.isin(ids, self.repeats.to(ids.device))
            ids, entropies = ids[counted], entropies[counted.to(entropies.device)]
        self.knowledge.table.record(ids, entropies)

    def _ask(
        self, images: Tensor, ids: Tensor, views: Tensor | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        if not self.weights.logit and self.features is None:
            return None, []
        if self.cache is None:
            self._new["teacher"] += len(images)
            return self.teacher.answer(images)
        if views is None:
            raise UserError(
                "teacher_cache needs to know each image's view: give loss(…, views=…), numbers "
                "from 0, or attach(…, views=1) where nothing random is done to images"
            )
        ids, views = ids.cpu(), views.cpu()
        number = self.knowledge.data.views or 1
        if len(views) and (int(views.min()) < 0 or int(views.max()) >= number):
            raise UserError(
                f"views from {int(views.min())} to {int(views.max())}: expected 0 to {number - 1}, "
                "as many as attach(…, views=…) says"
            )
        versions = self.knowledge.versions[ids]
        lasting = self.knowledge.cacheable(ids)
        known = self.cache.known(ids, views, versions) & lasting
        if bool(known.all()):
            return self.cache.read(ids, views), []
        new = torch.nonzero(~known).flatten()
        self._new["teacher"] += len(new)
        if len(new) == len(ids):
            answer = self.teacher.answer(images)[0]
            found = answer
        else:
            answer = self.teacher.answer(images[new.to(images.device)])[0]
            found = self.cache.read(ids, views).to(answer.device, answer.dtype)
            found[new.to(answer.device)] = answer
        keep = lasting[new]
        at = new[keep]
        self.cache.store(ids[at], views[at], versions[at], answer[keep.to(answer.device)])
        return found, []

    def share(self) -> None:
        """Add up counts and values over all processes; all of them call it."""
        counts = torch.tensor([self._new["student"], self._new["teacher"]])
        if several_processes():
            counts = counts.to(self.knowledge.table.sums.device)
            dist.all_reduce(counts)
        self.forwards["student"] += int(counts[0])
        self.forwards["teacher"] += int(counts[1])
        self._new = {"student": 0, "teacher": 0}
        self.knowledge.table.share()

    def counted(self) -> dict[str, int]:
        """Return all forward passes, with those that only this process knows of."""
        return {name: self.forwards[name] + self._new[name] for name in self.forwards}

    def record(self, epoch_sizes: Sequence[int]) -> dict[str, Any]:
        """Return forward passes and what is known of the samples, see `Method.record`.

        Args:
            epoch_sizes: samples of every epoch; all of them in the first.
        """
        plain = epoch_sizes[0] * len(epoch_sizes)
        facts = [
            [f"forward passes, {name}", f"{count:,} of {plain:,}, {1 - count / plain:.1%} saved"]
            for name, count in self.counted().items()
        ]
        facts.append(["samples that came back", f"{sum(self.knowledge.revived):,}"])
        return {
            "facts": facts,
            "forwards": self.counted(),
            **self.knowledge.record(epoch_sizes),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the samples, and the counts."""
        return {"knowledge": self.knowledge.state_dict(), "forwards": self.counted()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.knowledge.load_state_dict(state["knowledge"])
        counts = state["forwards"]
        self.forwards = {name: int(counts[name]) for name in ("student", "teacher")}
        self._new = {"student": 0, "teacher": 0}


def _check_finite(whose: str, values: Tensor, ids: Tensor) -> None:
    """Refuse values `(B,)` that are not finite, and name their ids.

    On the CPU alone. Elsewhere the sums of entropies are looked at when the epoch ends: asking now
    would stop the device.
    """
    if values.device.type == "cpu" and not bool(torch.isfinite(values).all()):
        raise not_finite(ids[~torch.isfinite(values).to(ids.device)], whose)


def check_ids(ids: Tensor, batch: int, size: int) -> Tensor:
    """Return ids `(B,)` as int64, or refuse them.

    Raises:
        UserError: no ids, not one a sample, no integers, out of range, or one twice.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 1 or len(ids) != batch:
        given = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(
            f"ids are {given}: expected a tensor ({batch},), one id a sample; let the loader "
            "give (image, label, id), as kcd.dataset does"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"ids are {ids.dtype}: expected integers, the index of each sample")
    ids = ids.long()
    if batch and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise UserError(
            f"ids from {int(ids.min())} to {int(ids.max())}: expected 0 to {size - 1}, the index "
            "of each sample in the whole data set, also where a part of it is drawn"
        )
    order = ids.sort().values
    twice = order[1:][order[1:] == order[:-1]]
    if len(twice):
        raise UserError(
            f"ids {shown(twice)} occur twice in a batch: expected each sample once; draw without "
            "replacement"
        )
    return ids
