"""What `train` is in recipes of the task shadow_removal, and how the learning rate falls there."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from tenfold.errors import UserError

__all__ = ["TRAIN_DEFAULTS", "check_train", "linear_rate", "rate_by_step"]

# What `train` is where a recipe of this task says nothing: LAB-Net's settings for ISTD.
TRAIN_DEFAULTS: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 2,
    "optimizer": "adam",
    "lr": 2e-4,
    "weight_decay": 0.0,
    "schedule": "linear",
}
# Keys of `train` that mean nothing here, with the value that leaves them out.
_UNUSED: dict[str, Any] = {"label_smoothing": 0, "mixup": 0, "cutmix": 0}


def check_train(train: Any) -> None:
    """Refuse settings of `train` that this task doesn't have.

    Args:
        train: the recipe's section.

    Raises:
        UserError: a setting for labels.
    """
    for name, value in _UNUSED.items():
        given = getattr(train, name)
        if given != value:
            raise UserError(f"train.{name}={given}: the task shadow_removal has none; leave it out")


def linear_rate(time: float, epochs: int, pseudo_pairs: bool = False) -> float:
    """Return the share of the peak rate at a time in epochs from 0: constant, then linear to zero.

    LAB-Net's rate in epoch e from 1 of 300 is 1 - max(0, e - 50) / 251: constant for a sixth of the
    run. At the start of each epoch it is this one; within the epoch it goes on falling, which
    short runs need. HQSS's is constant for half of the run, 1 - max(0, e - 50) / 50 of 100 epochs
    from 0.

    >>> [round(2e-4 * linear_rate(epoch - 1, 300), 10) for epoch in (1, 50, 51, 175, 300)]
    [0.0002, 0.0002, 0.0001992032, 0.0001003984, 7.968e-07]
    >>> [round(2e-4 * linear_rate(epoch, 100, pseudo_pairs=True), 10) for epoch in (50, 51, 75, 99)]
    [0.0002, 0.000196, 0.0001, 4e-06]

    Args:
        time: epochs that are over, with the share of the one that is going on.
        epochs: of the run.
        pseudo_pairs: whether the pairs are those of HQSS.
    """
    held = epochs / 2 if pseudo_pairs else max(0.0, epochs / 6 - 1)
    return min(1.0, max(0.0, 1 - (time - held) / (epochs - held)))


def rate_by_step(
    shape: Callable[[float], float], sizes: Sequence[int], warmup_steps: int = 0
) -> Callable[[int], float]:
    """Return the share of the peak rate at each optimizer step.

    Args:
        shape: of a time in epochs from 0.
        sizes: optimizer steps of each epoch.
        warmup_steps: steps in which the rate rises linearly.
    """
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        epoch = bisect.bisect_right(ends, step)
        if epoch == len(sizes):
            return shape(float(epoch))
        return shape(epoch + (step - ends[epoch] + sizes[epoch]) / sizes[epoch])

    return rate
