"""The tables of benchmarks/supervit.py."""

from __future__ import annotations

from typing import Any

from published import RESULTS, load, markdown, origin, points

COMMAND = "python benchmarks/supervit.py --parts"
RUNTIME_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "pytorch": "PyTorch"}


def speed() -> str:
    found = _part("supervit", "cells")
    if found is None:
        return f"*Not measured yet: `{COMMAND} cells`.*"
    part = found["cells"]
    rows = [
        [
            f"{row['size']}, {row['keep_rate']:g}",
            f"{row['macs'] / 1e9:.3f} G",
            f"{row['ms'] / part['batch']:.1f} ms",
            f"{row['macs_ratio']:.2f}x",
            _interval(row["ours"]),
            f"{row['ours']['of_macs_ratio']:.2f}",
            f"{row['direct']['speedup']:.2f}x",
            f"{row['direct']['of_macs_ratio']:.2f}",
        ]
        for row in part["rows"]
    ]
    header = ["size, keep rate", "MACs", "an image", "fewer MACs", "faster than deit_small"]
    header += ["of the MACs' ratio", "direct wrapper", "of the MACs' ratio"]
    furthest = max(abs(row["counted"] / row["macs"] - 1) for row in part["rows"])
    note = (
        f"Batch {part['batch']}, PyTorch, at least {part['rounds']} interleaved rounds a cell; "
        f"deit_small takes {part['plain_ms'] / part['batch']:.1f} ms an image. PyTorch's counter "
        f"differs from the formula by at most {100 * furthest:.3f} %, the class token's row."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def engines() -> str:
    found = _part("supervit", "engines")
    if found is None:
        return f"*Not measured yet: `{COMMAND} engines`.*"
    part = found["engines"]
    rates = list(part["macs_ratio"])
    rows = []
    for runtime, entry in part["runtimes"].items():
        if "plain_ms" not in entry:
            continue
        name = RUNTIME_NAMES.get(runtime, runtime)
        each = entry["plain_ms"] / part["batch"]
        rows.append([name, f"{each:.1f} ms", *[_interval(entry[rate]) for rate in rates]])
    header = ["engine", "deit_small, an image", *[f"SuperViT, {rate} kept" for rate in rates]]
    limits = ", ".join(f"{ratio:.2f}x at {rate}" for rate, ratio in part["macs_ratio"].items())
    note = (
        f"At 224, batch {part['batch']}; each beside deit_small in the same engine. Fewer "
        f"multiply-adds: {limits}."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def sparse() -> str:
    found = _part("supervit", "sparse")
    if found is None:
        return f"*Not measured yet: `{COMMAND} sparse`.*"
    part = found["sparse"]
    rows = [
        [
            f"2:4, {rate} kept",
            f"{entry['ms'] / part['batch']:.1f} ms",
            f"{entry['speedup']:.2f}x ({entry['low']:.2f} to {entry['high']:.2f})",
            str(entry["packed"]),
        ]
        for rate, entry in part["sparse"].items()
    ]
    best = part["best_dense"]
    header = ["SuperViT at 224", "an image", "faster than deit_small", "layers packed"]
    note = (
        f"Batch {part['batch']}; deit_small in its fastest engine, {best}, takes "
        f"{part['dense_ms'][best] / part['batch']:.1f} ms an image."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def training() -> str:
    found = _part("supervit", "training")
    if found is None:
        return f"*Not measured yet: `{COMMAND} training grid`.*"
    part, whole = found["training"], found.get("grid")
    rows = [
        [
            {"shared": "shared trunk", "apart": "four passes by themselves"}[name],
            f"{part['macs'][name]:.2f}x",
            f"{part[name]['times_plain']:.2f}x ({part[name]['low']:.2f} to "
            f"{part[name]['high']:.2f})",
        ]
        for name in ("shared", "apart")
    ]
    note = (
        f"Batch {part['batch']}, means over the {part['combinations']} combinations of cells that "
        f"a step draws from, {part['rounds']} rounds; a step of deit_small takes "
        f"{part['plain_ms']:.0f} ms."
    )
    if whole:
        note += (
            f" Evaluating all cells with shared work is {_interval(whole)} as fast as one after "
            "the other."
        )
    header = ["a training step of DeiT-small", "multiply-adds", "time, for one of deit_small"]
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def accuracy() -> str:
    return accuracy_table("supervit_accuracy", f"{COMMAND} accuracy")


def accuracy_gpu() -> str:
    return accuracy_table("supervit_accuracy_gpu", f"{COMMAND} accuracy --full")


def accuracy_table(name: str, command: str) -> str:
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet: `{command}`.*"
    found = load(name)
    rows = []
    for cell, entry in found["cells"].items():
        size, rate = cell.split()
        alone = entry["alone"]
        rows.append(
            [
                f"{size}, {rate}",
                f"{found['macs'][cell] / 1e6:.1f} M",
                _share(entry["supervit"]),
                "" if alone is None else _share(alone),
                points(entry["minus"]),
            ]
        )
    settings = found["settings"]
    images = f"{settings['images']:,}" if settings["images"] else "all"
    tested = next(iter(found["runs"].values()))["test_images"]
    kind = ", ".join(f"{key} {value}" for key, value in settings["options"].items())
    note = (
        f"{settings['model']} ({kind}) on {images} training images, {settings['epochs']} epochs, "
        f"batch {settings['batch_size']}, tested on {tested:,}. A network of its own is a plain "
        "ViT at that size, or one that is trained at that keep rate alone. Differences are in "
        "points, paired by seed, with their 95 % interval."
    )
    header = ["size, keep rate", "MACs", "one SuperViT", "a network of its own", "difference"]
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def _part(name: str, part: str) -> dict[str, Any] | None:
    if not (RESULTS / f"{name}.json").is_file():
        return None
    found = load(name)
    return found if found.get(part) else None


def _interval(found: dict[str, float]) -> str:
    return f"{found['speedup']:.2f}x ({found['low']:.2f} to {found['high']:.2f})"


def _share(found: dict[str, Any]) -> str:
    deviation = "" if found["sd"] is None else f" ± {100 * found['sd']:.2f}"
    return f"{100 * found['mean']:.2f} %{deviation}"
