"""What SMMix costs and brings: a step's time, mixing itself, accuracy beside Mixup and CutMix.

    python benchmarks/smmix.py --parts time mixing      # ten quiet minutes
    python benchmarks/smmix.py --parts accuracy         # an hour on one core
    python benchmarks/smmix.py --parts accuracy --minutes 9   # stop cleanly; repeat to go on
    python benchmarks/smmix.py --parts accuracy --seeds 0 --methods cutmix smmix   # some of it
    python benchmarks/smmix.py --full --minutes 9       # deit_tiny at 224, 300 epochs, on a GPU

Its parts:

- time: whole training steps, in turn: nothing mixed, timm's Mixup and CutMix, a step of SMMix's
  that mixes by attention, and one that mixes by Mixup. Half of the steps are of either kind.
- mixing: windows and pasting of a batch of 64 images of 224 pixels with 14 x 14 tokens, for all
  sides: this package's, by unfold and fold, and by a loop over images. All give the same images.
- accuracy: a small ViT on 50 classes of 64-pixel photos, trained with nothing mixed, with Mixup and
  CutMix as DeiT is, and with SMMix in CutMix's place; equal epochs, paired by seed.

Times go to results/<output>.json, accuracies to results/<output>_accuracy.json, runs in progress to
runs/<output>-<settings>/. The same command may be started several times at once, with
OMP_NUM_THREADS=1 one process a core; each takes runs that no other one has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import RESULTS, interleave, paired_ratio, save, summary
from paired import difference, spread
from resumable import Results, Runs, command_of, locked
from smmix_training import METHODS, Run, Settings, cutmix_loss, open_data, plain_loss, train
from tenfold.errors import UserError
from tenfold.methods import SMMix, extreme_windows, paste_windows
from training import Clock

RUNS = Path("runs")
PARTS = ("time", "mixing", "accuracy")
SMALL: dict[str, Any] = {
    "data": "npz:../shared/data/tinyimagenet50",
    "images": 4000,
    "size": 0,
    "model": "timm/vit_tiny_patch16_224",
    "patch": 8,
    "dim": 96,
    "depth": 4,
    "heads": 3,
    "drop_path": 0.0,
    "epochs": 14,
    "warmup_epochs": 1,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "augment": "flip_crop",
    "precision": "fp32",
    "device": "cpu",
    "seeds": [0, 1, 2],
    "output": "smmix",
}
FULL: dict[str, Any] = {
    **SMALL,
    "images": 0,
    "size": 224,
    "model": "timm/deit_tiny_patch16_224",
    "patch": 0,
    "dim": 0,
    "depth": 0,
    "heads": 0,
    "drop_path": 0.1,
    "epochs": 300,
    "warmup_epochs": 5,
    "batch_size": 256,
    "lr": 5e-4,
    "augment": "randaugment",
    "precision": "bf16",
    "device": "cuda",
    "output": "smmix_gpu",
}
# Of the part time: name, timm's network, its options, batch.
TIMED: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("deit_tiny, 224 px, batch 16", "deit_tiny_patch16_224", {}, 16),
    (
        "small ViT, 64 px, batch 64",
        "vit_tiny_patch16_224",
        {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
        64,
    ),
)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what it leaves open is the preset's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="deit_tiny at 224 pixels, on a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+")
    for name, value in SMALL.items():
        if name not in ("seeds", "output"):
            parser.add_argument(f"--{name}", type=type(value))
    parser.add_argument("--rounds", type=int, default=15, help="of timed steps")
    parser.add_argument("--networks", nargs="+", help="of the part time, by a part of their names")
    parser.add_argument("--minutes", type=float, help="start no epoch that would end later")
    parser.add_argument("--output", help="name of the files in benchmarks/results")
    given = parser.parse_args(words)
    for name, value in (FULL if given.full else SMALL).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.parts = given.parts or (["accuracy"] if given.full else list(PARTS))
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    return given


# -- a step's time ---------------------------------------------------------------------------------


def time_steps(name: str, options: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    """Time whole training steps of a network, in turn, each kind on a copy of its own."""
    import timm

    size = options.get("img_size", 224)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(0, 1000, (batch,), generator=generator)
    steps = {}
    for kind in ("plain", "cutmix", "mixup step", "smmix step"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=1000, drop_path_rate=0.1, **options).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        mixer = None
        if kind.endswith("step"):
            mixer = SMMix(switch_prob=1.0 if kind == "smmix step" else 0.0)
            mixer.attach(model, total_steps=10_000)
            loss_of: Any = mixer.loss
        else:
            loss_of = plain_loss if kind == "plain" else cutmix_loss(1000)
        steps[kind] = _step(model, optimizer, loss_of, mixer, images, labels)
    np.random.seed(0)
    times = interleave(steps, rounds, warm_up=3)
    # What a step takes on average where the coin falls either way equally often.
    mean = [(a + b) / 2 for a, b in zip(times["smmix step"], times["mixup step"], strict=True)]
    ratios = {kind: paired_ratio(times[kind], times["cutmix"]) for kind in steps}
    return {
        "network": name,
        "batch": batch,
        "size": size,
        "times": {kind: summary(values) for kind, values in times.items()},
        "to_cutmix": {**ratios, "average": paired_ratio(mean, times["cutmix"])},
    }


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Any,
    mixer: SMMix | None,
    images: Tensor,
    labels: Tensor,
) -> Any:
    def one() -> None:
        optimizer.zero_grad()
        loss_of(model, images, labels).backward()
        optimizer.step()
        if mixer is not None:
            mixer.step()

    return one


# -- mixing ----------------------------------------------------------------------------------------


def by_pooling(images: Tensor, scores: Tensor, side: int, pixels: int) -> Tensor:
    """Mix as this package does."""
    target, source = extreme_windows(scores, side)
    return paste_windows(images, target, source, side, pixels)


def by_unfolding(images: Tensor, scores: Tensor, side: int, pixels: int) -> Tensor:
    """Mix the textbook way: windows and patches by unfold, patches exchanged, images by fold."""
    height, tokens = images.shape[2], scores.shape[-1]
    windows = nn.functional.unfold(scores[:, None], side)  # (B, side * side, windows)
    sums = windows.sum(dim=1)
    numbers = torch.arange(tokens * tokens, dtype=torch.float32).reshape(1, 1, tokens, tokens)
    members = nn.functional.unfold(numbers, side)[0].long().T  # (windows, side * side)
    least, most = members[sums.argmin(dim=1)], members[sums.argmax(dim=1)]
    patches = nn.functional.unfold(images, pixels, stride=pixels)  # (B, C * pixels^2, tokens^2)
    rows = patches.shape[1]
    taken = patches.gather(2, most[:, None].expand(-1, rows, -1)).flip(0)
    mixed = patches.scatter(2, least[:, None].expand(-1, rows, -1), taken)
    return nn.functional.fold(mixed, (height, height), pixels, stride=pixels)


def by_looping(images: Tensor, scores: Tensor, side: int, pixels: int) -> Tensor:
    """Mix image by image, each window found by sums over slices of a running sum."""
    mixed, windows = images.clone(), scores.shape[-1] - side + 1
    corners = []
    for image in scores:
        total = nn.functional.pad(image.cumsum(0).cumsum(1), (1, 0, 1, 0))
        sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side]
        sums = (sums + total[:-side, :-side]).flatten()
        corners.append((int(sums.argmin()), int(sums.argmax())))
    length = side * pixels
    for b, (least, _) in enumerate(corners):
        i, j = (pixels * at for at in divmod(least, windows))
        k, m = (pixels * at for at in divmod(corners[-1 - b][1], windows))
        other = images[len(images) - 1 - b]
        mixed[b, :, i : i + length, j : j + length] = other[:, k : k + length, m : m + length]
    return mixed


def time_mixing(batch: int, pixels: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Time windows and pasting for all sides; refuse results that differ."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, pixels * tokens, pixels * tokens, generator=generator)
    # Whole numbers: sums are exact in any order, so that all must find the same windows.
    scores = torch.randint(0, 2**12, (batch, tokens, tokens), generator=generator).float()
    forms = {"unfold": by_unfolding, "loop": by_looping, "tenfold": by_pooling}
    sides: dict[str, Any] = {}
    for side in SMMix().sides(tokens):
        expected = by_pooling(images, scores, side, pixels)
        for name, form in forms.items():
            if not torch.equal(form(images, scores, side, pixels), expected):
                raise UserError(f"side {side}: the form {name} gives other images")
        calls = {
            name: (lambda form=form, side=side: form(images, scores, side, pixels))
            for name, form in forms.items()
        }
        times = interleave(calls, rounds)
        sides[str(side)] = {
            "times": {name: summary(values) for name, values in times.items()},
            "faster_than": {
                name: paired_ratio(times[name], times["tenfold"]) for name in ("unfold", "loop")
            },
        }
    return {
        "batch": batch,
        "size": pixels * tokens,
        "tokens": tokens,
        "sides": sides,
        "faster_than": {
            name: round(
                statistics.geometric_mean(s["faster_than"][name]["median"] for s in sides.values()),
                3,
            )
            for name in ("unfold", "loop")
        },
    }


def add_times(output: str, command: str, found: dict[str, Any]) -> None:
    """Write the parts time and mixing, beside what the file holds of them."""
    file = RESULTS / f"{output}.json"
    known: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    kept = {part: known[part] for part in ("time", "mixing") if part in known}
    commands = known.get("command", command).split("; ")
    together = "; ".join(dict.fromkeys([*commands, command]))
    save(output, together, 0, {"threads": torch.get_num_threads(), **kept, **found})


# -- accuracy --------------------------------------------------------------------------------------


def compare(runs: Runs) -> dict[str, Any]:
    """Return each method's accuracy, its difference to the others, and its CPU time."""
    accuracy: dict[str, dict[int, float]] = {}
    seconds: dict[str, dict[int, float]] = {}
    for run in runs.values():
        accuracy.setdefault(run["method"], {})[run["seed"]] = run["accuracy"]
        seconds.setdefault(run["method"], {})[run["seed"]] = run["cpu_seconds"]
    found: dict[str, Any] = {}
    for method in METHODS:
        if method not in accuracy:
            continue
        versus = {
            other: difference(accuracy[method], accuracy[other])
            for other in METHODS
            if other in accuracy and other != method
        }
        found[method] = {
            **spread(accuracy[method]),
            "minus": {name: value for name, value in versus.items() if value is not None},
            "cpu_seconds": spread(seconds[method]),
        }
    return {"accuracy": found}


