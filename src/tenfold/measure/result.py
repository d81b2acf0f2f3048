"""What a benchmark found, as data and in plain words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenfold.errors import UserError

__all__ = ["FORMAT", "BenchResult", "LatencyRow", "SizeRow", "Skipped", "summarise"]

FORMAT = 1
# Between the 10th and the 90th percentile; a quiet machine stays well below.
BUSY_SPREAD = 1.5


@dataclass(frozen=True)
class SizeRow:
    """The size of one model.

    Attributes:
        parameters: Elements of all parameters.
        nonzero_parameters: Those that are not zero.
        macs: Multiply-adds for one sample.
        effective_macs: Multiply-adds that are left when zero weights are skipped.
        dense_bytes: Parameters and buffers as they lie in memory.
        packed_bytes: The saved artifact, where the caller knows it.
    """

    parameters: int
    nonzero_parameters: int
    macs: int
    effective_macs: int
    dense_bytes: int
    packed_bytes: int | None = None


@dataclass(frozen=True)
class LatencyRow:
    """One model in one runtime at one batch size; times are milliseconds of one forward call.

    `ratio` is the time of the reference by that of this model, round by round, with the 95%
    interval of its median; None for the reference itself.
    """

    runtime: str
    batch: int
    model: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    images_per_second: float
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A runtime, or one model in it, that was not measured, and why."""

    runtime: str
    reason: str


@dataclass(frozen=True)
class BenchResult:
    """All that `bench` found; `to_dict` has the same names. The first model is the reference.

    `plans` has what `tenfold.optimize` decided, layer by layer, by model and batch size.
    """

    created: str
    command: str | None
    seed: int
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    models: list[str]
    accuracy: dict[str, float]
    size: dict[str, SizeRow]
    latency: list[LatencyRow]
    skipped: list[Skipped]
    summary: list[str]
    plans: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON and return the path.

        Raises:
            UserError: If the file can't be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error}: choose another path") from error
        return path


def summarise(
    models: Sequence[str],
    accuracy: dict[str, float],
    size: dict[str, SizeRow],
    latency: Sequence[LatencyRow],
    skipped: Sequence[Skipped],
) -> list[str]:
    """Put the findings in plain words, one line each, the bad ones too."""
    reference, *others = models
    lines = []
    for name in others:
        rows = [row for row in latency if row.model == name]
        lines += _speed(name, reference, rows)
        lines += _fastest(name, reference, latency)
        lines += _size(name, size[name], size[reference])
        if name in accuracy and reference in accuracy:
            points = 100 * (accuracy[name] - accuracy[reference])
            lines.append(
                f"Accuracy of {name}: {accuracy[name]:.2%} against {accuracy[reference]:.2%} of "
                f"{reference} ({points:+.2f} points)."
            )
    if not latency:
        lines.append("Nothing was timed.")
    spread = max((row.p90_ms / row.p10_ms for row in latency), default=1.0)
    if spread > BUSY_SPREAD:
        lines.append(
            f"This machine was busy: times of one model spread by up to {spread:.1f}x. Close other "
            "programs and measure again before relying on these ratios."
        )
    lines += [f"Skipped {entry.runtime}: {entry.reason}." for entry in skipped]
    return lines


def _speed(name: str, reference: str, rows: Sequence[LatencyRow]) -> list[str]:
    if not rows:
        return []
    count = len({row.runtime for row in rows})
    runtimes = f"{count} runtime" + ("s" if count > 1 else "")
    faster = [row for row in rows if row.verdict == "faster"]
    slower = [row for row in rows if row.verdict == "slower"]
    best = max(faster or rows, key=_ratio)
    if faster:
        where = len({row.runtime for row in faster})
        lines = [f"{name} is faster than {reference} in {where} of {runtimes} (best: {_at(best)})."]
    else:
        lines = [
            f"No gain yet: {name} is not faster than {reference} in any of {runtimes} "
            f"(best: {_at(best)})."
        ]
    if slower:
        worst = min(slower, key=_ratio)
        where = len({row.runtime for row in slower})
        lines.append(
            f"{name} is slower than {reference} in {where} of {runtimes} (worst: {_at(worst)})."
        )
    return lines


def _fastest(name: str, reference: str, latency: Sequence[LatencyRow]) -> list[str]:
    """Compare each model where it is fastest, whatever the runtime: what a user would deploy."""
    lines = []
    for batch in sorted({row.batch for row in latency}):
        rows = [row for row in latency if row.batch == batch]
        ours = [row for row in rows if row.model == name]
        theirs = [row for row in rows if row.model == reference]
        if not ours or len(theirs) < 2:
            continue
        a, b = (min(each, key=lambda row: row.median_ms) for each in (ours, theirs))
        lines.append(
            f"At batch {batch}, {name} is fastest in {a.runtime} ({a.median_ms:.3g} ms) and "
            f"{reference} in {b.runtime} ({b.median_ms:.3g} ms): {b.median_ms / a.median_ms:.2f}x."
        )
    return lines


def _size(name: str, size: SizeRow, reference: SizeRow) -> list[str]:
    if not size.effective_macs or size.effective_macs >= 0.99 * reference.effective_macs:
        return []
    less = reference.effective_macs / size.effective_macs
    return [
        f"{name} needs {less:.2f}x fewer multiply-adds, where zeros are skipped: "
        f"{size.effective_macs:,} instead of {reference.effective_macs:,}."
    ]


def _ratio(row: LatencyRow) -> float:
    return row.ratio or 0.0


def _at(row: LatencyRow) -> str:
    return f"{row.runtime} at batch {row.batch}, {_ratio(row):.2f}x"
