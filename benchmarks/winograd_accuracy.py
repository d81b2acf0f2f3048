"""Winograd3d's accuracy on `motions`: dense, vanilla Winograd training and low ranks, by seed.

    python benchmarks/winograd_accuracy.py                # about an hour on one CPU core
    python benchmarks/winograd_accuracy.py --minutes 30   # stop cleanly; repeat to go on
    # other settings need another file; the docs' longer fine-tuning, with --tiles 2 --keeps 0.5:
    python benchmarks/winograd_accuracy.py --tune_epochs 6 --output winograd_accuracy_long

A narrow C3D is trained densely, once a seed. Every run of the seed then fine-tunes this network
with the same clips in the same order, steps and schedule (SGD with momentum 0.9, cosine to zero):
as it is (`dense`), with all Winograd-domain weights trained (`vanilla`), or with a low-rank change
of them (`rank4`, `rank8`), columns pruned meanwhile. Every accuracy is of the finalized network, on
held-out clips made of other photos. Runs that matter most come first, all seeds of each.

Finished runs are kept in results/<output>.json, trained networks in runs/<output>-<settings>/. The
same command may be started several times at once, with OMP_NUM_THREADS=1 one process a core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paired import difference, spread
from resumable import Results, Runs, command_of, locked
from tenfold.data import ClipData, create
from tenfold.errors import UserError
from winograd_training import METHODS, Run, Settings, run

RUNS = Path("runs")
DEFAULTS: dict[str, Any] = {
    "train_clips": 3200,
    "test_clips": 4096,
    "size": 24,
    "width": 16,
    "batch_size": 32,
    "epochs": 20,
    "lr": 0.03,
    "tune_epochs": 2,
    "tune_lr": 0.01,
    "weight_decay": 5e-4,
}
KEEPS = (1.0, 0.5, 0.25)
# What is run of all that could be: method, tile, share of columns kept, with compensation; what
# matters most comes first. Without compensation rank 8 stands for all, with tile 4 for both ranks;
# a quarter of tile 4's 216 columns is too few for its 64 outputs.
CELLS: tuple[tuple[str, int, float, bool], ...] = (
    ("start", 0, 1.0, True),
    ("dense", 0, 1.0, True),
    ("vanilla", 2, 0.5, True),
    ("rank8", 2, 0.5, True),
    ("rank4", 2, 0.5, True),
    ("vanilla", 2, 1.0, True),
    ("rank8", 2, 1.0, True),
    ("vanilla", 2, 0.25, True),
    ("rank8", 2, 0.25, True),
    ("rank8", 4, 0.5, True),
    ("vanilla", 4, 0.5, True),
    ("rank8", 4, 0.5, False),
    ("rank8", 2, 0.5, False),
    ("rank8", 2, 0.25, False),
    ("rank4", 2, 1.0, True),
    ("rank4", 2, 0.25, True),
    ("rank8", 4, 1.0, True),
    ("vanilla", 4, 1.0, True),
)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--keeps", type=float, nargs="+", choices=KEEPS, default=list(KEEPS))
    parser.add_argument("--tiles", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument("--minutes", type=float, help="start no run that would end later")
    parser.add_argument("--output", default="winograd_accuracy", help="file in benchmarks/results")
    return parser.parse_args(words)


def grid(
    seeds: Sequence[int], methods: Sequence[str], keeps: Sequence[float], tiles: Sequence[int]
) -> list[Run]:
    """List the runs, those that matter most first, all seeds of each."""
    return [
        Run(seed, *cell)
        for cell in CELLS
        if cell[0] in methods and (not cell[1] or (cell[1] in tiles and cell[2] in keeps))
        for seed in seeds
    ]


def compare(runs: Runs) -> dict[str, Any]:
    """Return, by setting and method, the mean accuracy and the differences to the others.

    `dense` is the fine-tuned dense network; `compensated` the same run with compensation.
    """
    accuracy: dict[str, dict[str, dict[int, float]]] = {}
    for entry in runs.values():
        methods = accuracy.setdefault(str(entry["setting"] or "dense"), {})
        methods.setdefault(entry["method"], {})[entry["seed"]] = entry["accuracy"]
    dense = accuracy.get("dense", {}).get("dense", {})
    found: dict[str, dict[str, Any]] = {}
    for setting, methods in accuracy.items():
        repaired = accuracy.get(setting.removesuffix(" without compensation"), {})
        for method, values in methods.items():
            others = {"dense": dense if method != "dense" else {}}
            if setting != "dense":
                others["vanilla"] = methods.get("vanilla", {}) if method != "vanilla" else {}
            if repaired is not methods:
                others["compensated"] = repaired.get(method, {})
            versus = {name: difference(values, other) for name, other in others.items()}
            found.setdefault(setting, {})[method] = {
                **spread(values),
                "minus": {name: value for name, value in versus.items() if value is not None},
            }
    return {"accuracy": found}


def open_data(settings: Settings) -> ClipData:
    """Return the clips; they are made once a process and stay in memory, as bytes."""
    return create(  # type: ignore[return-value]
        {
            "name": "motions",
            "size": settings.size,
            "train_clips": settings.train_clips,
            "test_clips": settings.test_clips,
        }
    )


class Deadline:
    """Tells whether another run fits in; a run is as long as the longest so far, in CPU time.

    The process may be stopped for a while, so that wall time tells nothing about a run.
    """

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.longest, self.start = 0.0, time.process_time()

    def allows_a_run(self) -> bool:
        now = time.process_time()
        self.longest, self.start = max(self.longest, now - self.start), now
        return self.end is None or time.monotonic() + self.longest < self.end


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    deadline = Deadline(given.minutes)
    settings = Settings(**{name: getattr(given, name) for name in DEFAULTS})
    runs = grid(given.seeds, given.methods, given.keeps, given.tiles)
    digest = hashlib.sha256(json.dumps(settings.to_dict()).encode()).hexdigest()[:8]
    folder = RUNS / f"{given.output}-{digest}"
    command = command_of("winograd_accuracy", words)
    results = Results(given.output, settings.to_dict(), command, folder, compare)
    data = open_data(settings)
    elsewhere = 0
    for each in runs:
        with locked(folder / f"{each.name}.lock") as mine:
            if not mine:
                elsewhere += 1
                continue
            if each.name in results.runs:
                continue
            if not deadline.allows_a_run():
                done = sum(each.name in results.runs for each in runs)
                print(f"time is up: {done} of {len(runs)} runs done; repeat the command to go on")
                return 0
            result = run(each, settings, data, folder)
            results.add(each.name, result)
            print(
                f"{each.name}: accuracy {100 * result['accuracy']:.2f} %, "
                f"{result['cpu_seconds']:.0f} s of CPU",
                flush=True,
            )
    if elsewhere:
        print(f"{elsewhere} runs are left to the processes that have them")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
