"""What a run that translates images shows as it goes: figures, pictures and the report."""

from __future__ import annotations

import copy
import json
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tenfold.measure.image_features import to_uint8
from tenfold.tasks.folder import RunFolder, write_json
from tenfold.tasks.translation import Translation
from tenfold.tasks.translation_evaluation import evaluate_generator, in_evaluation

__all__ = ["Progress", "SavedReport"]

START = "start.json"  # in a run's folder: what the fresh student does
KEPT_GRIDS = 3  # in the report: the first, and the last ones
# Title, axis, and column of metrics.csv by label; no columns: the student's losses.
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Distance of held-out images to their targets", "L1", {"test_l1": "student"}),
    ("Distance of made from real images", "FID", {"test_fid": "student", "teacher_fid": "teacher"}),
    ("Losses of the student", "weighted, mean of an epoch", {}),
)
TEACHERS = ("teacher_", "discriminator")


class Progress(pl.Callback):
    """Evaluate as the phases say, keep the best, and draw what the student makes.

    Args:
        folder: of the run; grids lie in `samples/`.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ahead of a round of the student, judge the teacher, and keep it if it is the best."""
        task = _task(pl_module)
        if not task.phase.begins_round:
            return
        experiment = task.experiment
        if experiment.reference is None:
            task.teacher.take_snapshot()  # type: ignore[operator]
            return
        data, reference = experiment.choosing or (experiment.data, experiment.reference)
        with in_evaluation(task.teacher.generator) as generator:
            found = evaluate_generator(generator, data, reference, device=task.device)
        if found.score < task.best_teacher:
            task.best_teacher = found.score
            task.teacher.take_snapshot()  # type: ignore[operator]
        # Evaluating has drawn no random numbers, so that the epoch's are what they were.
        self._teacher = found.figures("teacher_")

    _teacher: dict[str, float] | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a phase that says so, evaluate the student and draw held-out images."""
        task = _task(pl_module)
        for name, value in (self._teacher or {}).items():
            pl_module.log(name, value)
        self._teacher = None
        if not task.phase.evaluates:
            return
        experiment = task.experiment
        with in_evaluation(task.student) as student:
            found = evaluate_generator(
                student, experiment.data, experiment.reference, device=task.device
            )
        figures, chosen_by = found.figures(), found
        if experiment.choosing is not None:
            with in_evaluation(task.student) as student:
                chosen_by = evaluate_generator(student, *experiment.choosing, device=task.device)
            figures |= chosen_by.figures("validation_")
        for name, value in figures.items():
            pl_module.log(name, value)
        if chosen_by.score < task.best_student:
            task.best_student = chosen_by.score
            if experiment.recipe.gan.keep == "best":
                state = copy.deepcopy(task.student.state_dict())
                task.best_state = {name: value.cpu() for name, value in state.items()}
        if experiment.recipe.gan.pictures:
            self._draw(task)

    def _draw(self, task: Translation) -> None:
        from PIL import Image

        grid = sample_grid(task)
        folder = self.folder.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"epoch_{task.current_epoch + 1:04d}.png"
        draft = target.with_suffix(".writing")
        Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(draft, "PNG")
        draft.replace(target)


class SavedReport(pl.Callback):
    """Write the run's record and report after each evaluation, once its figures are in place.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write them; a report that can't be written yet stops no run."""
        task = _task(pl_module)
        if not task.phase.evaluates:
            return
        write_translation_record(task, self.folder)
        from tenfold.report import write_report

        write_report(self.folder.path)


def sample_grid(task: Translation) -> Tensor:
    """Return rows of input, teacher, student and target of held-out images, uint8 `(3, h, w)`."""
    experiment = task.experiment
    data, rows = experiment.data, []
    count = experiment.recipe.gan.pictures
    batch = next(iter(data.test_loader(batch_size=count)))
    source = data.normalize(batch["source"])
    for number in range(len(source)):
        one = source[number : number + 1].to(task.device)
        with in_evaluation(task.student), in_evaluation(task.teacher), torch.no_grad():
            made = [task.teacher.source(one), task.student(one)]
        pictures = [batch["source"][number], *(to_uint8(image.float().cpu())[0] for image in made)]
        if "target" in batch:
            pictures.append(batch["target"][number])
        rows.append(torch.cat([_rgb(picture) for picture in pictures], dim=2))
    return torch.cat(rows, dim=1)


def write_translation_record(task: Translation, folder: RunFolder) -> None:
    """Write `methods.json`: facts, curves and grids, for the report."""
    experiment = task.experiment
    rows = folder.metrics()
    known = list(dict.fromkeys(name for row in rows for name, value in row.items() if value))
    own = {"epoch", "step", "learning_rate", "seconds", "train_loss"}
    student = [
        name
        for name in known
        if name not in own and not name.startswith((*TEACHERS, "test_", "validation_"))
    ]
    charts = []
    for title, y_label, names in CURVES:
        lines = [
            {
                "label": label,
                "points": [
                    [float(row["epoch"]), float(row[name])] for row in rows if row.get(name)
                ],
            }
            for name, label in (names or {name: name for name in student[:5]}).items()
        ]
        lines = [line for line in lines if line["points"]]
        if lines:
            charts.append({"title": title, "x_label": "epoch", "y_label": y_label, "lines": lines})
    entry = {
        "method": "the training of teacher and student",
        "facts": [list(pair) for pair in _facts(task, folder, rows)],
        "charts": charts,
        "images": [_grids(folder, experiment.data.paired)],
    }
    others = [
        {"method": method.key(), **record, "images": []}
        for method in experiment.methods
        if (record := method.record())
    ]
    write_json(folder.records, {"format": 1, "methods": [entry, *others]})


def _facts(
    task: Translation, folder: RunFolder, rows: list[dict[str, str]]
) -> list[tuple[str, str]]:
    experiment = task.experiment
    weights = [f"{name} {weight:g}" for name, weight in experiment.weights.items() if weight]
    facts = [("losses beside the methods'", ", ".join(weights) or "none")]
    facts += [(note.split(None, 1)[0], note.split(None, 1)[1]) for note in experiment.notes]
    now = [float(row["test_l1"]) for row in rows if row.get("test_l1")]
    if now and (folder.path / START).is_file():
        start = float(json.loads((folder.path / START).read_text(encoding="utf-8"))["l1"])
        facts.append(
            (
                "L1 to the targets, held out",
                f"{start:.3f} at the start, {now[-1]:.3f} now: {now[-1] / start:.2f} of it",
            )
        )
    facts.append(("held-out images", f"{experiment.data.test_size} of {experiment.data.name}"))
    return facts


def _grids(folder: RunFolder, paired: bool) -> dict[str, Any]:
    import base64

    files = sorted((folder.path / "samples").glob("epoch_*.png"))
    if len(files) > KEPT_GRIDS:
        files = [files[0], *files[1 - KEPT_GRIDS :]]
    columns = "input, teacher, student" + (", target" if paired else "")
    items = [
        {
            "png": base64.b64encode(file.read_bytes()).decode("ascii"),
            "caption": f"epoch {int(file.stem.removeprefix('epoch_'))}: {columns}",
        }
        for file in files
    ]
    return {"title": "Held-out images as training went", "items": items, "wide": True}


def _rgb(picture: Tensor) -> Tensor:
    return picture if picture.shape[0] == 3 else picture[:1].expand(3, -1, -1)


def _task(module: pl.LightningModule) -> Translation:
    assert isinstance(module, Translation)
    return module
