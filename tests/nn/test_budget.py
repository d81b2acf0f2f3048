"""The table of cells: what it knows, which cell it chooses, and what it refuses."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tenfold.errors import UserError
from tenfold.nn.budget import CellRow, CellTable, parse_budget
from tests.supervits import supervit

pytestmark = pytest.mark.unit

MACS = {(12, 0.5): 100, (12, 1.0): 200, (16, 0.5): 150, (16, 1.0): 300}
ACCURACY = {(12, 0.5): 0.80, (12, 1.0): 0.82, (16, 0.5): 0.85, (16, 1.0): 0.90}
TIMES = {(12, 0.5): 1.0, (12, 1.0): 3.0, (16, 0.5): 2.0, (16, 1.0): 2.5}


def table(**columns: dict[tuple[int, float], float]) -> CellTable:
    made = CellTable(MACS)
    for name, values in columns.items():
        for cell, value in values.items():
            made.note(cell, **{name: value})
    return made


def cell(row: CellRow) -> tuple[int, float]:
    return row.size, row.keep_rate


def test_the_most_accurate_cell_within_the_budget():
    full = table(
        accuracy=ACCURACY,
        latency_ms=TIMES,
        images_per_second={c: 1000 / t for c, t in TIMES.items()},
    )
    assert cell(full.choose(macs=100)) == (12, 0.5)
    assert cell(full.choose(macs=299)) == (16, 0.5)  # better and cheaper than (12, 1)
    assert cell(full.choose(macs=1e9)) == (16, 1.0)
    assert cell(full.choose(latency_ms=2.4)) == (16, 0.5)
    assert cell(full.choose(latency_ms=2.5)) == (16, 1.0)
    assert cell(full.choose(images_per_second=450)) == (16, 0.5)
    assert cell(full.choose(images_per_second=1000)) == (12, 0.5)


def test_of_equally_accurate_cells_the_cheapest():
    assert cell(table(accuracy=dict.fromkeys(MACS, 0.9)).choose(macs=1000)) == (12, 0.5)


def test_without_accuracies_the_most_work_counts_as_the_best():
    assert cell(table().choose(macs=250)) == (12, 1.0)
    some = table(accuracy={(12, 0.5): 0.1})
    assert cell(some.choose(macs=1000)) == (12, 0.5)  # what is known goes ahead of what isn't


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({}, "0 were given, expected one"),
        ({"macs": 5, "latency_ms": 5}, "2 were given"),
        ({"macs": 0}, "macs=0: expected more than 0"),
        ({"latency_ms": float("nan")}, "expected more than 0"),
        ({"macs": 99}, "less than any cell has: the cheapest, size 12, keep rate 0.5, has 100"),
        ({"latency_ms": 0.5}, r"latency_ms=0\.5 is less .* size 12, keep rate 0\.5, has 1;"),
        ({"images_per_second": 5}, "not known yet: measure them on this machine, tenfold bench"),
    ],
)
def test_budgets_that_nothing_fits(budget, text):
    with pytest.raises(UserError, match=text) as caught:
        table(accuracy=ACCURACY, latency_ms=TIMES).choose(**budget)
    assert "\n" not in str(caught.value)
    fast = table(images_per_second={(12, 0.5): 50})
    with pytest.raises(UserError, match=r"60 is more than any cell has: .* has 50"):
        fast.choose(images_per_second=60)


def test_the_front():
    full = table(accuracy={**ACCURACY, (16, 1.0): 0.85}, latency_ms=TIMES)
    assert [cell(row) for row in full.front("macs")] == [(12, 0.5), (16, 0.5)]
    assert [cell(row) for row in full.front("latency_ms")] == [(12, 0.5), (16, 0.5)]
    assert table().front("macs") == []


def test_plain_values_and_back():
    full = table(accuracy=ACCURACY, latency_ms=TIMES)
    full.machine = "this one"
    values = json.loads(json.dumps(full.to_dict()))
    assert CellTable.from_dict(values).rows == full.rows
    other = CellTable({(16, 1.0): 300, (20, 1.0): 400})  # another grid takes what it knows
    other.take(values)
    assert other.rows[0].accuracy == 0.90
    assert other.rows[1].accuracy is None
    assert other.machine == "this one"
    with pytest.raises(UserError, match="no cell of size 9 and keep rate 1"):
        full.note((9, 1.0), accuracy=1.0)


def changed(place: str, value: Any) -> Any:
    values = copy.deepcopy(table(accuracy=ACCURACY).to_dict())
    if place in values:
        values[place] = value
    else:
        values["cells"][0][place] = value
    return values


@pytest.mark.parametrize(
    "values",
    [
        [],
        None,
        "cells",
        {},
        {"format": 1},
        changed("format", 2),
        changed("cells", {}),
        changed("cells", ["x"]),
        changed("cells", [{}]),
        changed("size", "12"),
        changed("keep_rate", [1]),
        changed("macs", None),
        changed("macs", float("inf")),
        changed("accuracy", "high"),
        changed("latency_ms", {}),
        changed("batch", True),
    ],
    ids=str,
)
def test_what_is_no_table_is_refused(values):
    for take in (table().take, CellTable.from_dict):
        with pytest.raises(UserError, match="measure again, tenfold bench RUN") as caught:
            take(values)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("5ms", {"latency_ms": 5.0}),
        (" 0.5 S ", {"latency_ms": 500.0}),
        ("1.2gmacs", {"macs": 1.2e9}),
        ("1MMACs", {"macs": 1e6}),
        ("300img/s", {"images_per_second": 300.0}),
    ],
)
def test_budgets_as_people_write_them(text, budget):
    assert parse_budget(text) == pytest.approx(budget)


@pytest.mark.parametrize("text", ["", "5", "ms", "5 parsecs", "-1ms", "0gmacs", "nanms", "5msms"])
def test_what_is_no_budget(text):
    with pytest.raises(UserError, match="expected a number with its unit, such as 5ms"):
        parse_budget(text)


def test_a_supervit_asks_its_table():
    model = supervit()
    assert len(model.table.rows) == 9
    exact = model.macs(48, 0.7)
    found = model.at_budget(macs=exact)
    assert found.macs <= exact
    assert found.supervit is model
    with pytest.raises(UserError, match=r"size 32, keep rate 0\.5"):
        model.at_budget(macs=model.macs(32, 0.5) - 1)
    with pytest.raises(UserError, match="measure_cells"):
        model.at_budget(latency_ms=5)
    for row in list(model.table.rows):
        model.table.note((row.size, row.keep_rate), latency_ms=row.macs / 1e6, accuracy=row.size)
    found = model.at_budget(latency_ms=model.macs(48, 1.0) / 1e6)
    assert (found.size, found.keep_rate) == (48, 0.5)  # all of a size are equally right here
