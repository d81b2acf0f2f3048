"""Lightning's Trainer for our tasks: what a recipe may set of it, and its silence."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)

from tenfold.errors import UserError, unknown_name
from tenfold.tasks.checkpoints import SafeCheckpoints
from tenfold.tasks.folder import RunFolder
from tenfold.tasks.recipe import Recipe

__all__ = ["check_trainer", "make_trainer", "quietly"]

# What a recipe's `trainer` may not set, and where it belongs instead.
_OURS = {
    "max_epochs": "train.epochs",
    "min_epochs": "train.epochs",
    "max_steps": "train.epochs",
    "min_steps": "train.epochs",
    "accumulate_grad_batches": "train.accumulate",
    "gradient_clip_val": "train.clip_norm",
    "gradient_clip_algorithm": "train.clip_norm",
    "default_root_dir": "--run_dir",
    "use_distributed_sampler": "nothing: the loaders know their rank",
    "callbacks": "your own Trainer with tenfold's MethodCallback",
    "logger": "nothing: metrics.csv is written, and TensorBoard where it is installed",
    "enable_checkpointing": "nothing: every epoch is kept until the next is",
    "fast_dev_run": "train.epochs: 1 and data.limit",
    "overfit_batches": "data.limit",
    "max_time": "train.epochs, which the schedules of methods are made for",
}


def check_trainer(arguments: Mapping[str, Any]) -> None:
    """Refuse Trainer arguments that don't exist, or that the recipe sets elsewhere."""
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    for key in arguments:
        if key in _OURS:
            raise UserError(f"trainer.{key} is set elsewhere: use {_OURS[key]}")
        if key not in known:
            raise unknown_name("key", f"trainer.{key}", [f"trainer.{name}" for name in known])
    strategy = str(arguments.get("strategy", ""))
    if strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        raise UserError(
            f"trainer.strategy {strategy} cuts weights into shards, and methods choose among the "
            "weights of whole blocks: use ddp, which keeps every weight whole on every process"
        )


def make_trainer(
    recipe: Recipe, folder: RunFolder, callbacks: Sequence[pl.Callback], **settings: Any
) -> pl.Trainer:
    """Make the Trainer of a run.

    Args:
        recipe: its `trainer` is handed on.
        folder: of the run.
        callbacks: all of them.
        settings: the task's own.

    Raises:
        UserError: the Trainer refuses a setting.
    """
    with quietly():
        try:
            return pl.Trainer(
                **{
                    "max_epochs": recipe.train.epochs,
                    "default_root_dir": folder.path,
                    "callbacks": list(callbacks),
                    "logger": _logger(folder),
                    "use_distributed_sampler": False,  # the loaders know their rank
                    "enable_model_summary": False,
                    "enable_progress_bar": sys.stdout.isatty(),
                    "num_sanity_val_steps": 0,
                    "log_every_n_steps": 1,
                    **settings,
                    **recipe.trainer,
                    "plugins": _plugins(recipe),
                },
            )
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


def _plugins(recipe: Recipe) -> list[Any]:
    given = recipe.trainer.get("plugins") or []
    return [*(given if isinstance(given, list) else [given]), SafeCheckpoints()]


def _logger(folder: RunFolder) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return False
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder.path, name="", version="tensorboard")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep Lightning's advice out of the way; what stops a run still comes through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers.*",
            ".*log_every_n_steps.*",
            ".*GPU available.*",
            ".*in eval mode at the start of training.*",
        ):
            warnings.filterwarnings("ignore", text)
        warnings.filterwarnings("ignore", ".*Checkpoint directory.*exists and is not empty.*")
        warnings.filterwarnings(
            "ignore", ".*WeightAveraging callback with a model that overrides.*"
        )
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
