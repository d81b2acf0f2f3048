"""Export every cell of a network with many budgets, all of them on one file of weights.

An ONNX file may keep its weights in another file, by offset and length. Here the graphs of all
cells point into one such file, in which every tensor lies once.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.deploy.fold import eval_copy
from tenfold.deploy.onnx import Check, check_runtimes
from tenfold.errors import UserError
from tenfold.measure.inputs import ExampleInputs, as_inputs
from tenfold.measure.onnx_write import write_onnx
from tenfold.nn.supervit import SuperViT

__all__ = ["CellsExport", "cell_name", "export_cells"]

WEIGHTS = "weights.bin"
# Smaller tensors (shapes, scalars) stay in the graph, where engines want to see them.
LEAST_BYTES = 1024
_NAME = re.compile(r"\d+-[\d.e-]+\.onnx")
ALIGNMENT = 4096  # of a tensor in the file, so that engines can map it


@dataclass(frozen=True)
class CellsExport:
    """What `export_cells` wrote.

    Attributes:
        path: the folder.
        files: name of each cell's file, by (size, keep rate).
        bytes: of all files together.
        separate_bytes: that the same files would take with weights of their own.
        checks: comparisons that each cell passed.
    """

    path: Path
    files: dict[tuple[int, float], str]
    bytes: int
    separate_bytes: int
    checks: dict[tuple[int, float], list[Check]]


def cell_name(size: int, keep_rate: float) -> str:
    """Return the name of a cell's file, such as `192-0.7.onnx`."""
    return f"{size}-{keep_rate:g}.onnx"


def export_cells(
    model: SuperViT,
    folder: str | Path,
    example_inputs: ExampleInputs,
    cells: Sequence[tuple[int, float]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> CellsExport:
    """Write each cell as `SIZE-RATE.onnx`, all on one file of weights, and check them.

    Every file is run in ONNX Runtime and OpenVINO at two batch sizes, as `export` does. They take
    their places only when all of them have passed; cells of an earlier call make room.

    Args:
        model: stays as it is.
        folder: to write into; made if missing.
        example_inputs: images `(B, C, H, H)` of the largest size.
        cells: some of the grid; all by default.
        metadata: as `export` takes it; each cell's size and keep rate are added.

    Raises:
        UserError: no SuperViT, or a file that computes something else.
    """
    if not isinstance(model, SuperViT):
        raise UserError(
            f"{type(model).__name__} has no cells: expected a SuperViT; use tenfold.export"
        )
    target = Path(folder)
    inputs = tuple(value.cpu() for value in as_inputs(example_inputs))
    original: Any = eval_copy(model).cpu()
    chosen = list(cells) if cells is not None else model.cells
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(dir=target, prefix=".export-")
    except OSError as error:
        raise UserError(f"{target} can't be written: {error}: choose another path") from error
    separate, checks = 0, {}
    with staging as name:
        draft = Path(name)
        with (draft / WEIGHTS).open("wb") as weights:
            store = _Store(weights)
            for size, rate in chosen:
                file = draft / cell_name(size, rate)
                facts = {**(metadata or {}), "cell": {"size": size, "keep_rate": rate}}
                write_onnx(original.cell(size, rate), file, inputs, facts)
                separate += file.stat().st_size
                store.take_from(file)
        for size, rate in chosen:
            cell = original.cell(size, rate)
            checks[size, rate] = check_runtimes(draft / cell_name(size, rate), "onnx", cell, inputs)
        written = sorted(draft.iterdir(), key=lambda file: file.suffix == ".onnx")
        total = sum(file.stat().st_size for file in written)
        for file in target.glob("*-*.onnx"):  # of another time: they would read other weights
            if _NAME.fullmatch(file.name):
                file.unlink()
        for file in written:  # the weights first, so that no graph ever lacks them
            os.replace(file, target / file.name)
    files = {(size, rate): cell_name(size, rate) for size, rate in chosen}
    return CellsExport(target, files, total, separate, checks)


class _Store:
    """The one file of weights: a tensor that is there already is not written again."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._places: dict[bytes, tuple[int, int]] = {}

    def take_from(self, path: Path) -> None:
        """Move the tensors of an ONNX file over, and have it point to them."""
        import onnx
        from onnx.external_data_helper import set_external_data

        graph = onnx.load(str(path))
        for tensor in graph.graph.initializer:
            data = tensor.raw_data
            if len(data) < LEAST_BYTES:
                continue
            offset, length = self._place(data)
            set_external_data(tensor, WEIGHTS, offset=offset, length=length)
            tensor.ClearField("raw_data")
        onnx.save(graph, str(path))

    def _place(self, data: bytes) -> tuple[int, int]:
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            start = self._file.tell()
            gap = -start % ALIGNMENT
            self._file.write(b"\0" * gap + data)
            self._places[digest] = (start + gap, len(data))
        return self._places[digest]
