import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.report.charts import (
    WIDTH,
    Interval,
    IntervalRow,
    Line,
    interval_chart,
    line_chart,
    marker,
    nice_ticks,
    share_bar,
)

pytestmark = pytest.mark.unit


def line(values: list[float | None], role: str = "after", label: str = "now") -> Line:
    return Line(label, role, list(enumerate(values)))


def paths(svg: str, style: str) -> list[str]:
    tree = ElementTree.fromstring(svg)
    return [found.get("d", "") for found in tree.iter("path") if found.get("class") == style]


def texts(svg: str) -> list[str]:
    return [found.text or "" for found in ElementTree.fromstring(svg).iter("text")]


def draw(*lines: Line) -> str:
    return line_chart("loss", "Loss", "What it shows", lines, y_label="Loss")


def test_title_and_description_are_tied_to_the_chart() -> None:
    tree = ElementTree.fromstring(draw(line([1.0, 0.5])))
    ids = {found.get("id"): found.text for found in tree if found.get("id")}
    assert [ids[name] for name in tree.get("aria-labelledby", "").split()] == [
        "Loss",
        "What it shows",
    ]


def test_higher_values_are_drawn_higher_and_later_epochs_further_right() -> None:
    (path,) = paths(draw(line([1.0, 2.0, 4.0])), "curve after")
    points = [tuple(map(float, point.split())) for point in path.lstrip("M").split("L")]
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    # Equal steps of epochs are equal steps on the page, twice the rise twice the height.
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert ys[1] - ys[2] == pytest.approx(2 * (ys[0] - ys[1]), abs=0.31)


def test_missing_and_absurd_values_leave_gaps() -> None:
    svg = draw(line([1.0, 2.0, None, 3.0, math.nan, math.inf, 1e300, 2.0, 1.0]))
    assert [path.count("L") for path in paths(svg, "curve after")] == [1, 0, 1]


def test_the_last_value_is_written_at_the_end() -> None:
    assert "now 0.250" in texts(draw(line([1.0, 0.5, 0.25, None])))


def test_labels_that_would_meet_are_moved_apart() -> None:
    svg = draw(*(line([1.0, 0.5], label=name) for name in "abcd"))
    tree = ElementTree.fromstring(svg)
    heights = sorted(
        float(found.get("y", ""))
        for found in tree.iter("text")
        if "end-label" in found.get("class", "")
    )
    gaps = [after - before for before, after in itertools.pairwise(heights)]
    assert len(heights) == 4
    assert min(gaps) >= 16.9


def test_one_epoch_is_a_dot() -> None:
    tree = ElementTree.fromstring(draw(line([0.7])))
    assert [found.get("class") for found in tree.iter("circle")].count("dot after") >= 1
    assert "now 0.700" in texts(draw(line([0.7])))


@pytest.mark.parametrize("values", [[], [None, math.nan], [math.inf]])
def test_nothing_to_draw_is_no_chart(values: list[float | None]) -> None:
    assert draw(line(values)) == ""


def test_limits_hold_the_axis() -> None:
    svg = line_chart(
        "a", "A", "A", [line([0.95, 1.0])], y_label="A", unit=" %", scale=100.0, limits=(0, 100)
    )
    assert "100 %" in texts(svg)
    assert not any(text.startswith("10") and text != "100 %" for text in texts(svg)[1:-1])


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-6, 1e6, allow_nan=False),
)
def test_ticks_enclose_the_values_evenly(low: float, reach: float) -> None:
    high = low + reach
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-6
    assert ticks[-1] >= high - step * 1e-6
    assert 2 <= len(ticks) <= 12


@given(
    st.lists(
        st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), min_size=1, max_size=6
    ),
    st.text(max_size=12),
)
def test_any_values_and_any_text_give_valid_xml(values: list[float | None], text: str) -> None:
    curves = line_chart("a", text, text, [line(values, label=text)], y_label=text)
    row = IntervalRow(
        text, text, [Interval("before", value, value, value, text) for value in values]
    )
    for svg in (curves, interval_chart("b", text, text, [row], x_label=text)):
        if svg:
            ElementTree.fromstring(svg)
            assert "nan" not in svg.replace(text, "").lower()


def test_text_is_escaped() -> None:
    row = IntervalRow("<script>", "a & b", [Interval("after", 1.0, 2.0, 3.0, '"2"')])
    svg = interval_chart("x", "<t>", "<d>", [row], x_label="ms")
    assert "<script>" not in svg
    assert {"<script>", "a & b", '"2"'} <= set(texts(svg))


def test_intervals_start_at_zero_and_keep_proportion() -> None:
    row = IntervalRow("onnxruntime", "", [Interval("after", 1.0, 2.0, 4.0, "2 ms")])
    tree = ElementTree.fromstring(interval_chart("x", "t", "d", [row], x_label="ms"))
    (dot,) = tree.iter("circle")
    spread = next(p for p in tree.iter("path") if p.get("class") == "spread after")
    start, end = (float(point.split()[0]) for point in spread.get("d", "")[1:].split("L"))
    middle, zero = float(dot.get("cx", "")), 6.0
    assert start - zero == pytest.approx((middle - zero) / 2, abs=0.2)
    assert end - zero == pytest.approx((middle - zero) * 2, abs=0.2)
    assert end < WIDTH


def test_bars_keep_to_their_frame() -> None:
    def widths(svg: str) -> list[float]:
        return [float(found.get("width", "")) for found in ElementTree.fromstring(svg)]

    assert widths(share_bar(0.5)) == [96, 48]
    assert widths(share_bar(0.5, 0.5)) == [48, 24]
    assert widths(share_bar(7.0)) == [96, 96]
    assert widths(share_bar(None, math.nan)) == [0, 0]


def test_every_role_has_its_own_marker() -> None:
    roles = ["before", "after", "other-1", "other-2", "other-3"]
    drawn = {marker(role).replace(role, "") for role in roles}
    # Before and after share the circle: hollow and filled, which the style sheet does.
    assert len(drawn) == 4
    for role in roles:
        ElementTree.fromstring(marker(role, dashed=True, line=True))
