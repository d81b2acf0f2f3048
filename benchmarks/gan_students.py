"""Five students of one online teacher, side by side: plain, OMGD, DCD, CRD, DCD with CRD.

    python benchmarks/gan_students.py                              # all, some 45 minutes twice
    python benchmarks/gan_students.py --sets edges2clothes         # one of the two sets
    python benchmarks/gan_students.py --minutes 8                  # stop cleanly; repeat to go on

Two small sets are read from archives below --data: edges2clothes, pairs of edge maps and photos,
and lemon2orange without pairs. A teacher of reduced width is trained as pix2pix and CycleGAN are,
and five students of half its width imitate it as they go: after every step of the teacher (pairs),
or in rounds in which it stands still. A student's step changes neither teacher nor discriminator,
so that one teacher serves all five exactly. They share initial weights, images and their order.

What they learn from: the plain student from the discriminator and the L1 distance, to the target
(weight 100) or, without pairs, to the teacher's image (10); all others from the discriminator, from
style and feature losses in the space of --extractor, and from their methods' losses.

Figures are of held-out images alone, and of the last weights: nothing is chosen by them. FID and
KID are taken in the space of --extractor too, a run of `tenfold train stagenet-extractor`; they
can't be compared with published ones. Few images: FID is biased upwards, KID is not.

Figures go to results/<output>.json, runs in progress to runs/<output>-<settings>/, with pictures
of each run; those of the first seed go to results/ where the set's licence allows it. The same
command may be started several times at once, with OMP_NUM_THREADS=1 one process a core; each takes
runs that no other one has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common import RESULTS
from gan_students_training import SETS, STUDENTS, Run, Settings, SideBySide
from paired import difference, spread
from resumable import Results, Runs, command_of, locked
from tenfold.data import TranslationData, create_translation
from tenfold.errors import UserError
from tenfold.tasks.extractors import open_extractor
from tenfold.tasks.translation_evaluation import Reference, TranslationEvaluation
from training import Clock

RUNS = Path("runs")
SMALL: dict[str, Any] = {
    "size": 128,
    "limit": 0,
    "teacher": 16,
    "student": 8,
    "ndf": 32,
    "batch_size": 1,
    "lr": 2e-4,
    "style": 1e4,
    "feature": 10.0,
    "pairs_epochs": 3,
    "unpaired_epochs": 3,
    "round_epochs": 1,
    "student_epochs": 1,
}
FIGURES = ("kid", "fid", "l1", "ssim")
TITLE = 18  # pixels above a grid


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="../shared/data", help="folder of i2i_SET/SET.tar")
    parser.add_argument("--extractor", default="runs/stagenet-extractor", help="a run of stagenet")
    for name, value in SMALL.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--pictures", type=int, default=6, help="held-out images in a grid")
    parser.add_argument("--minutes", type=float, help="start no epoch that would end later")
    parser.add_argument("--output", default="gan_students")
    return parser.parse_args(words)


def open_set(name: str, settings: Settings, archives: Path, folder: Path) -> TranslationData:
    """Unpack a set's archive into a folder, and open it."""
    archive = archives / f"i2i_{name}" / f"{name}.tar"
    if not archive.is_file():
        raise UserError(f"{archive} does not exist: give the folder of i2i_{name} by --data")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    paired, _ = SETS[name]
    options: dict[str, Any] = {
        "name": "pairs" if paired else "unpaired",
        "path": str(folder / name),
        "size": [settings.size, settings.size],
    }
    if not paired:
        options["reference"] = "test"  # held-out images alone, on both sides
    if settings.limit:
        options["limit"] = settings.limit
    return create_translation(options)


def figures_of(found: TranslationEvaluation) -> dict[str, float]:
    given = {"l1": found.l1, "ssim": found.ssim}
    if found.distances is not None:
        given |= {"kid": found.distances.kid, "fid": found.distances.fid}
    return {name: value for name, value in given.items() if value is not None}


