"""Time several callables against each other fairly, and say how sure the ratio is."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Ratio", "interleave", "paired_ratio"]

# Shorter samples are dominated by the clock and by interrupts.
SAMPLE_SECONDS = 0.005
WARM_UP_RUNS = 3
ROUNDS = 7
ROUNDS_OVER_BUDGET = 3
BOOTSTRAPS = 2000


def interleave(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    synchronise: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Time `calls` in rounds and return, per name, the milliseconds of one run in each round.

    In a round each callable runs once untimed, because the one before it has taken the caches and
    put its threads to sleep, and then back to back for at least 5 ms; the median of these runs
    counts. Each round starts with the next callable, and every second pass has the reverse order,
    so that drift of clock speed or load falls on all alike. Rounds go on for `seconds`, at least 7
    (3 when one round alone takes longer than that). The garbage collector is off meanwhile.

    Args:
        calls: What to time, by name.
        seconds: Time budget for all rounds together.
        synchronise: Waits for pending device work; called before the clock is read.
    """
    wait = synchronise or (lambda: None)
    share = seconds / (ROUNDS * len(calls))
    runs = {name: _runs_per_sample(call, wait, share) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with _no_garbage_collection():
        started = time.perf_counter()
        first_round = 0.0
        while True:
            for name in names:
                calls[name]()
                times = [_time(calls[name], wait) for _ in range(runs[name])]
                samples[name].append(1000 * statistics.median(times))
            elapsed = time.perf_counter() - started
            rounds = len(samples[names[0]])
            names.append(names.pop(0))
            if rounds % len(names) == 0:
                names.reverse()
            first_round = first_round or elapsed
            least = ROUNDS_OVER_BUDGET if first_round > seconds else ROUNDS
            if elapsed >= seconds and rounds >= least:
                return samples


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the median over rounds, and the 95% interval of that median."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Say "faster" or "slower" only when the whole interval is 2% away from 1."""
        if self.low > 1.02:
            return "faster"
        return "slower" if self.high < 0.98 else "no gain"


def paired_ratio(reference: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio:
    """Compare times of the same rounds: above 1 means that `other` is faster.

    The interval is a bootstrap over blocks of neighbouring rounds (2000 draws, seeded): rounds
    that follow each other share the load of the machine, so they are not independent.
    """
    ratios = np.asarray(reference) / np.asarray(other)
    rounds = len(ratios)
    block = max(1, round(math.sqrt(rounds)))
    starts = np.random.default_rng(seed).integers(
        0, rounds, size=(BOOTSTRAPS, math.ceil(rounds / block), 1)
    )
    draws = (starts + np.arange(block)).reshape(BOOTSTRAPS, -1)[:, :rounds] % rounds
    medians = np.median(ratios[draws], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _runs_per_sample(call: Callable[[], object], wait: Callable[[], None], most: float) -> int:
    _time(call, wait)  # the first run allocates and compiles
    fastest = max(min(_time(call, wait) for _ in range(WARM_UP_RUNS)), 1e-7)
    # Three runs let the median drop an interrupted one, if there is time for that.
    least = 3 if 3 * fastest < most else 1
    return max(least, math.ceil(SAMPLE_SECONDS / fastest))


def _time(call: Callable[[], object], wait: Callable[[], None]) -> float:
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
