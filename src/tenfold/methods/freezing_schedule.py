"""When weights may freeze, and how near to its level a weight must be.

In iteration n of T (from 0), with W iterations of warm-up:

    rho(n) = constant | linear: x | sine: sin(pi x / 2),  x = (n - W) / (T - W),  for n > W
"""

from __future__ import annotations

import math
import warnings

from tenfold.errors import UserError
from tenfold.methods.schedule import Schedule

__all__ = ["FreezingSchedule", "default_momentum", "freeze_threshold", "warmup_steps"]

WARMUP = 0.2  # of the run, as the paper's 80 of 400 and 20 of 100 epochs
# Where a run is long enough, a weight that has stopped changing its level may freeze after this
# share of the run when the threshold stands at half a level spacing.
_DWELL = 0.01
_MOST_MOMENTUM = 0.99


def freeze_threshold(threshold: str | float, x: float) -> float:
    """Return rho, the distance in level spacings up to which weights freeze.

    Args:
        threshold: "linear", "sine", or a constant.
        x: share of the time after the warm-up that is over, 0 to 1; more counts as 1.

    >>> [round(freeze_threshold("sine", x), 5) for x in (0.25, 0.5, 1.0)]
    [0.38268, 0.70711, 1.0]
    """
    x = min(1.0, max(0.0, x))
    if threshold == "linear":
        return x
    if threshold == "sine":
        return math.sin(math.pi * x / 2)
    return float(threshold)


def default_momentum(total_steps: int) -> float:
    """Return the momentum beta of the distance for a run of so many steps.

    After a level change, d falls from one level spacing by the factor beta a step, so that it takes
    ln(rho) / ln(beta) steps to pass a threshold of rho. Short runs need less momentum than the
    paper's 0.99, or nothing would freeze in time.

    >>> round(default_momentum(100_000), 4), round(default_momentum(1_000), 4)
    (0.99, 0.933)
    """
    return min(_MOST_MOMENTUM, math.pow(0.5, 1 / max(1.0, _DWELL * total_steps)))


def warmup_steps(warmup: int | float | None, schedule: Schedule) -> int:
    """Return W, the iterations in which nothing freezes: at most all but one of the run.

    Args:
        warmup: a share of the run, or epochs as an int; None is a fifth.
        schedule: of the run.

    Raises:
        UserError: epochs in a run that has none, or as many as it has.
    """
    warmup = WARMUP if warmup is None else warmup
    steps = round(warmup * schedule.total_steps)
    if isinstance(warmup, int) and warmup > 0:
        if schedule.epochs is None:
            raise UserError(
                f"warmup={warmup} counts epochs, and this loop has none: give steps_per_epoch=…, "
                "or a share of the run such as 0.2"
            )
        if warmup >= schedule.epochs:
            raise UserError(
                f"warmup={warmup}: expected less than the {schedule.epochs} epochs of the run, or "
                "a share such as 0.2"
            )
        steps = schedule.epoch_ends[warmup - 1]
    return min(steps, schedule.total_steps - 1)


class FreezingSchedule:
    """The threshold over the time of one run.

    Args:
        threshold: "linear", "sine" or a constant.
        warmup: W, in iterations.
        total_steps: T.

    Attributes:
        start: W as it has come out: later than planned where a mask was still being chosen; None
            as long as nothing may freeze.
    """

    def __init__(self, threshold: str | float, warmup: int, total_steps: int):
        self.threshold, self.warmup, self.total_steps = threshold, warmup, total_steps
        self.start: int | None = None
        self.warned = False

    def at(self, n: int, masks_final: bool) -> float | None:
        """Return rho in iteration n, or None as long as nothing freezes."""
        if n >= self.total_steps and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {n + 1} of {self.total_steps}: LTS was attached for fewer steps; the "
                "threshold stays at its last value",
                stacklevel=2,
            )
        if self.start is None:
            if n <= self.warmup or not masks_final:
                return None
            self.start = n - 1
        share = (n - self.start) / max(1, self.total_steps - self.start)
        return freeze_threshold(self.threshold, share)
