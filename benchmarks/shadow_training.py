"""Removers of shadows trained side by side, and what needs no training.

    python benchmarks/shadow_training.py                       # all, about 25 minutes twice
    python benchmarks/shadow_training.py --arms pairs unet     # some of them
    python benchmarks/shadow_training.py --minutes 30          # start no run later; repeat to go on

On triplets of real scenes (--data, in ISTD's layout; 32 to train on and 14 held out), all with the
same steps, crops and head start (`guess: ring`), from the same recipe but for what the name says:

    pairs       LAB-Net of width 8 on photos with and without shadow
    hqss        the same, on pseudo shadows that HQSS paints; no photo without shadow is read
    rendered    the same, on shadows rendered into other photos (`rendered_shadows`); neither is
                any real shadow read
    unet        an RGB U-Net of at least ten times the parameters, on pairs
    wide        LAB-Net of width 16 on pairs, the teacher of the next two
    distilled   LAB-Net of width 8, distilled from it
    sparse      LAB-Net of width 16 at 1:4 (LBC), distilled from it

Figures are of the held-out scenes at 256 x 256 alone, and of the last weights: nothing is chosen by
them. Results go to results/<output>.json, runs to runs/<output>/, with pictures of the first seed
(whose photos' terms aren't known, so that they stay there). The same command may be started twice
at once, with OMP_NUM_THREADS=1; each takes runs that the other one hasn't.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tenfold
from common import save
from paired import difference, spread
from resumable import Results, Runs, command_of, locked
from tenfold.data import create_shadows
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.measure.shadow_baselines import ring_gain, untouched
from tenfold.measure.shadow_errors import ShadowErrors
from tenfold.nn import models
from tenfold.tasks.folder import RunFolder
from tenfold.tasks.removal_evaluation import baseline_errors, floats, measured, removed
from tenfold.tasks.shadow_verbs import remover_of
from training import Clock

RUNS = Path("runs")
ARMS = ("pairs", "hqss", "rendered", "unet", "wide", "distilled", "sparse")
SMALL: dict[str, Any] = {
    "size": 96, "side": 128, "attention": 64, "batch_size": 4, "epochs": 16, "lr": 5e-4,
    "ema": 0.98, "outside": 0.1, "unet": 16, "painter_epochs": 6, "light": 1.0,
}  # fmt: skip
LAB, RGB = "labnet", "shadow_unet"


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="../shared/data/shadow_uiuc", help="in ISTD's layout")
    for name, value in SMALL.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--minutes", type=float, help="start no run later")
    parser.add_argument("--latency", action="store_true", help="time the networks, train nothing")
    parser.add_argument("--output", default="shadow_training")
    return parser.parse_args(words)


def recipe_of(arm: str, seed: int, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the recipe of one run."""
    data: dict[str, Any] = {
        "name": "triplets", "path": given.data, "size": given.size,
        "short_side": [given.size, given.side],
    }  # fmt: skip
    training = {
        "guess": "ring", "start": "identity", "gradient": 0, "outside": given.outside,
        "side": given.side,
    }  # fmt: skip
    width = 16 if arm in ("wide", "sparse") else 8
    model: dict[str, Any] = {"name": LAB, "width": width, "attention_size": given.attention}
    methods: dict[str, Any] = {"labnet": training}
    augment = "relight"
    if arm == "unet":
        model = {"name": RGB, "width": given.unet}
    if arm == "hqss":
        data["targets"] = False
        augment = "auto"
        methods["hqss"] = {"synthesizer": str(folder / f"painter-{seed}")}
    if arm == "rendered":
        data = {"name": "rendered_shadows", "size": given.size, "samples": 32}
        augment = "auto"
    if arm in ("distilled", "sparse"):
        training["teacher"] = str(folder / f"wide-{seed}")
    if arm == "sparse":
        methods["lbc"] = {
            "n": 1, "m": 4,
            "exclude": ["block1.x.*", "block2.x.*", "block7.out.conv", "block8.out.conv",
                        "*.attention.*"],
        }  # fmt: skip
    return {
        "task": "shadow_removal",
        "data": data,
        "model": model,
        "methods": methods,
        "train": {
            "epochs": given.epochs, "batch_size": given.batch_size, "optimizer": "adam",
            "lr": given.lr, "clip_norm": 0.3, "augment": augment, "ema": given.ema,
        },
        "trainer": {"check_val_every_n_epoch": given.epochs, "enable_progress_bar": False},
        "seed": seed,
        "name": f"{arm}-{seed}",
    }  # fmt: skip


