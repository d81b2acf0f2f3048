import math

import pytest

from tenfold.report import numbers

pytestmark = pytest.mark.unit


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.count(34_100_000), "34.1 M"),
        (numbers.count(512), "512"),
        (numbers.count(0), "0"),
        (numbers.count(999_960), "1.00 M"),
        (numbers.count(4_090_000_000), "4.09 G"),
        (numbers.count(-1500), "−1.50 k"),
        (numbers.file_size(12_345_678), "12.3 MB"),
        (numbers.file_size(999), "999 B"),
        (numbers.file_size(0), "0 B"),
        (numbers.percent(0.972), "97.2 %"),
        (numbers.percent(0.97245, 2), "97.25 %"),
        (numbers.milliseconds(3.2149), "3.21 ms"),
        (numbers.milliseconds(0.04567), "0.0457 ms"),
        (numbers.milliseconds(128.4), "128 ms"),
        (numbers.times(1.4249), "1.42×"),
        (numbers.significant(9.999), "10.0"),
        (numbers.significant(-0.5), "−0.500"),
        (numbers.significant(1e12), "1.0 × 10¹²"),
        (numbers.power_of_ten(1.23e-7), "1.2 × 10⁻⁷"),
        (numbers.power_of_ten(0.0), "0"),
        (numbers.interval(3.104, 3.4), "3.10 – 3.40"),
        (numbers.interval(0.97, 1.014, 2), "0.97 – 1.01"),
        (numbers.duration(12.3), "12.3 s"),
        (numbers.duration(245), "4 min 5 s"),
        (numbers.duration(7980), "2 h 13 min"),
        (numbers.relative_change(200, 102.2), "−48.9 %"),
        (numbers.relative_change(100, 8), "−92.0 % (12.5×)"),
        (numbers.relative_change(100, 130), "+30.0 %"),
        (numbers.relative_change(5, 5), "unchanged"),
        (numbers.accuracy_change(0.9702, 0.9654), "−0.48 points"),
        (numbers.accuracy_change(0.5, 0.51), "+1.00 points"),
        (numbers.accuracy_change(0.5, 0.5), "unchanged"),
    ],
)
def test_written_for_people(written: str, expected: str) -> None:
    assert plain(written) == expected


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_dash(value: float | None) -> None:
    one = (
        numbers.count,
        numbers.file_size,
        numbers.percent,
        numbers.milliseconds,
        numbers.times,
        numbers.significant,
        numbers.power_of_ten,
        numbers.duration,
    )
    two = (numbers.interval, numbers.relative_change, numbers.accuracy_change)
    assert {write(value) for write in one} == {numbers.MISSING}
    assert {write(value, 1.0) for write in two} == {numbers.MISSING}
    assert {write(1.0, value) for write in two} == {numbers.MISSING}


def test_a_change_from_nothing_has_no_percentage() -> None:
    assert numbers.relative_change(0.0, 3.0) == numbers.MISSING
