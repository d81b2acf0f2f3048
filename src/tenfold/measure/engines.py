"""Make one callable per model in each runtime that `bench` knows."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.measure.machine import find_compiler
from tenfold.measure.onnx_write import write_onnx
from tenfold.measure.quiet import quiet, reason
from tenfold.measure.runners import OnnxModel, OpenVinoModel

__all__ = ["RUNTIMES", "OnnxFiles", "Prepared", "check_runtimes", "prepare"]

RUNTIMES = ("pytorch", "torch.compile", "onnxruntime", "openvino", "tenfold")
CHANNELS_LAST = "pytorch channels_last"

Call = Callable[[], object]


@dataclass
class Prepared:
    """The models that one runtime can run at one batch size, and the reasons of the others.

    `plans` has what `tenfold.optimize` decided about each, for the runtime "tenfold".
    """

    runtime: str
    batch: int
    calls: dict[str, Call] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)


def check_runtimes(runtimes: Iterable[str] | None) -> tuple[str, ...]:
    """Return the runtimes asked for, all by default.

    Raises:
        UserError: If one is unknown.
    """
    if runtimes is None:
        return RUNTIMES
    chosen = (runtimes,) if isinstance(runtimes, str) else tuple(runtimes)
    for name in chosen:
        if name not in RUNTIMES:
            raise unknown_name("runtime", str(name), RUNTIMES)
    if not chosen:
        raise UserError(f"runtimes is empty; expected some of {', '.join(RUNTIMES)}: name one")
    return tuple(dict.fromkeys(chosen))


def prepare(
    runtime: str,
    models: Mapping[str, nn.Module],
    batches: Sequence[tuple[Tensor, ...]],
    threads: int,
    onnx: OnnxFiles,
) -> Iterator[Prepared]:
    """Yield, for each batch, the callables of one runtime; "pytorch" yields two memory formats.

    Args:
        runtime: One of `RUNTIMES`.
        models: Networks in eval mode, which are not changed.
        batches: Inputs, one tuple a batch size.
        threads: Threads for engines that have their own.
        onnx: Where the models' ONNX files come from.
    """
    if runtime == "pytorch":
        yield from _eager(models, batches)
    elif runtime == "torch.compile":
        yield from _compiled(models, batches)
    elif runtime == "tenfold":
        yield from _optimized(models, batches)
    else:
        yield from _exported(runtime, models, batches, threads, onnx)


def _call(model: Callable[..., object], inputs: tuple[Tensor, ...]) -> Call:
    def call() -> object:
        return model(*inputs)

    return call


def _eager(
    models: Mapping[str, nn.Module], batches: Sequence[tuple[Tensor, ...]]
) -> Iterator[Prepared]:
    for inputs in batches:
        yield Prepared(
            "pytorch", len(inputs[0]), {n: _call(model, inputs) for n, model in models.items()}
        )
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(batches[0][0].dim())
    if memory_format is None:
        return
    reordered = {
        name: copy.deepcopy(model).to(memory_format=memory_format) for name, model in models.items()
    }
    for inputs in batches:
        first = inputs[0].contiguous(memory_format=memory_format)
        calls = {name: _call(model, (first, *inputs[1:])) for name, model in reordered.items()}
        yield Prepared(CHANNELS_LAST, len(first), calls)


def _compiled(
    models: Mapping[str, nn.Module], batches: Sequence[tuple[Tensor, ...]]
) -> Iterator[Prepared]:
    runtime = "torch.compile"
    if find_compiler() is None:
        why = "no C++ compiler found: install g++ or clang++, or set CXX"
        yield Prepared(runtime, len(batches[0][0]), skipped=dict.fromkeys(models, why))
        return
    for inputs in batches:
        # Compiled code of earlier models counts against a limit, behind which PyTorch falls back
        # to eager mode without a word.
        torch.compiler.reset()
        prepared = Prepared(runtime, len(inputs[0]))
        for name, model in models.items():
            try:
                with (
                    quiet(),
                    torch._dynamo.config.patch(
                        recompile_limit=64, fail_on_recompile_limit_hit=True
                    ),
                ):
                    compiled = torch.compile(model, dynamic=False)
                    with torch.no_grad():
                        compiled(*inputs)
            except Exception as error:
                prepared.skipped[name] = reason(error)
            else:
                prepared.calls[name] = _call(compiled, inputs)
        yield prepared
    torch.compiler.reset()


def _optimized(
    models: Mapping[str, nn.Module], batches: Sequence[tuple[Tensor, ...]]
) -> Iterator[Prepared]:
    # The only look upwards, and only when asked: measuring needs what it measures.
    optimize = importlib.import_module("tenfold.deploy.optimize").optimize
    for inputs in batches:
        prepared = Prepared("tenfold", len(inputs[0]))
        for name, model in models.items():
            try:
                fast: Any = model if hasattr(model, "plan") else optimize(model, inputs)
            except UserError as error:
                prepared.skipped[name] = str(error)
                continue
            prepared.calls[name] = _call(fast, inputs)
            prepared.plans[name] = fast.plan.to_dict()
        yield prepared


def _exported(
    runtime: str,
    models: Mapping[str, nn.Module],
    batches: Sequence[tuple[Tensor, ...]],
    threads: int,
    onnx: OnnxFiles,
) -> Iterator[Prepared]:
    if batches[0][0].device.type != "cpu":
        why = f"measured on the CPU only; the inputs are on {batches[0][0].device}"
        yield Prepared(runtime, len(batches[0][0]), skipped=dict.fromkeys(models, why))
        return
    runner = OnnxModel if runtime == "onnxruntime" else OpenVinoModel
    for inputs in batches:
        prepared = Prepared(runtime, len(inputs[0]))
        for name in models:
            try:
                engine = runner(onnx.path(name), threads=threads, batch=len(inputs[0]))
                engine(*inputs)
            except UserError as error:
                prepared.skipped[name] = str(error)
            else:
                prepared.calls[name] = _call(engine, inputs)
        yield prepared


class OnnxFiles:
    """The ONNX file of each model: a given one, or one written into `folder` when first asked for.

    Args:
        models: Networks in eval mode.
        inputs: Example inputs for those that must be exported.
        given: Files that are there already, by model name.
        folder: Where the others go.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        inputs: tuple[Tensor, ...],
        given: Mapping[str, str | Path],
        folder: Path,
    ) -> None:
        for name in given:
            if name not in models:
                raise unknown_name("model in onnx", str(name), models)
        self._models = models
        self._inputs = inputs
        self._folder = folder
        self._files = {name: Path(path) for name, path in given.items()}
        self._errors: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Return the file of one model.

        Raises:
            UserError: If the model can't be exported.
        """
        if name in self._errors:
            raise UserError(self._errors[name])
        if name not in self._files:
            path = self._folder / f"{len(self._files)}.onnx"
            try:
                write_onnx(self._models[name], path, self._inputs)
            except UserError as error:
                self._errors[name] = str(error)
                raise
            self._files[name] = path
        return self._files[name]
