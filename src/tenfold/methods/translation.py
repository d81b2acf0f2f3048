"""What DCD, CRD and other methods share that distil a generator of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tenfold.errors import StateError, UserError
from tenfold.methods.base import Kind, Method, Stage

__all__ = ["StudentStep", "TranslationMethod", "check_image_pair"]


@dataclass(frozen=True, kw_only=True)
class StudentStep:
    """One step of a student: what it was given, what it made, and who judges it.

    Attributes:
        source: images that are translated, `(B, C, H, W)` in [-1, 1].
        student: what the student made of them, with its graph.
        teacher: what the teacher made of them, without one.
        student_maps: the student's maps at the taps, by the tap's name.
        teacher_maps: the teacher's, without a graph.
        discriminator: the teacher's, as it is now; conditional where `paired`.
        paired: whether there are targets.
        target: the images wanted, or None.
    """

    source: Tensor
    student: Tensor
    teacher: Tensor
    student_maps: dict[str, Tensor]
    teacher_maps: dict[str, Tensor]
    discriminator: nn.Module
    paired: bool = True
    target: Tensor | None = None


class TranslationMethod(Method):
    """Adds losses to those of a student generator. It changes nothing in the network itself."""

    kind = Kind.LOSS
    stage = Stage.LOSS
    tasks: ClassVar[frozenset[str]] = frozenset({"translation"})

    def tap_names(self) -> Sequence[str] | None:
        """Return the modules whose maps the method reads; None: the generator's default ones."""
        return ()

    def use_setting(self, paired: bool, size: tuple[int, int]) -> None:
        """Take note of the data ahead of `attach`.

        Args:
            paired: whether there are targets.
            size: height and width of the images trained on.

        Raises:
            UserError: the method can't work on such images.
        """

    def student_losses(self, step: StudentStep) -> dict[str, Tensor]:
        """Return the method's losses, weighted, by name; they are added up."""
        raise NotImplementedError


class OwnAdam:
    """The optimizer of modules that a method trains beside a student.

    Student and modules are meant to share one Adam. Adam treats each weight by itself, so a second
    one with the same settings is the same; they are read from the student's at each step.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def follow(self, optimizer: Optimizer) -> None:
        """Step with the student's rate and betas, unless its gradients overflowed."""
        given = optimizer.param_groups[0]
        if "betas" in given:  # a rate of SGD says nothing about one of Adam
            for group in self.optimizer.param_groups:
                group["lr"], group["betas"] = given["lr"], given["betas"]
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        # One question to the device, not one a gradient.
        if gradients and bool(torch.stack([each.isfinite().all() for each in gradients]).all()):
            self.optimizer.step()
        self.optimizer.zero_grad()


def check_image_pair(student: Tensor, teacher: Tensor) -> None:
    """Refuse images that no two generators make of the same source.

    Raises:
        UserError: other shapes or types, or values that are not finite or outside [-1, 1].
    """
    if student.shape != teacher.shape or student.ndim != 4:
        raise UserError(
            f"student and teacher made images of shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: expected one shape (B, C, H, W) for both"
        )
    for name, images in (("student", student), ("teacher", teacher)):
        if not images.is_floating_point():
            raise UserError(f"the {name}'s images are {images.dtype}: expected floats in [-1, 1]")
        if torch.compiler.is_compiling():
            continue
        low, high = (float(each) for each in images.detach().aminmax())
        if not (-1.01 <= low <= high <= 1.01):  # also true for NaN
            raise UserError(
                f"the {name}'s images go from {low:g} to {high:g}: expected values in [-1, 1]"
            )


def needed(network: nn.Module | None, method: str, role: str) -> nn.Module:
    """Return a network that the method was given.

    Raises:
        StateError: it was not.
    """
    if network is None:
        raise StateError(
            f"{method} has no {role}: call use_network({role!r}, …) ahead of attach(…)"
        )
    return network
