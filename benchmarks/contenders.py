"""One cell of a comparison of engines: a dense model in each of them, and other forms of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.measure.engines import RUNTIMES, OnnxFiles, prepare
from tenfold.measure.timing import interleave, paired_ratio


def dense_calls(
    model: nn.Module, x: Tensor, threads: int, folder: Path, runtimes: Sequence[str] = RUNTIMES
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Return the dense model in every engine, and why some are missing.

    Exporting takes long, and the file is for any batch size: `folder` keeps it for later cells.
    """
    calls: dict[str, Callable[[], object]] = {}
    skipped: dict[str, str] = {}
    folder.mkdir(exist_ok=True)
    kept = list(folder.glob("*.onnx"))
    files = OnnxFiles({"dense": model}, (x,), {"dense": kept[0]} if kept else {}, folder)
    for runtime in runtimes:
        for prepared in prepare(runtime, {"dense": model}, [(x,)], threads, files):
            if "dense" in prepared.calls:
                calls[prepared.runtime] = prepared.calls["dense"]
            else:
                skipped[prepared.runtime] = prepared.skipped["dense"]
    return calls, skipped


def compare(
    model: nn.Module,
    others: Mapping[str, nn.Module],
    x: Tensor,
    threads: int,
    seconds: float,
    folder: Path,
    runtimes: Sequence[str] = RUNTIMES,
    x_of_others: Tensor | None = None,
) -> dict[str, Any]:
    """Time the dense model in every engine and other forms of it, all in turn.

    Args:
        model: dense.
        others: such as sparse ones, by name.
        x: input.
        threads: of every contender.
        seconds: a contender.
        folder: for ONNX files.
        runtimes: engines for the dense model.
        x_of_others: the same input as the other forms are to get it, in another memory format.
    """
    torch.set_num_threads(threads)
    given = x if x_of_others is None else x_of_others
    with torch.inference_mode():
        calls, skipped = dense_calls(model, x, threads, folder, runtimes)
        dense = list(calls)
        for name, fast in others.items():
            calls[name] = lambda fast=fast: fast(given)
        samples = interleave(calls, seconds * len(calls))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    best = min(dense, key=medians.__getitem__)
    return {
        "best_dense": best,
        "dense_ms": {name: round(medians[name], 4) for name in dense},
        "skipped": skipped,
        "sparse": {
            name: {
                "ms": round(medians[name], 4),
                "speedup": round((ratio := paired_ratio(samples[best], samples[name])).median, 3),
                "low": round(ratio.low, 3),
                "high": round(ratio.high, 3),
            }
            for name in others
        },
    }
