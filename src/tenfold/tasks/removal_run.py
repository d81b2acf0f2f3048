"""Train a recipe of the task shadow_removal: from its objects to a finished, saved remover."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tenfold import __version__
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.methods.schedule import Schedule
from tenfold.nn.shadow_remover import facts_of
from tenfold.tasks.callback import MethodCallback
from tenfold.tasks.checkpoints import every_epoch, newest
from tenfold.tasks.classification import in_channels_last
from tenfold.tasks.folder import RunFolder, open_run, write_json
from tenfold.tasks.optimization import epoch_sizes
from tenfold.tasks.progress import MetricsFile, progress
from tenfold.tasks.recipe import Recipe
from tenfold.tasks.removal_evaluation import (
    RemovalEvaluation,
    baseline_errors,
    measured,
)
from tenfold.tasks.removal_progress import RemovalProgress, pictures_of, write_removal_record
from tenfold.tasks.removal_setup import (
    TASK,
    RemovalExperiment,
    removal_rows,
    set_up_removal,
)
from tenfold.tasks.shadow_removal import ShadowDataModule, ShadowRemoval
from tenfold.tasks.trainer import check_trainer, make_trainer, quietly

__all__ = ["RemovalRun", "train_removal"]


@dataclass(frozen=True)
class RemovalRun:
    """A finished run.

    Attributes:
        path: its folder.
        model: the finished network in evaluation mode, on the CPU.
        evaluation: over the held-out photos.
    """

    path: Path
    model: nn.Module
    evaluation: RemovalEvaluation


def train_removal(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: Any = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> RemovalRun | None:
    """Train a remover of shadows, and save it as an artifact; see `tenfold.train`.

    Raises:
        UserError: anything wrong with the recipe, the data or the folder, or a loss that is not
            finite; the last good checkpoint is kept.
    """
    experiment = set_up_removal(recipe, model, data, overrides)
    checked = experiment.recipe
    check_trainer(checked.trainer)
    path = Path(run_dir) if run_dir is not None else Path("runs") / str(checked.name)
    _refuse_itself(experiment, path)
    folder = RunFolder(path)
    task, callback, trainer = _build(experiment, folder)
    # Nothing of an old run is touched before everything that can be checked has been.
    if getattr(rank_zero_only, "rank", 0) == 0:
        open_run(path, checked, resume=resume, overwrite=overwrite)
        if resume and folder.is_finished:
            done = RemovalEvaluation.from_dict(folder.facts()["evaluation"])
            return RemovalRun(path, artifact.read(folder.model).model(model), done)
    checkpoint = newest(folder.checkpoints) if resume else None
    photos = ShadowDataModule(
        experiment.data, checked.train, checked.seed, experiment.methods, experiment.pairs
    )
    with quietly():
        try:
            trainer.fit(task, datamodule=photos, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    if not trainer.is_global_zero:
        return None
    if checked.train.ema is not None and not task.has_trained and checkpoint is not None:
        # Killed after the last checkpoint: Lightning did not put the average in place of the
        # weights, as nothing was left to train. The checkpoint holds it.
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        task.load_state_dict(saved["state_dict"])
    write_removal_record(experiment, folder)
    finished = callback.finalize(task).cpu().to(memory_format=torch.contiguous_format).eval()
    return _finish(experiment, folder, finished, command)


def _build(
    experiment: RemovalExperiment, folder: RunFolder
) -> tuple[ShadowRemoval, MethodCallback, pl.Trainer]:
    recipe = experiment.recipe
    train = recipe.train
    callback = MethodCallback(experiment.methods)
    callbacks: list[pl.Callback] = [callback]
    if train.ema is not None:
        # Buffers are copied, not averaged: a mask is no quantity to average.
        callbacks.append(
            WeightAveraging(
                use_buffers=False,
                multi_avg_fn=get_ema_multi_avg_fn(train.ema),  # type: ignore[no-untyped-call]
            )
        )
    callbacks += [
        MetricsFile(folder), progress(), RemovalProgress(experiment, folder),
        every_epoch(folder.checkpoints),
    ]  # fmt: skip
    trainer = make_trainer(
        recipe,
        folder,
        callbacks,
        accumulate_grad_batches=train.accumulate,
        gradient_clip_val=train.clip_norm,
        # Whole photos of many sets take longer than an epoch: ten times a run is enough.
        check_val_every_n_epoch=max(1, train.epochs // 10),
    )
    sizes = epoch_sizes(
        experiment.data.train_size,
        train,
        experiment.methods,
        trainer.world_size,
        recipe.trainer.get("limit_train_batches"),
    )
    for method in experiment.methods:
        method.check_schedule(Schedule(sum(sizes), sizes))
    callback.steps_per_epoch = sizes
    task = ShadowRemoval(
        in_channels_last(experiment.model),
        train,
        experiment.training,
        experiment.data,
        sizes=sizes,
        methods=experiment.methods,
        synthesis=experiment.synthesis,
        seed=recipe.seed,
    )
    return task, callback, trainer


def _finish(
    experiment: RemovalExperiment, folder: RunFolder, model: nn.Module, command: str | None
) -> RemovalRun:
    recipe, data, training = experiment.recipe, experiment.data, experiment.training
    remover = training.remover(model)
    evaluation, errors = measured(remover, data)
    baselines = baseline_errors(data) if data.test_has_targets else {}
    pictures = [] if errors is None else pictures_of(experiment, remover, errors)
    write_removal_record(experiment, folder, evaluation, baselines, pictures)
    artifact.save(
        model,
        folder.model,
        network=experiment.network,
        preprocessing={
            **data.preprocessing(),
            "task": TASK,
            "multiple": int(getattr(model, "multiple", 1)),
            **facts_of(model, training.guess, training.composite, training.side),
        },
        recipe=recipe.to_dict(),
    )
    cost = count_cost(model, experiment.example)
    write_json(
        folder.path / "layers.json", {"layers": removal_rows(cost, experiment.plans, measured=True)}
    )
    seconds = sum(float(row.get("seconds") or 0) for row in folder.metrics())
    run = shlex.quote(str(folder.path))
    write_json(
        folder.path / "run.json",
        {
            "name": recipe.name,
            "label": experiment.label,
            "command": command,
            "reproduce": [
                command
                or f"tenfold train {shlex.quote(str(folder.path / 'recipe.yaml'))} --overwrite",
                f"tenfold export {run} --to onnx",
                f"tenfold bench {run}",
                f"tenfold report {run}",
            ],
            "seconds": round(seconds, 1),
            "epochs": recipe.train.epochs,
            "tenfold": __version__,
            "baseline": recipe.baseline,
            "evaluation": evaluation.to_dict(),
            "baselines": baselines,
            "skipped": data.skipped,
        },
    )
    return RemovalRun(folder.path, model, evaluation)


def _refuse_itself(experiment: RemovalExperiment, path: Path) -> None:
    """Refuse to write over a run that is read from."""
    for other in experiment.others:
        if other.run is not None and path.resolve() in (
            other.run.resolve(),
            other.run.resolve().parent,
        ):
            raise UserError(
                f"methods.{other.key}.{other.role} {other.run} is this run itself: give another "
                "--run_dir"
            )
