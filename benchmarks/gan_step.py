"""What a step of distilling a generator costs, beside the same step written as in a textbook.

    python benchmarks/gan_step.py                        # all parts
    python benchmarks/gan_step.py --parts relations      # one of them, some minutes

- relations: all of CRD's relation terms of one image (rows, columns, patches), forward and
  backward, beside the direct form (`textbook_relations.py`), which makes every difference vector.
  Time in turn in one process. Peak memory in a process for each: resident memory at its highest
  (VmHWM, reset ahead of the call), less what was resident before; a small image goes first, so that
  libraries are loaded. Values and gradients of both are compared.
- dcd: a student's step of DCD as the recipe horse2zebra has it (teacher of 64 and student of 16
  filters, VGG16 with random weights), forward and backward, beside the same step with what the
  authors' released code wastes (`textbook_dcd.py`). Multiplications are counted, those of
  convolutions apart from those of Gram matrices; time in turn in one process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Threads that wait shall sleep, of both contenders: on a busy machine they else hold up each sum.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

import textbook_relations
from common import RESULTS, interleave, paired_ratio, save, summary
from gan_step_dcd import dcd_step
from resumable import command_of
from tenfold.errors import UserError
from tenfold.methods import CRD

PARTS = ("relations", "dcd")
CONTENDERS = ("direct", "ours")
WARM_UP_SIDE = 96


def image_pair(batch: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return what a student and a teacher could have made: alike, not equal, smooth in part."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, side // 8, side // 8, generator=random)
    teacher = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear").tanh()
    student = teacher + 0.2 * torch.randn(teacher.shape, generator=random)
    return student.clamp(-1, 1).requires_grad_(), teacher


def relation_loss_of(contender: str) -> Callable[[Tensor, Tensor], Tensor]:
    return CRD().loss if contender == "ours" else textbook_relations.all_relations


def step(contender: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Run the relation terms forward and backward, and return their value."""
    student.grad = None
    loss = relation_loss_of(contender)(student, teacher)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def relations(batch: int, side: int, rounds: int, threads: int) -> dict[str, Any]:
    student, teacher = image_pair(batch, side)
    values, gradients = {}, {}
    for name in CONTENDERS:
        values[name] = float(step(name, student, teacher))
        assert student.grad is not None
        gradients[name] = student.grad.clone()
    apart = float((gradients["ours"] - gradients["direct"]).norm() / gradients["direct"].norm())
    found: dict[str, Any] = {
        "batch": batch,
        "side": side,
        "value": values["direct"],
        "value_relative_difference": abs(values["ours"] / values["direct"] - 1),
        "gradient_relative_difference": apart,
        "peak_memory_by": "VmHWM - VmRSS of a process for each, forward and backward",
        "extra_peak_mib": {name: peak_of(name, batch, side, threads) for name in CONTENDERS},
    }
    peaks = found["extra_peak_mib"]
    found["memory_ratio"] = round(peaks["direct"] / peaks["ours"], 2)
    print(found, flush=True)
    calls = {name: functools.partial(step, name, student, teacher) for name in CONTENDERS}
    times = interleave(calls, rounds, warm_up=1)
    found |= {name: summary(times[name]) for name in CONTENDERS}
    found["speedup"] = paired_ratio(times["direct"], times["ours"])
    print(found["direct"], found["ours"], found["speedup"], flush=True)
    return found


def peak_of(contender: str, batch: int, side: int, threads: int) -> float:
    """Return what a step of one contender takes at its peak, in MiB, measured in its process."""
    words = ["--peak-of", contender, "--batch", batch, "--side", side, "--threads", threads]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"measuring {contender}'s memory failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def own_peak(contender: str, batch: int, side: int) -> float:
    step(contender, *image_pair(1, WARM_UP_SIDE))
    student, teacher = image_pair(batch, side)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        raise UserError("peak memory is read from Linux' /proc: expected Linux; leave it out")
    reset.write_text("5")
    before = resident()["VmRSS"]
    step(contender, student, teacher)
    return round((resident()["VmHWM"] - before) / 1024, 2)


def resident() -> dict[str, int]:
    """Return this process's memory in KiB: VmRSS, now, and VmHWM, the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = [line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM"))]
    return {name: int(value.split()[0]) for name, value in pairs}


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="gan_step", help="name of a file in benchmarks/results")
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    torch.set_num_threads(given.threads)
    if given.peak_of:
        print(own_peak(given.peak_of, given.batch, given.side))
        return 0
    command = command_of("gan_step", words)
    measured: dict[str, Callable[[], Mapping[str, Any]]] = {
        "relations": lambda: relations(given.batch, given.side, given.rounds, given.threads),
        "dcd": lambda: dcd_step(given.batch, given.side, given.rounds),
    }
    path = RESULTS / f"{given.output}.json"
    known: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    results = {part: known.get(part) for part in PARTS}
    commands = known.get("command", command).split("; ")
    for part in given.parts:
        results[part] = {
            "threads": given.threads,
            "waiting_threads": os.environ["OMP_WAIT_POLICY"],
            "load_before": round(os.getloadavg()[0], 2),
            **measured[part](),
        }
        save(given.output, "; ".join(dict.fromkeys([*commands, command])), 0, results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"gan_step: {error}")
