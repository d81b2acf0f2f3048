"""When things happen in a run: steps, epochs, and shares of the whole."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.errors import UserError

__all__ = ["Schedule", "Window", "check_time"]


def check_time(name: str, value: int | float) -> None:
    """Refuse a moment that is neither a share of the run nor a whole number of epochs.

    A float in (0, 1) is a share; an int is epochs, at least 1. Zero, the start, is allowed as int.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}={value!r}: expected a share in (0, 1) or a number of epochs")
    if isinstance(value, int):
        if value < 0:
            raise UserError(f"{name}={value}: expected at least 0 epochs")
    elif not 0 < value < 1:
        raise UserError(
            f"{name}={value}: a float is a share of the run, in (0, 1); write epochs as an int"
        )


@dataclass(frozen=True)
class Window:
    """A span of the run, counted in `unit`s: epochs or optimizer steps."""

    unit: str
    start: int
    end: int


class Schedule:
    """The length of a run, in steps and, where known, in epochs.

    Args:
        total_steps: optimizer steps of the whole run, at least 1.
        steps_per_epoch: an int, or one int an epoch where epochs differ in length (a condensed
            data set shrinks); None when the loop has no epochs.

    Raises:
        UserError: a number is not positive, or the epochs don't add up to the total.
    """

    def __init__(self, total_steps: int, steps_per_epoch: int | Sequence[int] | None = None):
        self.total_steps = total_steps = _whole("total_steps", total_steps)
        self.epoch_ends: list[int] = []
        if steps_per_epoch is None:
            return
        if not isinstance(steps_per_epoch, Sequence):
            size = _whole("steps_per_epoch", steps_per_epoch)
            self.epoch_ends = [*range(size, total_steps, size), total_steps]
            return
        sizes = list(steps_per_epoch)
        if not sizes or min(sizes) < 1 or sum(sizes) != total_steps:
            raise UserError(
                f"steps_per_epoch adds up to {sum(sizes)} over {len(sizes)} epochs: expected "
                f"total_steps={total_steps}, every epoch at least 1 step"
            )
        self.epoch_ends = list(itertools.accumulate(sizes))

    @property
    def epochs(self) -> int | None:
        """Number of epochs, or None when the loop has none."""
        return len(self.epoch_ends) or None

    def epoch_at(self, step: int) -> int:
        """Return the epoch (0-based) that step number `step` (0-based) belongs to."""
        return bisect.bisect_right(self.epoch_ends, step)

    def window(self, start: int | float, end: int | float, changes: int) -> Window:
        """Place the span from `start` to `end` in the run.

        Ints are epochs. Shares are epochs too (rounded), as long as every one of the `changes`
        that have to happen can have an epoch of its own; in a shorter run steps are counted, or a
        one-epoch run could never finish and a six-epoch one would take several decisions at once.

        Raises:
            UserError: an int without known epochs, an end beyond the run, or an empty span.
        """
        for name, value in (("start", start), ("end", end)):
            check_time(name, value)
            if isinstance(value, int) and value > 0 and self.epochs is None:
                raise UserError(
                    f"{name}={value} counts epochs, and this loop has none: give "
                    "steps_per_epoch=…, or a share of the run such as 0.5"
                )
        in_steps = Window(
            "step", self._place(start, self.total_steps), self._place(end, self.total_steps)
        )
        window = in_steps
        if self.epochs is not None:
            in_epochs = Window(
                "epoch", self._place(start, self.epochs), self._place(end, self.epochs)
            )
            named = (isinstance(end, int) and end > 0) or (isinstance(start, int) and start > 0)
            if named or in_epochs.end - in_epochs.start >= changes:
                window = in_epochs
            length = self.epochs
            if in_epochs.end > length and isinstance(end, int):
                raise UserError(
                    f"end={end}: the run has {length} epochs only; expected an end within it, "
                    "or a share such as 0.5"
                )
        if window.end <= window.start:
            raise UserError(
                f"start={start}, end={end}: expected the end after the start (here both fall on "
                f"{window.unit} {window.start} of {self.epochs or self.total_steps}); train "
                "longer or move them apart"
            )
        return window

    @staticmethod
    def _place(value: int | float, length: int) -> int:
        return value if isinstance(value, int) else round(value * length)


def _whole(name: str, value: object) -> int:
    """Take any kind of integer (NumPy's too), but neither a bool nor a float."""
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = 0
    if isinstance(value, bool) or found < 1:
        raise UserError(f"{name}={value!r}: expected an int of at least 1")
    return found
