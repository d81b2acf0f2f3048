"""What LTS costs and saves: accuracy beside plain quantization-aware training, and measured steps.

    python benchmarks/lts.py                     # the small setting, for one CPU core
    python benchmarks/lts.py --minutes 9         # stop cleanly after 9 minutes; repeat to go on
    python benchmarks/lts.py --parts accuracy --seeds 0 --bits 2 4     # some of it
    python benchmarks/lts.py --start runs/cifar10-dense/model   # from a network that is there
    python benchmarks/lts.py --parts checkpoints # what `step` needs, while the machine is busy
    python benchmarks/lts.py --full --minutes 9  # all images, the paper's recipe, on a GPU

Its parts:

- accuracy: ResNet-20 on CIFAR-10, trained in floats, then to 2, 3 and 4 bits from there: with LTS,
  and by the same quantization-aware training without freezing. Paired by seed. `--start` gives the
  float network for all seeds.
- step: ResNet-18 in its form for 32x32 images trained to 2 bits (which is the part checkpoints);
  from its checkpoints at 4/6, 5/6 and 6/6 of the run, whole training steps with the saving on and
  off, in turn.
- bookkeeping: a step of LTS in the middle of its run with the saving off, beside the same without
  freezing, at batch 128.

Finished runs are kept in results/<output>.json, a run in progress in runs/<output>-<settings>/. The
same command may be started several times at once; each process takes runs that no other one has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import RESULTS, interleave, paired_ratio, save, summary
from lbc import locked
from lts_training import METHODS, Run, Settings, Training, build, train
from paired import difference, spread
from tenfold.data import ImageData, create
from tenfold.errors import UserError
from tenfold.methods import LTS
from training import Clock

RUNS = Path("runs")
PARTS = ("accuracy", "checkpoints", "step", "bookkeeping")
SMALL: dict[str, Any] = {
    "data": "npz:../shared/data/cifar10",
    "images": 2000,
    "model": "resnet20",
    "float_epochs": 12,
    "epochs": 6,
    "batch_size": 64,
    "float_lr": 0.1,
    "lr": 0.02,
    "device": "cpu",
    "step_images": 640,
    "step_float_epochs": 3,
    "step_epochs": 6,
    "step_batch_size": 64,
    "timed_batch_size": 64,
    "seeds": [0, 1, 2],
    "bits": [2, 3, 4],
    "rounds": 5,
    "output": "lts",
}
FULL: dict[str, Any] = {
    **SMALL,
    "images": 0,
    "float_epochs": 400,
    "epochs": 400,
    "batch_size": 128,
    "lr": 0.1,
    "device": "cuda",
    "step_images": 0,
    "step_float_epochs": 60,
    "step_epochs": 60,
    "step_batch_size": 128,
    "timed_batch_size": 128,
    "rounds": 15,
    "output": "lts_gpu",
}
SHARES = ("4/6", "5/6", "6/6")  # of the part step's run


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what it leaves open is the preset's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the paper's recipe, on a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", help="as in a recipe")
    parser.add_argument("--model", help="of the part accuracy, as in a recipe")
    parser.add_argument("--start", help="artifact of its float network, instead of training one")
    for name, text in (
        ("images", "training images of the part accuracy; 0: all"),
        ("float_epochs", "epochs of the float network"),
        ("epochs", "epochs from there"),
        ("batch_size", None),
        ("step_images", "training images of the part step; 0: all"),
        ("step_float_epochs", None),
        ("step_epochs", "a multiple of 6"),
        ("step_batch_size", None),
        ("timed_batch_size", "images of a step that is timed in the part step"),
        ("rounds", "pairs of steps that are timed"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--float_lr", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--bits", type=int, nargs="+")
    parser.add_argument("--minutes", type=float, help="start no epoch that would end later")
    parser.add_argument("--output", help="name of the file in benchmarks/results")
    given = parser.parse_args(words)
    for name, value in (FULL if given.full else SMALL).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.step_epochs < 6 or given.step_epochs % 6:
        raise UserError(f"--step_epochs {given.step_epochs}: expected a multiple of 6")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    return given


class Results:
    """What is done of one output, in its JSON file; several processes may share it."""

    def __init__(self, given: argparse.Namespace, settings: dict[str, Any], command: str):
        self.given, self.settings, self.command = given, settings, command
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        self.folder = RUNS / f"{given.output}-{digest}"
        known = self.read()
        for part, values in settings.items():
            old = known.get("settings", {}).get(part, values)
            differing = [
                f"{k} {old.get(k)}, now {values[k]}" for k in values if old.get(k) != values[k]
            ]
            if differing:
                raise UserError(
                    f"results/{given.output}.json holds other settings ({', '.join(differing)}): "
                    "give the same, or another --output"
                )

    def read(self) -> dict[str, Any]:
        file = RESULTS / f"{self.given.output}.json"
        found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return found

    def has(self, part: str, name: str) -> bool:
        return name in self.read().get(part, {})

    def add(self, part: str, name: str, result: dict[str, Any]) -> None:
        with locked(self.folder / "results.lock", wait=True):
            known = self.read()
            found = {each: known.get(each, {}) for each in ("runs", "step", "bookkeeping")}
            found[part] = {**found[part], name: result}
            commands = known.get("command", self.command).split("; ")
            runs = found["runs"]
            save(
                self.given.output,
                "; ".join(dict.fromkeys([*commands, self.command])),
                sorted({run["seed"] for run in runs.values()} or {0}),
                {
                    "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.get_device_name() if self.given.device == "cuda" else None,
                    "settings": self.settings,
                    "accuracy": compare(runs),
                    **found,
                },
            )


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return accuracy by bits and method, LTS's difference to plain training, and its savings."""
    values: dict[tuple[int, str], dict[int, float]] = {}
    saved: dict[int, list[dict[str, float]]] = {}
    for run in runs.values():
        values.setdefault((run["bits"], run["method"]), {})[run["seed"]] = run["accuracy"]
        if run["method"] == "lts":
            saved.setdefault(run["bits"], []).append(run["saved"])
    found: dict[str, Any] = {}
    for (bits, method), by_seed in sorted(values.items()):
        found.setdefault(str(bits), {})[method] = spread(by_seed)
    for bits, counts in saved.items():
        entry = found[str(bits)]["lts"]
        entry["minus"] = difference(values[bits, "lts"], values.get((bits, "qat"), {}))
        entry["saved"] = {
            key: round(sum(count[key] for count in counts) / len(counts), 6) for key in counts[0]
        }
    return found


