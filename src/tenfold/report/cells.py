"""The cells of a network with many budgets: those that no other one beats, as charts and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.nn.budget import CellRow, CellTable
from tenfold.report import numbers
from tenfold.report.charts import Line, line_chart
from tenfold.report.fields import Fields

__all__ = ["CellView", "cell_charts", "cell_views", "read_cell_table"]

_ROLES = ("before", "other-1", "other-2", "other-3")


@dataclass(frozen=True)
class CellView:
    """One row of the table; `best` says for which costs no other cell beats it."""

    row: CellRow
    best: str


def read_cell_table(found: Fields) -> CellTable:
    """Read what `cells.json` says.

    Raises:
        UserError: a field is of another form.
    """
    rows = found.items(
        "cells",
        lambda row: CellRow(
            size=row.whole("size"),
            keep_rate=row.number("keep_rate") or 0.0,
            macs=row.whole("macs"),
            accuracy=row.number("accuracy"),
            latency_ms=row.number("latency_ms"),
            images_per_second=row.number("images_per_second"),
        ),
    )
    table = CellTable({})
    table.rows = list(rows)
    table.machine = found.text("machine")
    return table


def cell_views(table: CellTable) -> list[CellView]:
    """Return the rows, each with what it is the best for."""
    fronts = {"MACs": table.front("macs"), "time": table.front("latency_ms")}
    return [
        CellView(row, " and ".join(cost for cost, front in fronts.items() if row in front))
        for row in table.rows
    ]


def cell_charts(table: CellTable) -> list[str]:
    """Draw accuracy over multiply-adds and over the time of one image, with the front of each."""
    # In units that leave ticks short.
    giga = max((row.macs for row in table.rows), default=0) >= 2e9
    unit, per = ("billions", 1e9) if giga else ("millions", 1e6)
    drawn = [
        _chart(table, "macs", per, f"Multiply-adds of one image, {unit}"),
        _chart(table, "latency_ms", 1.0, "Milliseconds for one image"),
    ]
    return [chart for chart in drawn if chart]


def _chart(table: CellTable, cost: str, per: float, x_label: str) -> str:
    front = table.front(cost)
    lines = [Line("best", "after", _points(front, cost, per))]
    for index, size in enumerate(dict.fromkeys(row.size for row in table.rows)):
        rows = [row for row in table.rows if row.size == size]
        role = _ROLES[index % len(_ROLES)]
        lines.append(Line(f"{size} px", role, _points(rows, cost, per), dots=True))
    best = "; ".join(
        f"{row}: {numbers.percent(row.accuracy)} at {getattr(row, cost) / per:.3g}" for row in front
    )
    return line_chart(
        f"cells-{cost}",
        f"Accuracy of every cell over {x_label.lower()}",
        f"No other cell beats: {best}.",
        lines if front else [],
        y_label="Test accuracy",
        x_label=x_label,
        unit=" %",
        scale=100.0,
        limits=(0.0, 100.0),
    )


def _points(
    rows: Sequence[CellRow], cost: str, per: float
) -> tuple[tuple[float, float | None], ...]:
    known = [row for row in rows if None not in (row.accuracy, getattr(row, cost))]
    known.sort(key=lambda row: float(getattr(row, cost)))
    return tuple((getattr(row, cost) / per, row.accuracy) for row in known)
