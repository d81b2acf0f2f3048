"""What methods tell about a run: facts, charts and small pictures, one section a method."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.report.charts import Line, line_chart
from tenfold.report.fields import Fields, short

__all__ = ["Picture", "PictureGroup", "Record", "RecordChart", "read_record", "record_charts"]

_ROLES = ("after", "before", "other-1", "other-2", "other-3")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG in base64 and the line below it."""

    png: str
    caption: str


@dataclass(frozen=True)
class PictureGroup:
    """Pictures under one title; wide ones have details, and get more room."""

    title: str
    items: tuple[Picture, ...]
    wide: bool = False


@dataclass(frozen=True)
class RecordChart:
    """Curves of a method: label and points of each."""

    title: str
    x_label: str
    y_label: str
    from_zero: bool
    lines: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]


@dataclass(frozen=True)
class Record:
    """What one method tells."""

    method: str
    facts: tuple[tuple[str, str], ...]
    charts: tuple[RecordChart, ...]
    images: tuple[PictureGroup, ...]


def read_record(found: Fields) -> Record:
    """Read one method's entry of methods.json.

    Raises:
        UserError: a field is of another form.
    """
    facts = []
    for pair in found.values("facts"):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise found.error("facts", pair, "pairs of strings")
        facts.append((str(pair[0]), str(pair[1])))
    return Record(
        method=found.name("method"),
        facts=tuple(facts),
        charts=found.items("charts", _chart),
        images=found.items("images", _pictures),
    )


def _chart(found: Fields) -> RecordChart:
    return RecordChart(
        title=found.name("title"),
        x_label=found.text("x_label") or "",
        y_label=found.text("y_label") or "",
        from_zero=bool(found.data.get("from_zero")),
        lines=found.items("lines", lambda line: (line.text("label") or "", _points(line))),
    )


def _points(found: Fields) -> tuple[tuple[float, float], ...]:
    points = []
    for pair in found.values("points"):
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(p, int | float) and not isinstance(p, bool) for p in pair)
        ):
            raise found.error("points", pair, "pairs of numbers")
        points.append((float(pair[0]), float(pair[1])))
    return tuple(points)


def _pictures(found: Fields) -> PictureGroup:
    wide = bool(found.data.get("wide"))
    return PictureGroup(found.name("title"), found.items("items", _picture), wide)


def _picture(found: Fields) -> Picture:
    png = found.name("png")
    try:
        start = base64.b64decode(png, validate=True)[:8]
    except (ValueError, binascii.Error):
        start = b""
    if start != _PNG:
        raise found.error("png", short(png), "a PNG in base64")
    return Picture(png, found.text("caption") or "")


def record_charts(records: Sequence[Record]) -> list[list[str]]:
    """Draw the charts of each record; one without a value is left out."""
    return [
        [drawn for at, chart in enumerate(record.charts) if (drawn := _drawn(record, at, chart))]
        for record in records
    ]


def _drawn(record: Record, at: int, chart: RecordChart) -> str:
    lines = [
        Line(label, _ROLES[index % len(_ROLES)], points)
        for index, (label, points) in enumerate(chart.lines)
    ]
    ends = [f"{label or 'last'}: {points[-1][1]:g}" for label, points in chart.lines if points]
    return line_chart(
        f"{record.method}-{at}".replace(":", "-"),
        chart.title,
        f"Last values, {', '.join(ends)}.",
        lines,
        y_label=chart.y_label,
        x_label=chart.x_label,
        from_zero=chart.from_zero,
    )
