"""A benchmark as plain text for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tenfold.measure.result import BenchResult, LatencyRow

__all__ = ["columns", "table"]

NAME_WIDTH = 20


def table(result: BenchResult) -> str:
    """Return sizes, accuracies, latencies with spread, and the summary, at most 100 columns wide.

    The spread in brackets runs from the 10th to the 90th percentile of the rounds; a ratio is
    against the first model, with its 95% interval.
    """
    sizes = [["model", "accuracy", "bytes", "packed", "MACs dense", "effective", "non-zero"]]
    for name in result.models:
        size = result.size[name]
        kept = size.nonzero_parameters / size.parameters if size.parameters else 0.0
        sizes.append(
            [
                _short(name),
                f"{result.accuracy[name]:.2%}" if name in result.accuracy else "-",
                _count(size.dense_bytes),
                "-" if size.packed_bytes is None else _count(size.packed_bytes),
                _count(size.macs),
                _count(size.effective_macs),
                f"{kept:.1%}",
            ]
        )
    times = [
        ["runtime", "batch", "model", "latency", "per second", f"vs {_short(result.models[0])}", ""]
    ]
    previous: tuple[str, int] | None = None
    for row in result.latency:
        times.append(_time_cells(row, first=(row.runtime, row.batch) != previous))
        previous = (row.runtime, row.batch)
    blocks = [columns(sizes), columns(times)] if result.latency else [columns(sizes)]
    findings = [textwrap.fill(line, width=100, subsequent_indent="  ") for line in result.summary]
    return "\n\n".join([*blocks, "\n".join(findings)])


def _time_cells(row: LatencyRow, first: bool) -> list[str]:
    ratio = "reference"
    if row.ratio is not None:
        ratio = f"{row.ratio:.2f}x [{row.ratio_low:.2f}-{row.ratio_high:.2f}]"
    return [
        row.runtime if first else "",
        str(row.batch) if first else "",
        _short(row.model),
        f"{_ms(row.median_ms)} ms [{_ms(row.p10_ms)}-{_ms(row.p90_ms)}]",
        f"{row.images_per_second:,.0f}",
        ratio,
        row.verdict or "",
    ]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text, the first one a header that is ruled off."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _ms(value: float) -> str:
    """Return three significant digits."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def _count(value: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)
