"""Write a module as one ONNX file with a dynamic batch: used by `export` and by `bench`.

Height and width are fixed unless asked otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.measure.inputs import ExampleInputs, as_inputs, at_batch, run_once
from tenfold.measure.quiet import quiet, reason
from tenfold.measure.runners import METADATA_KEY
from tenfold.nn.kernel_layer import KernelLayer
from tenfold.nn.qdq import to_qdq

__all__ = [
    "OPSET",
    "Draw",
    "Signature",
    "at_size",
    "dynamic_shapes",
    "metadata_text",
    "trace_inputs",
    "write_onnx",
]

OPSET = 20
# One protobuf message holds 2 GB; the margin is for the graph beside the weights.
SINGLE_FILE_BYTES = 1_800_000_000
# A traced batch of 1 would be taken as a constant, and so would a side of once the multiple.
TRACE_BATCH = 2
TRACE_MULTIPLES = 2

Draw = Callable[[tuple[Tensor, ...], int, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Signature:
    """How a network is called that takes more than an image, or not every image.

    Attributes:
        inputs: their names.
        outputs: their names.
        least_side: of images, where height and width are dynamic.
        batch: the only batch size that it takes; None: any.
        draw: makes inputs to compare with, from inputs, a batch size and a seed; by default
            standard normal ones.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    least_side: int = 1
    batch: int | None = None
    draw: Draw | None = None


def write_onnx(
    model: nn.Module,
    path: Path,
    example_inputs: ExampleInputs,
    metadata: Mapping[str, Any] | None = None,
    *,
    dynamic_size: int | None = None,
    signature: Signature | None = None,
) -> None:
    """Write `model`, as it stands (put it in eval mode first), to the ONNX file `path`.

    The batch dimension is dynamic and named "batch". A single input is called "image", a single
    output "logits". Weights over 1.8 GB go to `<path>.data` beside the file. Prints nothing.

    Args:
        model: The network, on any device; it is not changed.
        path: The file to write; its folder exists.
        example_inputs: Tensor `(B, ...)`, or several; B may be 1.
        metadata: JSON-able facts, stored under the key "tenfold".
        dynamic_size: height and width are dynamic too, and multiples of this; None fixes them.
        signature: names and bounds, for networks that need others.

    Raises:
        UserError: If the model can't be exported, saying why.
    """
    if any(isinstance(module, KernelLayer) for module in model.modules()):
        raise UserError(
            "packed for this CPU: ONNX has no such operators; export the model that was given to "
            "optimize"
        )
    model = to_qdq(model)
    inputs = trace_inputs(example_inputs, dynamic_size, signature)
    shapes = dynamic_shapes(inputs, dynamic_size, signature)
    outputs = run_once(model, inputs, "the model")
    names = (_names("image", len(inputs)), _names("logits", len(outputs)))
    if signature is not None:
        names = (list(signature.inputs), list(signature.outputs))
    text = metadata_text(metadata)
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=names[0],
                output_names=names[1],
                verbose=False,
                custom_translation_table=_translations(),
            )
            if program is None:
                raise RuntimeError("the exporter returned nothing")
            for value, dynamic in zip(program.model.graph.inputs, shapes, strict=True):
                # The exporter does so without a word when a dynamic dimension fails.
                if value.shape is not None and any(
                    isinstance(value.shape[axis], int) for axis in dynamic
                ):
                    fixed = 0 in dynamic and isinstance(value.shape[0], int)
                    what = "batch size" if fixed else "image size"
                    raise RuntimeError(f"forward() makes the {what} a constant")
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # stack traces of this machine, most of a small file
            if text is not None:
                program.model.metadata_props[METADATA_KEY] = text
            weights = sum(tensor.nbytes for tensor in model.state_dict().values())
            program.save(str(path), external_data=weights > SINGLE_FILE_BYTES)
            import onnx

            onnx.checker.check_model(str(path))
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} can't be exported to ONNX: {reason(error)}: rewrite that part "
            "of forward() without Python control flow on tensors or on the batch size"
            f"{'' if dynamic_size is None else ', or leave dynamic_size out'}"
        ) from error


