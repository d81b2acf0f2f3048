"""Draw the report's charts as SVG text: pure functions, no drawing library.

Colours and fonts come from the page's style sheet by class name (`before`, `after`, `other-1`, …),
so that a chart follows the page into dark mode and print. A chart is drawn 460 units wide: two fit
side by side on a desk, one fills a phone, and the text stays readable on both.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.report.numbers import significant

__all__ = [
    "Interval",
    "IntervalRow",
    "Line",
    "interval_chart",
    "line_chart",
    "marker",
    "nice_ticks",
    "share_bar",
]

WIDTH = 460
# Width of a character at the charts' font size: system fonts differ, this fits the widest of them.
CHARACTER = 8.0
LINE_HEIGHT = 17
# XML 1.0 forbids most control characters, even escaped.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Line:
    """One curve: `points` are epoch and value (`None` leaves a gap), `label` stands at its end.

    `dots` marks every point.
    """

    label: str
    role: str
    points: Sequence[tuple[float, float | None]]
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Interval:
    """A dot at `middle` on a line from `low` to `high`, with its value as text at the right."""

    role: str
    low: float | None
    middle: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class IntervalRow:
    """A group of intervals under one label; `note` stands at the right end of the label's line."""

    label: str
    note: str
    intervals: Sequence[Interval]


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers that enclose `low` and `high`, `about` as many as asked for.

    >>> nice_ticks(0.0, 9.3)
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    if high <= low:
        # One value alone (or a flat curve) still needs an axis around it.
        reach = abs(low) * 0.1 or 1.0
        low, high = low - reach, low + reach
    rough = (high - low) / max(1, about - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    # A hair of tolerance: 0.3 / 0.1 must not become a step more.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(at * step, 12 - math.floor(math.log10(step))) for at in range(first, last + 1)]


def line_chart(
    identifier: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    x_label: str = "Epoch",
    unit: str = "",
    scale: float = 1.0,
    limits: tuple[float | None, float | None] = (None, None),
    from_zero: bool = False,
) -> str:
    """Draw curves over epochs, the last value of each written at its end.

    Args:
        identifier: Unique on the page; the accessible title and description are tied by it.
        title: Accessible title.
        description: Accessible description: what a reader would see.
        lines: The curves; values that are `None`, not finite or absurd (beyond 1e100) leave gaps.
        y_label: What the vertical axis shows.
        x_label: What the horizontal axis shows.
        unit: Written after each number, such as `" %"`.
        scale: Factor from value to shown number, such as 100 for shares in per cent.
        limits: Ends that the vertical axis never passes, in shown numbers.
        from_zero: Start the vertical axis at zero.

    Returns:
        One `<svg>` element, or an empty string when no line has a value.
    """
    curves = [(line, _runs(line.points, scale)) for line in lines]
    curves = [(line, runs) for line, runs in curves if runs]
    if not curves:
        return ""
    points = [point for _, runs in curves for run in runs for point in run]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    values = [y for _, y in points] + ([0.0] if from_zero else [])
    y_ticks = nice_ticks(min(values), max(values))
    least, most = limits
    y_ticks = [
        tick
        for tick in y_ticks
        if (least is None or tick >= least) and (most is None or tick <= most)
    ] or y_ticks
    tick_texts = _tick_texts(y_ticks, unit)
    ends = [(runs[-1][-1], f"{line.label} {significant(runs[-1][-1][1])}{unit}".strip(), line.role)
            for line, runs in curves]  # fmt: skip
    left = max(len(text) for text in tick_texts) * CHARACTER + 10
    gap = 19 if len(curves) > 1 else 9
    right = WIDTH - max(len(text) for _, text, _ in ends) * CHARACTER - gap - 2
    top, bottom, height = 30.0, 216.0, 258.0
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_at(value: float) -> float:
        return (
            (left + right) / 2
            if x_high == x_low
            else left + 6 + (value - x_low) / (x_high - x_low) * (right - left - 12)
        )

    def y_at(value: float) -> float:
        return bottom - (value - y_low) / ((y_high - y_low) or 1) * (bottom - top)

    parts = [_text(0, 14, y_label, "axis-label")]
    for tick, text in zip(y_ticks, tick_texts, strict=True):
        y = y_at(tick)
        parts.append(_rule(left, y, right, y, "axis" if tick == y_ticks[0] else "grid"))
        parts.append(_text(left - 8, y + 4, text, "tick", "end"))
    for x_tick in _epoch_ticks(x_low, x_high):
        parts.append(_rule(x_at(x_tick), bottom, x_at(x_tick), bottom + 4, "axis"))
        parts.append(_text(x_at(x_tick), bottom + 19, f"{x_tick:g}", "tick", "middle"))
    parts.append(_text((left + right) / 2, height - 6, x_label, "axis-label", "middle"))
    for line, runs in curves:
        dashed = " dashed" if line.dashed else ""
        for run in runs:
            path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in run)
            parts.append(f'<path class="curve {line.role}{dashed}" d="M{path}"/>')
            if len(run) == 1 or line.dots:
                parts += [_shape(line.role, x_at(x), y_at(y), 3.5) for x, y in run]
        if len(curves) == 1:
            parts.append(_shape(line.role, x_at(runs[-1][-1][0]), y_at(runs[-1][-1][1]), 3.5))
    spread = _spread([y_at(y) for (_, y), _, _ in ends], top, bottom)
    for y, (_, text, role) in zip(spread, ends, strict=True):
        if len(curves) > 1:
            # Several ends may meet in one place: their markers stand with the labels.
            parts.append(_shape(role, right + 10, y, 3.5))
        parts.append(_text(right + gap, y + 4, text, f"end-label {role}"))
    return _svg(identifier, title, description, height, parts)


