"""Choose what the report's charts show: latency by batch size, curves over epochs."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.report import numbers
from tenfold.report.charts import Interval, IntervalRow, Line, interval_chart, line_chart, marker
from tenfold.report.inputs import Bench, Latency, Run
from tenfold.report.tables import LatencyGroup, latency_groups

__all__ = [
    "KeyEntry",
    "LatencyChart",
    "curve_charts",
    "curve_key",
    "latency_charts",
    "model_key",
    "schedule_charts",
]


@dataclass(frozen=True)
class LatencyChart:
    """The drawing of one batch size."""

    batch: int
    drawing: str


@dataclass(frozen=True)
class KeyEntry:
    """A sign of a chart and what it stands for."""

    sign: str
    text: str


def role(bench: Bench, model: str) -> str:
    """Return a model's style class: the reference is before, the last after, others between."""
    at = bench.models.index(model)
    if at == 0 and len(bench.models) > 1:
        return "before"
    return "after" if at == len(bench.models) - 1 else f"other-{(at - 1) % 3 + 1}"


def model_key(bench: Bench) -> list[KeyEntry]:
    """Return the key of the latency charts."""
    return [KeyEntry(marker(role(bench, model)), model) for model in bench.models]


def latency_charts(bench: Bench) -> list[LatencyChart]:
    """Draw one chart a batch size, so that large batches don't flatten the small ones."""
    groups = latency_groups(bench)
    charts = []
    for batch in sorted({group.batch for group in groups}):
        rows = [_latency_row(bench, group) for group in groups if group.batch == batch]
        said = (
            f"{row.label}: {', '.join(part.text for part in row.intervals)} {row.note}".strip()
            for row in rows
        )
        drawing = interval_chart(
            f"latency-{batch}",
            f"Latency at batch {batch}, {' and '.join(bench.models)}",
            f"Median time of one batch. {'; '.join(said)}.",
            rows,
            x_label="Milliseconds for one batch",
        )
        if drawing:
            charts.append(LatencyChart(batch, drawing))
    return charts


def curve_key(run: Run) -> list[KeyEntry]:
    """Return the key of the curves; empty when there is one kind of line only."""
    dashed = bool(run.metrics and "train_loss" in run.metrics.curves)
    entries = [KeyEntry(marker("after", line=True), "this run, test")]
    if dashed:
        entries.append(KeyEntry(marker("after", dashed=True, line=True), "this run, training"))
    if run.baseline_metrics:
        entries.append(KeyEntry(marker("before", line=True), "before (baseline), test"))
        if "train_loss" in run.baseline_metrics.curves:
            entries.append(
                KeyEntry(marker("before", dashed=True, line=True), "before (baseline), training")
            )
    return entries if len(entries) > 1 else []


def curve_charts(run: Run) -> list[str]:
    """Draw accuracy and loss over epochs, the baseline's beneath this run's."""
    compared = run.baseline_metrics is not None
    accuracy = _lines(run, "test_accuracy", "now" if compared else "", "before")
    loss = _lines(run, "train_loss", "train", "train", dashed=True)
    loss += _lines(run, "test_loss", "test", "test")
    return _drawn(
        line_chart(
            "accuracy",
            "Test accuracy over epochs",
            _last_values(run, "test_accuracy", percent=True),
            accuracy,
            y_label="Test accuracy",
            unit=" %",
            scale=100.0,
            limits=(0.0, 100.0),
        ),
        line_chart(
            "loss",
            "Training and test loss over epochs",
            f"{_last_values(run, 'train_loss')} {_last_values(run, 'test_loss')}".strip(),
            loss,
            y_label="Loss",
        ),
    )


def schedule_charts(run: Run) -> list[str]:
    """Draw density and learning rate over epochs, where the run recorded a density."""
    density = _lines(run, "density", "", "before")
    if not density:
        return []
    return _drawn(
        line_chart(
            "density",
            "Density over epochs",
            _last_values(run, "density", percent=True),
            density,
            y_label="Density (share of weights kept)",
            unit=" %",
            scale=100.0,
            limits=(0.0, 100.0),
            from_zero=True,
        ),
        line_chart(
            "learning-rate",
            "Learning rate over epochs",
            _last_values(run, "learning_rate"),
            _lines(run, "learning_rate", "", "before")[-1:],
            y_label="Learning rate",
            limits=(0.0, None),
            from_zero=True,
        ),
    )


def _drawn(*charts: str) -> list[str]:
    return [chart for chart in charts if chart]


def _lines(run: Run, name: str, now: str, before: str, dashed: bool = False) -> list[Line]:
    lines = []
    for metrics, label, kind in (
        (run.baseline_metrics, before, "before"),
        (run.metrics, now, "after"),
    ):
        if metrics and name in metrics.curves:
            lines.append(Line(label, kind, metrics.curves[name], dashed))
    return lines


def _last_values(run: Run, name: str, percent: bool = False) -> str:
    write = numbers.percent if percent else numbers.significant
    words = name.replace("_", " ")
    parts = [
        f"{who}, last {words}: {write(metrics.last(name))}."
        for who, metrics in (("This run", run.metrics), ("Before", run.baseline_metrics))
        if metrics and name in metrics.curves
    ]
    return " ".join(parts)


def _latency_row(bench: Bench, group: LatencyGroup) -> IntervalRow:
    last = group.rows[-1][0]
    note = ""
    if len(bench.models) == 2 and last.ratio is not None:
        note = f"{numbers.times(last.ratio)} {last.verdict or ''}".strip()

    def interval(row: Latency) -> Interval:
        text = numbers.milliseconds(row.median_ms)
        if len(bench.models) > 2 and row.ratio is not None:
            # One note couldn't say which of several models it means.
            text = f"{text}, {numbers.times(row.ratio)}"
        return Interval(role(bench, row.model), row.p10_ms, row.median_ms, row.p90_ms, text)

    return IntervalRow(group.runtime, note, [interval(row) for row, _ in group.rows])