def trace_inputs(
    example_inputs: ExampleInputs,
    dynamic_size: int | None = None,
    signature: Signature | None = None,
) -> tuple[Tensor, ...]:
    """Return inputs of batch 2, whatever batch was given, and sides at which none is a constant.

    A signature may fix the batch, and then it is that one.

    Raises:
        UserError: no image among the inputs, or one whose sides are no multiples of `dynamic_size`.
    """
    fixed = None if signature is None else signature.batch
    inputs = at_batch(as_inputs(example_inputs), fixed or TRACE_BATCH)
    if dynamic_size is None:
        return inputs
    if dynamic_size < 1:
        raise UserError(
            f"dynamic_size {dynamic_size}: expected at least 1, what the sides are multiples of"
        )
    if all(value.ndim < 4 for value in inputs):
        raise UserError(
            f"example inputs of shape {', '.join(str(tuple(value.shape)) for value in inputs)}: "
            "a dynamic size is for images (B, C, H, W); leave dynamic_size out"
        )
    return tuple(
        _at_least(value, dynamic_size, TRACE_MULTIPLES) if value.ndim >= 4 else value
        for value in inputs
    )


def _at_least(images: Tensor, multiple: int, times: int) -> Tensor:
    """Repeat rows and columns of images until each side is so many times the multiple."""
    height, width = images.shape[-2:]
    if height % multiple or width % multiple:
        raise UserError(
            f"example images of {height}x{width}: expected sides that are multiples of "
            f"{multiple}, as dynamic_size says"
        )
    return at_size(images, max(height, times * multiple), max(width, times * multiple))


def at_size(images: Tensor, height: int, width: int) -> Tensor:
    """Repeat or cut the rows and columns of images `(..., H, W)` so that there are so many."""
    rows = torch.arange(height, device=images.device) % images.shape[-2]
    columns = torch.arange(width, device=images.device) % images.shape[-1]
    return images[..., rows, :][..., columns].contiguous()


def dynamic_shapes(
    inputs: tuple[Tensor, ...],
    dynamic_size: int | None = None,
    signature: Signature | None = None,
) -> tuple[dict[int, Any], ...]:
    """Return the dynamic dimensions of each input, as the exporters take them.

    Args:
        inputs: from `trace_inputs`.
        dynamic_size: None: the batch alone. Else the last two dimensions of images and clips too,
            which are multiples of this; images have their size in common.
        signature: may fix the batch, and say how small images may be.
    """
    fixed = signature is not None and signature.batch is not None
    first: dict[int, Any] = {} if fixed else {0: torch.export.Dim("batch")}
    if dynamic_size is None:
        return tuple(dict(first) for _ in inputs)
    least = -(-(1 if signature is None else signature.least_side) // dynamic_size)
    bounds = {} if least < 2 else {"min": least}
    height, width = (torch.export.Dim(name, **bounds) for name in ("height", "width"))
    if dynamic_size > 1:
        height, width = (dynamic_size * side for side in (height, width))
    return tuple(
        first | {value.ndim - 2: height, value.ndim - 1: width} if value.ndim >= 4 else dict(first)
        for value in inputs
    )


def _translations() -> dict[Any, Any]:
    """Return how the operators of quantized layers are written in ONNX."""
    from onnxscript import opset20

    op: Any = opset20

    def quantize(x: Any, lower: Any, step: Any, top: Any, shift: bool) -> Any:
        zero = op.Constant(value=_scalar(0, np.uint8))
        x = op.Clip(op.Sub(x, lower) if shift else x, op.Constant(value=_scalar(0)), top)
        codes = op.QuantizeLinear(x, step, zero)
        return op.DequantizeLinear(codes, op.Constant(value=_scalar(1)), zero)

    def dequantize(integers: Any, scale: Any) -> Any:
        zeros = op.CastLike(op.Mul(scale, op.Constant(value=_scalar(0))), integers)
        return op.DequantizeLinear(integers, scale, zeros, axis=0)

    operators = torch.ops.tenfold
    return {
        operators.quantize_input.default: quantize,
        operators.dequantize_weight.default: dequantize,
    }


def _scalar(value: float, kind: Any = np.float32) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(value, dtype=kind))


def metadata_text(metadata: Mapping[str, Any] | None) -> str | None:
    """Return metadata as JSON text, or None.

    Raises:
        UserError: If something in it is not JSON-able.
    """
    if metadata is None:
        return None
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"metadata can't be written as JSON: {reason(error)}: use numbers, texts, lists and "
            "mappings only"
        ) from error


def _names(single: str, count: int) -> list[str]:
    return [single] if count == 1 else [f"{single}_{position}" for position in range(count)]