def interval_chart(
    identifier: str,
    title: str,
    description: str,
    rows: Sequence[IntervalRow],
    *,
    x_label: str,
) -> str:
    """Draw dots with intervals on one axis from zero, grouped in labelled rows.

    Args:
        identifier: Unique on the page; the accessible title and description are tied by it.
        title: Accessible title.
        description: Accessible description: what a reader would see.
        rows: The groups, drawn from top to bottom.
        x_label: What the axis shows, with its unit.

    Returns:
        One `<svg>` element, or an empty string when nothing has a value.
    """
    shown = [
        value
        for row in rows
        for part in row.intervals
        for value in (part.low, part.middle, part.high)
        if _usable(value)
    ]
    largest = max((value for value in shown if value is not None), default=0.0)
    if largest <= 0:
        return ""
    ticks = nice_ticks(0.0, largest)
    texts = [part.text for row in rows for part in row.intervals]
    left, right = 6.0, WIDTH - max(map(len, texts)) * CHARACTER - 14
    parts: list[str] = []
    y = 8.0
    for row in rows:
        y += 14
        parts.append(_text(0, y, row.label, "row-label"))
        parts.append(_text(WIDTH, y, row.note, "note", "end"))
        y += 4
        for part in row.intervals:
            parts.append(_rule(left, y + 9, right, y + 9, "grid"))
            parts.extend(_interval(part, y + 9, left, (right - left) / ticks[-1]))
            parts.append(_text(WIDTH, y + 13, part.text, f"end-label {part.role}", "end"))
            y += LINE_HEIGHT
        y += 10
    axis = y
    parts.append(_rule(left, axis, right, axis, "axis"))
    for tick, text in zip(ticks, _tick_texts(ticks, ""), strict=True):
        x = left + tick / ticks[-1] * (right - left)
        parts.append(_rule(x, axis, x, axis + 4, "axis"))
        parts.append(_text(x, axis + 18, text, "tick", "middle"))
    parts.append(_text((left + right) / 2, axis + 36, x_label, "axis-label", "middle"))
    return _svg(identifier, title, description, axis + 42, parts)


def share_bar(share: float | None, whole: float | None = 1.0) -> str:
    """Draw a small bar: `whole` of the width outlined as before, `share` of it filled as after.

    It stands beside the number it shows, so it's hidden from screen readers.
    """
    outer = min(1.0, max(0.0, whole)) if whole is not None and math.isfinite(whole) else 0.0
    inner = min(1.0, max(0.0, share)) if share is not None and math.isfinite(share) else 0.0
    return (
        '<svg class="bar" viewBox="0 0 96 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar-whole" x="0" y="0" width="{96 * outer:.2f}" height="12"/>'
        f'<rect class="bar-kept" x="0" y="0" width="{96 * outer * inner:.2f}" height="12"/></svg>'
    )