def accuracy(given: argparse.Namespace, words: Sequence[str]) -> bool:
    """Train what is missing, seed by seed; return whether all of it is done."""
    settings = Settings(**{name: getattr(given, name) for name in Settings.__dataclass_fields__})
    output = f"{given.output}_accuracy"
    digest = hashlib.sha256(json.dumps(settings.to_dict()).encode()).hexdigest()[:8]
    folder = RUNS / f"{output}-{digest}"
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    command = command_of("smmix", words)
    results = Results(output, settings.to_dict(), command, folder, compare, gpu)
    data, clock = open_data(settings), Clock(given.minutes)
    runs = [Run(seed, method) for seed in given.seeds for method in given.methods]
    for run in runs:
        with locked(folder / f"{run.name}.lock") as mine:
            if not mine or run.name in results.runs:
                continue
            result = train(run, settings, data, folder, clock)
            if result is None:
                return False
            results.add(run.name, result)
            (folder / f"{run.name}.pt").unlink(missing_ok=True)
            print(f"{run.name}: accuracy {100 * result['accuracy']:.2f} %", flush=True)
    return all(run.name in results.runs for run in runs)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    if given.device == "cuda":
        torch.set_float32_matmul_precision("high")
    command = command_of("smmix", words)
    if "time" in given.parts:
        found = {}
        for title, name, options, batch in TIMED:
            if given.networks is None or any(part in title for part in given.networks):
                found[title] = time_steps(name, options, batch, given.rounds)
                ratio = found[title]["to_cutmix"]
                print(
                    f"{title}: {ratio['average']['median']:.2f} of Mixup and CutMix on average, "
                    f"{ratio['smmix step']['median']:.2f} where it mixes by attention",
                    flush=True,
                )
        add_times(given.output, command, {"time": found})
    if "mixing" in given.parts:
        mixing = time_mixing(64, 16, 14, given.rounds)
        print(f"mixing: {mixing['faster_than']} times as fast", flush=True)
        add_times(given.output, command, {"mixing": mixing})
    done = "accuracy" not in given.parts or accuracy(given, words)
    print("all done" if done else "not all done: repeat the command to go on")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
