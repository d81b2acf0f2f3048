"""Turn numbers into what people read: 12.3 MB, 34.1 M, 97.2 %, 3.21 ms, and an en dash for none.

Every function takes `None` and non-finite numbers and answers with `MISSING`, so that no caller has
to ask first. A no-break space stands between number and unit.
"""

from __future__ import annotations

import math

__all__ = [
    "MISSING",
    "accuracy_change",
    "count",
    "duration",
    "file_size",
    "interval",
    "milliseconds",
    "percent",
    "power_of_ten",
    "relative_change",
    "significant",
    "times",
]

MISSING = "–"
SPACE = "\u00a0"
MINUS = "\u2212"


def significant(value: float | None, digits: int = 3) -> str:
    """Format with that many significant digits, without an exponent for everyday sizes.

    >>> significant(3.14159), significant(0.012345), significant(1234.5)
    ('3.14', '0.0123', '1,234')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-5 or size >= 1e9:
        return power_of_ten(value)
    # Rounded first, so that 9.999 counts as 10 when the decimals are chosen.
    rounded = float(f"{size:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(rounded)))
    return _signed(f"{size:,.{decimals}f}", value)


def power_of_ten(value: float | None) -> str:
    """Format as a power of ten: `1.2 × 10⁻⁷`; zero stays `0`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{abs(value):.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return _signed(f"{mantissa}{SPACE}×{SPACE}10{raised}", value)


def count(value: float | None) -> str:
    """Format a count with k, M, G or T: `34.1 M`; below a thousand as it is."""
    return _scaled(value, ("", "k", "M", "G", "T"))


def file_size(value: float | None) -> str:
    """Format bytes in decimal units: `12.3 MB`."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def percent(value: float | None, decimals: int = 1) -> str:
    """Format a share of one in per cent: 0.972 becomes `97.2 %`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _signed(f"{abs(value) * 100:.{decimals}f}{SPACE}%", value)


def milliseconds(value: float | None) -> str:
    """Format milliseconds with three significant digits: `3.21 ms`."""
    text = significant(value)
    return text if text == MISSING else f"{text}{SPACE}ms"


def times(value: float | None) -> str:
    """Format a ratio with two decimals: `1.42×`."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2f}×"


def interval(low: float | None, high: float | None, decimals: int | None = None) -> str:
    """Format two ends as `3.1 – 3.4`, with `decimals` or three significant digits."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return MISSING
    if decimals is None:
        return f"{significant(low)}{SPACE}–{SPACE}{significant(high)}"
    return f"{low:.{decimals}f}{SPACE}–{SPACE}{high:.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Format seconds as `12.3 s`, `4 min 5 s` or `2 h 13 min`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 60:
        return f"{significant(seconds)}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{rest}{SPACE}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}{SPACE}h{SPACE}{minutes}{SPACE}min"


def relative_change(before: float | None, after: float | None) -> str:
    """Say how a size changed: `−48.9 %`, and the factor too once less than a quarter is left."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return MISSING
    if before == after:
        return "unchanged"
    if before <= 0:
        return MISSING
    change = after / before - 1
    text = f"{MINUS if change < 0 else '+'}{abs(change) * 100:.1f}{SPACE}%"
    return f"{text} ({significant(before / after)}×)" if 0 < after < before / 4 else text


def accuracy_change(before: float | None, after: float | None) -> str:
    """Say how an accuracy changed, in percentage points: `−0.52 points`."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return MISSING
    if before == after:
        return "unchanged"
    change = (after - before) * 100
    return f"{MINUS if change < 0 else '+'}{abs(change):.2f}{SPACE}points"


def _signed(text: str, value: float) -> str:
    return f"{MINUS}{text}" if value < 0 else text


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    size, unit = abs(value), 0
    # 999.6 k would be shown as 1,000 k: what rounds to the next unit goes there.
    while float(f"{size:.2e}") >= 1000 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    whole = unit == 0 and size == int(size)
    text = f"{int(size)}" if whole else significant(size)
    return _signed(f"{text}{SPACE}{units[unit]}".rstrip(SPACE), value)
