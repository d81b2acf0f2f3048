"""The cells of a network with several budgets: what each costs, and which one a budget allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenfold.errors import UserError

__all__ = ["CellRow", "CellTable", "parse_budget"]

Cell = tuple[int, float]
# What a row may lack: it is measured.
KNOWN = ("accuracy", "latency_ms", "images_per_second", "batch")
BUDGETS = ("macs", "latency_ms", "images_per_second")
UNITS = {
    "ms": ("latency_ms", 1.0),
    "s": ("latency_ms", 1000.0),
    "gmacs": ("macs", 1e9),
    "mmacs": ("macs", 1e6),
    "img/s": ("images_per_second", 1.0),
}


@dataclass(frozen=True)
class CellRow:
    """One cell: what it costs, and how right it is.

    Attributes:
        size: side of the image in pixels.
        keep_rate: share of the tokens that stay.
        macs: multiply-adds of one image.
        accuracy: on held-out images, 0 to 1; None: not evaluated.
        latency_ms: median time of one image; None: not measured.
        images_per_second: in a batch of `batch`; None: not measured.
        batch: that the throughput was measured with.
    """

    size: int
    keep_rate: float
    macs: int
    accuracy: float | None = None
    latency_ms: float | None = None
    images_per_second: float | None = None
    batch: int | None = None

    def __str__(self) -> str:
        """Name the cell."""
        return f"size {self.size}, keep rate {self.keep_rate:g}"


class CellTable:
    """What is known of the cells of one network.

    Args:
        macs: of one image, by (size, keep rate).
    """

    def __init__(self, macs: Mapping[Cell, int]):
        self.rows = [CellRow(size, rate, count) for (size, rate), count in macs.items()]
        self.machine: str | None = None

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> CellTable:
        """Return the table that `to_dict` has described.

        Raises:
            UserError: it is no such table.
        """
        table = cls({(row["size"], row["keep_rate"]): row["macs"] for row in _rows(found)})
        table.take(found)
        return table

    def note(self, cell: Cell, **known: float | int | None) -> None:
        """Take in figures of a cell, by the names of `CellRow`.

        Raises:
            UserError: there is no such cell.
        """
        for index, row in enumerate(self.rows):
            if (row.size, row.keep_rate) == cell:
                self.rows[index] = dataclasses.replace(row, **known)  # type: ignore[arg-type]
                return
        raise UserError(f"there is no cell of size {cell[0]} and keep rate {cell[1]:g}")

    def choose(
        self,
        *,
        macs: float | None = None,
        latency_ms: float | None = None,
        images_per_second: float | None = None,
    ) -> CellRow:
        """Return the most accurate row whose cost is within the one budget that is given.

        Of equally accurate ones it is the one with the fewest multiply-adds; where cells were not
        evaluated, the one with the most.

        Raises:
            UserError: not exactly one budget, none measured, or a budget below the cheapest cell.
        """
        given = dict(zip(BUDGETS, (macs, latency_ms, images_per_second), strict=True))
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise UserError(
                f"a budget is one of {', '.join(BUDGETS)}: {len(named)} were given, expected one"
            )
        name, budget = next(iter(named.items()))
        if not budget > 0:
            raise UserError(f"{name}={budget}: expected more than 0")
        rows = [row for row in self.rows if getattr(row, name) is not None]
        if not rows:
            raise UserError(
                f"the cells' {name} is not known yet: measure them on this machine, tenfold bench "
                "RUN (in Python tenfold.measure.measure_cells), or give a budget in macs"
            )
        at_least = name == "images_per_second"
        within = [
            row
            for row in rows
            if (getattr(row, name) >= budget if at_least else getattr(row, name) <= budget)
        ]
        if not within:
            best = (max if at_least else min)(rows, key=lambda row: getattr(row, name))
            raise UserError(
                f"{name}={budget:g} is {'more' if at_least else 'less'} than any cell has: the "
                f"cheapest, {best}, has {getattr(best, name):,.5g}; give a wider budget"
            )
        return max(
            within,
            key=lambda row: (-1.0, row.macs) if row.accuracy is None else (row.accuracy, -row.macs),
        )

    def front(self, cost: str) -> list[CellRow]:
        """Return the rows that no other one beats in both accuracy and a cost, cheapest first.

        Args:
            cost: `macs` or `latency_ms`.
        """
        known = [row for row in self.rows if None not in (row.accuracy, getattr(row, cost))]
        found: list[CellRow] = []
        for row in sorted(known, key=lambda row: (getattr(row, cost), -(row.accuracy or 0.0))):
            if not found or (row.accuracy or 0.0) > (found[-1].accuracy or 0.0):
                found.append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they stand in `cells.json`."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"format": 1, "machine": self.machine, "cells": rows}

    def take(self, found: Mapping[str, Any]) -> None:
        """Take in what `to_dict` has returned; cells of another grid are left out.

        Raises:
            UserError: it is no such table.
        """
        ours = {(row.size, row.keep_rate) for row in self.rows}
        for row in _rows(found):
            cell = (row["size"], row["keep_rate"])
            if cell in ours:
                self.note(cell, **{name: row.get(name) for name in KNOWN})
        machine = found.get("machine")
        self.machine = machine if isinstance(machine, str) else None


def _rows(found: Any) -> list[Mapping[str, Any]]:
    """Return the rows of what `to_dict` has returned, or of what somebody made of it."""
    rows = found.get("cells") if isinstance(found, Mapping) else None
    if not isinstance(rows, list) or found.get("format") != 1 or not all(map(_is_row, rows)):
        raise UserError("the table of cells has another form: measure again, tenfold bench RUN")
    return rows


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, Mapping)
        and all(_is_number(row.get(name)) for name in ("size", "keep_rate", "macs"))
        and all(row.get(name) is None or _is_number(row[name]) for name in KNOWN)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parse_budget(text: str) -> dict[str, float]:
    """Read a budget as a user writes it: `5ms`, `1.2gmacs`, `300img/s`.

    Raises:
        UserError: no number, or another unit.

    >>> parse_budget("5ms")
    {'latency_ms': 5.0}
    """
    lower = text.strip().lower()
    for unit in sorted(UNITS, key=len, reverse=True):
        if lower.endswith(unit):
            name, factor = UNITS[unit]
            try:
                value = float(lower.removesuffix(unit)) * factor
            except ValueError:
                break
            if value > 0:
                return {name: value}
            break
    raise UserError(
        f"budget {text!r}: expected a number with its unit, such as 5ms, 1.2gmacs or 300img/s"
    )
