"""Put the report together: read the run, fill the template, write one file in one piece."""

from __future__ import annotations

import os
import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.errors import UserError
from tenfold.report import figures, headline, numbers, tables
from tenfold.report.cells import cell_charts, cell_views
from tenfold.report.inputs import Bench, Run, read_run
from tenfold.report.records import record_charts

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["render", "write_report"]


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write one self-contained HTML page about a run, without scripts and without outside files.

    What the run's folder lacks is named in the page together with the command that makes it. The
    page appears under its name only when it is complete, and replaces an older one.

    Args:
        run: The run's folder.
        output: The file to write, or a folder to write `report.html` into; default
            `<run>/report.html`.

    Returns:
        The path of the page.

    Raises:
        UserError: If the folder is missing, a file in it is broken or of another format, or the
            page can't be written.
    """
    folder = Path(run)
    page = render(read_run(folder))
    target = folder / "report.html" if output is None else Path(output)
    if target.is_dir():
        target = target / "report.html"
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A lone surrogate from a JSON escape has no bytes in UTF-8: it becomes a question mark.
            unfinished.write_text(page, encoding="utf-8", errors="replace")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as problem:
        raise UserError(
            f"the report can't be written to {target} ({problem.strerror}): "
            "name another file with `output`"
        ) from problem
    return target


def render(run: Run) -> str:
    """Return the page of a run as HTML text."""
    bench, layers = run.bench, run.layers
    page = _template().render(
        run=run,
        bench=bench,
        sentence=headline.headline_sentence(run),
        headline=headline.headline_figures(run),
        about=headline.about_run(run),
        size_rows=tables.size_rows(bench) if bench else [],
        has_packed=any(size.packed_bytes is not None for size in bench.size.values())
        if bench
        else False,
        latency_note=_latency_note(bench) if bench else "",
        latency_groups=tables.latency_groups(bench) if bench else [],
        latency_charts=figures.latency_charts(bench) if bench else [],
        model_key=figures.model_key(bench) if bench else [],
        curve_charts=figures.curve_charts(run),
        curve_key=figures.curve_key(run),
        baseline_note=_baseline_note(run),
        schedule_charts=figures.schedule_charts(run),
        cell_charts=cell_charts(run.cells) if run.cells else [],
        cell_rows=cell_views(run.cells) if run.cells else [],
        records=list(zip(run.records, record_charts(run.records), strict=True)),
        layer_rows=tables.layer_rows(layers) if layers else [],
        layer_macs=_total([layer.macs for layer in layers or ()]),
        layer_effective_macs=_total([layer.effective_macs for layer in layers or ()]),
        layer_parameters=_total([layer.parameters for layer in layers or ()]),
        machine=tables.facts(bench.machine) if bench else [],
        versions=tables.facts(bench.versions) if bench else [],
        commands=_commands(run.folder),
    )
    return page.lstrip()


def _latency_note(bench: Bench) -> str:
    threads = f" on {bench.threads:g} threads" if bench.threads is not None else ""
    if bench.threads == 1:
        threads = " on one thread"
    note = f"Median time of one batch{threads}, models interleaved in one process."
    if len(bench.models) == 1:
        return note
    return f"{note} Ratio: time of {bench.models[0]} over the model's time; above one is faster."


def _baseline_note(run: Run) -> str:
    if not run.baseline:
        return "No baseline was named, so this run stands alone."
    if run.baseline_metrics is None:
        return f"The baseline's curves are missing: no metrics.csv in {run.baseline}."
    return f"Before: the baseline {run.baseline}."


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _commands(folder: Path) -> dict[str, str]:
    """Return the command that makes each part of a run's folder."""
    place = shlex.quote(str(folder))
    return {
        "train": "tenfold train recipe.yaml",
        "bench": f"tenfold bench {place}",
        "export": f"tenfold export {place} --to onnx",
        "report": f"tenfold report {place}",
    }


def _template() -> Template:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    own = resources.files("tenfold.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name in numbers.__all__:
        if name != "MISSING":
            environment.filters[name] = getattr(numbers, name)
    # Only our own style sheet and our own drawings, whose texts charts.py has escaped, pass as they
    # are; everything else is escaped by the environment.
    environment.filters["drawing"] = Markup
    environment.globals["style"] = Markup((own / "style.css").read_text(encoding="utf-8"))
    return environment.from_string((own / "template.html").read_text(encoding="utf-8"))