def marker(role: str, dashed: bool = False, line: bool = False) -> str:
    """Draw the sign that stands for a role in a chart, for its key."""
    style = f'class="curve {role}{" dashed" if dashed else ""}"'
    stroke = f'<path {style} d="M1 7L27 7"/>' if line else ""
    return (
        '<svg class="sign" viewBox="0 0 28 14" aria-hidden="true">'
        f"{stroke}{_shape(role, 14, 7, 4)}</svg>"
    )


def _interval(part: Interval, y: float, left: float, scale: float) -> list[str]:
    drawn = []
    low, middle, high = part.low, part.middle, part.high
    if low is not None and high is not None and _usable(low) and _usable(high):
        start, end = left + low * scale, left + high * scale
        drawn.append(_rule(start, y, end, y, f"spread {part.role}"))
        drawn.extend(_rule(x, y - 3.5, x, y + 3.5, f"spread {part.role}") for x in (start, end))
    if middle is not None and _usable(middle):
        drawn.append(_shape(part.role, left + middle * scale, y, 4))
    return drawn


def _usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and abs(value) < 1e100


def _runs(
    points: Sequence[tuple[float, float | None]], scale: float
) -> list[list[tuple[float, float]]]:
    """Cut a curve at its gaps."""
    runs: list[list[tuple[float, float]]] = []
    gap = True
    for x, value in points:
        if value is None or not _usable(value) or not _usable(x):
            gap = True
            continue
        if gap:
            runs.append([])
        runs[-1].append((x, value * scale))
        gap = False
    return runs


def _epoch_ticks(low: float, high: float) -> list[float]:
    if high == low:
        return [low]
    ticks = nice_ticks(low, high, about=6)
    return [tick for tick in ticks if low <= tick <= high and (tick % 1 == 0 or high - low < 2)]


def _tick_texts(ticks: Sequence[float], unit: str) -> list[str]:
    """Write all ticks of an axis with the same number of decimals."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(ticks[0]) or 1.0
    if step < 1e-4 or max(abs(tick) for tick in ticks) >= 1e6:
        return [f"{tick:.3g}{unit}" for tick in ticks]
    decimals = next((d for d in range(7) if math.isclose(step, round(step, d), rel_tol=1e-6)), 6)
    return [f"{tick:,.{decimals}f}{unit}".replace("-", "\u2212") for tick in ticks]


def _spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Move labels apart so that none covers another, each as near to its place as that allows."""
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    placed = list(wanted)
    floor = top
    for at in order:
        placed[at] = floor = max(placed[at], floor)
        floor += LINE_HEIGHT
    ceiling = bottom
    for at in reversed(order):
        placed[at] = ceiling = min(placed[at], ceiling)
        ceiling -= LINE_HEIGHT
    return placed


def _shape(role: str, x: float, y: float, size: float) -> str:
    """Draw a role's marker: each has its own shape, so that colour is never the only sign."""
    style = f'class="dot {role}"'
    if role == "other-1":
        reach = size + 1
        corners = f"l{reach} {reach}l{-reach} {reach}l{-reach} {-reach}z"
        return f'<path {style} d="M{x:.1f} {y - reach:.1f}{corners}"/>'
    if role == "other-2":
        corner = f'x="{x - size:.1f}" y="{y - size:.1f}"'
        return f'<rect {style} {corner} width="{2 * size}" height="{2 * size}"/>'
    if role == "other-3":
        return f'<path {style} d="M{x:.1f} {y - size:.1f}l{size} {2 * size}h{-2 * size}z"/>'
    return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<path class="{style}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{_plain(text)}</text>'


def _plain(text: str) -> str:
    return html.escape(FORBIDDEN.sub("\ufffd", text), quote=True)


def _svg(identifier: str, title: str, description: str, height: float, parts: Sequence[str]) -> str:
    name = _plain(identifier)
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{_plain(title)}</title>'
        f'<desc id="{name}-description">{_plain(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
