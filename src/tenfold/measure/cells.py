"""Time every cell of a network with many budgets on this machine, all in turn."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.measure.inputs import ExampleInputs, as_inputs, at_batch
from tenfold.measure.machine import doctor
from tenfold.measure.timing import interleave, paired_ratio
from tenfold.nn.budget import CellRow, CellTable
from tenfold.nn.supervit import SuperViT

__all__ = ["CELLS", "cell_lines", "measure_cells", "read_cells", "write_cells"]

CELLS = "cells.json"  # beside an artifact's own files


def measure_cells(
    model: SuperViT,
    example_inputs: ExampleInputs,
    *,
    batch: int = 16,
    threads: int | None = None,
    seconds: float = 12.0,
    reference: nn.Module | None = None,
) -> dict[tuple[int, float], float]:
    """Note in `model.table` how long one image takes in each cell, and how many images a second.

    In PyTorch, interleaved, in evaluation mode.

    Args:
        model: stays as it is but for its table.
        example_inputs: tensor `(B, C, H, H)`.
        batch: images at a time for the throughput.
        threads: of PyTorch; as they are by default.
        seconds: for all cells at one batch size.
        reference: a network to compare with, such as the plain ViT.

    Returns:
        How many times faster than the reference each cell is at `batch`; empty without one.
    """
    if not isinstance(model, SuperViT):
        raise UserError(
            f"{type(model).__name__} has no cells: expected a SuperViT; use tenfold.bench"
        )
    inputs = as_inputs(example_inputs)
    before, training = torch.get_num_threads(), model.training
    torch.set_num_threads(threads or before)
    model.eval()
    ratios = {}
    try:
        with torch.inference_mode():
            for size in dict.fromkeys((1, batch)):
                (images,) = at_batch(inputs, size)
                calls: dict[str, Callable[[], object]] = {
                    str(cell): functools.partial(model, images, *cell) for cell in model.cells
                }
                if reference is not None:
                    calls["reference"] = functools.partial(reference, images)
                samples = interleave(calls, seconds)
                for cell in model.cells:
                    median = statistics.median(samples[str(cell)])
                    if size == 1:
                        model.table.note(cell, latency_ms=median)
                    if size == batch:
                        rate = 1000 * batch / median
                        model.table.note(cell, images_per_second=rate, batch=batch)
                        if reference is not None:
                            ratio = paired_ratio(samples["reference"], samples[str(cell)])
                            ratios[cell] = ratio.median
    finally:
        torch.set_num_threads(before)
        model.train(training)
    model.table.machine = doctor().cpu
    return ratios


def write_cells(folder: Path, table: CellTable) -> Path:
    """Write a table beside an artifact's files, as `cells.json`."""
    file = folder / CELLS
    draft = file.with_suffix(".writing")
    draft.write_text(json.dumps(table.to_dict(), indent=1) + "\n", encoding="utf-8")
    draft.replace(file)
    return file


def read_cells(folder: Path) -> dict[str, Any] | None:
    """Read `cells.json`; None where there is none.

    Raises:
        UserError: it isn't JSON.
    """
    file = folder / CELLS
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON: {error}; measure again, tenfold bench RUN"
        ) from error
    return found


def cell_lines(rows: Sequence[CellRow], best: Sequence[CellRow] = ()) -> list[str]:
    """Write cells as a table for a terminal; those that no other beats are marked.

    Args:
        rows: of a table.
        best: of them, see `CellTable.front`.
    """
    header = ("size", "keep rate", "MACs", "accuracy", "one image", "images/s", "")
    lines = [header]
    for row in rows:
        lines.append(
            (
                str(row.size),
                f"{row.keep_rate:g}",
                f"{row.macs / 1e9:.3f} G" if row.macs >= 1e9 else f"{row.macs / 1e6:.1f} M",
                "-" if row.accuracy is None else f"{100 * row.accuracy:.2f} %",
                "-" if row.latency_ms is None else f"{row.latency_ms:.3g} ms",
                "-" if row.images_per_second is None else f"{row.images_per_second:.4g}",
                "*" if row in best else "",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
