"""Exported models as plain callables: ONNX Runtime and OpenVINO, on the CPU, in float32.

Both take tensors or arrays and return tensors. `threads` is the number of threads of one call;
`batch` fixes the batch size, which lets an engine plan its memory ahead (used for timing).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.measure.quiet import quiet, reason

__all__ = ["METADATA_KEY", "OnnxModel", "OpenVinoModel", "load_openvino", "openvino_core"]

METADATA_KEY = "tenfold"

TensorOrArray = Tensor | np.ndarray[Any, Any]


def load_openvino() -> Any:
    """Import OpenVINO without its usage reports, and return the module.

    `import openvino` sends an event over the network unless its optional reporting package is
    absent, so that package is hidden while the import runs. Has no effect on an earlier import.
    """
    hidden = "openvino_telemetry"
    absent = object()
    before: Any = sys.modules.get(hidden, absent)
    if "openvino" not in sys.modules:
        sys.modules[hidden] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if before is absent:
            sys.modules.pop(hidden, None)
        else:
            sys.modules[hidden] = before
    return openvino


@functools.cache
def openvino_core() -> Any:
    """Return the one OpenVINO `Core` of this process.

    A core's CPU plugin puts a signal stack of its own in place, and its end puts the one before
    back. With two cores of which the older ends first, the stack that comes back is the older
    one's, which is freed: the next signal that Python handles (Ctrl+C, a data worker that ends)
    would then kill the process.
    """
    return load_openvino().Core()


class OnnxModel:
    """Run an ONNX file in ONNX Runtime.

    >>> model = OnnxModel("model.onnx", threads=2)  # doctest: +SKIP
    >>> logits = model(images)  # doctest: +SKIP

    Args:
        path: The `.onnx` file.
        threads: Threads for one call; None leaves the choice to the engine.
        batch: A fixed batch size, or None for any.

    Raises:
        UserError: If the file is missing or is not a model that ONNX Runtime can run.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, batch: int | None = None
    ) -> None:
        self.path = _existing(path, "an .onnx file")
        self.threads = _checked_threads(threads)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Idle workers of one session would otherwise spin on the cores that the next model needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if batch is not None:
            options.add_free_dimension_override_by_name("batch", batch)
        try:
            with quiet():
                onnxruntime.disable_telemetry_events()
                self._session = onnxruntime.InferenceSession(
                    str(self.path), options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:
            raise UserError(
                f"{self.path} can't be run by ONNX Runtime: {reason(error)}: expected an ONNX "
                "model; write one with tenfold export"
            ) from error
        self._input_names = [entry.name for entry in self._session.get_inputs()]

    @property
    def input_shapes(self) -> list[tuple[int | None, ...]]:
        """The shapes that the file states, input by input; None where it takes any."""
        return [
            tuple(side if isinstance(side, int) else None for side in entry.shape)
            for entry in self._session.get_inputs()
        ]

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON that `export` stored in the file; empty when there is none."""
        properties = self._session.get_modelmeta().custom_metadata_map
        return _parsed(properties.get(METADATA_KEY), self.path)

    def __call__(self, *inputs: TensorOrArray) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for inputs `(B, ...)`: a tensor, or a tuple where there are several.

        Raises:
            UserError: If the inputs don't fit the model.
        """
        arrays = _arrays(inputs, len(self._input_names), self.path)
        feed = dict(zip(self._input_names, arrays, strict=True))
        try:
            outputs = self._session.run(None, feed)
        except Exception as error:
            raise _input_error(self.path, arrays, error) from error
        return _tensors(outputs)


class OpenVinoModel:
    """Run an OpenVINO model (`.xml` with its `.bin`) or an ONNX file in OpenVINO on the CPU.

    Args:
        path: The `.xml` or `.onnx` file.
        threads: Threads for one call; None leaves the choice to the engine.
        batch: A fixed batch size, or None for any.

    Raises:
        UserError: If the file is missing or is not a model that OpenVINO can run.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, batch: int | None = None
    ) -> None:
        self.path = _existing(path, "an .xml or .onnx file")
        self.threads = _checked_threads(threads)
        if self.path.suffix not in {".xml", ".onnx"}:
            raise UserError(
                f"{self.path} can't be run by OpenVINO: the name ends in "
                f"{self.path.suffix or 'nothing'}; expected .xml or .onnx"
            )
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Some CPUs would silently compute in bfloat16.
            "INFERENCE_PRECISION_HINT": "f32",
            # Pinned threads keep their core even when another engine is at work there.
            "ENABLE_CPU_PINNING": False,
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            with quiet():
                core = openvino_core()
                model = core.read_model(str(self.path))
                if batch is not None:
                    shapes = {port: port.get_partial_shape() for port in model.inputs}
                    for shape in shapes.values():
                        shape[0] = batch
                    model.reshape(shapes)
                stored = model.has_rt_info([METADATA_KEY])
                text = model.get_rt_info([METADATA_KEY]).astype(str) if stored else None
                compiled = core.compile_model(model, "CPU", settings)
        except Exception as error:
            raise UserError(
                f"{self.path} can't be run by OpenVINO: {reason(error)}: expected an OpenVINO or "
                "ONNX model; write one with tenfold export"
            ) from error
        self._text = text
        self._inputs = len(compiled.inputs)
        self._request = compiled.create_infer_request()

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON that `export` stored in the `.xml`; empty when there is none."""
        return _parsed(self._text, self.path)

    def __call__(self, *inputs: TensorOrArray) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for inputs `(B, ...)`: a tensor, or a tuple where there are several.

        Raises:
            UserError: If the inputs don't fit the model.
        """
        arrays = _arrays(inputs, self._inputs, self.path)
        try:
            results = self._request.infer(arrays, share_inputs=True)
        except Exception as error:
            raise _input_error(self.path, arrays, error) from error
        return _tensors(list(results.values()))


def _existing(path: str | Path, expected: str) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; expected {expected}: give its path")
    return path


def _checked_threads(threads: int | None) -> int | None:
    if threads is not None and threads < 1:
        raise UserError(
            f"threads is {threads}; expected 1 or more, or None for the engine's choice"
        )
    return threads


def _parsed(text: str | None, path: Path) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds damaged metadata; expected a JSON mapping: export it again")
    return dict(value)


def _arrays(
    inputs: Sequence[TensorOrArray], expected: int, path: Path
) -> list[np.ndarray[Any, Any]]:
    if len(inputs) != expected:
        raise UserError(f"{path} was given {len(inputs)} inputs; expected {expected}")
    return [
        np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
        for value in inputs
    ]


def _tensors(outputs: Sequence[np.ndarray[Any, Any]]) -> Tensor | tuple[Tensor, ...]:
    tensors = tuple(torch.from_numpy(np.asarray(value)) for value in outputs)
    return tensors[0] if len(tensors) == 1 else tensors


def _input_error(path: Path, arrays: list[np.ndarray[Any, Any]], error: Exception) -> UserError:
    given = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
    return UserError(
        f"{path} refuses the inputs {given}: {reason(error)}: pass inputs of the shape and type "
        "that the model was exported with"
    )
