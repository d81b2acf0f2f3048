"""Generators of images: how long one image takes in every engine, teacher beside student.

    python benchmarks/gan_infer.py                       # 256 px, batch 1: 10 minutes
    python benchmarks/gan_infer.py --seconds 20          # the same for longer
    python benchmarks/gan_infer.py --size 128 --output gan_infer_128

The ResNet-9 of CycleGAN (ngf 64), the mobile ResNet-9 of the same width, and students of ngf 16 and
8, each in PyTorch (both memory formats), torch.compile, ONNX Runtime, OpenVINO and as
`tenfold.optimize` makes it, all in turn in one process. A ratio compares the best engine on each
side, out of the box (without tenfold) and with it. Weights are random: they don't change the time.

The share of the limit is the network's multiply-adds over what this processor could do in the same
time: the most multiply-adds a second of one thread with all operands in registers, measured in the
same run, times the number of threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import save
from resumable import command_of
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.measure.cost import count_cost
from tenfold.measure.engines import RUNTIMES, OnnxFiles, check_runtimes, prepare
from tenfold.measure.timing import interleave, paired_ratio
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator

TEACHERS = ("resnet9_64", "mobile9_64")
STUDENTS = ("mobile9_16", "mobile9_8")
OWN = "tenfold"
PEAKS = 5  # measurements of the limit, before and after
MOST_DIFFERENT = 1e-4


def networks() -> dict[str, nn.Module]:
    """Return teachers and students with weights that leave no map near zero."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "resnet9_64": ResNetGenerator(64),
        "mobile9_64": MobileResNetGenerator(64),
        "mobile9_16": MobileResNetGenerator(16),
        "mobile9_8": MobileResNetGenerator(8),
    }
    for network in made.values():
        network.eval().requires_grad_(False)
    return made


def difference(output: object, expected: Tensor) -> float:
    """Return the largest absolute difference of an engine's image."""
    first = output[0] if isinstance(output, tuple | list) else output
    if isinstance(first, Mapping):
        first = next(iter(first.values()))
    return float((torch.as_tensor(first) - expected).abs().max())


def peak() -> float:
    """Return the most multiply-adds a second of one thread; 0 without compiled kernels."""
    found = [value[0] for _ in range(PEAKS) if (value := native.peak()) is not None]
    return max(found, default=0.0)


def measure(
    size: int, batch: int, threads: int, seconds: float, runtimes: Sequence[str]
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    models = networks()
    x = torch.rand(batch, 3, size, size) * 2 - 1
    limit = peak()
    calls: dict[str, Callable[[], object]] = {}
    cells: dict[str, dict[str, Any]] = {name: {} for name in models}
    plans: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        expected = {name: model(x) for name, model in models.items()}
        files = OnnxFiles(models, (x,), {}, Path(folder))
        for runtime in runtimes:
            for prepared in prepare(runtime, models, [(x,)], threads, files):
                plans |= prepared.plans
                for name, why in prepared.skipped.items():
                    cells[name][prepared.runtime] = {"skipped": why}
                for name, call in prepared.calls.items():
                    found = difference(call(), expected[name])
                    cells[name][prepared.runtime] = {"difference": found}
                    if found > MOST_DIFFERENT:
                        cells[name][prepared.runtime]["skipped"] = "its image differs"
                    else:
                        calls[f"{name} {prepared.runtime}"] = call
                print(prepared.runtime, "is ready", flush=True)
        samples = interleave(calls, seconds * len(calls))
    limit = threads * max(limit, peak())
    for key, times in samples.items():
        name, _, engine = key.partition(" ")
        macs = count_cost(models[name], x).macs
        median, least = statistics.median(times), min(times)
        cells[name][engine] |= {
            "median_ms": round(median, 3),
            "min_ms": round(least, 3),
            "share_of_limit": round(macs / (least / 1000) / limit, 4) if limit else None,
        }
        print(name, engine, cells[name][engine], flush=True)
    return {
        "size": size,
        "batch": batch,
        "threads": threads,
        "instruction_set": native.instruction_set(),
        "limit_gmacs_a_second": round(limit / 1e9, 2),
        "rounds": len(next(iter(samples.values()))),
        "networks": {
            name: {"gmacs": round(count_cost(model, x).macs / 1e9, 4), "engines": cells[name]}
            for name, model in models.items()
        },
        "ratios": ratios(samples),
        "plans": {name: plan["network_ms"] for name, plan in plans.items()},
    }


def ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Compare each student with each teacher, in the best engine on each side."""
    found: dict[str, Any] = {}
    for teacher in TEACHERS:
        for student in STUDENTS:
            pair: dict[str, Any] = {}
            for kind, own in (("out_of_the_box", False), ("with_tenfold", True)):
                teachers, students = best(samples, teacher, own), best(samples, student, own)
                if teachers is None or students is None:
                    continue
                ratio = paired_ratio(samples[teachers], samples[students])
                pair[kind] = {
                    "teacher": teachers.partition(" ")[2],
                    "student": students.partition(" ")[2],
                    "times_faster": round(ratio.median, 3),
                    "low": round(ratio.low, 3),
                    "high": round(ratio.high, 3),
                    "of_minima": round(min(samples[teachers]) / min(samples[students]), 3),
                }
            found[f"{teacher} / {student}"] = pair
            print(teacher, student, pair, flush=True)
    return found


def best(samples: Mapping[str, Sequence[float]], name: str, own: bool) -> str | None:
    """Return the key of a network's fastest engine, with or without our own."""
    keys = [
        key
        for key in samples
        if key.startswith(f"{name} ") and (own or key.partition(" ")[2] != OWN)
    ]
    return min(keys, key=lambda key: statistics.median(samples[key]), default=None)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="of the square image")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="a network in an engine")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES))
    parser.add_argument("--output", default="gan_infer", help="name in benchmarks/results")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    found = measure(
        given.size, given.batch, given.threads, given.seconds, check_runtimes(given.runtimes)
    )
    save(given.output, command_of("gan_infer", words), 0, found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"gan_infer: {error}")
