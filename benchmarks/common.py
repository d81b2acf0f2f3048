"""What every benchmark shares: paired timing, and results with where and how they were made."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tenfold import __version__, doctor

RESULTS = Path(__file__).parent / "results"


def interleave(
    samples: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time every callable once a round, in an order that reverses from round to round.

    Returns:
        Seconds by name, one entry a round; entries of one round belong together.
    """
    names = list(samples)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warm_up, rounds):
        for name in names if index % 2 else reversed(names):
            start = time.perf_counter()
            samples[name]()
            if index >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile in milliseconds."""
    ordered = sorted(1000 * value for value in seconds)
    tenth = statistics.quantiles(ordered, n=10)
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "p10_ms": round(tenth[0], 3),
        "p90_ms": round(tenth[-1], 3),
    }


def paired_ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Return the median of the ratios round by round, with its quartiles."""
    ratios = sorted(a / b for a, b in zip(of, to, strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "median": round(statistics.median(ratios), 4),
        "quartile_low": round(quartiles[0], 4),
        "quartile_high": round(quartiles[2], 4),
        "rounds": len(ratios),
    }


def save(name: str, command: str, seed: int | list[int], results: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json`, whole or not at all, with hardware, versions, seed, command."""
    machine = doctor()
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    written = {
        "benchmark": name,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "tenfold": __version__,
        "machine": machine.to_dict(),
        **results,
    }
    draft = path.with_suffix(".writing")
    draft.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
