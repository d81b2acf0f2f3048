"""Write a module as one ONNX file with a dynamic batch: used by `export` and by `bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tenfold.errors import UserError
from tenfold.measure.inputs import ExampleInputs, as_inputs, at_batch, run_once
from tenfold.measure.quiet import quiet, reason
from tenfold.measure.runners import METADATA_KEY
from tenfold.nn.kernel_layer import KernelLayer
from tenfold.nn.qdq import to_qdq

__all__ = ["OPSET", "metadata_text", "trace_inputs", "write_onnx"]

OPSET = 20
# One protobuf message holds 2 GB; the margin is for the graph beside the weights.
SINGLE_FILE_BYTES = 1_800_000_000
# A traced batch of 1 would be taken as a constant.
TRACE_BATCH = 2


def write_onnx(
    model: nn.Module,
    path: Path,
    example_inputs: ExampleInputs,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `model`, as it stands (put it in eval mode first), to the ONNX file `path`.

    The batch dimension is dynamic and named "batch". A single input is called "image", a single
    output "logits". Weights over 1.8 GB go to `<path>.data` beside the file. Prints nothing.

    Args:
        model: The network, on any device; it is not changed.
        path: The file to write; its folder exists.
        example_inputs: Tensor `(B, ...)`, or several; B may be 1.
        metadata: JSON-able facts, stored under the key "tenfold".

    Raises:
        UserError: If the model can't be exported, saying why.
    """
    import torch

    if any(isinstance(module, KernelLayer) for module in model.modules()):
        raise UserError(
            "packed for this CPU: ONNX has no such operators; export the model that was given to "
            "optimize"
        )
    model = to_qdq(model)
    inputs = trace_inputs(example_inputs)
    outputs = run_once(model, inputs, "the model")
    text = metadata_text(metadata)
    batch = torch.export.Dim("batch")
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                input_names=_names("image", len(inputs)),
                output_names=_names("logits", len(outputs)),
                verbose=False,
                custom_translation_table=_translations(),
            )
            if program is None:
                raise RuntimeError("the exporter returned nothing")
            shapes = [value.shape for value in program.model.graph.inputs]
            if any(shape is not None and isinstance(shape[0], int) for shape in shapes):
                # The exporter does so without a word when the dynamic batch fails.
                raise RuntimeError("forward() makes the batch size a constant")
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
        ) from error


def _translations() -> dict[Any, Any]:
    """Return how the operators of quantized layers are written in ONNX."""
    import torch
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


def trace_inputs(example_inputs: ExampleInputs) -> tuple[Any, ...]:
    """Return inputs of batch 2, whatever batch was given."""
    return at_batch(as_inputs(example_inputs), TRACE_BATCH)


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
