"""What `train` is in recipes of the task shadow_synthesis."""

from __future__ import annotations

from typing import Any

from tenfold.errors import UserError

__all__ = ["TRAIN_DEFAULTS", "check_train"]

# What `train` is where a recipe of this task says nothing: HQSS's settings.
TRAIN_DEFAULTS: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 1,
    "optimizer": {"name": "adam", "betas": [0.5, 0.999]},
    "lr": 2e-4,
    "weight_decay": 0.0,
    "schedule": "linear",
}
# Keys of `train` that mean nothing here, with the value that leaves them out.
_UNUSED: dict[str, Any] = {
    "warmup_epochs": 0, "label_smoothing": 0, "mixup": 0, "cutmix": 0, "ema": None,
    "accumulate": 1, "clip_norm": None,
}  # fmt: skip


def check_train(train: Any) -> None:
    """Refuse settings of `train` that this task doesn't have.

    Args:
        train: the recipe's section.

    Raises:
        UserError: such a setting, or a schedule that the task has no use for.
    """
    for name, value in _UNUSED.items():
        given = getattr(train, name)
        if given != value:
            raise UserError(
                f"train.{name}={given}: the task shadow_synthesis has none; leave it out"
            )
    if train.schedule not in ("linear", "constant"):
        raise UserError(
            f"train.schedule={train.schedule}: expected linear (constant for half of the run, then "
            "falling to zero) or constant for the task shadow_synthesis"
        )
