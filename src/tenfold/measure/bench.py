"""Measure models side by side on this machine, in every runtime, and say whether anything was won.

All models of one runtime and batch size are timed in alternation in this process with the same
number of threads, so that a busy or warming machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.measure.cost import count_cost
from tenfold.measure.engines import OnnxFiles, Prepared, check_runtimes, prepare
from tenfold.measure.inputs import ExampleInputs, as_inputs, at_batch, run_once
from tenfold.measure.machine import doctor
from tenfold.measure.quiet import reason
from tenfold.measure.result import BenchResult, LatencyRow, SizeRow, Skipped, summarise
from tenfold.measure.timing import interleave, paired_ratio

__all__ = ["bench"]

_Value = TypeVar("_Value", int, float)


def bench(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    seconds: float = 2.0,
    accuracy: Mapping[str, float] | None = None,
    packed_bytes: Mapping[str, int] | None = None,
    onnx: Mapping[str, str | Path] | None = None,
    command: str | None = None,
    seed: int = 0,
) -> BenchResult:
    """Time `models` against the first of them and return sizes, latencies and conclusions.

    Copies in eval mode are timed; the models stay as they are. Outputs are not compared.

    Args:
        models: Networks by name; the first is the reference.
        example_inputs: Tensor `(B, ...)`, or several; rows are repeated to each batch size. On a
            CUDA device PyTorch is timed there, the other runtimes are skipped.
        batch_sizes: Batch sizes to time.
        threads: Threads for every runtime; PyTorch's number by default.
        runtimes: Some of "pytorch" (eager, in both memory formats), "torch.compile",
            "onnxruntime", "openvino", "tenfold" (each model as `tenfold.optimize` makes it); all by
            default. One that can't run is skipped with a reason.
        seconds: Time for one runtime at one batch size, warm-up not counted.
        accuracy: Known accuracies in 0..1, by model name.
        packed_bytes: Known sizes of saved artifacts in bytes, by model name.
        onnx: ONNX files that exist already, by model name; the others are exported for the time.
        command: The command line to record.
        seed: For the bootstrap behind the ratio's interval.

    Raises:
        UserError: If an argument makes no sense, or a model fails on the inputs.
    """
    _check(models, batch_sizes, threads, seconds)
    chosen = check_runtimes(runtimes)
    known_accuracy = _known("accuracy", accuracy, models)
    known_bytes = _known("packed_bytes", packed_bytes, models)
    inputs = as_inputs(example_inputs)
    copies = {name: _eval_copy(name, model) for name, model in models.items()}
    for name, model in copies.items():
        run_once(model, inputs, f"model {name!r}")
    size = {name: _size(model, inputs, known_bytes.get(name)) for name, model in copies.items()}

    threads = threads or torch.get_num_threads()
    batches = [at_batch(inputs, batch) for batch in dict.fromkeys(batch_sizes)]
    latency: list[LatencyRow] = []
    skipped: list[Skipped] = []
    plans: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, _torch_threads(threads):
        files = OnnxFiles(copies, inputs, onnx or {}, Path(folder))
        for runtime in chosen:
            for prepared in prepare(runtime, copies, batches, threads, files):
                skipped += _skipped(prepared, list(models))
                for name, plan in prepared.plans.items():
                    plans.setdefault(name, {})[str(prepared.batch)] = plan
                latency += _measure(prepared, list(models), inputs[0].device, seconds, seed)
    skipped = list(dict.fromkeys(skipped))

    machine = doctor()
    names = list(models)
    return BenchResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seed=seed,
        threads=threads,
        machine=machine.to_dict(),
        versions={name: engine.version for name, engine in machine.engines.items()},
        models=names,
        accuracy=known_accuracy,
        size=size,
        latency=latency,
        skipped=skipped,
        plans=plans,
        summary=summarise(names, known_accuracy, size, latency, skipped),
    )


def _measure(
    prepared: Prepared, names: list[str], device: torch.device, seconds: float, seed: int
) -> list[LatencyRow]:
    reference = names[0]
    if reference not in prepared.calls:
        return []
    synchronise = torch.cuda.synchronize if device.type == "cuda" else None
    with torch.no_grad():
        samples = interleave(prepared.calls, seconds, synchronise)
    rows = []
    for name in names:
        if name not in samples:
            continue
        low, median, high = (float(value) for value in np.percentile(samples[name], [10, 50, 90]))
        ratio = None if name == reference else paired_ratio(samples[reference], samples[name], seed)
        rows.append(
            LatencyRow(
                runtime=prepared.runtime,
                batch=prepared.batch,
                model=name,
                median_ms=median,
                p10_ms=low,
                p90_ms=high,
                rounds=len(samples[name]),
                images_per_second=1000 * prepared.batch / median,
                ratio=ratio.median if ratio else None,
                ratio_low=ratio.low if ratio else None,
                ratio_high=ratio.high if ratio else None,
                verdict=ratio.verdict if ratio else None,
            )
        )
    return rows


def _skipped(prepared: Prepared, names: list[str]) -> list[Skipped]:
    """Say why models are missing, once when all have the same reason."""
    if not prepared.skipped:
        return []
    reasons = set(prepared.skipped.values())
    if len(prepared.skipped) == len(names) and len(reasons) == 1:
        return [Skipped(prepared.runtime, reasons.pop())]
    found = [Skipped(prepared.runtime, f"{name}: {why}") for name, why in prepared.skipped.items()]
    if names[0] in prepared.skipped and prepared.calls:
        others = ", ".join(prepared.calls)
        found.append(Skipped(prepared.runtime, f"{others}: nothing to compare with"))
    return found


def _size(model: nn.Module, inputs: tuple[Tensor, ...], packed_bytes: int | None) -> SizeRow:
    cost = count_cost(model, inputs)
    return SizeRow(
        parameters=cost.parameters,
        nonzero_parameters=cost.nonzero_parameters,
        macs=cost.macs,
        effective_macs=cost.effective_macs,
        dense_bytes=cost.bytes,
        packed_bytes=packed_bytes,
    )


def _check(
    models: Mapping[str, nn.Module], batch_sizes: Sequence[int], threads: int | None, seconds: float
) -> None:
    if not isinstance(models, Mapping) or not models:
        given = "empty" if isinstance(models, Mapping) else type(models).__name__
        raise UserError(
            f'models is {given}; expected a mapping such as {{"dense": a, "sparse": b}}: '
            "name at least one model"
        )
    for name, model in models.items():
        if not isinstance(name, str) or not name:
            raise UserError(f"model name {name!r} is not a text; expected one such as 'dense'")
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model {name!r} is {type(model).__name__}; expected a torch.nn.Module: "
                "load it first"
            )
    if not batch_sizes or any(
        isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in batch_sizes
    ):
        raise UserError(
            f"batch_sizes is {batch_sizes!r}; expected whole numbers of 1 or more, such as (1, 16)"
        )
    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}; expected 1 or more, or None for PyTorch's number")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"seconds is {seconds}; expected a positive number, such as 2.0")


def _known(
    what: str, given: Mapping[str, _Value] | None, models: Mapping[str, nn.Module]
) -> dict[str, _Value]:
    for name in given or {}:
        if name not in models:
            raise unknown_name(f"model in {what}", str(name), models)
    return dict(given or {})


def _eval_copy(name: str, model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise UserError(
            f"model {name!r} can't be copied: {reason(error)}: call finalize on its methods first"
        ) from error


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
