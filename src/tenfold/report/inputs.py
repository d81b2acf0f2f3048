"""Read what lies in a run's folder. Each file may be missing; one that is there must make sense."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tenfold.errors import UserError
from tenfold.nn.budget import CellTable
from tenfold.report.cells import read_cell_table
from tenfold.report.fields import Fields, short
from tenfold.report.records import Record, read_record

__all__ = ["Bench", "Check", "Export", "Latency", "Layer", "Metrics", "Run", "Size", "read_run"]

# Only these columns of metrics.csv are drawn; others are left alone, whatever they hold.
CURVES = (
    "train_loss", "test_loss", "test_accuracy", "density", "learning_rate",
    "test_l1", "test_ssim", "test_fid", "test_shadow_lab_mae", "test_nonshadow_lab_mae",
)  # fmt: skip
# Epoch and value, in the file's order; `None` where the cell is empty or not finite.
Curve = tuple[tuple[float, float | None], ...]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Metrics:
    """The curves of a metrics.csv by column name; a column without any value is absent."""

    curves: Mapping[str, Curve]

    def last(self, name: str) -> float | None:
        """Return the last value of a curve, `None` when there is none."""
        values = [value for _, value in self.curves.get(name, ()) if value is not None]
        return values[-1] if values else None


@dataclass(frozen=True)
class Size:
    """What one model weighs: counts, MACs per image or clip, bytes on disk."""

    parameters: float | None = None
    nonzero_parameters: float | None = None
    macs: float | None = None
    effective_macs: float | None = None
    dense_bytes: float | None = None
    packed_bytes: float | None = None


@dataclass(frozen=True)
class Latency:
    """One model in one runtime at one batch size; `ratio` is the reference's time over its own."""

    runtime: str
    batch: int
    model: str
    median_ms: float | None
    p10_ms: float | None
    p90_ms: float | None
    images_per_second: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    verdict: str | None


@dataclass(frozen=True)
class Bench:
    """A bench.json; `models[0]` is the reference."""

    created: str | None
    command: str | None
    seed: float | None
    threads: float | None
    machine: Mapping[str, object]
    versions: Mapping[str, object]
    models: tuple[str, ...]
    accuracy: Mapping[str, float | None]
    size: Mapping[str, Size]
    latency: tuple[Latency, ...]
    skipped: tuple[tuple[str, str], ...]
    summary: tuple[str, ...]
    baseline: str | None


@dataclass(frozen=True)
class Layer:
    """One row of layers.json; `treatment` is what the method did, `reason` why it did nothing."""

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: float | None
    macs: float | None
    kept: float | None
    effective_macs: float | None
    treatment: str | None
    reason: str | None


@dataclass(frozen=True)
class Check:
    """One comparison of an exported file with the model it came from."""

    runtime: str
    batch: float | None
    max_difference: float | None


@dataclass(frozen=True)
class Export:
    """One exported file and its checks."""

    format: str
    path: str
    bytes: float | None
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Run:
    """All that is known about a run; what has no file is `None` or empty."""

    folder: Path
    name: str
    recipe: str | None
    metrics: Metrics | None
    baseline: str | None
    baseline_metrics: Metrics | None
    bench: Bench | None
    layers: tuple[Layer, ...] | None
    exports: tuple[Export, ...] | None
    records: tuple[Record, ...]
    commands: tuple[str, ...]
    seconds: float | None
    epochs: float | None
    version: str | None
    unit: str = "image"  # or clip: what the network takes
    cells: CellTable | None = None  # of a network with many budgets

    @property
    def makes_images(self) -> bool:
        """Whether the network makes images: it has no accuracy, but a distance to others."""
        curves = self.metrics.curves if self.metrics else {}
        return any(name in curves for name in ("test_l1", "test_fid", "test_shadow_lab_mae"))


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: If the folder is missing, or a file in it is broken or of another format.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/<name>")
    bench = _read(folder / "bench.json", _bench)
    about = _read_json(folder / "run.json")
    baseline = about.text("baseline") if about else None
    baseline = baseline or (bench.baseline if bench else None)
    commands = list(about.texts("reproduce")) if about else []
    command = about.text("command") if about else None
    if command and not commands:
        commands = [command]
    if bench and bench.command and bench.command not in commands:
        commands.append(bench.command)
    return Run(
        folder=folder,
        name=(about.text("name") if about else None) or folder.resolve().name,
        recipe=_read_text(folder / "recipe.yaml"),
        metrics=_read_metrics(folder / "metrics.csv"),
        baseline=baseline,
        baseline_metrics=_baseline_metrics(folder, baseline) if baseline else None,
        bench=bench,
        layers=_read(folder / "layers.json", lambda found: found.items("layers", _layer)),
        exports=_read(
            folder / "export" / "export.json", lambda found: found.items("exports", _export)
        ),
        records=_read(folder / "methods.json", _records) or (),
        commands=tuple(commands),
        seconds=about.number("seconds") if about else None,
        epochs=about.number("epochs") if about else None,
        version=about.text("tenfold") if about else None,
        unit=(about.fields("evaluation").text("unit") if about else None) or "image",
        cells=_read(folder / "model" / "cells.json", read_cell_table),
    )


