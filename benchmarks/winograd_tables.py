"""The tables of Winograd3d: speed, errors, accuracy and memory."""

from __future__ import annotations

from typing import Any

from published import RESULTS, load, markdown, origin, points

NAME = "winograd3d"
KEEPS = {"all": "all columns", "half": "half", "quarter": "a quarter"}
SHARES = {1.0: "all", 0.5: "1/2", 0.25: "1/4"}
LABELS = {
    "start": "the trained network",
    "dense": "dense, fine-tuned",
    "vanilla": "vanilla Winograd",
    "rank4": "rank 4",
    "rank8": "rank 8",
}
LONGER = "--tune_epochs 6 --tiles 2 --keeps 0.5"  # what makes winograd_accuracy_long
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


def accuracy(name: str = "winograd_accuracy") -> str:
    if not (RESULTS / f"{name}.json").is_file():
        more = "" if name == "winograd_accuracy" else f" {LONGER} --output {name}"
        return f"*Not measured yet: `python benchmarks/winograd_accuracy.py{more}`.*"
    found = load(name)
    versus = ("dense", "vanilla", "compensated")
    rows = []
    for setting, methods in sorted(found["accuracy"].items(), key=_place):
        tile, kept = _said(setting)
        for method, entry in sorted(methods.items(), key=lambda item: list(LABELS).index(item[0])):
            deviation = "" if entry["sd"] is None else f" ± {100 * entry['sd']:.2f}"
            mean = f"{100 * entry['mean']:.2f} %{deviation}"
            minus = [points(entry["minus"].get(other)) for other in versus]
            rows.append([tile, kept, LABELS[method], mean, *minus])
            tile = ""
    settings = found["settings"]
    run = next(iter(found["runs"].values()))
    note = (
        f"C3D of width {settings['width']} on clips of 8x{settings['size']}x{settings['size']}: "
        f"{settings['epochs']} epochs over {settings['train_clips']:,} clips, then "
        f"{settings['tune_epochs']} epochs of fine-tuning, tested on {run['test_clips']:,} clips "
        "of other photos. Differences are in points, paired by seed, with their 95 % interval; "
        "`compensated` is the same run with compensation."
    )
    header = ["", "columns", "trained", "accuracy ± sd"]
    header += ["minus dense", "minus vanilla", "minus compensated"]
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def longer_accuracy() -> str:
    return accuracy("winograd_accuracy_long")


def _place(item: tuple[str, Any]) -> tuple[int, str, float, bool]:
    """Order settings: dense first, then by tile and share of columns, compensated ones first."""
    words = item[0].split()
    if len(words) == 1:
        return 0, "", 0.0, False
    return 1, words[0], -float(words[2]), len(words) > 3


def _said(setting: str) -> tuple[str, str]:
    tile, _, rest = setting.partition(" keep ")
    if not rest:
        return "", ""
    share, _, plain = rest.partition(" ")
    shares = SHARES.get(float(share), share)
    return tile, f"{shares}, {plain}" if plain else shares


def memory() -> str:
    name = "winograd_memory"
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet: `python benchmarks/{name}.py`.*"
    found = load(name)
    rows = []
    for network, forms in found["networks"].items():
        title, dense = network, forms["dense"]["trained"]
        for form, entry in forms.items():
            trained = f"{entry['trained'] / 1e6:.2f} M ({entry['trained'] / dense:.2f}x)"
            frozen = f"{entry['frozen'] / 1e6:.1f} M" if entry["frozen"] else ""
            sizes = [f"{entry[key] / 2**20:.0f} MiB" for key in ("sgd_bytes", "adamw_bytes")]
            rows.append([title, form, trained, frozen, *sizes])
            title = ""
    header = ["", "form", "trained in converted layers", "frozen there"]
    header += ["state of SGD with momentum", "of AdamW"]
    note = "Both states are of the whole network, with all that is not converted."
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} ms" if value < 10 else f"{value:.0f} ms"
