"""The verbs that train: from a recipe to a finished, saved and measured model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tenfold import __version__
from tenfold.data import LabelledData, TranslationData
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.methods import LayerPlan
from tenfold.methods.schedule import Schedule
from tenfold.nn.supervit import SuperViT
from tenfold.tasks.callback import MethodCallback
from tenfold.tasks.cells import evaluate_cells
from tenfold.tasks.checkpoints import every_epoch, newest
from tenfold.tasks.classification import Classification, ImageDataModule, in_channels_last
from tenfold.tasks.evaluation import Evaluation, evaluate
from tenfold.tasks.folder import RunFolder, open_run, refuse_other_recipe, write_json
from tenfold.tasks.optimization import epoch_sizes
from tenfold.tasks.progress import MetricsFile, progress
from tenfold.tasks.recipe import Recipe, task_of
from tenfold.tasks.records import write_records
from tenfold.tasks.setup import Experiment, layer_plans, layer_rows, plan, set_up
from tenfold.tasks.trainer import check_trainer, make_trainer, quietly
from tenfold.tasks.translation_run import TranslationRun, train_translation

__all__ = ["Run", "check_trainer", "evaluate", "plan", "train"]

if TYPE_CHECKING:
    from tenfold.data.shadows import ShadowData
    from tenfold.tasks.removal_run import RemovalRun
    from tenfold.tasks.synthesis_run import SynthesisRun


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        model: the finished network in evaluation mode, on the CPU.
        evaluation: over the held-out images.
    """

    path: Path
    model: nn.Module
    evaluation: Evaluation


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: LabelledData | TranslationData | ShadowData | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Run | TranslationRun | RemovalRun | SynthesisRun | None:
    """Train a recipe to its end, and save the finished model as an artifact.

    Args:
        recipe: a shipped name, a YAML file, a mapping or a recipe.
        model: a network to train instead of the one that the recipe names.
        data: data instead of what the recipe names.
        run_dir: the run's folder; `runs/<name>` by default.
        resume: go on from the last checkpoint of the folder.
        overwrite: throw away the run that is in the folder.
        overrides: values by dotted key, such as `{"train.epochs": 5}`.
        command: what the user typed, for the record.

    Returns:
        The run; None on ranks other than the first.

    Raises:
        UserError: anything wrong with the recipe, the data or the folder, or a loss that is not
            finite; the last good checkpoint is kept.
    """
    own = _train_of(task_of(recipe, overrides))
    if own is not None:
        found: Run | TranslationRun | RemovalRun | SynthesisRun | None = own(
            recipe,
            model,
            data,
            run_dir=run_dir,
            resume=resume,
            overwrite=overwrite,
            overrides=overrides,
            command=command,
        )
        return found
    experiment = set_up(recipe, model, data, overrides)
    plans = layer_plans(experiment)  # now: a method may put other layers in place of the network's
    check_trainer(experiment.recipe.trainer)
    path = Path(run_dir) if run_dir is not None else Path("runs") / str(experiment.recipe.name)
    _refuse_itself(experiment, path)
    folder = RunFolder(path)
    task, callback, trainer = _build(experiment, folder)
    # Nothing of an old run is touched before everything that can be checked has been.
    if getattr(rank_zero_only, "rank", 0) == 0:
        open_run(path, experiment.recipe, resume=resume, overwrite=overwrite)
        if resume and folder.is_finished:
            done = folder.facts()["evaluation"]
            trained = artifact.read(folder.model).model(
                experiment.model if experiment.network.name is None else None
            )
            return Run(path, trained, Evaluation(**done))
    _train_others(experiment, path, command)
    checkpoint = newest(folder.checkpoints) if resume else None
    images = ImageDataModule(
        experiment.data, experiment.recipe.train, experiment.recipe.seed, experiment.methods
    )
    with quietly():
        try:
            trainer.fit(task, datamodule=images, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    if not trainer.is_global_zero:
        return None
    ema = experiment.recipe.train.ema is not None
    if ema and not task.has_trained and checkpoint is not None:
        # Killed between the last checkpoint and the artifact: nothing was left to train, and so
        # Lightning did not put the average in place of the weights. The checkpoint holds it.
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        task.load_state_dict(saved["state_dict"])
    write_records(experiment.methods, experiment.data, folder)
    finished = callback.finalize(task).cpu().to(memory_format=torch.contiguous_format).eval()
    return _finish(experiment, plans, folder, finished, command)


def _train_of(task: str | None) -> Callable[..., Any] | None:
    """Return what trains a task whose runs are no classifier's; None for the others."""
    if task == "translation":
        return train_translation
    if task == "shadow_removal":
        from tenfold.tasks.removal_run import train_removal

        return train_removal
    if task == "shadow_synthesis":
        from tenfold.tasks.synthesis_run import train_synthesis

        return train_synthesis
    return None


def _refuse_itself(experiment: Experiment, path: Path) -> None:
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


def _train_others(experiment: Experiment, path: Path, command: str | None) -> None:
    """Train networks that methods need and nobody has trained yet; their runs are kept.

    Raises:
        UserError: a run of another recipe lies in its place, or training it failed.
    """
    for other in experiment.others:
        if other.recipe is None:
            continue
        folder = RunFolder(other.folder_beside(path))
        if folder.is_run and not folder.is_empty:
            try:
                refuse_other_recipe(folder, other.recipe)
            except UserError as error:
                raise UserError(
                    f"the {other.role} of {other.key}: {error}; or name the run itself, "
                    f"methods.{other.key}.{other.role}: {folder.path}"
                ) from error
        if not folder.is_finished:
            if getattr(rank_zero_only, "rank", 0) == 0:
                print(f"first the {other.role}, {other.origin}: {folder.path}", flush=True)
            train(
                other.recipe,
                data=experiment.data,
                run_dir=folder.path,
                resume=True,
                command=command,
            )
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()  # the first process alone writes the artifact
        other.network.load_state_dict(artifact.read(folder.model).state_dict())


def _build(
    experiment: Experiment, folder: RunFolder
) -> tuple[Classification, MethodCallback, pl.Trainer]:
    recipe = experiment.recipe
    callback = MethodCallback(experiment.methods)
    callbacks: list[pl.Callback] = [callback]
    if recipe.train.ema is not None:
        # Buffers are copied, not averaged: a mask is no quantity to average.
        callbacks.append(
            WeightAveraging(
                use_buffers=False,
                multi_avg_fn=get_ema_multi_avg_fn(recipe.train.ema),  # type: ignore[no-untyped-call]
            )
        )
    callbacks += [MetricsFile(folder), progress(), every_epoch(folder.checkpoints)]
    trainer = make_trainer(
        recipe,
        folder,
        callbacks,
        accumulate_grad_batches=recipe.train.accumulate,
        gradient_clip_val=recipe.train.clip_norm,
    )
    sizes = epoch_sizes(
        experiment.data.train_size,
        recipe.train,
        experiment.methods,
        trainer.world_size,
        recipe.trainer.get("limit_train_batches"),
    )
    for method in experiment.methods:
        method.check_schedule(Schedule(sum(sizes), sizes))
    callback.steps_per_epoch = sizes
    task = Classification(
        in_channels_last(experiment.model),
        recipe.train,
        num_classes=experiment.data.num_classes,
        total_steps=sum(sizes),
        steps_per_epoch=sizes[0],
        methods=experiment.methods,
        normalize=experiment.data.normalize,
        seed=recipe.seed,
    )
    return task, callback, trainer


def _finish(
    experiment: Experiment,
    plans: Mapping[str, LayerPlan],
    folder: RunFolder,
    model: nn.Module,
    command: str | None,
) -> Run:
    recipe, data = experiment.recipe, experiment.data
    evaluation = evaluate(model, data)
    assert isinstance(evaluation, Evaluation)
    if isinstance(model, SuperViT):
        evaluate_cells(model, data)  # the artifact keeps the table
    described = {
        "network": experiment.network,
        "preprocessing": data.preprocessing(),
        "classes": data.classes,
        "recipe": recipe.to_dict(),
    }
    artifact.save(model, folder.model, **described)  # type: ignore[arg-type]
    rows = layer_rows(count_cost(model, experiment.example), plans, measured=True)
    write_json(folder.path / "layers.json", {"layers": rows})
    seconds = sum(float(row.get("seconds") or 0) for row in folder.metrics())
    run = folder.path
    write_json(
        run / "run.json",
        {
            "name": recipe.name,
            "label": experiment.label,
            "command": command,
            "reproduce": [
                command or f"tenfold train {shlex.quote(str(run / 'recipe.yaml'))} --overwrite",
                f"tenfold export {shlex.quote(str(run))} --to onnx",
                f"tenfold bench {shlex.quote(str(run))}",
                f"tenfold report {shlex.quote(str(run))}",
            ],
            "seconds": round(seconds, 1),
            "epochs": recipe.train.epochs,
            "tenfold": __version__,
            "baseline": recipe.baseline,
            "evaluation": evaluation.to_dict(),
            "skipped": data.skipped,
        },
    )
    return Run(run, model, evaluation)
