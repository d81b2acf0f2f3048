"""What `optimize` decided: a row a layer, and what holds for the whole network."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tenfold.errors import UserError
from tenfold.measure.table import columns

__all__ = ["LayerChoice", "OptimizePlan"]

WIDTH = 100


@dataclass(frozen=True)
class LayerChoice:
    """One convolution or linear layer.

    Attributes:
        layer: its name in the network.
        kind: "Conv2d" or "Linear", or the name of a class derived from one.
        pattern: N:M that its zeros follow, or None.
        input: shape of its input at its first call with the example, or None.
        tile: outputs of a tile, of a 3-D convolution that is computed in the Winograd domain.
        columns: its kept columns, and all of them.
        dense_ms: milliseconds of the layer as it is, in the better memory format.
        packed_ms: milliseconds of the packed layer; of a 3-D convolution, in its fastest tile.
        chosen: "packed" or "dense".
        fused: what the packed layer does besides, such as "add, relu".
        reason: why it stays dense, where that isn't a matter of time.
    """

    layer: str
    kind: str
    pattern: str | None = None
    input: tuple[int, ...] | None = None
    tile: tuple[int, int, int] | None = None
    columns: tuple[int, int] | None = None
    dense_ms: float | None = None
    packed_ms: float | None = None
    chosen: str = "dense"
    fused: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class OptimizePlan:
    """What `optimize` did and measured; `str()` gives a table, `to_dict()` JSON-able values.

    Attributes:
        layers: a row for each convolution and linear layer.
        precision: of the packed values.
        instruction_set: that the kernels used, or None without compiled kernels.
        memory_format: of the convolutions that stay dense, "contiguous" or "channels_last".
        inputs: how many tensors the network takes.
        at_once: how many samples of a batch go through the network together; None: all.
        folded: names of the BatchNorm modules that were folded away.
        replaced: how many operators of PyTorch kernels of ours compute, by kind.
        network_ms: milliseconds of the whole network in each form that was timed.
        difference: largest difference to the given model on the example, relative to the largest
            output.
        reason: what was not done, and why; None when there is nothing to say.
    """

    layers: tuple[LayerChoice, ...]
    precision: str = "float32"
    instruction_set: str | None = None
    memory_format: str = "contiguous"
    inputs: int = 1
    at_once: int | None = None
    folded: tuple[str, ...] = ()
    replaced: dict[str, int] = field(default_factory=dict)
    network_ms: dict[str, float] = field(default_factory=dict)
    difference: float | None = None
    reason: str | None = None

    @property
    def packed(self) -> tuple[LayerChoice, ...]:
        """Return the rows of the layers that are packed."""
        return tuple(row for row in self.layers if row.chosen == "packed")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able values."""
        values = asdict(self)
        values["folded"] = list(self.folded)
        values["layers"] = [
            {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(row).items()}
            for row in self.layers
        ]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimizePlan:
        """Undo `to_dict`.

        Raises:
            UserError: a key that a plan doesn't have, or lacks.
        """
        try:
            rows = []
            for row in values["layers"]:
                given: dict[str, Any] = {
                    key: (*value,) if isinstance(value, list) else value
                    for key, value in row.items()
                }
                rows.append(LayerChoice(**given))
            return cls(**{**values, "layers": (*rows,), "folded": (*values["folded"],)})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"not the plan of an optimized model ({error}): expected the keys "
                f"{', '.join(entry.name for entry in fields(cls))}"
            ) from error

    def __str__(self) -> str:
        rows = [["layer", "kind", "pattern", "input", "dense ms", "packed ms", "chosen", "fused"]]
        notes: dict[str, list[str]] = {}
        for row in self.layers:
            rows.append(
                [
                    row.layer or "(the model)",
                    row.kind,
                    row.pattern or _domain(row) or "-",
                    "-" if row.input is None else "x".join(str(size) for size in row.input),
                    _ms(row.dense_ms),
                    _ms(row.packed_ms),
                    row.chosen,
                    row.fused or "",
                ]
            )
            if row.reason is not None and (row.pattern is not None or "3d" in row.kind.lower()):
                notes.setdefault(row.reason, []).append(row.layer)
        parts = [columns(rows)] if self.layers else []
        lines = [
            f"{len(self.packed)} of {len(self.layers)} layers packed; precision {self.precision}; "
            f"kernels: {self.instruction_set or 'none, plain PyTorch'}; dense convolutions "
            f"{self.memory_format}; BatchNorm folded: {len(self.folded)}"
        ]
        if self.replaced:
            kinds = ", ".join(f"{kind} ({count})" for kind, count in self.replaced.items())
            lines.append(f"own kernels also for: {kinds}")
        if self.at_once is not None:
            lines.append(f"of a batch {self.at_once} at once go through the network")
        if self.difference is not None:
            lines.append(f"largest relative difference to the given model: {self.difference:.1e}")
        if self.network_ms:
            times = (f"{name} {_ms(value)} ms" for name, value in self.network_ms.items())
            lines.append(f"whole network: {', '.join(times)}")
        lines += [self.reason] if self.reason else []
        lines += [f"dense, {why}: {_names(layers)}" for why, layers in notes.items()]
        wrapped = [textwrap.fill(line, width=WIDTH, subsequent_indent="  ") for line in lines]
        return "\n\n".join([*parts, "\n".join(wrapped)])


def _domain(row: LayerChoice) -> str | None:
    """Return tile and kept columns, such as 2x4x4 72/144."""
    if row.tile is None or row.columns is None:
        return None
    return f"{'x'.join(map(str, row.tile))} {row.columns[0]}/{row.columns[1]}"


def _names(layers: list[str], most: int = 5) -> str:
    more = len(layers) - most
    return ", ".join(layers[:most]) + (f" and {more} more" if more > 0 else "")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"
