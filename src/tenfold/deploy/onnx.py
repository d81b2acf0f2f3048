"""Export a network to ONNX, OpenVINO or a torch.export file, and prove that the file computes it.

BatchNorm is folded, the batch dimension is dynamic, height and width where asked, and before a file
takes its name it is run in the engines it is meant for, at two batch sizes (and two image sizes),
and compared with the original network.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.deploy.fold import eval_copy, fold_batch_norm
from tenfold.errors import UserError, unknown_name
from tenfold.measure.cpu import instruction_sets
from tenfold.measure.inputs import (
    ExampleInputs,
    as_inputs,
    outputs_of,
    random_like,
    run_once,
)
from tenfold.measure.onnx_write import (
    Draw,
    Signature,
    at_size,
    dynamic_shapes,
    metadata_text,
    trace_inputs,
    write_onnx,
)
from tenfold.measure.quiet import quiet, reason
from tenfold.measure.runners import (
    METADATA_KEY,
    OnnxModel,
    OpenVinoModel,
    load_openvino,
    openvino_core,
)
from tenfold.nn.quantized import QuantizedLayer

__all__ = ["Check", "ExportResult", "check_runtimes", "export"]

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
# Neither is the batch that the model is traced with.
CHECKED_BATCHES = (1, 3)
# Relative to max(1, largest output of the original network).
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-4
# An input near the middle between two codes may fall to either side, by the order of a sum: rarely,
# and then the output moves by what one step of one input makes of it.
QUANTIZED_TOLERANCE = 2e-2
# A CPU without VNNI adds 8-bit products up in 16 bits, which saturate: not the file's fault.
SATURATING_TOLERANCE = 1e-1

Runner = Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference, relative to max(1, largest reference output).

    The size is that of the images, (H, W), where the file takes any; else None.
    """

    runtime: str
    batch: int
    max_difference: float
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        path: The file; for OpenVINO the `.xml`, with its `.bin` beside it.
        format: "onnx", "openvino" or "torch".
        bytes: Size of all files written.
        checks: The comparisons that the file passed.
        folded: Names of the BatchNorm modules that were folded away.
    """

    path: Path
    format: str
    bytes: int
    checks: list[Check]
    folded: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {**asdict(self), "path": str(self.path)}


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs,
    to: str = "onnx",
    metadata: Mapping[str, Any] | None = None,
    *,
    dynamic_size: int | None = None,
    signature: Signature | None = None,
) -> ExportResult:
    """Write `model` for another runtime, check it there, and return where it is.

    `path` that ends in the format's suffix (`.onnx`, `.xml`, `.pt2`) is the file; any other path is
    a folder, in which `model<suffix>` is written. Folders are created. A file that is there is
    replaced only after the new one has passed. The model itself is not changed.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> export(network, "net.onnx", torch.zeros(1, 3, 2, 2)).path  # doctest: +SKIP
    PosixPath('net.onnx')

    Args:
        model: Any network; a copy in eval mode on the CPU is exported.
        path: A file or a folder.
        example_inputs: Tensor `(B, ...)`, or several; B may be 1, the file takes any batch.
        to: "onnx", "openvino" (float32 weights) or "torch" (a torch.export program).
        metadata: JSON-able facts such as classes and preprocessing, kept in the file under
            "tenfold" and read back by `OnnxModel.metadata` and `OpenVinoModel.metadata`.
        dynamic_size: The file takes images of any height and width that are multiples of this, as
            `generator.multiple` says for a generator; it is also checked at a second size. None:
            the example's size alone.
        signature: names, bounds and the inputs to check with, for a network that needs others.

    Raises:
        UserError: If the model can't be exported, or the file computes something else.
    """
    if to not in FORMATS:
        raise unknown_name("export format", to, FORMATS)
    target = _target(Path(path), to)
    metadata_text(metadata)
    inputs = tuple(value.cpu() for value in as_inputs(example_inputs))
    trace_inputs(inputs, dynamic_size, signature)
    original = eval_copy(model).cpu()
    run_once(original, inputs, "the model")
    folded = fold_batch_norm(original, inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-")
    except OSError as error:
        raise UserError(
            f"{target.parent} can't be written: {error}: choose another path"
        ) from error
    with folder as temporary:
        draft = Path(temporary) / target.name
        _write(folded.model, draft, inputs, to, metadata, dynamic_size, signature)
        checks = check_runtimes(draft, to, original, inputs, dynamic_size, signature)
        # The companions (.bin, .data) go first, so that the main file never lacks them.
        written = sorted(Path(temporary).iterdir(), key=lambda file: file.name == target.name)
        size = sum(file.stat().st_size for file in written)
        for file in written:
            os.replace(file, target.parent / file.name)
    return ExportResult(target, to, size, checks, folded.folded)


def check_runtimes(
    file: Path,
    to: str,
    original: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic_size: int | None = None,
    signature: Signature | None = None,
) -> list[Check]:
    """Run a file in the engines that it is meant for, at two batch sizes where it takes any.

    Args:
        file: the exported one.
        to: its format.
        original: what it has to compute.
        inputs: examples.
        dynamic_size: None, or what the sides of images are multiples of: then at two sizes, too.
        signature: may fix the batch, and draw the inputs.

    Raises:
        UserError: an engine can't run it, or computes something else.
    """
    checks = []
    sizes: list[tuple[int, int] | None] = [None]
    if dynamic_size is not None:
        images = next(value for value in inputs if value.ndim >= 4)
        height, width = images.shape[-2:]
        # Another aspect ratio: sides that were mixed up would show.
        taller = 1 if height + dynamic_size != width + 2 * dynamic_size else 3
        sizes = [(height, width), (height + taller * dynamic_size, width + 2 * dynamic_size)]
    for runtime, open_runner in _runtimes(to):
        with _named(runtime):
            runner = open_runner(file)
        for size in sizes:
            checks += _check(runtime, runner, original, inputs, size, signature)
        del runner  # lets go of the file
    return checks


def _target(path: Path, to: str) -> Path:
    suffix = FORMATS[to]
    if path.suffix.lower() == suffix and not path.is_dir():
        return path
    if path.suffix.lower() in FORMATS.values() and not path.is_dir():
        raise UserError(
            f"{path} does not fit to={to!r}, which writes {suffix}: change the "
            "ending or name a folder"
        )
    return path / f"model{suffix}"


def _write(
    model: nn.Module,
    draft: Path,
    inputs: tuple[Tensor, ...],
    to: str,
    metadata: Mapping[str, Any] | None,
    dynamic_size: int | None,
    signature: Signature | None,
) -> None:
    sizes: dict[str, Any] = {"dynamic_size": dynamic_size, "signature": signature}
    if to == "onnx":
        write_onnx(model, draft, inputs, metadata, **sizes)
    elif to == "openvino":
        with tempfile.TemporaryDirectory() as folder:
            onnx_file = Path(folder) / "model.onnx"
            write_onnx(model, onnx_file, inputs, **sizes)
            _write_openvino(onnx_file, draft, metadata)
    else:
        _write_program(model, draft, inputs, metadata, dynamic_size, signature)


def _write_openvino(onnx_file: Path, draft: Path, metadata: Mapping[str, Any] | None) -> None:
    openvino = load_openvino()
    try:
        with quiet():
            converted = openvino_core().read_model(str(onnx_file))
            text = metadata_text(metadata)
            if text is not None:
                converted.set_rt_info(text, [METADATA_KEY])
            openvino.save_model(converted, str(draft), compress_to_fp16=False)
    except Exception as error:
        raise UserError(
            f'OpenVINO can\'t convert the model: {reason(error)}: use to="onnx" and another runtime'
        ) from error


def _write_program(
    model: nn.Module,
    draft: Path,
    inputs: tuple[Tensor, ...],
    metadata: Mapping[str, Any] | None,
    dynamic_size: int | None,
    signature: Signature | None,
) -> None:
    text = metadata_text(metadata)
    traced = trace_inputs(inputs, dynamic_size, signature)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                model,
                traced,
                dynamic_shapes=dynamic_shapes(traced, dynamic_size, signature),
            )
            extra = None if text is None else {METADATA_KEY: text}
            torch.export.save(program, str(draft), extra_files=extra)
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} can't be exported by torch.export: {reason(error)}: rewrite "
            "that part of forward() without Python control flow on tensors or on the batch size"
            f"{'' if dynamic_size is None else ', or leave dynamic_size out'}"
        ) from error


def _runtimes(to: str) -> list[tuple[str, Callable[[Path], Runner]]]:
    if to == "onnx":
        return [("onnxruntime", OnnxModel), ("openvino", OpenVinoModel)]
    if to == "openvino":
        return [("openvino", OpenVinoModel)]
    return [("torch.export", _load_program)]


def _load_program(path: Path) -> Runner:
    with quiet():
        return torch.export.load(str(path)).module()


@contextlib.contextmanager
def _named(runtime: str) -> Iterator[None]:
    """Say in an error which runtime refused a file that nobody will find under its draft name."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the exported model can't be run by {runtime}: {reason(error)}: nothing was written"
        ) from error


