"""Differences between runs that share their seed: mean, 95 % interval, and what may be said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

ALIKE = "not separable"


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Return mean and standard deviation of one value a seed; the latter needs two."""
    found = list(values.values())
    deviation = round(statistics.stdev(found), 6) if len(found) > 1 else None
    return {"mean": round(statistics.mean(found), 6), "sd": deviation, "seeds": sorted(values)}


def difference(of: Mapping[int, float], to: Mapping[int, float]) -> dict[str, Any] | None:
    """Compare two sets of runs, seed by seed.

    Args:
        of: one value a seed.
        to: likewise; seeds that only one of them has are left out.

    Returns:
        Mean of the differences, its two-sided 95 % interval by Student's t, and the verdict:
        higher, lower, or not separable when the interval holds 0. One pair has no interval, no
        pair gives None.
    """
    from scipy.stats import t

    seeds = sorted(set(of) & set(to))
    if not seeds:
        return None
    differences = [of[seed] - to[seed] for seed in seeds]
    mean = statistics.mean(differences)
    found = {"mean": round(mean, 6), "low": None, "high": None, "pairs": len(seeds)}
    if len(seeds) < 2:
        return {**found, "verdict": "one seed, no interval"}
    error = statistics.stdev(differences) / len(seeds) ** 0.5
    half = float(t.ppf(0.975, len(seeds) - 1)) * error
    low, high = mean - half, mean + half
    verdict = "higher" if low > 0 else "lower" if high < 0 else ALIKE
    return {**found, "low": round(low, 6), "high": round(high, 6), "verdict": verdict}
