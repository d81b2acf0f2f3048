"""KCD beside plain distillation: accuracy, forward passes and time, paired by seed.

    python benchmarks/kcd.py                      # 4,000 images: an hour on two cores
    python benchmarks/kcd.py --time               # 1,000 images, timed: ten quiet minutes
    python benchmarks/kcd.py --minutes 9          # stop cleanly after 9 minutes; repeat to go on
    python benchmarks/kcd.py --full --minutes 9   # the paper's recipe on all images, on a GPU
    python benchmarks/kcd.py --seeds 0            # some of it
    python benchmarks/kcd.py --methods kd kcd --ratios 0.7

A ResNet-56 is trained first, once and on all images, and teaches a ResNet-20 on some of them: not
at all (student), from all samples (kd), from those that KCD keeps, and from as many that are left
by chance (random). Two parts:

- accuracy: all methods and ratios. The views of an image can be counted (mirrored or not), and the
  teacher answers once for each view, so that this part is mostly the student's work.
- time: kd and kcd without that cache, the teacher answering every batch, as it does where there are
  too many views. Counted forward passes must be those of the schedule, exactly.

All runs of a seed share initial weights, order of the data, augmentation, optimizer and schedule,
and take turns, an epoch each, so that whatever else the machine does meets all of them alike. Times
hold everything that training does, condensing included, but not evaluation and checkpoints. They
are taken by the clock and as the process's CPU time: the part accuracy may be paused or share its
core, the part time wants a machine of its own.

Finished runs are kept in results/<output>.json, runs in progress in runs/<output>-<settings>/. The
same command may be started several times at once, and each process takes seeds that no other one
has: on few cores one process a core with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import RESULTS, save
from kcd_training import METHODS, Run, Settings, Training, build
from lbc import locked
from paired import difference, spread
from tenfold import evaluate
from tenfold.data import ImageData, create
from tenfold.errors import UserError, unknown_name
from training import Clock

RUNS = Path("runs")
PARTS = ("accuracy", "time")
SMALL: dict[str, Any] = {
    "data": "npz:../shared/data/cifar10",
    "images": 4000,
    "teacher": "resnet56",
    "student": "resnet20",
    "epochs": 12,
    "teacher_images": 0,
    "teacher_epochs": 4,
    "stages": 6,
    "batch_size": 64,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "augment": "flip",
    "cache": True,
    "precision": "fp32",
    "device": "cpu",
    "seeds": [0, 1, 2],
    "ratios": [0.7, 0.5],
    "parts": ["accuracy"],
    "output": "kcd",
}
# What the teacher learned makes no difference to the time it takes.
TIME: dict[str, Any] = {
    **SMALL,
    "images": 1000,
    "teacher_images": 1000,
    "teacher_epochs": 1,
    "parts": ["time"],
    "output": "kcd_time",
}
FULL: dict[str, Any] = {
    **SMALL,
    "images": 0,
    "epochs": 240,
    "teacher_epochs": 240,
    "batch_size": 64,
    "schedule": "paper",
    "augment": "flip_crop",
    "cache": False,
    "device": "cuda",
    "parts": list(PARTS),
    "output": "kcd_gpu",
}


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what it leaves open is the preset's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--time", action="store_true", help="the part time, on 1,000 images")
    size.add_argument("--full", action="store_true", help="240 epochs on all images, on a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=" ".join(METHODS))
    parser.add_argument("--ratios", type=float, nargs="+", help="shares that are kept in the end")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--data", help="as in a recipe")
    parser.add_argument("--images", type=int, help="training images; 0: all")
    parser.add_argument("--teacher", help="as a recipe's model")
    parser.add_argument("--student", help="as a recipe's model")
    parser.add_argument("--epochs", type=int, help="of the student")
    parser.add_argument("--teacher_images", type=int, help="training images; 0: all")
    parser.add_argument("--teacher_epochs", type=int)
    parser.add_argument("--stages", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--weight_decay", type=float)
    parser.add_argument("--schedule", choices=["cosine", "paper"])
    parser.add_argument("--augment", help="as in a recipe")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, help="start no epoch that would end later")
    parser.add_argument("--output", help="name of the file in benchmarks/results")
    given = parser.parse_args(words)
    preset = FULL if given.full else TIME if given.time else SMALL
    for name, value in preset.items():
        if getattr(given, name, None) is None:
            setattr(given, name, value)
    given.images, given.teacher_images = given.images or None, given.teacher_images or None
    for method in given.methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    return given


def grid(
    parts: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    ratios: Sequence[float],
    cache: bool,
) -> dict[int, list[Run]]:
    """List the runs of each seed.

    Without a cache the accuracy's runs ask the teacher every time, and are timed by themselves.
    """
    found: dict[int, list[Run]] = {}
    for seed in seeds:
        runs = []
        for part in parts:
            cached = cache and part == "accuracy"
            for method in methods:
                if part == "time" and method in ("student", "random"):
                    continue
                for ratio in (1.0,) if method in ("student", "kd") else ratios:
                    runs.append(Run(seed, method, ratio, cached and method != "student"))
        found[seed] = list(dict.fromkeys(runs))
    return found


def compare(runs: dict[str, dict[str, Any]], cache: bool) -> dict[str, dict[str, Any]]:
    """Return, by part and method, accuracy, forward passes and time beside the others'.

    Without a cache every run asks the teacher every time, and serves both parts.
    """
    found: dict[str, dict[str, Any]] = {}
    asking = [run for run in runs.values() if not run["cached"]]
    for part, chosen in (
        (
            "accuracy",
            [r for r in runs.values() if r["cached"] == cache or r["method"] == "student"],
        ),
        ("time", [r for r in asking if r["method"].startswith(("kd", "kcd"))]),
    ):
        accuracy: dict[str, dict[int, float]] = {}
        seconds: dict[str, dict[int, float]] = {}
        cpu: dict[str, dict[int, float]] = {}
        entries: dict[str, dict[str, Any]] = {}
        for run in chosen:
            accuracy.setdefault(run["method"], {})[run["seed"]] = run["accuracy"]
            seconds.setdefault(run["method"], {})[run["seed"]] = sum(run["seconds"])
            cpu.setdefault(run["method"], {})[run["seed"]] = sum(run["cpu_seconds"])
            passes = entries.setdefault(run["method"], {"forwards": {}})["forwards"]
            passes[str(run["seed"])] = run["forwards"]
        for method, entry in entries.items():
            rivals = {name: accuracy.get(name, {}) for name in accuracy if name != method}
            versus = {name: difference(accuracy[method], other) for name, other in rivals.items()}
            entry["accuracy"] = spread(accuracy[method])
            entry["minus"] = {name: value for name, value in versus.items() if value is not None}
            entry["seconds"] = spread(seconds[method])
            entry["cpu_seconds"] = spread(cpu[method])
            if "kd" in entries and method != "kd":
                entry["time_saved"] = saved(seconds[method], seconds["kd"])
                entry["cpu_saved"] = saved(cpu[method], cpu["kd"])
        if entries:
            found[part] = entries
    return found


def saved(of: dict[int, float], to: dict[int, float]) -> dict[str, Any] | None:
    """Return which share of the time is saved, seed by seed, as mean and 95 % interval."""
    both = sorted(set(of) & set(to))
    if not both:
        return None
    shares = {seed: 1 - of[seed] / to[seed] for seed in both}
    return difference(shares, dict.fromkeys(both, 0.0))


class Results:
    """The finished runs of one output, in its JSON file; several processes may share it."""

    def __init__(self, output: str, settings: Settings, command: str, folder: Path):
        self.output, self.settings = output, settings
        self.command, self.folder = command, folder
        known = self._read()
        if known and known["settings"] != settings.to_dict():
            old, new = known["settings"], settings.to_dict()
            differing = ", ".join(
                f"{key} {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]
            )
            raise UserError(
                f"results/{output}.json holds runs of other settings ({differing}): give the "
                "same, or another --output"
            )

    def _read(self) -> dict[str, Any]:
        file = RESULTS / f"{self.output}.json"
        found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return found

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self._read().get("runs", {})
        return found

    @property
    def teacher(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._read().get("teacher")
        return found

    def add(self, teacher: dict[str, Any], name: str, result: dict[str, Any]) -> None:
        with locked(self.folder / "results.lock", wait=True):
            runs = {**self.runs, name: result}
            commands = self._read().get("command", self.command).split("; ")
            save(
                self.output,
                "; ".join(dict.fromkeys([*commands, self.command])),
                sorted({entry["seed"] for entry in runs.values()}),
                {
                    "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.get_device_name() if self.settings.device == "cuda" else None,
                    "settings": self.settings.to_dict(),
                    "teacher": teacher,
                    "comparison": compare(runs, self.settings.cache),
                    "runs": runs,
                },
            )


def images(settings: Settings, limit: int | None) -> ImageData:
    return create({"name": settings.data} | ({} if limit is None else {"limit": limit}))


def teach(
    settings: Settings, folder: Path, clock: Clock
) -> tuple[nn.Module, dict[str, Any]] | None:
    """Train the teacher, or read the one that is there; None when the time was up first."""
    finished = folder / "teacher.pt"
    data = images(settings, settings.teacher_images)
    with locked(folder / "teacher.lock", wait=True):
        if not finished.is_file():
            training = Training(Run(0, "teacher"), settings, data, folder, None)
            while not training.finished:
                if not clock.allows_an_epoch():
                    return None
                clock.epoch = training.epoch()
            found = evaluate(training.model, data)
            state = {
                "model": training.model.state_dict(),
                "facts": {
                    "accuracy": round(found.accuracy, 6),
                    "images": data.train_size,
                    "epochs": training.epochs,
                    "seconds": round(sum(training.seconds), 1),
                },
            }
            torch.save(state, finished)
            training.clear()
            print(f"teacher: accuracy {100 * found.accuracy:.2f} %", flush=True)
    state = torch.load(finished, map_location="cpu", weights_only=True)
    teacher = build(settings.teacher, data)
    teacher.load_state_dict(state["model"])
    teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher.eval().requires_grad_(False), state["facts"]


def take_turns(
    runs: list[Run],
    settings: Settings,
    data: ImageData,
    folder: Path,
    clock: Clock,
    teacher: tuple[nn.Module, dict[str, Any]],
    results: Results,
) -> bool:
    """Train the runs of one seed, an epoch each in turn; tell whether all came to their end."""
    left = [run for run in runs if run.name not in results.runs]
    trainings = [Training(run, settings, data, folder, teacher[0]) for run in left]
    turn = 0
    while trainings:
        least = min(training.done for training in trainings)
        behind = [training for training in trainings if training.done == least]
        for training in behind if turn % 2 else reversed(behind):
            if not training.finished:
                if not clock.allows_an_epoch():
                    return False
                clock.epoch = training.epoch()
            if training.finished:
                result = training.result()
                results.add(teacher[1], training.run.name, result)
                training.clear()
                trainings.remove(training)
                print(
                    f"{training.run.name}: accuracy {100 * result['accuracy']:.2f} %, "
                    f"{sum(result['seconds']):.1f} s, {result['forwards']}",
                    flush=True,
                )
        turn += 1
    return True


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    clock = Clock(given.minutes)
    if given.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    settings = Settings(**{key: getattr(given, key) for key in Settings.__dataclass_fields__})
    digest = hashlib.sha256(json.dumps(settings.to_dict()).encode()).hexdigest()[:8]
    folder = RUNS / f"{given.output}-{digest}"
    results = Results(given.output, settings, command_of(words), folder)
    data = images(settings, settings.images)
    teacher = teach(settings, folder, clock)
    seeds = grid(given.parts, given.seeds, given.methods, given.ratios, settings.cache)
    wanted = [run for runs in seeds.values() for run in runs]
    elsewhere = 0
    for seed, runs in seeds.items() if teacher is not None else ():
        assert teacher is not None
        with locked(folder / f"seed{seed}.lock") as mine:
            if not mine:
                elsewhere += 1
            elif not take_turns(runs, settings, data, folder, clock, teacher, results):
                break
    done = sum(run.name in results.runs for run in wanted)
    if elsewhere:
        print(f"{elsewhere} seeds are left to the processes that have them")
    elif done < len(wanted):
        print(f"time is up: {done} of {len(wanted)} runs done; repeat the command to go on")
    return 0


def command_of(words: Sequence[str]) -> str:
    """Return the command without --minutes, which changes nothing in the result."""
    kept = list(words)
    if "--minutes" in kept:
        at = kept.index("--minutes")
        del kept[at : at + 2]
    return shlex.join(["python", "benchmarks/kcd.py", *kept])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
