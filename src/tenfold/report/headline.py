"""Say the outcome of a run in one sentence and four or five figures, before → after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tenfold.report import numbers
from tenfold.report.inputs import Bench, Latency, Run, Size

__all__ = ["Figure", "about_run", "headline_figures", "headline_sentence", "verdict_style"]


@dataclass(frozen=True)
class Figure:
    """One figure of the headline; `before` is `None` where there is nothing to compare with."""

    label: str
    before: str | None
    after: str
    note: str
    verdict: str = ""
    style: str = ""


def headline_sentence(run: Run) -> str:
    """Return the first finding of the bench, or what is known without one."""
    if run.bench and run.bench.summary:
        return run.bench.summary[0]
    accuracy = run.metrics.last("test_accuracy") if run.metrics else None
    unmeasured = "speed and size have not been measured yet."
    if accuracy is None:
        return unmeasured.capitalize()
    return f"The last test accuracy is {numbers.percent(accuracy)}; {unmeasured}"


def headline_figures(run: Run) -> list[Figure]:
    """Return accuracy, bytes on disk, effective MACs, non-zero parameters and the best latency.

    "Before" is the bench's reference, "after" its last model. What the bench doesn't know is taken
    from the curves (accuracy) and from the layers (MACs); what nobody knows is left out, but the
    accuracy.
    """
    before, after = _sizes(run)
    figures = _quality(run) if run.makes_images else [_accuracy(run)]
    if after.dense_bytes is not None or after.packed_bytes is not None:
        stored = after.packed_bytes if after.packed_bytes is not None else after.dense_bytes
        form = "packed" if after.packed_bytes is not None else "stored dense"
        figures.append(_size("Bytes on disk", before.dense_bytes, stored, numbers.file_size, form))
    if after.effective_macs is not None:
        # Dense against effective when there is one model only: what its own zeros would save.
        start = before.effective_macs if before.effective_macs is not None else after.macs
        figures.append(
            _size(
                "Effective MACs", start, after.effective_macs, numbers.count, "a count, not a time"
            )
        )
    if after.nonzero_parameters is not None:
        start = before.nonzero_parameters
        figures.append(
            _size("Non-zero parameters", start, after.nonzero_parameters, numbers.count, "")
        )
    latency = _latency(run.bench) if run.bench else None
    return [*figures, latency] if latency else figures


def about_run(run: Run) -> str:
    """Return one line on training and measuring: how long, when, on what."""
    parts = []
    if run.bench and len(run.bench.models) > 2:
        parts.append(f"The figures compare {run.bench.models[0]} with {run.bench.models[-1]}.")
    if run.epochs is not None:
        epochs = f"{run.epochs:g} epoch{'' if run.epochs == 1 else 's'}"
        took = f" in {numbers.duration(run.seconds)}" if run.seconds is not None else ""
        parts.append(f"Trained for {epochs}{took}.")
    if run.bench:
        bench = run.bench
        where = bench.machine.get("cpu")
        words = ["Measured"]
        if bench.created:
            words.append(f"on {bench.created.partition('T')[0]}")
        if isinstance(where, str):
            words.append(f"on {where}")
        if bench.threads is not None:
            words.append(f"with {bench.threads:g} thread{'' if bench.threads == 1 else 's'}")
        parts.append(" ".join(words) + "." if len(words) > 1 else "")
    if run.baseline:
        parts.append(f"Baseline: {run.baseline}.")
    return " ".join(part for part in parts if part)


def verdict_style(verdict: str | None) -> str:
    """Return the style class of a verdict; unknown words look like "no gain": plain."""
    return {"faster": "faster", "slower": "slower"}.get(verdict or "", "even")


def _sizes(run: Run) -> tuple[Size, Size]:
    bench = run.bench
    if bench:
        after = bench.size[bench.models[-1]]
        return (bench.size[bench.models[0]] if len(bench.models) > 1 else Size()), after
    if run.layers:
        macs = [layer.macs for layer in run.layers if layer.macs is not None]
        kept = [layer.effective_macs for layer in run.layers if layer.effective_macs is not None]
        if macs and kept:
            return Size(effective_macs=sum(macs)), Size(effective_macs=sum(kept))
    return Size(), Size()


def _quality(run: Run) -> list[Figure]:
    """Return how close made images come to the targets, or to real ones."""
    assert run.metrics is not None
    known = (
        ("L1 to the targets", "test_l1", "held out, images in -1 to 1; less is better"),
        ("FID", "test_fid", "held out; the extractor is named below"),
        ("LAB error in the shadow", "test_shadow_lab_mae", "held out; a MAE, the field's RMSE"),
        ("LAB error outside it", "test_nonshadow_lab_mae", "held out; less is better"),
    )
    found = [(label, run.metrics.last(name), note) for label, name, note in known]
    return [
        Figure(label, None, f"{value:.3g}", note)
        for label, value, note in found
        if value is not None
    ]


def _accuracy(run: Run) -> Figure:
    after = run.metrics.last("test_accuracy") if run.metrics else None
    before = run.baseline_metrics.last("test_accuracy") if run.baseline_metrics else None
    if run.bench:
        measured = run.bench.accuracy
        first, last = run.bench.models[0], run.bench.models[-1]
        after = measured[last] if measured[last] is not None else after
        if len(run.bench.models) > 1 and measured[first] is not None:
            before = measured[first]
    return Figure(
        label="Accuracy",
        before=None if before is None else numbers.percent(before),
        after=numbers.percent(after),
        note="" if before is None or after is None else numbers.accuracy_change(before, after),
    )


def _size(
    label: str,
    before: float | None,
    after: float | None,
    write: Callable[[float | None], str],
    remark: str,
) -> Figure:
    change = numbers.relative_change(before, after)
    note = " · ".join(text for text in (change, remark) if text not in ("", numbers.MISSING))
    return Figure(label, None if before is None else write(before), write(after), note)


def _latency(bench: Bench) -> Figure | None:
    """Return the setting with the best ratio, and how many of all settings gained."""
    last = bench.models[-1]
    reference = {
        (row.runtime, row.batch): row for row in bench.latency if row.model == bench.models[0]
    }
    compared: list[tuple[float, Latency]] = [
        (row.ratio, row) for row in bench.latency if row.model == last and row.ratio is not None
    ]
    if not compared:
        return None
    ratio, best = max(compared, key=lambda pair: pair[0])
    gains = sum(row.verdict == "faster" for _, row in compared)
    start = reference.get((best.runtime, best.batch))
    return Figure(
        label="Latency, best case",
        before=numbers.milliseconds(start.median_ms) if start else None,
        after=numbers.milliseconds(best.median_ms),
        note=(
            f"{numbers.times(ratio)} in {best.runtime} at batch {best.batch}; "
            f"faster in {gains} of {len(compared)} settings"
        ),
        verdict=best.verdict or "",
        style=verdict_style(best.verdict),
    )
