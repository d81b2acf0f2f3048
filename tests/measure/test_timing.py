"""Interleaved timing and the ratio's interval, with a clock that the test moves."""

import gc

import numpy as np
import pytest

from tenfold.measure import timing
from tenfold.measure.timing import Ratio, interleave, paired_ratio

pytestmark = pytest.mark.unit


class Clock:
    """Callables advance it by what they claim to last."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.log = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        def run():
            assert self.now == 0.0 or name in "abc"
            self.log.append(name)
            self.now += seconds

        return run


def test_times_rounds_and_budget(monkeypatch):
    clock = Clock(monkeypatch)
    # A round: 1 untimed and 5 timed runs of a, 1 and 3 of b, 22 ms together.
    samples = interleave({"a": clock.call("a", 0.001), "b": clock.call("b", 0.004)}, 0.5)
    assert {name: len(values) for name, values in samples.items()} == {"a": 23, "b": 23}
    assert samples["a"] == pytest.approx([1.0] * 23)
    assert samples["b"] == pytest.approx([4.0] * 23)


def test_order_is_balanced(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {name: clock.call(name, 0.01) for name in "abc"}
    interleave(calls, 1e-9)
    rounds = clock.log[12:]  # after 4 warm-up runs each
    order = [rounds[position] for position in range(0, len(rounds), 2)]
    firsts = order[::3]
    assert len(firsts) == 3
    assert set(firsts) == {"a", "b", "c"}
    assert all(set(order[i : i + 3]) == {"a", "b", "c"} for i in range(0, len(order), 3))


def test_at_least_seven_rounds_when_one_fits_the_budget(monkeypatch):
    clock = Clock(monkeypatch)
    assert len(interleave({"a": clock.call("a", 1.0)}, 3.0)["a"]) == 7


def test_garbage_collector_is_off_meanwhile_and_back_after_an_error():
    seen = []

    def run():
        seen.append(gc.isenabled())
        if len(seen) > 8:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interleave({"a": run}, 1e-9)
    assert not seen[-1]
    assert gc.isenabled()


def test_synchronise_brackets_each_run(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-9)
    interleave({"a": lambda: log.append("run")}, 1e-9, lambda: log.append("wait"))
    assert log[:6] == ["wait", "run", "wait"] * 2


def test_ratio_of_known_times():
    generator = np.random.default_rng(1)
    other = 1 + 0.02 * generator.standard_normal(60)
    ratio = paired_ratio(2 * other * (1 + 0.02 * generator.standard_normal(60)), other)
    assert ratio.low < ratio.median < ratio.high
    assert ratio.median == pytest.approx(2, rel=0.02)
    assert ratio.high - ratio.low < 0.1
    assert ratio.verdict == "faster"
    assert paired_ratio([1.0] * 9, [1.0] * 9) == Ratio(1.0, 1.0, 1.0)


def test_interval_is_reproducible_and_wider_for_a_burst_of_load():
    # The same values, once scattered over the rounds and once as one burst.
    burst = np.r_[np.ones(30), np.full(20, 1.5)]
    scattered = np.random.default_rng(0).permutation(burst)

    def width(values):
        ratio = paired_ratio(values, np.ones(50), seed=3)
        assert ratio == paired_ratio(values, np.ones(50), seed=3)
        return ratio.high - ratio.low

    assert width(burst) >= width(scattered)
    assert paired_ratio(burst, np.ones(50)).verdict == "no gain"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.03, 1.2, "faster"), (1.0, 1.2, "no gain"), (0.8, 0.97, "slower"), (0.8, 0.99, "no gain")],
)
def test_verdict_needs_the_whole_interval(low, high, verdict):
    assert Ratio(1.0, low, high).verdict == verdict
