"""The papers' full recipes on a GPU: horse2zebra, summer2winter, edges2shoes and cityscapes.

    python benchmarks/gan_full.py --data datasets                          # all of it: GPU-weeks
    python benchmarks/gan_full.py --data datasets --recipes horse2zebra --variants dcd crd
    python benchmarks/gan_full.py --data datasets --iterations 20          # a trial of all parts
    python benchmarks/gan_full.py --data datasets --gan.perceptual vgg16.pth --gan.extractor pt.pth

The full runs were not done here: there were neither the data sets nor the hours. Only the first
iterations of each recipe are tested, on made-up images. What this script prints is therefore
nobody's measurement until somebody runs it.

Teachers of 64 and students of 16 filters are trained by the shipped recipes, each with one variant
of the student's losses: none (the plain student: discriminator and L1 distance), omgd, dcd, crd and
dcd+crd. Each variant trains its own teacher, with the same seed. --data holds a folder for each
recipe, of its name: unpaired ones with trainA, trainB, testA and testB, pairs with train and test.
VGG16's and Inception's weights are downloaded, or given by path. Words such as --train.batch_size 2
override the recipe.

Runs lie in runs/<output>/<recipe>-<variant>-seed<seed>; a command that was killed goes on where it
was when it is repeated. Figures go to results/<output>.json: FID and KID by the extractor that is
named beside them, of the last student.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tenfold
from paired import difference, spread
from resumable import Results, Runs, command_of, locked
from tenfold.errors import UserError
from tenfold.tasks.recipe import load_recipe, parse_overrides
from tenfold.tasks.translation_run import TranslationRun

RUNS = Path("runs")
RECIPES = ("horse2zebra", "summer2winter", "edges2shoes", "cityscapes")
VARIANTS = ("none", "omgd", "dcd", "crd", "dcd+crd")
# OMGD's weights of channel means. Its authors' one for cityscapes isn't known to us: that of pairs.
CHANNEL = {"horse2zebra": 500.0, "summer2winter": 100.0, "edges2shoes": 100.0, "cityscapes": 100.0}
FIGURES = ("fid", "kid", "l1", "ssim")


def arguments(words: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Read the command line; what has a dot in its name overrides the recipes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with a folder for each recipe")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[233])
    parser.add_argument("--iterations", type=int, help="a trial: one epoch of so many batches")
    parser.add_argument("--output", default="gan_full", help="name of a file in benchmarks/results")
    given, rest = parser.parse_known_args(words)
    return given, parse_overrides(rest)


def overrides_of(
    recipe: str, variant: str, seed: int, data: str, iterations: int | None, more: dict[str, Any]
) -> dict[str, Any]:
    """Return what makes a shipped recipe the one of a variant; `more` wins."""
    shipped = load_recipe(recipe)
    sections = {"omgd": {"channel": CHANNEL[recipe]}, **shipped.methods}
    keys = [] if variant == "none" else variant.split("+")
    found: dict[str, Any] = {
        "data.path": str(Path(data) / recipe),
        "methods": {key: sections[key] for key in keys},
        "seed": seed,
    }
    if variant == "none":
        found |= {"gan.style": 0.0, "gan.feature": 0.0}
    elif "crd" not in keys:  # what pairs have twice of them in the recipe is CRD's
        found |= {"gan.style": 1e4, "gan.feature": 10.0}
    if iterations is not None:
        batch = more.get("train.batch_size", shipped.train.batch_size)
        found |= {"data.limit": iterations * batch, "train.epochs": 1, "gan.decay_epochs": 0}
        found |= {"gan.round_epochs": 1, "gan.student_epochs": 1, "gan.evaluate_every": 1}
    return found | more


def compare(runs: Runs) -> dict[str, Any]:
    """Return mean figures by recipe and variant, and their differences to the plain student."""
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        for variant in VARIANTS:
            for figure in FIGURES:
                values, plain = (
                    {
                        run["seed"]: run["figures"][figure]
                        for run in runs.values()
                        if (run["recipe"], run["variant"]) == (recipe, one)
                        and figure in run["figures"]
                    }
                    for one in (variant, "none")
                )
                if not values:
                    continue
                entry = spread(values)
                if variant != "none":
                    entry["minus_plain"] = difference(values, plain)
                found.setdefault(recipe, {}).setdefault(variant, {})[figure] = entry
    return {"figures": found}


def result_of(
    run: TranslationRun, recipe: str, variant: str, seed: int, overrides: dict[str, Any]
) -> dict[str, Any]:
    evaluation, distances = run.evaluation, run.evaluation.distances
    named = None if distances is None else f"{distances.extractor} {distances.extractor_hash[:12]}"
    return {
        "seed": seed,
        "recipe": recipe,
        "variant": variant,
        "figures": evaluation.figures(prefix=""),
        "test_images": evaluation.images,
        "reference_images": None if distances is None else distances.reference_images,
        "extractor": named,
        "overrides": {key: value for key, value in overrides.items() if key != "data.path"},
    }


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given, more = arguments(words)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is not None:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    folder = RUNS / given.output
    settings = {"iterations": given.iterations, "overrides": more}
    command = command_of("gan_full", words)
    results = Results(given.output, settings, command, folder, compare, gpu)
    for seed in given.seeds:
        for recipe in given.recipes:
            for variant in given.variants:
                name = f"{recipe}-{variant}-seed{seed}"
                with locked(folder / f"{name}.lock") as mine:
                    if not mine or name in results.runs:
                        continue
                    overrides = overrides_of(
                        recipe, variant, seed, given.data, given.iterations, more
                    )
                    path = folder / name
                    run = tenfold.train(
                        recipe,
                        run_dir=path,
                        resume=(path / "recipe.yaml").is_file(),
                        overrides=overrides,
                        command=command,
                    )
                    assert isinstance(run, TranslationRun)
                    results.add(name, result_of(run, recipe, variant, seed, overrides))
                    print(f"{name}: {run.evaluation}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