def painter_of(seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of HQSS's first stage, which reads shadow photos and masks alone."""
    return {
        "task": "shadow_synthesis",
        "data": {
            "name": "triplets", "path": given.data, "size": 64, "short_side": [64, 96],
            "targets": False,
        },
        "model": {
            "name": "hqss", "width": 32, "blocks": 3, "discriminator_width": 16,
            "discriminator_layers": 2,
        },
        "methods": {"hqss": {"light": given.light}},
        "train": {"epochs": given.painter_epochs, "batch_size": 1, "lr": 1e-3},
        "trainer": {"enable_progress_bar": False},
        "seed": seed,
        "name": f"painter-{seed}",
    }  # fmt: skip


def train(recipe: Mapping[str, Any], folder: Path) -> Path:
    """Train a recipe, or go on with it, and return its folder."""
    path = folder / str(recipe["name"])
    run = tenfold.train(recipe, run_dir=path, resume=path.is_dir())
    assert run is not None
    return path


def figures_of(table: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    return {
        f"{region}_{name}": float(value)
        for region, row in table.items()
        for name, value in row.items()
        if value is not None
    }


def scenes_of(errors: ShadowErrors) -> list[float]:
    """Return the LAB error in the shadow of each scene."""
    return [round(value, 3) for value in errors.per_image()[:, 0, 0].tolist()]


def result_of(path: Path, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Measure a finished run on the held-out scenes."""
    data = create_shadows({"name": "triplets", "path": given.data})
    found = artifact.read(path / "model")
    network = found.model().eval()
    evaluation, each = measured(remover_of(network, found.preprocessing or {}), data)
    assert evaluation.result is not None
    assert each is not None
    example = (torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256))
    cost = count_cost(network, example)
    return {
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "nonzero_parameters": int(sum((p != 0).sum() for p in network.parameters())),
        "gmacs": round(cost.macs / 1e9, 3),
        "figures": figures_of(evaluation.result),
        "scenes": scenes_of(each),
        "seconds": RunFolder(path).facts()["seconds"],
    }


def compare(runs: Runs) -> dict[str, Any]:
    """Return mean figures by arm, and the difference of each to `pairs`, seed by seed."""
    found: dict[str, Any] = {}
    paired = {run["seed"]: run for name, run in runs.items() if name.startswith("pairs-")}
    for arm in ARMS:
        mine = {run["seed"]: run for name, run in runs.items() if name.startswith(f"{arm}-")}
        if not mine:
            continue
        found[arm] = {}
        for figure in next(iter(mine.values()))["figures"]:
            values = {seed: run["figures"][figure] for seed, run in mine.items()}
            entry = spread(values)
            if arm != "pairs":
                to = {seed: run["figures"][figure] for seed, run in paired.items()}
                entry["minus_pairs"] = difference(values, to)
            found[arm][figure] = entry
        scenes = [run["scenes"] for run in mine.values()]
        found[arm]["scenes"] = [
            round(statistics.mean(values), 3) for values in zip(*scenes, strict=True)
        ]
    return {"figures": found}


def untrained(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the photos as they are, and what needs no training of a network."""
    data = create_shadows({"name": "triplets", "path": given.data})
    as_is, _ = measured(untouched, data)
    assert as_is.result is not None
    found = {"input": as_is.result, **baseline_errors(data)}
    _, each = measured(ring_gain, data)
    assert each is not None
    return {
        "scene_names": [data.name_of(number) for number in range(data.test_size)],
        "scenes_of_ring_gain": scenes_of(each),
        "figures": {name: figures_of(table) for name, table in found.items()},
    }


def write_pictures(folder: Path, given: argparse.Namespace, target: Path, arms: list[str]) -> None:
    """Write a row for each of some held-out scenes: input, mask, gain, networks, truth."""
    from PIL import Image

    seed = min(given.seeds)
    data = create_shadows({"name": "triplets", "path": given.data})
    removers = {}
    for arm in arms:
        found = artifact.read(folder / f"{arm}-{seed}" / "model")
        removers[arm] = remover_of(found.model().eval(), found.preprocessing or {})
    rows = []
    for number, batch in enumerate(data.test_loader(batch_size=1)):
        if number % 2:
            continue
        images, mask, truth = floats(batch)
        made = [removed(remover, images, mask) for remover in removers.values()]
        row = [images, mask.expand(-1, 3, -1, -1), ring_gain(images, mask), *made, truth]
        rows.append(torch.cat([each[0] for each in row], 2))
    grid = torch.cat(rows, 1).mul(255).round().to(torch.uint8)
    Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(target, "JPEG", quality=85)
    print(f"drew {target.name}: input, mask, ring-matched gain, {', '.join(arms)}, truth")


def time_networks(given: argparse.Namespace, words: Sequence[str]) -> None:
    """Time each arm's network on 256 x 256 in every engine, with parameters and MACs."""
    names = {
        "labnet-32": (LAB, {"width": 32, "attention_size": 256}),
        "unet": (RGB, {"width": given.unet}),
        "wide": (LAB, {"width": 16, "attention_size": given.attention}),
        "pairs": (LAB, {"width": 8, "attention_size": given.attention}),
    }
    torch.manual_seed(0)
    networks = {
        name: models.build(network, options=options)[0].eval()
        for name, (network, options) in names.items()
    }
    codes, mask = torch.rand(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
    mask[..., 64:192, 70:172] = 1  # 20 % of the area
    found = tenfold.bench(
        networks, (codes, mask), batch_sizes=(1,), seconds=6,
        runtimes=("pytorch", "onnxruntime", "openvino", "tenfold"),
    )  # fmt: skip
    save(
        f"{given.output}_latency",
        command_of("shadow_training", words),
        0,
        {"threads": torch.get_num_threads(), **found.to_dict()},
    )
    print("\n".join(found.summary))


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    if given.latency:
        time_networks(given, words)
        return 0
    settings = {name: getattr(given, name) for name in SMALL}
    folder, clock = RUNS / given.output, Clock(given.minutes)
    baselines = untrained(given)

    def summarize(runs: Runs) -> dict[str, Any]:
        return {"untrained": baselines, **compare(runs)}

    command = command_of("shadow_training", words)
    results = Results(given.output, settings, command, folder, summarize)
    wanted = [(arm, seed) for seed in given.seeds for arm in given.arms]
    for arm, seed in wanted:
        name = f"{arm}-{seed}"
        with locked(folder / f"{name}.lock") as mine:
            if not mine or name in results.runs:
                continue
            if not clock.allows_an_epoch():
                break
            if arm == "hqss":
                train(painter_of(seed, given), folder)
            if arm in ("distilled", "sparse") and f"wide-{seed}" not in results.runs:
                print(f"{name} waits for wide-{seed}: repeat the command")
                continue
            path = train(recipe_of(arm, seed, given, folder), folder)
            found = result_of(path, seed, given)
            results.add(name, found)
            print(f"{name}: {found['figures']}", flush=True)
    done = all(f"{arm}-{seed}" in results.runs for arm, seed in wanted)
    if done:
        shown = [arm for arm in ("hqss", "unet", "pairs") if arm in given.arms]
        write_pictures(folder, given, folder / "pictures.jpg", shown)
    print("all done" if done else "not all done: repeat the command to go on")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
