"""OMGD: the online multi-granularity distillation that DCD and CRD came after; a baseline.

Paper: "Online Multi-Granularity Distillation for GAN Compression" (ICCV 2021, arXiv 2108.06908).

The student imitates the image of a teacher that is trained at the same time, and its feature maps
as far as the mean of each channel goes:

    L = 10 (1 - SSIM(y_S, y_T)) + 1e-5 TV(y_S) + w_channel sum_l | GAP(A_l(F_S^l)) - GAP(F_T^l) |^2

with TV the total variation, GAP the mean over pixels, and A_l a 1x1 convolution, batch norm and
ReLU to as many channels as the teacher has. Style and feature losses of the images, which DCD and
CRD have too, are the task's own.

What differs from the paper: it has a second, deeper teacher. DCD and CRD keep the wide one alone,
and so do we, that the three can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.methods.omgd_terms import structural_similarity, total_variation
from tenfold.methods.translation import (
    OwnAdam,
    StudentStep,
    TranslationMethod,
    check_image_pair,
    needed,
)
from tenfold.nn.taps import maps_at, taps_of

__all__ = ["OMGD"]


@dataclass(kw_only=True, eq=False)
class OMGD(TranslationMethod):
    """Online multi-granularity distillation of image-to-image generators (OMGD), one teacher.

    Args:
        similarity: weight of 1 - SSIM.
        variation: weight of the total variation, a sum over pixels.
        channel: weight of the distance of channel means; the authors have 500 for horse2zebra and
            100 for summer2winter and edges2shoes.
        taps: names of the modules whose maps are compared; by default those of `tenfold.nn`'s
            generators.
    """

    similarity: float = 10.0
    variation: float = 1e-5
    channel: float = 500.0
    taps: list[str] | None = None

    def validate(self) -> None:  # noqa: D102
        weights = {"similarity": self.similarity, "variation": self.variation}
        weights["channel"] = self.channel
        for name, value in weights.items():
            if not value >= 0:
                raise UserError(f"{name}={value}: expected at least 0")
        if not any(weights.values()):
            raise UserError("all weights of OMGD are 0: expected one above 0, or leave OMGD out")
        if self.taps is not None and not self.taps:
            raise UserError("taps is empty: name modules, or leave it out; or set channel to 0")

    def __post_init__(self) -> None:
        self._teacher: nn.Module | None = None
        self._names: tuple[str, ...] = ()
        self._adaptors: dict[str, nn.Module] = {}
        self._adam: OwnAdam | None = None
        super().__post_init__()

    def tap_names(self) -> Sequence[str] | None:
        """Return the modules whose maps are compared."""
        return self.taps if self.channel else ()

    def use_network(self, role: str, network: nn.Module) -> None:
        """Take the `teacher`, whose maps say how many channels are imitated."""
        if role == "teacher":
            self._teacher = network

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Build the adaptors of channels, and register them as the method's own."""
        if not self.channel:
            return model
        teacher = needed(self._teacher, "OMGD", "teacher")
        self._names = taps_of(model, self.taps)
        given, wanted = maps_at(model, self._names), maps_at(teacher, self._names)
        for name in self._names:
            self._adaptors[name] = _adaptor(given[name].shape[1], wanted[name].shape[1])
        adaptors = nn.ModuleList(self._adaptors.values()).to(next(model.parameters()).device)
        self._adam = OwnAdam(adaptors)
        self.own(adaptors, self._adam.optimizer)
        return model

    def student_losses(self, step: StudentStep) -> dict[str, Tensor]:
        """Return the losses of a step, by name; see `TranslationMethod`."""
        check_image_pair(step.student, step.teacher)
        losses = {}
        if self.similarity:
            similar = structural_similarity(step.student, step.teacher.detach())
            losses["similarity"] = self.similarity * (1 - similar)
        if self.variation:
            losses["variation"] = self.variation * total_variation(step.student)
        if self.channel:
            losses["channel"] = self.channel * self._channel_loss(step)
        return losses

    def _channel_loss(self, step: StudentStep) -> Tensor:
        with torch.autocast(step.student.device.type, enabled=False):
            distances = []
            for name in self._names:
                mine = self._adaptors[name](step.student_maps[name].float()).mean((2, 3))
                theirs = step.teacher_maps[name].detach().float().mean((2, 3))
                distances.append(functional.mse_loss(mine, theirs))
            return torch.stack(distances).sum()

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Move the adaptors, from the gradients of the same backward pass."""
        if self._adam is not None:
            self._adam.follow(optimizer)


def _adaptor(channels: int, wanted: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, wanted, 1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU()
    )
