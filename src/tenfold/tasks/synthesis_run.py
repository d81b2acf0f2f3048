"""Train a recipe of the task shadow_synthesis: from its objects to a finished synthesizer."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tenfold import __version__
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.methods.hqss import HQSS
from tenfold.tasks.checkpoints import every_epoch, newest
from tenfold.tasks.folder import RunFolder, open_run, write_json
from tenfold.tasks.progress import MetricsFile, progress
from tenfold.tasks.recipe import Recipe
from tenfold.tasks.setup import layer_rows
from tenfold.tasks.shadow_synthesis import RegionDataModule, ShadowSynthesis
from tenfold.tasks.synthesis_evaluation import SynthesisEvaluation, evaluate_synthesis
from tenfold.tasks.synthesis_progress import SynthesisProgress, write_synthesis_record
from tenfold.tasks.synthesis_setup import SynthesisExperiment, set_up_synthesis
from tenfold.tasks.trainer import check_trainer, make_trainer, quietly

__all__ = ["SynthesisRun", "train_synthesis"]


@dataclass(frozen=True)
class SynthesisRun:
    """A finished run.

    Attributes:
        path: its folder.
        model: encoder and generator, in evaluation mode, on the CPU.
        evaluation: how dark what it paints on held-out photos is.
    """

    path: Path
    model: nn.Module
    evaluation: SynthesisEvaluation


def train_synthesis(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: Any = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> SynthesisRun:
    """Learn to paint shadows, and save encoder and generator as an artifact; see `tenfold.train`.

    Raises:
        UserError: anything wrong with the recipe, the data or the folder, more than one device, or
            a loss that is not finite; the last good checkpoint is kept.
    """
    experiment = set_up_synthesis(recipe, model, data, overrides)
    checked = experiment.recipe
    check_trainer(checked.trainer)
    if str(checked.trainer.get("precision")) in ("16", "16-mixed"):
        raise UserError(
            "trainer.precision 16-mixed scales losses, and several networks learn here at once: "
            "use bf16-mixed, or leave it out"
        )
    if checked.trainer.get("limit_train_batches") not in (None, 1.0):
        raise UserError("trainer.limit_train_batches: use data.limit for the task shadow_synthesis")
    path = Path(run_dir) if run_dir is not None else Path("runs") / str(checked.name)
    folder = RunFolder(path)
    trainer = make_trainer(
        checked,
        folder,
        [SynthesisProgress(), MetricsFile(folder), progress(), every_epoch(folder.checkpoints)],
    )
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices: {trainer.world_size} processes, and the task shadow_synthesis "
            "trains on one device (batches are of 1 photo): set trainer.devices to 1"
        )
    open_run(path, checked, resume=resume, overwrite=overwrite)
    if resume and folder.is_finished:
        trained = artifact.read(folder.model).model(_bare(experiment))
        found = SynthesisEvaluation.from_dict(folder.facts()["evaluation"])
        return SynthesisRun(path, trained, found)
    task = ShadowSynthesis(experiment)
    checkpoint = newest(folder.checkpoints) if resume else None
    with quietly():
        try:
            trainer.fit(
                task,
                datamodule=RegionDataModule(experiment),
                ckpt_path=checkpoint,
                weights_only=True,
            )
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    return _finish(experiment, folder, task.finalize().cpu().eval(), command)


def _bare(experiment: SynthesisExperiment) -> HQSS | None:
    """Return the user's own network as it is saved; None: the artifact names it."""
    if experiment.network.name is not None:
        return None
    model = experiment.model
    model.shadow_discriminator = model.lit_discriminator = None
    return model


def _finish(
    experiment: SynthesisExperiment, folder: RunFolder, model: HQSS, command: str | None
) -> SynthesisRun:
    recipe, data = experiment.recipe, experiment.data
    write_synthesis_record(experiment, model, folder)
    evaluation = evaluate_synthesis(model, data, experiment.pairs.shapes)
    artifact.save(
        model,
        folder.model,
        network=experiment.network,
        preprocessing={**data.preprocessing(), "task": recipe.task, "space": "lab"},
        recipe=recipe.to_dict(),
    )
    cost = count_cost(model, experiment.example)
    write_json(folder.path / "layers.json", {"layers": layer_rows(cost, {}, measured=True)})
    seconds = sum(float(row.get("seconds") or 0) for row in folder.metrics())
    run = folder.path
    write_json(
        run / "run.json",
        {
            "name": recipe.name,
            "label": "hqss",
            "command": command,
            "reproduce": [
                command or f"tenfold train {shlex.quote(str(run / 'recipe.yaml'))} --overwrite",
                f"tenfold synthesize {shlex.quote(str(run))} IMAGES --masks MASKS --out FOLDER",
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
    return SynthesisRun(run, model, evaluation)
