"""Train a recipe of the task translation: from its objects to a finished, saved student."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold import __version__
from tenfold.data import LabelledData, TranslationData
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.measure.paper_macs import paper_macs
from tenfold.tasks.checkpoints import every_epoch, newest
from tenfold.tasks.folder import RunFolder, open_run, write_json
from tenfold.tasks.progress import MetricsFile, progress
from tenfold.tasks.recipe import Recipe
from tenfold.tasks.setup import layer_rows
from tenfold.tasks.trainer import check_trainer, make_trainer, quietly
from tenfold.tasks.translation import PairDataModule, Translation
from tenfold.tasks.translation_evaluation import (
    TranslationEvaluation,
    evaluate_generator,
    in_evaluation,
)
from tenfold.tasks.translation_progress import (
    START,
    Progress,
    SavedReport,
    write_translation_record,
)
from tenfold.tasks.translation_setup import TranslationExperiment, set_up_translation

__all__ = ["TEACHER", "TranslationRun", "train_translation"]

TEACHER = "teacher"  # the folder of the teacher's artifact, beside the student's


@dataclass(frozen=True)
class TranslationRun:
    """A finished run.

    Attributes:
        path: its folder.
        model: the finished student in evaluation mode, on the CPU.
        evaluation: over the held-out images.
    """

    path: Path
    model: nn.Module
    evaluation: TranslationEvaluation


def train_translation(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: TranslationData | LabelledData | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> TranslationRun:
    """Train a student beside its teacher, and save both as artifacts; see `tenfold.train`.

    Raises:
        UserError: anything wrong with the recipe, the data or the folder, more than one device, or
            a loss that is not finite; the last good checkpoint is kept.
    """
    experiment = set_up_translation(recipe, model, data, overrides)
    checked = experiment.recipe
    check_trainer(checked.trainer)
    if str(checked.trainer.get("precision")) in ("16", "16-mixed"):
        raise UserError(
            "trainer.precision 16-mixed scales losses, and several networks learn here at once: "
            "use bf16-mixed, or leave it out"
        )
    path = Path(run_dir) if run_dir is not None else Path("runs") / str(checked.name)
    folder = RunFolder(path)
    trainer = make_trainer(
        checked,
        folder,
        [
            Progress(folder), MetricsFile(folder), SavedReport(folder), progress(),
            every_epoch(folder.checkpoints),
        ],
        max_epochs=len(experiment.phases),
    )  # fmt: skip
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices: {trainer.world_size} processes, and the task translation trains on "
            "one device (batches are of 1 to 4 images): set trainer.devices to 1"
        )
    open_run(path, checked, resume=resume, overwrite=overwrite)
    if resume and folder.is_finished:
        trained = artifact.read(folder.model).model(model)
        found = TranslationEvaluation.from_dict(folder.facts()["evaluation"])
        return TranslationRun(path, trained, found)
    for network in (experiment.student, experiment.teacher):
        network.to(memory_format=torch.channels_last)
    task = Translation(experiment)
    images = PairDataModule(experiment.data, checked.train, checked.seed)
    checkpoint = newest(folder.checkpoints) if resume else None
    if checkpoint is None and experiment.data.paired:
        with in_evaluation(experiment.student) as fresh:
            start = evaluate_generator(fresh, experiment.data)
        write_json(folder.path / START, start.to_dict())
    with quietly():
        try:
            trainer.fit(task, datamodule=images, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    write_translation_record(task, folder)
    student = task.finalize().cpu().to(memory_format=torch.contiguous_format).eval()
    return _finish(experiment, folder, student, command)


def _finish(
    experiment: TranslationExperiment, folder: RunFolder, student: nn.Module, command: str | None
) -> TranslationRun:
    recipe, data = experiment.recipe, experiment.data
    reference = experiment.reference
    if reference is not None:
        reference.extractor.to("cpu")
    evaluation = evaluate_generator(student, data, reference)
    described: dict[str, Any] = {
        "preprocessing": data.preprocessing(),
        "recipe": recipe.to_dict(),
    }
    artifact.save(student, folder.model, network=experiment.network, **described)
    teacher = experiment.teacher.source.cpu().to(memory_format=torch.contiguous_format)
    artifact.save(
        teacher.eval(), folder.path / TEACHER, network=experiment.teacher_network, **described
    )
    cost = count_cost(student, experiment.example)
    write_json(
        folder.path / "layers.json", {"layers": layer_rows(cost, experiment.plans, measured=True)}
    )
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
            "macs": {"true": cost.macs, "paper": paper_macs(student, experiment.example)},
        },
    )
    return TranslationRun(run, student, evaluation)
