"""The tables of benchmarks/winograd3d.py."""

from __future__ import annotations

from typing import Any

from published import RESULTS, load, markdown, origin

NAME = "winograd3d"
KEEPS = {"all": "all columns", "half": "half", "quarter": "a quarter"}
NETWORKS = {"r3d_18": "R3D-18", "c3d": "C3D"}


def missing(part: str) -> str | None:
    """Return what stands in the place of a part that isn't measured, or None."""
    if (RESULTS / f"{NAME}.json").is_file() and load(NAME)[part]:
        return None
    return f"*Not measured yet: `python benchmarks/{NAME}.py --only {part}`.*"


def written(found: dict[str, Any]) -> str:
    cells = {cell.split()[0] for part in ("layers", *NETWORKS) for cell in found[part]}
    return origin(
        {**found, "threads": f"{found['kernels']} kernels, {' and '.join(sorted(cells))}"}
    )


def speed() -> str:
    if why := missing("layers"):
        return why
    found = load(NAME)
    rows = []
    title = "R3D-18's eligible layers"
    for cell, result in found["layers"].items():
        means = [f"{result['geometric_mean'][keep]:.2f}x" for keep in KEEPS]
        rows.append([title, cell, "each layer's own", *means])
        title = ""
    for part, name in NETWORKS.items():
        for cell, result in found[part].items():
            speedups = [
                f"{value['speedup']:.2f}x ({value['low']:.2f} to {value['high']:.2f})"
                for value in (result["sparse"][keep] for keep in KEEPS)
            ]
            best = f"{result['best_dense']}, {result['dense_ms'][result['best_dense']]:.0f} ms"
            rows.append([name, cell, best, *speedups])
            name = ""
    return f"{markdown(['', 'cell', 'fastest dense', *KEEPS.values()], rows)}\n\n{written(found)}"


def layers() -> str:
    if why := missing("layers"):
        return why
    found = load(NAME)
    parts = []
    for cell, result in found["layers"].items():
        rows = []
        for row in result["rows"]:
            best = row["best_dense"]
            fastest = f"{best}, {row['dense_ms'][best]:.2f} ms"
            rows.append([row["layer"], str(row["count"]), fastest])
            for keep in KEEPS:
                name = row["best"][keep]
                value = row["sparse"].get(name)
                tile = "direct" if value is None else f"{value['speedup']:.2f}x, {name.split()[1]}"
                rows[-1].append(tile)
        table = markdown(["layer", "times", "fastest dense", *KEEPS.values()], rows)
        parts.append(f"{cell}:\n\n{table}")
    return "\n\n".join([*parts, written(found)])


def errors() -> str:
    if why := missing("errors"):
        return why
    found = load(NAME)
    tiles = list(next(iter(found["errors"].values())))
    rows = [
        [layer, *[f"{values[tile]:.1e}" for tile in tiles]]
        for layer, values in found["errors"].items()
    ]
    return f"{markdown(['layer', *tiles], rows)}\n\n{written(found)}"


def growth() -> str:
    if why := missing("growth"):
        return why
    found = load(NAME)
    rows = []
    for row in found["growth"]:
        chosen = row["chosen"] == "packed"
        rows.append(
            [
                f"{row['channels']} channels, {row['frames']}x{row['size']}x{row['size']}",
                _ms(row["direct_ms"]),
                _ms(row["all_ms"]),
                row["tile"] if chosen else "direct",
                _ms(row["half_ms"]),
                _ms(row["quarter_ms"]),
            ]
        )
    header = ["layer", "direct", "all columns", "chosen", "half", "a quarter"]
    return f"{markdown(header, rows)}\n\n{written(found)}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} ms" if value < 10 else f"{value:.0f} ms"