def compare(runs: Runs) -> dict[str, Any]:
    """Return mean figures by set and network, and each student's difference to the plain one."""
    found: dict[str, Any] = {}
    for name in SETS:
        mine = [run for run in runs.values() if run["set"] == name]
        entries: dict[str, Any] = {}
        for network in ("input", "teacher", *STUDENTS):
            for figure in FIGURES:
                values = {
                    run["seed"]: run["figures"][network][figure]
                    for run in mine
                    if figure in run["figures"][network]
                }
                plain = {
                    run["seed"]: run["figures"]["plain"][figure]
                    for run in mine
                    if figure in run["figures"]["plain"]
                }
                if not values:
                    continue
                entry = spread(values)
                if network in STUDENTS[1:]:
                    entry["minus_plain"] = difference(values, plain)
                entries.setdefault(network, {})[figure] = entry
        if entries:
            found[name] = entries
    return {"figures": found}


def write_grid(titles: list[str], grid: Tensor, target: Path) -> None:
    """Write a grid of pictures with a title above each column, as JPEG."""
    from PIL import Image, ImageDraw, ImageFont

    _, height, width = grid.shape
    picture = Image.new("RGB", (width, height + TITLE), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (0, TITLE))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for column, title in enumerate(titles):
        pen.text((column * width // len(titles) + 4, 1), title, "black", font)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target, "JPEG", quality=85)
    print(f"drew {target.name}")


def result_of(
    run: Run, sides: SideBySide, found: dict[str, TranslationEvaluation], data: TranslationData
) -> dict[str, Any]:
    distances = found["plain"].distances
    assert distances is not None
    steps = -(-data.train_size // sides.settings.batch_size)
    passes = [phase.learns for phase in sides.phases]
    return {
        "seed": run.seed,
        "set": run.set,
        "train_images": data.train_size,
        "test_images": found["plain"].images,
        "reference_images": distances.reference_images,
        "dimensions": distances.dimensions,
        "extractor": f"{distances.extractor} {distances.extractor_hash[:12]}",
        "steps": {
            "teacher": steps * sum(learns != "student" for learns in passes),
            "students": steps * sum(learns != "teacher" for learns in passes),
        },
        "figures": {name: figures_of(each) for name, each in found.items()},
        "losses": {name: student.losses for name, student in sides.students.items()},
        "weights": {
            name: {loss: weight for loss, weight in student.experiment.weights.items() if weight}
            for name, student in sides.students.items()
        },
        "cpu_seconds": round(sides.cpu_seconds, 1),
    }


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    extractor = open_extractor(given.extractor)
    settings = Settings(
        **{name: getattr(given, name) for name in SMALL}, extractor=extractor.sha256[:12]
    )
    digest = hashlib.sha256(json.dumps(settings.to_dict()).encode()).hexdigest()[:8]
    folder, clock = RUNS / f"{given.output}-{digest}", Clock(given.minutes)
    command = command_of("gan_students", words)
    results = Results(given.output, settings.to_dict(), command, folder, compare)
    wanted = [Run(seed, name) for seed in given.seeds for name in given.sets]
    for run in wanted:
        with locked(folder / f"{run.name}.lock") as mine, tempfile.TemporaryDirectory() as unpacked:
            if not mine or run.name in results.runs:
                continue
            data = open_set(run.set, settings, Path(given.data), Path(unpacked))
            file = folder / f"{run.name}.pt"
            sides = SideBySide(run, settings, data, given.extractor, file)
            if not sides.train(clock):
                break
            found = sides.evaluate(Reference(extractor, data))
            grid = sides.pictures(given.pictures)
            write_grid(*grid, folder / f"{run.name}.jpg")
            if run.seed == min(given.seeds) and SETS[run.set][1]:
                write_grid(*grid, RESULTS / f"{given.output}_{run.set}.jpg")
            results.add(run.name, result_of(run, sides, found, data))
            file.unlink(missing_ok=True)
            for name, each in found.items():
                print(f"{run.name} {name}: {figures_of(each)}", flush=True)
    done = all(run.name in results.runs for run in wanted)
    print("all done" if done else "not all done: repeat the command to go on")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