def accuracy(given: argparse.Namespace, settings: Settings, results: Results, clock: Clock) -> bool:
    """Train what is missing; return whether all of it is done."""
    data = open_data(settings)
    grid = []
    for seed in given.seeds:
        grid.append(Run(seed))
        grid += [Run(seed, method, bits) for bits in given.bits for method in METHODS]
    for run in grid:
        if results.has("runs", run.name):
            continue
        with locked(results.folder / f"{run.name}.lock") as mine:
            if not mine or results.has("runs", run.name):
                continue
            result = train(run, settings, data, results.folder, clock)
            if result is None:
                return False
            results.add("runs", run.name, result)
            (results.folder / f"{run.name}.pt").unlink(missing_ok=True)
            print(f"{run.name}: accuracy {100 * result['accuracy']:.2f} %", flush=True)
    return all(results.has("runs", run.name) for run in grid)


def step(given: argparse.Namespace, settings: Settings, results: Results, clock: Clock) -> bool:
    """Train ResNet-18 to 2 bits, and time its steps at three moments; return whether it is done."""
    folder = results.folder / "step"
    data = open_data(settings)
    run = Run(0, "lts", 2)
    moments = {share: settings.epochs * (4 + i) // 6 for i, share in enumerate(SHARES)}
    if all(results.has("step", share) for share in SHARES):
        return True
    with locked(folder / "step.lock") as mine:
        if not mine:
            return False
        for each in (Run(0), run):
            if not (folder / f"{each.name}-done.pt").is_file():
                keep = () if each.method == "float" else tuple(moments.values())
                done = train(each, settings, data, folder, clock, keep, test=False)
                if done is None:
                    return False
                torch.save({}, folder / f"{each.name}-done.pt")
        for share, epoch in moments.items() if "step" in given.parts else ():
            if results.has("step", share):
                continue
            training = Training(run, settings, data, folder)
            training.load(folder / f"{run.name}-epoch{epoch}.pt")
            result = time_steps(training, given)
            results.add("step", share, result)
            print(f"{share} of the run: {100 * result['share']:.1f} % of a step saved", flush=True)
    return True


def time_steps(training: Training, given: argparse.Namespace) -> dict[str, Any]:
    method = training.method
    assert method is not None
    image, label = one_batch(training.data, given.timed_batch_size, training.settings.device)
    training.model.train()
    measured = method.measure(
        lambda model: nn.functional.cross_entropy(model(image), label), rounds=given.rounds
    )
    return {
        **asdict(measured),
        "frozen": method.metrics()["frozen"],
        "left_out": method.metrics()["left_out"],
        "batch_size": given.timed_batch_size,
    }


def bookkeeping(given: argparse.Namespace, settings: Settings, results: Results) -> None:
    """Time a step of LTS with freezing under way and nothing left out, beside one without."""
    if results.has("bookkeeping", settings.model):
        return
    data = open_data(settings)
    image, label = one_batch(data, 128, settings.device)
    model = build(settings, data, 0)
    steps = {}
    for name, threshold in (("qat", 0.0), ("lts", "linear")):
        twin = build(settings, data, 0)
        twin.load_state_dict(model.state_dict())
        method = LTS(bits=2, threshold=threshold, save_backward=False, warmup=1, first_last=8)
        # The first epoch is one step: all timed steps are in the time of freezing.
        method.attach(twin, total_steps=10_000, steps_per_epoch=[1, 9_999])
        steps[name] = step_of(twin, method, image, label)
    times = interleave(steps, max(10, 2 * given.rounds), warm_up=3)
    result = {
        "times": {name: summary(values) for name, values in times.items()},
        "overhead": paired_ratio(times["lts"], times["qat"]),
    }
    results.add("bookkeeping", settings.model, result)
    print(f"bookkeeping: {100 * (result['overhead']['median'] - 1):+.2f} % of a step", flush=True)


def step_of(model: nn.Module, method: LTS, image: torch.Tensor, label: torch.Tensor) -> Any:
    optimizer = torch.optim.SGD(
        method.parameters_for(model), lr=1e-3, momentum=0.9, weight_decay=1e-4
    )

    def one() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        optimizer.step()
        method.step()
        if image.is_cuda:
            torch.cuda.synchronize()

    return one


def one_batch(data: ImageData, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch = next(iter(data.train_loader(batch_size=size, seed=0)))
    image = data.normalize(batch["image"].to(device))
    return image.contiguous(memory_format=torch.channels_last), batch["label"].to(device)


def open_data(settings: Settings) -> ImageData:
    options: dict[str, object] = {"name": settings.data}
    return create({**options, "limit": settings.images} if settings.images else options)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    clock = Clock(given.minutes)
    if given.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    common = {name: getattr(given, name) for name in Settings.__dataclass_fields__}
    small = Settings(**common)
    large = replace(
        small,
        images=given.step_images,
        model="cifar_resnet18",
        start=None,
        float_epochs=given.step_float_epochs,
        epochs=given.step_epochs,
        batch_size=given.step_batch_size,
    )
    described = {"accuracy": small.to_dict(), "step": large.to_dict()}
    results = Results(given, described, command_of(words))
    done = True
    if "bookkeeping" in given.parts:
        bookkeeping(given, small, results)
    if {"step", "checkpoints"} & set(given.parts):
        done = step(given, large, results, clock) and done
    if "accuracy" in given.parts:
        done = accuracy(given, small, results, clock) and done
    print("all done" if done else "not all done: repeat the command to go on")
    return 0


def command_of(words: Sequence[str]) -> str:
    """Return the command without --minutes, which changes nothing in the result."""
    kept = list(words)
    if "--minutes" in kept:
        at = kept.index("--minutes")
        del kept[at : at + 2]
    return shlex.join(["python", "benchmarks/lts.py", *kept])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
