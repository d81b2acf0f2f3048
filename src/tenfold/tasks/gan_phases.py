"""The epochs of a run that trains generators: who learns in each, and at what rate."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.tasks.gan_recipe import Gan

__all__ = ["Phase", "learning_rate", "phases"]


@dataclass(frozen=True)
class Phase:
    """One pass over the data.

    Attributes:
        learns: joint (teacher and student, pairs), teacher or student (unpaired, in turn).
        epoch: the teacher's epoch, from 1, that sets the learning rate.
        begins_round: whether the teacher is judged ahead of it, and a snapshot taken.
        evaluates: whether the student is evaluated after it.
    """

    learns: str
    epoch: int
    begins_round: bool = False
    evaluates: bool = False

    @property
    def has_student(self) -> bool:
        """Whether the student takes steps."""
        return self.learns != "teacher"


def phases(gan: Gan, epochs: int, paired: bool) -> list[Phase]:
    """Return the passes of a whole run.

    Pairs: teacher and student learn in every batch. Unpaired: after each `round_epochs` epochs of
    the teacher, and after the last, the student learns for `round_epochs * student_epochs` epochs
    from a teacher that stands still.

    >>> [phase.learns for phase in phases(Gan(round_epochs=2, student_epochs=1), 3, paired=False)]
    ['teacher', 'teacher', 'student', 'student', 'teacher', 'student', 'student']

    Args:
        gan: the recipe's section.
        epochs: of the teacher.
        paired: whether there are targets.
    """
    if paired:
        every = gan.evaluate_every or max(1, epochs // 10)
        return [
            Phase("joint", epoch, evaluates=epoch % every == 0 or epoch == epochs)
            for epoch in range(1, epochs + 1)
        ]
    found = []
    for epoch in range(1, epochs + 1):
        found.append(Phase("teacher", epoch))
        if epoch % gan.round_epochs == 0 or epoch == epochs:
            length = gan.round_epochs * gan.student_epochs
            for number in range(length):
                first, last = number == 0, number == length - 1
                found.append(Phase("student", epoch, begins_round=first, evaluates=last))
    return found


def learning_rate(peak: float, epoch: int, epochs: int, decay: int | None, falls: bool) -> float:
    """Return the rate of one epoch of the teacher: constant, then falling linearly towards zero.

    >>> learning_rate(2e-4, 101, 200, 100, True)
    0.00019801980198019803

    Args:
        peak: rate of the first epochs.
        epoch: from 1.
        epochs: of the run.
        decay: the last so many epochs fall; half of them by default.
        falls: False: constant throughout.
    """
    decay = epochs // 2 if decay is None else decay
    if not falls:
        return peak
    return peak * (1 - max(0, epoch - (epochs - decay)) / (decay + 1))