def _bench(found: Fields) -> Bench:
    if found.data.get("format") != 1:
        raise UserError(
            f"{found.file} has format {short(found.data.get('format'))}, this version of tenfold "
            "reads format 1: measure again with `tenfold bench`"
        )
    models = found.texts("models")
    if not models:
        raise found.error("models", [], "at least one name")
    accuracy, size = found.fields("accuracy"), found.fields("size")
    skipped = found.items("skipped", lambda row: (row.name("runtime"), row.text("reason") or ""))
    latency = found.items("latency", _latency)
    for row in latency:
        if row.model not in models:
            raise found.error("latency", row.model, f"one of the models {', '.join(models)}")
    return Bench(
        created=found.text("created"),
        command=found.text("command"),
        seed=found.number("seed"),
        threads=found.number("threads"),
        machine=found.fields("machine").data,
        versions=found.fields("versions").data,
        models=models,
        accuracy={model: accuracy.number(model) for model in models},
        size={model: _size(size.fields(model)) for model in models},
        latency=latency,
        skipped=skipped,
        summary=found.texts("summary"),
        baseline=found.text("baseline"),
    )


def _records(found: Fields) -> tuple[Record, ...]:
    if found.data.get("format") != 1:
        raise found.error("format", found.data.get("format"), "1")
    return found.items("methods", read_record)


def _size(found: Fields) -> Size:
    return Size(**{name: found.number(name) for name in Size.__dataclass_fields__})


def _latency(found: Fields) -> Latency:
    return Latency(
        runtime=found.name("runtime"),
        batch=found.whole("batch"),
        model=found.name("model"),
        median_ms=found.number("median_ms"),
        p10_ms=found.number("p10_ms"),
        p90_ms=found.number("p90_ms"),
        images_per_second=found.number("images_per_second"),
        ratio=found.number("ratio"),
        ratio_low=found.number("ratio_low"),
        ratio_high=found.number("ratio_high"),
        verdict=found.text("verdict"),
    )


def _layer(found: Fields) -> Layer:
    shape = found.values("shape")
    if not all(isinstance(size, int) for size in shape):
        raise found.error("shape", shape, "a list of whole numbers")
    return Layer(
        name=found.name("name"),
        type=found.text("type") or "",
        shape=tuple(size for size in shape if isinstance(size, int)),
        parameters=found.number("parameters"),
        macs=found.number("macs"),
        kept=found.number("kept"),
        effective_macs=found.number("effective_macs"),
        treatment=found.text("treatment"),
        reason=found.text("reason"),
    )


def _export(found: Fields) -> Export:
    return Export(
        format=found.name("format"),
        path=found.name("path"),
        bytes=found.number("bytes"),
        checks=found.items(
            "checks",
            lambda row: Check(
                row.name("runtime"), row.number("batch"), row.number("max_difference")
            ),
        ),
    )


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{file} can't be read as text ({problem}): write it again") from problem


def _read_json(file: Path) -> Fields | None:
    text = _read_text(file)
    if text is None:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(
            f"{file} is not JSON ({problem}): write it again with the tenfold command that made it"
        ) from problem
    return Fields(file, "", data)


def _read(file: Path, build: Callable[[Fields], Item]) -> Item | None:
    found = _read_json(file)
    return None if found is None else build(found)


def _read_metrics(file: Path) -> Metrics | None:
    text = _read_text(file)
    if text is None:
        return None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if "epoch" not in (rows.fieldnames or ()):
        raise UserError(f"{file} has no column epoch in its first line: expected one row per epoch")
    table: dict[str, dict[float, float | None]] = {name: {} for name in CURVES}
    for row in rows:
        epoch = _cell(file, rows.line_num, "epoch", row.get("epoch"))
        if epoch is None:
            continue
        for name, values in table.items():
            value = _cell(file, rows.line_num, name, row.get(name))
            # Some loggers write train and test of one epoch in two rows: empty never overwrites.
            if value is not None or epoch not in values:
                values[epoch] = value
    curves = {
        name: tuple(sorted(values.items()))
        for name, values in table.items()
        if any(value is not None for value in values.values())
    }
    return Metrics(curves)


def _cell(file: Path, line: int, column: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError as problem:
        raise UserError(
            f"{file}, line {line}, column {column}: {short(text)} is not a number: "
            "correct the cell or leave it empty"
        ) from problem
    return value if math.isfinite(value) else None


def _baseline_metrics(folder: Path, baseline: str) -> Metrics | None:
    # Written as the user gave it, mostly relative to where the command ran: the project's root.
    for start in (Path(), folder.resolve().parent.parent, folder.resolve().parent):
        found = _read_metrics(start / baseline / "metrics.csv")
        if found is not None:
            return found
    return None
