"""What an image folder costs before the first step: time and memory, with 200,000 files.

    python benchmarks/folder_startup.py [--files 200000] [--classes 1000]

Makes the folder below a temporary directory (the files are empty: starting reads names only) and
starts on it in a new process each time: without a kept listing, with one, and with torchvision's
`ImageFolder`, which keeps a Python string and a tuple for each file. The folder has just been made,
so the system has its entries in memory; a disk that has to be read first adds its own time to every
start that visits all the files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

SEED = 0  # nothing is drawn; the loader wants one
CLASSES_TO_WARM_UP = 2


def make_folder(root: Path, files: int, classes: int) -> None:
    """Make root/{train,val}/<class>/<name>.jpg, named like ImageNet's."""
    for split, count in (("train", files), ("val", classes)):
        for label in range(classes):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(label, count, classes):
                os.close(os.open(folder / f"n{label:08}_{number}.jpg", os.O_CREAT | os.O_WRONLY))


def start_tenfold(root: Path) -> object:
    """Do what a run does ahead of its first batch."""
    from tenfold.data import create

    data = create(f"imagefolder:{root}")
    loader = data.train_loader(batch_size=256, seed=SEED, workers=0)
    return data, loader, next(iter(loader.sampler))


def start_torchvision(root: Path) -> object:
    from torchvision.datasets import ImageFolder

    return ImageFolder(root / "train", allow_empty=True), ImageFolder(root / "val")


STARTS: dict[str, Callable[[Path], object]] = {
    "tenfold": start_tenfold,
    "torchvision": start_torchvision,
}


def resident() -> int:
    """Return this process's bytes in memory, without programs' files and what could be freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(kind: str, root: Path, answer: Any) -> None:
    before = resident()
    began, busy = time.perf_counter(), time.process_time()
    kept = STARTS[kind](root)
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    answer.send({"seconds": seconds, "cpu_seconds": cpu, "bytes": resident() - before})
    del kept


def in_new_process(kind: str, root: Path) -> dict[str, float]:
    """Start in a process of its own, which has this one's imports."""
    forked = multiprocessing.get_context("fork")
    receiver, sender = forked.Pipe(duplex=False)
    process = forked.Process(target=measure, args=(kind, root, sender))
    process.start()
    found: dict[str, float] = receiver.recv()
    process.join()
    return found


def summary(runs: list[dict[str, float]], files: int) -> dict[str, Any]:
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {
        "cpu_seconds": round(middle["cpu_seconds"], 4),
        "seconds": round(middle["seconds"], 4),
        "seconds_least": round(min(run["seconds"] for run in runs), 4),
        "bytes_per_file": round(middle["bytes"] / files, 1),
        "rounds": len(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"first": [], "second": [], "torchvision": []}
    with tempfile.TemporaryDirectory() as temporary:
        root, small, cache = (Path(temporary) / name for name in ("many", "few", "cache"))
        make_folder(root, options.files, options.classes)
        make_folder(small, CLASSES_TO_WARM_UP, CLASSES_TO_WARM_UP)
        os.environ["TENFOLD_DATA"] = str(cache)
        for start in STARTS.values():
            start(small)  # pays for the imports
        time.sleep(2.5)  # a listing of a folder that has only just changed isn't kept
        for _ in range(options.rounds):
            runs["torchvision"].append(in_new_process("torchvision", root))
            for listing in (cache / "listings").glob("*.npz"):
                listing.unlink()
            runs["first"].append(in_new_process("tenfold", root))
            runs["second"].append(in_new_process("tenfold", root))
        kept = sum(file.stat().st_size for file in (cache / "listings").iterdir())
    # val has one file a class, the rest is train.
    total = options.files + options.classes
    common.save(
        "folder_startup",
        f"python benchmarks/folder_startup.py --files {options.files} --classes {options.classes}",
        SEED,
        {
            "threads": 1,
            "files": total,
            "folders": 2 * options.classes,
            "listing_bytes_per_file": round(kept / total, 1),
            "starts": {name: summary(found, total) for name, found in runs.items()},
        },
    )


if __name__ == "__main__":
    main()
