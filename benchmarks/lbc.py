"""LBC's accuracy beside its rivals': dense, magnitude (ASP), SR-STE and LBC, paired by seed.

    python benchmarks/lbc.py                        # the small setting, for two CPU cores
    python benchmarks/lbc.py --minutes 9            # stop cleanly after 9 minutes; repeat to go on
    python benchmarks/lbc.py --full --minutes 9     # 200 epochs on all images, on a GPU
    python benchmarks/lbc.py --methods random --patterns 2:4    # a control beside them
    python benchmarks/lbc.py --smoke vit            # a ViT trains and finalizes exactly: a minute

All runs of a seed share initial weights, order of the data, augmentation, optimizer and schedule
(SGD with momentum 0.9, weight decay 1e-4, cosine to zero), and all methods treat the layers of
LBC's default choice. Every accuracy is of plain layers with exactly N:M weights, on the whole
held-out set. Finished runs are kept in results/<output>.json, a run in progress in
runs/<output>-<settings>/. The same command may be started several times at once, and each process
takes runs that no other one has: on few cores one process a core with OMP_NUM_THREADS=1, on a GPU
as many as it takes to keep it busy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paired import difference, spread
from resumable import Results, command_of, locked
from tenfold.data import ImageData, create
from tenfold.errors import UserError, unknown_name
from training import CONTROL, METHODS, Clock, Run, Settings, train

RUNS = Path("runs")
DATA = "npz:../shared/data/"
SMALL: dict[str, Any] = {
    "data": f"{DATA}cifar10",
    "images": 5000,
    "model": "resnet20",
    "epochs": 16,
    "batch_size": 64,
    "lr": 0.1,
    "optimizer": "sgd",
    "preset": "resnet",
    "precision": "fp32",
    "device": "cpu",
    "seeds": [0, 1, 2],
    "patterns": ["2:4", "1:16", "1:4"],
    "methods": list(METHODS),
    "output": "lbc_accuracy",
}
FULL: dict[str, Any] = {
    **SMALL,
    "images": None,
    "epochs": 200,
    "batch_size": 128,
    "device": "cuda",
    "output": "lbc_accuracy_gpu",
}
SMOKE: dict[str, Any] = {
    **SMALL,
    "data": f"{DATA}tinyimagenet50",
    "images": 320,
    "model": "timm/vit_tiny_patch16_224",
    "epochs": 3,
    "batch_size": 32,
    "lr": 5e-4,
    "optimizer": "adamw",
    "preset": "deit",
    "seeds": [0],
    "patterns": ["2:4"],
    "methods": ["lbc"],
    "output": "smoke_vit",
}


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what it leaves open is the preset's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="200 epochs, all images, on a GPU")
    parser.add_argument("--smoke", choices=["vit"], help="a short run that shows the pattern")
    parser.add_argument("--data", help="as in a recipe")
    parser.add_argument("--images", type=int, help="training images; 0: all")
    parser.add_argument("--model", help="as in a recipe")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--optimizer", help="sgd or adamw")
    parser.add_argument("--preset", choices=["resnet", "deit"], help="of LBC")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--patterns", nargs="+", help="such as 2:4 1:16")
    parser.add_argument("--methods", nargs="+", help=" ".join((*METHODS, CONTROL)))
    parser.add_argument("--minutes", type=float, help="start no epoch that would end later")
    parser.add_argument("--output", help="name of the file in benchmarks/results")
    given = parser.parse_args(words)
    preset = SMOKE if given.smoke else FULL if given.full else SMALL
    for name, value in preset.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.images = given.images or None
    if given.epochs < 2:
        raise UserError(f"--epochs {given.epochs}: expected at least 2, magnitude prunes at half")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    return given


def grid(seeds: Sequence[int], patterns: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """List the runs, seed by seed; dense comes first, because magnitude begins with its half."""
    for method in methods:
        if method not in (*METHODS, CONTROL):
            raise unknown_name("method", method, (*METHODS, CONTROL))
    pairs = []
    for pattern in patterns:
        n, _, m = pattern.partition(":")
        if not (n.isdigit() and m.isdigit()):
            raise UserError(f"--patterns {pattern}: expected N:M, such as 2:4")
        pairs.append((int(n), int(m)))
    runs = []
    for seed in seeds:
        if "dense" in methods:
            runs.append(Run(seed, "dense"))
        runs += [Run(seed, key, n, m) for n, m in pairs for key in methods if key != "dense"]
    return runs


def open_data(settings: Settings) -> ImageData:
    options: dict[str, object] = {"name": settings.data}
    return create(options if settings.images is None else {**options, "limit": settings.images})


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by pattern and method, the mean accuracy and the differences to the others."""
    accuracy: dict[tuple[str | None, str], dict[int, float]] = {}
    for run in runs.values():
        accuracy.setdefault((run["pattern"], run["method"]), {})[run["seed"]] = run["accuracy"]
    dense = accuracy.pop((None, "dense"), {})
    found: dict[str, dict[str, Any]] = {"dense": {"dense": spread(dense)}} if dense else {}
    for pattern, method in accuracy:
        others = {"dense": dense} | {
            rival: accuracy.get((pattern, rival), {})
            for rival in (*METHODS[1:], CONTROL)
            if rival != method
        }
        versus = {
            name: difference(accuracy[pattern, method], values) for name, values in others.items()
        }
        found.setdefault(str(pattern), {})[method] = {
            **spread(accuracy[pattern, method]),
            "minus": {name: value for name, value in versus.items() if value is not None},
        }
    return found


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    clock = Clock(given.minutes)
    if given.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    settings = Settings(**{key: getattr(given, key) for key in Settings.__dataclass_fields__})
    runs = grid(given.seeds, given.patterns, given.methods)
    digest = hashlib.sha256(json.dumps(settings.to_dict()).encode()).hexdigest()[:8]
    folder = RUNS / f"{given.output}-{digest}"
    if given.smoke:
        return smoke(runs, settings, folder)
    results = Results(
        given.output,
        settings.to_dict(),
        command_of("lbc", words),
        folder,
        lambda found: {"accuracy": compare(found)},
        torch.cuda.get_device_name() if settings.device == "cuda" else None,
    )
    data = open_data(settings)
    elsewhere = 0
    for run in runs:
        with locked(folder / f"{run.name}.lock") as mine:
            if not mine:
                elsewhere += 1
                continue
            if run.name in results.runs:
                continue
            result = train(run, settings, data, folder, clock)
            if result is None:
                done = sum(run.name in results.runs for run in runs)
                print(f"time is up: {done} of {len(runs)} runs done; repeat the command to go on")
                return 0
            results.add(run.name, result)
            (folder / f"{run.name}.pt").unlink(missing_ok=True)
            print(f"{run.name}: accuracy {100 * result['accuracy']:.2f} %", flush=True)
    if elsewhere:
        print(f"{elsewhere} runs are left to the processes that have them")
    return 0


def smoke(runs: list[Run], settings: Settings, folder: Path) -> int:
    """Train from the start, and show how full the blocks of every treated kind of layer are."""
    data = open_data(settings)
    for run in runs:
        (folder / f"{run.name}.pt").unlink(missing_ok=True)
        result = train(run, settings, data, folder, Clock())
        assert result is not None
        print(
            f"{run.name}: accuracy {100 * result['accuracy']:.2f} % of {data.num_classes} classes"
        )
        for kind, entry in result["blocks"].items():
            print(
                f"{kind:<8}{entry['layers']:>3} layers, weights kept in a block of {run.m}: "
                f"{entry['least']} to {entry['most']}"
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
