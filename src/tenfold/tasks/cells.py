"""Accuracy of every cell of a SuperViT, and the verbs on single cells."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import torch
from torch import nn

from tenfold.data import LabelledData
from tenfold.deploy.cells import CellsExport, cell_name, export_cells
from tenfold.deploy.onnx import ExportResult, export
from tenfold.errors import UserError
from tenfold.measure import doctor
from tenfold.measure.cells import write_cells
from tenfold.nn.budget import CellTable, parse_budget
from tenfold.nn.supervit import SuperViT, SuperViTCell
from tenfold.tasks.evaluation import data_of
from tenfold.tasks.loading import example_of, metadata_of, model_of, open_artifact

__all__ = [
    "cell_at",
    "evaluate_cells",
    "evaluate_run_cells",
    "export_run_cell",
    "export_run_cells",
    "parse_cell",
    "supervit_of",
]

Cell = tuple[int, float]


def evaluate_cells(
    model: SuperViT, data: LabelledData, *, batch_size: int | None = None
) -> dict[Cell, float]:
    """Return the accuracy of every cell on held-out images, 0 to 1, and note it in `model.table`.

    The rates of one size share resize, patches and the blocks ahead of the first drop.

    Args:
        model: in any mode; it is put back.
        data: held-out images.
        batch_size: images at a time; 256 by default.
    """
    cells = model.cells
    right, count = dict.fromkeys(cells, 0), 0
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in data.test_loader(batch_size=batch_size or data.eval_batch_size):
                images, label = data.normalize(batch[data.key]).to(device), batch["label"]
                for _, group in itertools.groupby(cells, key=lambda cell: cell[0]):
                    some = list(group)
                    for cell, logits in zip(some, model(images, cells=some), strict=True):
                        right[cell] += int((logits.argmax(dim=1).cpu() == label).sum())
                count += len(label)
    finally:
        model.train(training)
    for cell in cells:
        model.table.note(cell, accuracy=right[cell] / count)
    return {cell: right[cell] / count for cell in cells}


def evaluate_run_cells(
    path: str | Path, data: str | None = None, batch_size: int | None = None
) -> CellTable:
    """Evaluate all cells of a run or an artifact, and keep the figures beside it.

    Args:
        path: the run or the artifact.
        data: name of a data set; the one that it was trained on by default.
        batch_size: images at a time.

    Raises:
        UserError: it is no SuperViT, or no data set is known.
    """
    model, folder = supervit_of(path)
    images = data_of(data, {"recipe": open_artifact(path)[1].recipe}, Path(path))
    evaluate_cells(model, images, batch_size=batch_size)
    write_cells(folder, model.table)
    return model.table


def export_run_cells(path: str | Path, cells: list[Cell] | None = None) -> CellsExport:
    """Export cells of a run into `RUN/export/cells/`, on one file of weights; all by default.

    Raises:
        UserError: it is no SuperViT; see `export_cells`.
    """
    run, found = open_artifact(path)
    model, _ = supervit_of(path)
    return export_cells(
        model, run.export / "cells", example_of(found), cells, metadata=metadata_of(found)
    )


def export_run_cell(path: str | Path, cell: Cell, to: str = "onnx") -> ExportResult:
    """Export one cell of a run into `RUN/export/SIZE-RATE.onnx`, with its own weights.

    Raises:
        UserError: it is no SuperViT; see `tenfold.export`.
    """
    run, found = open_artifact(path)
    model, _ = supervit_of(path)
    suffix = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}[to]
    target = run.export / cell_name(*cell).replace(".onnx", suffix)
    facts = {**metadata_of(found), "cell": {"size": cell[0], "keep_rate": cell[1]}}
    return export(model.cell(*cell), target, example_of(found), to=to, metadata=facts)


def cell_at(model: nn.Module, budget: str) -> SuperViTCell:
    """Return the best cell of a network within a budget such as `5ms`.

    Raises:
        UserError: no SuperViT, no such budget, or none of its kind was measured.
    """
    if not isinstance(model, SuperViT):
        raise UserError(
            f"a budget chooses among the cells of a SuperViT, and this is {type(model).__name__}: "
            "leave --budget out"
        )
    wanted = parse_budget(budget)
    here = doctor().cpu
    if "macs" not in wanted and model.table.machine not in (None, here):
        warnings.warn(
            f"the cells were measured on {model.table.machine}, and this is {here}: measure them "
            "here, tenfold bench RUN",
            stacklevel=2,
        )
    return model.at_budget(**wanted)


def parse_cell(text: str) -> Cell:
    """Read a cell as a user writes it.

    Raises:
        UserError: it is no size and keep rate.

    >>> parse_cell("192,0.7")
    (192, 0.7)
    """
    size, comma, rate = text.partition(",")
    try:
        return int(size), float(rate) if comma else 1.0
    except ValueError:
        raise UserError(
            f"cell {text!r}: expected a size and a keep rate, such as 192,0.7"
        ) from None


def supervit_of(path: str | Path) -> tuple[SuperViT, Path]:
    """Open a run's or an artifact's SuperViT; return it and the artifact's folder.

    Raises:
        UserError: it is another network.
    """
    run, found = open_artifact(path)
    model = model_of(run, found)
    if not isinstance(model, SuperViT):
        raise UserError(f"{path} holds {type(model).__name__}, which has no cells: leave them out")
    return model, found.path
