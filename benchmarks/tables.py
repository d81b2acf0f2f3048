"""Write the tables of the docs from benchmarks/results/*.json, or check that they are up to date.

    python benchmarks/tables.py [--check]

A page marks a table's place by `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gan_tables
import shadow_tables
import supervit_tables
import training_tables
import vit_tables
import winograd_tables
from published import RESULTS, ROOT, load, markdown, origin, percent, points

MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def lbc_step() -> str:
    found = load("lbc_overhead")
    rows = []
    for case, result in found["step"].items():
        dense = result["times"]["dense"]
        rows.append([case, "dense", _spread(dense), ""])
        for name, ratio in result["overhead"].items():
            overhead = (
                f"{percent(ratio['median'])} "
                f"({percent(ratio['quartile_low'])} to {percent(ratio['quartile_high'])})"
            )
            rows.append(["", name, _spread(result["times"][name]), overhead])
    header = ["network", "step", "median ms (10-90 %)", "overhead, paired (quartiles)"]
    return f"{markdown(header, rows)}\n\n{origin(found)}"


def lbc_memory() -> str:
    found = load("lbc_overhead")
    rows = []
    for name, patterns in found["score_memory"].items():
        sizes = {key: value for key, value in patterns.items() if ":" in key}
        small = next(iter(sizes.values()))["accumulator_MiB"]
        rows.append(
            [
                name.removeprefix("timm/"),
                f"{patterns['sparse_weights']:,}",
                f"{small:.0f} MiB",
                *[f"{value['full_MiB']:.0f} MiB" for value in sizes.values()],
            ]
        )
    patterns = [key for key in next(iter(found["score_memory"].values())) if ":" in key]
    header = ["network", "sparse weights", "SGD, any pattern", *[f"Adam, {p}" for p in patterns]]
    note = "Counted from the networks' shapes; alive candidates not included."
    return f"{markdown(header, rows)}\n\n{note}"


def lbc_accuracy() -> str:
    return accuracy_table("lbc_accuracy", "python benchmarks/lbc.py")


def lbc_accuracy_gpu() -> str:
    return accuracy_table("lbc_accuracy_gpu", "python benchmarks/lbc.py --full")


def accuracy_table(name: str, command: str) -> str:
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet: `{command}`.*"
    found = load(name)
    others = ["dense", "magnitude", "srste"]
    if any("random" in methods for methods in found["accuracy"].values()):
        others.append("random")
    rows = []
    for pattern, methods in found["accuracy"].items():
        for method, entry in methods.items():
            deviation = "" if entry["sd"] is None else f" ± {100 * entry['sd']:.2f}"
            rows.append(
                [
                    "" if pattern == "dense" else pattern,
                    LABELS[method],
                    f"{100 * entry['mean']:.2f} %{deviation}",
                    *[points(entry.get("minus", {}).get(other)) for other in others],
                ]
            )
    header = ["pattern", "method", "accuracy ± sd", *[f"minus {LABELS[name]}" for name in others]]
    settings = found["settings"]
    images = f"{settings['images']:,}" if settings["images"] else "all"
    tested = next(iter(found["runs"].values()))["test_images"]
    note = (
        f"{settings['model']} on {images} training images, {settings['epochs']} epochs, batch "
        f"{settings['batch_size']}, tested on {tested:,}. Differences are in points, paired by "
        "seed, with their 95 % interval."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def folder_startup() -> str:
    found = load("folder_startup")
    titles = {
        "first": "tenfold, first start",
        "second": "tenfold, list kept",
        "torchvision": "torchvision's ImageFolder",
    }
    rows = [
        [
            title,
            f"{start['cpu_seconds']:.2f} s",
            f"{start['seconds']:.2f} s",
            f"{start['bytes_per_file']:.0f} bytes",
        ]
        for title, start in ((titles[name], start) for name, start in found["starts"].items())
    ]
    header = [f"{found['files']:,} files in {found['folders']:,} folders"]
    header += ["CPU time", "wall time", "memory per file"]
    return f"{markdown(header, rows)}\n\n{origin(found)}"


# Rows of the table with the speedups that we aim at.
GOALS = {
    "layers": ("ResNet-50's convolutions", (1.6, 2.8, 4.5, 7.0)),
    "resnet50": ("ResNet-50", (1.4, 2.2, 3.2, 4.0)),
    "deit_small": ("DeiT-small", (1.3, 2.0, 2.8, 3.5)),
}


def nm_engine() -> str:
    if not (RESULTS / "nm_engine.json").is_file():
        return "*Not measured yet: `python benchmarks/nm_engine.py`.*"
    found = load("nm_engine")
    rows = []
    for part, (title, goals) in GOALS.items():
        rows.append([f"{title}: goal", "", "", *[f"{goal:g}x" for goal in goals]])
        for cell, result in sorted(found[part].items()):
            if part == "layers":
                values = list(result["geometric_mean"].values())
                ranges, best = [""] * len(values), "each layer's own"
            else:
                values = [value["speedup"] for value in result["sparse"].values()]
                ranges = [
                    f" ({v['low']:.2f} to {v['high']:.2f})" for v in result["sparse"].values()
                ]
                best = f"{result['best_dense']}, {result['dense_ms'][result['best_dense']]:.1f} ms"
            speedups = [
                f"**{value:.2f}x**{shown}" if value >= goal else f"{value:.2f}x{shown}"
                for value, goal, shown in zip(values, goals, ranges, strict=True)
            ]
            rows.append(["", cell, best, *speedups])
    patterns = list(next(iter(found["resnet50"].values()))["sparse"])
    return f"{markdown(['', 'cell', 'fastest dense', *patterns], rows)}\n\n{nm_origin(found)}"


def nm_layers() -> str:
    if not (RESULTS / "nm_engine.json").is_file():
        return "*Not measured yet: `python benchmarks/nm_engine.py`.*"
    found = load("nm_engine")
    if not found["layers"]:
        return "*Not measured yet: `python benchmarks/nm_engine.py --only layers`.*"
    cell, result = next(iter(found["layers"].items()))
    rows = [
        [
            row["layer"],
            str(row["count"]),
            f"{row['best_dense']}, {row['dense_ms'][row['best_dense']]:.3f} ms",
            *[f"{v['speedup']:.2f}x, {v['gmacs']:.0f}" for v in row["sparse"].values()],
        ]
        for row in result["rows"]
    ]
    patterns = list(result["geometric_mean"])
    registers, cache = result["peak_gmacs_a_thread"]
    note = (
        f"{cell}. Beside the speedup: billions of multiply-adds a second, of non-zeros alone. A "
        f"thread of this machine does at most {registers:.0f} with all operands in registers, and "
        f"{cache:.0f} with one of them in the first-level cache."
    )
    header = ["layer", "times", "fastest dense", *patterns]
    return f"{markdown(header, rows)}\n\n{note}\n\n{nm_origin(found)}"


def nm_costs() -> str:
    if not (RESULTS / "nm_engine.json").is_file():
        return "*Not measured yet: `python benchmarks/nm_engine.py`.*"
    found = load("nm_engine")
    extras = found["extras"]
    if not extras:
        return "*Not measured yet: `python benchmarks/nm_engine.py --only extras`.*"
    rows = [
        [
            name,
            f"{extras['disk_bytes'][name] / 2**20:.1f} MiB",
            f"{extras['memory_mib'][name]:.0f} MiB",
            f"{extras['packing_seconds'][name]:.1f} s" if name in extras["scaling"] else "",
            f"{extras['scaling'][name]:.2f}x" if name in extras["scaling"] else "",
        ]
        for name in extras["disk_bytes"]
    ]
    header = ["ResNet-50", "on disk", "memory of a batch of 8", "to pack", "two threads for one"]
    sizes = [[size, f"{ms:.2f} ms"] for size, ms in extras["sizes"].items()]
    return (
        f"{markdown(header, rows)}\n\n{markdown(['2:4, one thread', 'an image'], sizes)}\n\n"
        f"{nm_origin(found)}"
    )


def nm_profile() -> str:
    if not (RESULTS / "nm_profile.json").is_file():
        return "*Not measured yet: `python benchmarks/nm_profile.py`.*"
    found = load("nm_profile")
    rows = []
    for name, (title, _) in GOALS.items():
        for pattern, result in found.get(name, {}).items():
            kinds = result["kinds"]
            times = [
                f"{kinds[kind]['ms']:.1f} ms" if kind in kinds else ""
                for kind in ("packed layers", "dense layers", "attention", "all else")
            ]
            bound = f"{result['bound_ms']:.1f} ms"
            rows.append([title, pattern, f"{result['ms']:.1f} ms", *times, bound])
            title = ""
    header = ["", "", "whole", "packed layers", "dense layers", "attention", "all else", "bound"]
    threads = f"{found['kernels']} kernels, 1"
    return f"{markdown(header, rows)}\n\n{origin({**found, 'threads': threads})}"


def nm_origin(found: dict[str, Any]) -> str:
    return origin({**found, "threads": f"{found['kernels']} kernels, 1 and 2"})


def quickstart() -> str:
    return bench_table("quickstart")


def cifar10_run() -> str:
    return bench_table("cifar10_run")


def small_resnet20() -> str:
    if not (RESULTS / "small_resnet20.json").is_file():
        return "*Not measured yet: the commands above.*"
    return bench_table("small_resnet20")


def bench_table(name: str) -> str:
    found = load(name)
    models = found["models"]
    rows = [
        ["accuracy", *[f"{100 * found['accuracy'][m]:.2f} %" for m in models], ""],
        ["bytes on disk", *[_bytes(found["size"][m]["packed_bytes"]) for m in models], ""],
        ["MACs, effective", *[_millions(found["size"][m]["effective_macs"]) for m in models], ""],
    ]
    latency = found["latency"]
    for row in latency:
        if row["model"] != models[0]:
            continue
        same = [r for r in latency if (r["runtime"], r["batch"]) == (row["runtime"], row["batch"])]
        times = [
            f"{r['median_ms']:.3g} ms ({r['p10_ms']:.3g}-{r['p90_ms']:.3g})"
            for model in models
            for r in same
            if r["model"] == model
        ]
        last = same[-1]
        ratio = f"{last['ratio']:.2f}x ({last['ratio_low']:.2f}-{last['ratio_high']:.2f}), "
        rows.append([f"{row['runtime']}, batch {row['batch']}", *times, ratio + last["verdict"]])
    skipped = "".join(f"\n{s['runtime']}: not timed, {s['reason']}.  " for s in found["skipped"])
    header = ["", *models, "speed"]
    return f"{markdown(header, rows)}\n{skipped}\n{origin(found)}"


LABELS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "srste": "SR-STE",
    "lbc": "LBC",
    "random": "random removal",
}

TABLES: dict[str, Callable[[], str]] = {
    "lbc_accuracy": lbc_accuracy,
    "lbc_accuracy_gpu": lbc_accuracy_gpu,
    "lts_accuracy": training_tables.lts_accuracy,
    "lts_step": training_tables.lts_step,
    "lts_gpu": training_tables.lts_gpu,
    "kcd_accuracy": training_tables.kcd_accuracy,
    "kcd_accuracy_gpu": training_tables.kcd_accuracy_gpu,
    "kcd_time": training_tables.kcd_time,
    "smmix_time": vit_tables.smmix_time,
    "smmix_mixing": vit_tables.smmix_mixing,
    "smmix_accuracy": vit_tables.smmix_accuracy,
    "smmix_accuracy_gpu": vit_tables.smmix_accuracy_gpu,
    "nm_engine": nm_engine,
    "nm_layers": nm_layers,
    "nm_costs": nm_costs,
    "nm_profile": nm_profile,
    "supervit_speed": supervit_tables.speed,
    "supervit_engines": supervit_tables.engines,
    "supervit_training": supervit_tables.training,
    "supervit_sparse": supervit_tables.sparse,
    "supervit_accuracy": supervit_tables.accuracy,
    "supervit_accuracy_gpu": supervit_tables.accuracy_gpu,
    "winograd3d_speed": winograd_tables.speed,
    "winograd3d_layers": winograd_tables.layers,
    "winograd3d_errors": winograd_tables.errors,
    "winograd3d_growth": winograd_tables.growth,
    "winograd3d_accuracy": winograd_tables.accuracy,
    "winograd3d_accuracy_longer": winograd_tables.longer_accuracy,
    "winograd3d_memory": winograd_tables.memory,
    "gan_students": gan_tables.gan_students,
    "gan_students_targets": gan_tables.gan_students_targets,
    "gan_step_dcd": gan_tables.gan_step_dcd,
    "gan_step_relations": gan_tables.gan_step_relations,
    "gan_infer": gan_tables.gan_infer,
    "shadow_training": shadow_tables.shadow_training,
    "labnet_speed": shadow_tables.labnet_speed,
    "shadow_speed": shadow_tables.shadow_speed,
    "shadow_photo": shadow_tables.shadow_photo,
    "lbc_step": lbc_step,
    "lbc_memory": lbc_memory,
    "folder_startup": folder_startup,
    "quickstart": quickstart,
    "cifar10_run": cifar10_run,
    "small_resnet20": small_resnet20,
}


def rendered(text: str) -> str:
    """Return a page with its tables as the results have them."""
    return MARK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, fail if a page differs"
    )
    check = parser.parse_args().check
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if rendered(text) != text:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(rendered(text), encoding="utf-8")
    for page in stale:
        print(f"{page}: {'differs from benchmarks/results' if check else 'written'}")
    return 1 if check and stale else 0


def _spread(times: dict[str, float]) -> str:
    return f"{times['median_ms']:.0f} ({times['p10_ms']:.0f}-{times['p90_ms']:.0f})"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f} MB"


def _millions(value: int) -> str:
    return f"{value / 1e6:.1f} M"


if __name__ == "__main__":
    sys.exit(main())