def _check(
    runtime: str,
    runner: Runner,
    original: nn.Module,
    inputs: tuple[Tensor, ...],
    size: tuple[int, int] | None,
    signature: Signature | None,
) -> list[Check]:
    checks = []
    draw: Draw = random_like
    batches: tuple[int, ...] = CHECKED_BATCHES
    if signature is not None:
        draw = signature.draw or random_like
        batches = batches if signature.batch is None else (signature.batch,)
    there, name = "", "the model"
    if size is not None:
        name = "the model, which takes images of any size if dynamic_size is right,"
        there = f" and images of {size[0]}x{size[1]}"
        inputs = tuple(at_size(value, *size) if value.ndim >= 4 else value for value in inputs)
    for batch in batches:
        drawn = draw(inputs, batch, batch)
        expected = run_once(copy.deepcopy(original), drawn, name)
        with _named(runtime), torch.no_grad():
            outputs = outputs_of(runner(*drawn))
        difference = _difference(outputs, expected, runtime, batch)
        tolerance = TOLERANCES.get(expected[0].dtype, TOLERANCE)
        if any(isinstance(module, QuantizedLayer) for module in original.modules()):
            tolerance = QUANTIZED_TOLERANCE
            if not any("vnni" in name for name in instruction_sets() or ()):
                tolerance = SATURATING_TOLERANCE
                if QUANTIZED_TOLERANCE < difference <= tolerance:
                    warnings.warn(
                        f"{runtime} differs by {difference:.2g} here: this CPU has no VNNI, and "
                        "8-bit sums saturate; evaluate the file on the machine that will run it",
                        stacklevel=2,
                    )
        if not difference <= tolerance:  # also true for NaN
            raise UserError(
                f"the exported model computes something else in {runtime} at batch {batch}"
                f"{there}: "
                f"difference {difference:.2g}, expected at most {tolerance:g}: nothing was "
                "written; please report the layer types of this model"
            )
        checks.append(Check(runtime, batch, difference, size))
    return checks


def _difference(
    outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], runtime: str, batch: int
) -> float:
    shapes = [tuple(output.shape) for output in outputs]
    wanted = [tuple(reference.shape) for reference in expected]
    if shapes != wanted:
        raise UserError(
            f"the exported model returns shapes {shapes} in {runtime} at batch {batch}; expected "
            f"{wanted}: keep the batch size out of Python arithmetic in forward()"
        )
    worst = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        if reference.numel() == 0:
            continue
        size = max(1.0, float(reference.abs().max()))
        difference = float((output.double() - reference.double()).abs().max()) / size
        if difference != difference:
            return difference
        worst = max(worst, difference)
    return worst
