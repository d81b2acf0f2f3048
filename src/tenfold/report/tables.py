"""Arrange what was read into the rows of the report's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tenfold.report import numbers
from tenfold.report.charts import share_bar
from tenfold.report.headline import verdict_style
from tenfold.report.inputs import Bench, Latency, Layer, Size

__all__ = [
    "LatencyGroup",
    "LayerRow",
    "SizeRow",
    "facts",
    "latency_groups",
    "layer_rows",
    "size_rows",
]


@dataclass(frozen=True)
class SizeRow:
    """One quantity: a value for each model and, but for the reference, its change."""

    label: str
    cells: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class LatencyGroup:
    """All models of one runtime at one batch size, with the style class of each verdict."""

    runtime: str
    batch: int
    rows: tuple[tuple[Latency, str], ...]


@dataclass(frozen=True)
class LayerRow:
    """A layer with its bars, drawn, and what was done to it, in words."""

    layer: Layer
    shape: str
    kept_bar: str
    macs_bar: str
    remark: str


def size_rows(bench: Bench) -> list[SizeRow]:
    """Return accuracy, parameters, bytes and MACs of every model."""
    first, others = bench.models[0], bench.models[1:]

    def row(
        label: str,
        value: Callable[[str], float | None],
        write: Callable[[float | None], str],
        change: Callable[[float | None, float | None], str] = numbers.relative_change,
        start: float | None = None,
    ) -> SizeRow:
        start = value(first) if start is None else start
        changed = [(write(value(model)), change(start, value(model))) for model in others]
        return SizeRow(label, ((write(value(first)), None), *changed))

    def size(read: Callable[[Size], float | None]) -> Callable[[str], float | None]:
        return lambda model: read(bench.size[model])

    # The reference is stored dense: a packed file is compared with that.
    stored = bench.size[first].dense_bytes
    return [
        row("Accuracy", bench.accuracy.get, numbers.percent, numbers.accuracy_change),
        row("Parameters", size(lambda s: s.parameters), numbers.count),
        row("Non-zero parameters", size(lambda s: s.nonzero_parameters), numbers.count),
        row("Bytes, stored dense", size(lambda s: s.dense_bytes), numbers.file_size),
        row("Bytes, packed", size(lambda s: s.packed_bytes), numbers.file_size, start=stored),
        row("MACs, dense", size(lambda s: s.macs), numbers.count),
        row("MACs, effective", size(lambda s: s.effective_macs), numbers.count),
    ]


def latency_groups(bench: Bench) -> list[LatencyGroup]:
    """Group the latency rows by runtime and batch size, in the order of the file."""
    groups: dict[tuple[str, int], list[tuple[Latency, str]]] = {}
    for row in bench.latency:
        group = groups.setdefault((row.runtime, row.batch), [])
        group.append((row, verdict_style(row.verdict)))
    for rows in groups.values():
        rows.sort(key=lambda pair: bench.models.index(pair[0].model))
    return [LatencyGroup(runtime, batch, tuple(rows)) for (runtime, batch), rows in groups.items()]


def layer_rows(layers: Sequence[Layer]) -> list[LayerRow]:
    """Return a row a layer; bars of MACs share one scale, that of the largest layer."""
    largest = max((layer.macs or 0.0 for layer in layers), default=0.0) or 1.0
    rows = []
    for layer in layers:
        share = (
            layer.effective_macs / layer.macs
            if layer.macs and layer.effective_macs is not None
            else None
        )
        remark = layer.treatment or "left dense"
        if layer.reason:
            remark = f"{remark}: {layer.reason}"
        rows.append(
            LayerRow(
                layer=layer,
                shape="\u2009×\u2009".join(str(size) for size in layer.shape) or numbers.MISSING,
                kept_bar=share_bar(layer.kept),
                macs_bar=share_bar(share, (layer.macs or 0.0) / largest),
                remark=remark,
            )
        )
    return rows


def facts(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Turn a JSON object of any depth into labels and text."""
    units = {"gib": "GiB", "gb": "GB", "mhz": "MHz"}
    found = []
    for key, value in values.items():
        words = str(key).split("_")
        if words[-1] == "bytes" and isinstance(value, int | float):
            found.append((" ".join(words[:-1]), f"{value / 2**30:.1f} GiB"))
            continue
        unit = units.get(words[-1].lower()) if len(words) > 1 else None
        label = " ".join(words[:-1] if unit else words)
        text = _plain(value)
        found.append((label, f"{text} {unit}" if unit and text != numbers.MISSING else text))
    return found


def _plain(value: object) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return numbers.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return numbers.significant(value)
    if isinstance(value, dict):
        return ", ".join(f"{label} {text}" for label, text in facts(value))
    if isinstance(value, list):
        nested = any(isinstance(part, dict) for part in value)
        return ("; " if nested else ", ").join(_plain(part) for part in value)
    return str(value)
