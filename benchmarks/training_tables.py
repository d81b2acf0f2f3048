"""The tables of benchmarks/lts.py and benchmarks/kcd.py."""

from __future__ import annotations

from typing import Any

from published import RESULTS, load, markdown, origin, percent, points

LTS_LABELS = {"float": "in floats", "qat": "without freezing", "lts": "LTS"}
KCD_LABELS = {
    "student": "student alone",
    "kd": "KD, all samples",
    "kcd": "KCD",
    "random": "random dropping",
}


def lts_accuracy() -> str:
    return lts_accuracy_table("lts", "python benchmarks/lts.py")


def lts_gpu() -> str:
    return lts_accuracy_table("lts_gpu", "python benchmarks/lts.py --full")


def lts_accuracy_table(name: str, command: str) -> str:
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet: `{command}`.*"
    found = load(name)
    if not found["accuracy"]:
        return f"*Not measured yet: `{command} --parts accuracy`.*"
    rows = []
    for bits, methods in sorted(found["accuracy"].items(), key=lambda item: -int(item[0])):
        for method in ("float", "qat", "lts"):
            entry = methods.get(method)
            if entry is None:
                continue
            deviation = "" if entry["sd"] is None else f" ± {100 * entry['sd']:.2f}"
            saved = entry.get("saved")
            counted = ["", "", ""]
            if saved is not None:
                keys = ("updates", "backward", "backward_by_work")
                counted = [f"{100 * saved[key]:.1f} %" for key in keys]
            rows.append(
                [
                    "" if method in ("float", "lts") else f"{bits} bits",
                    LTS_LABELS[method],
                    f"{100 * entry['mean']:.2f} %{deviation}",
                    points(entry.get("minus")),
                    *counted,
                ]
            )
    header = ["", "training", "accuracy ± sd", "minus without freezing", "updates saved"]
    header += ["backward, counted", "by layers' work"]
    settings = found["settings"]["accuracy"]
    images = f"{settings['images']:,}" if settings["images"] else "all"
    tested = next(iter(found["runs"].values()))["test_images"]
    start = settings["start"] or f"{settings['float_epochs']} epochs in floats"
    note = (
        f"{settings['model']} on {images} training images, {settings['epochs']} epochs "
        f"after {start}, batch {settings['batch_size']}, tested on {tested:,}. Differences are in "
        "points, paired by seed, with their 95 % interval."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def lts_step() -> str:
    command = "python benchmarks/lts.py --parts step bookkeeping"
    if not (RESULTS / "lts.json").is_file():
        return f"*Not measured yet: `{command}`.*"
    found = load("lts")
    if not found["step"] or not found["bookkeeping"]:
        return f"*Not measured yet: `{command}`.*"
    rows = [
        [
            f"{share} of the run",
            f"{100 * row['frozen']:.1f} %",
            f"{100 * row['left_out']:.1f} %",
            f"{row['dense_ms']:.0f} ms",
            f"{row['saving_ms']:.0f} ms",
            f"{100 * row['share']:.1f} %",
            f"{row['gradient_difference']:.0e}",
        ]
        for share, row in found["step"].items()
    ]
    header = ["ResNet-18, 2 bits", "weights frozen", "of the weights' gradients left out"]
    header += ["whole step", "with the saving", "saved", "gradients differ by"]
    settings = found["settings"]["step"]
    batch = next(iter(found["step"].values()))["batch_size"]
    images = f"{settings['images']:,}" if settings["images"] else "all"
    note = (
        f"Batch {batch}; from checkpoints of one run of {settings['epochs']} epochs on {images} "
        f"images, batch {settings['batch_size']}."
    )
    model, kept = next(iter(found["bookkeeping"].items()))
    ratio = kept["overhead"]
    note += (
        f" Bookkeeping in {model}, batch 128: {percent(ratio['median'])} of a step, quartiles "
        f"{percent(ratio['quartile_low'])} to {percent(ratio['quartile_high'])}."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def kcd_accuracy() -> str:
    return kcd_table("kcd", "python benchmarks/kcd.py")


def kcd_accuracy_gpu() -> str:
    return kcd_table("kcd_gpu", "python benchmarks/kcd.py --full")


def kcd_table(name: str, command: str) -> str:
    """Accuracy of each method, and its difference to the others that it must be held against."""
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet: `{command}`.*"
    found = load(name)
    gpu = found["settings"]["device"] == "cuda"
    rows = []
    for method, entry in found["comparison"].get("accuracy", {}).items():
        kind, _, ratio = method.partition(" ")
        passes = [entry["forwards"][seed] for seed in entry["forwards"]]
        deviation = (
            "" if entry["accuracy"]["sd"] is None else f" ± {100 * entry['accuracy']['sd']:.2f}"
        )
        minus = entry["minus"]
        rows.append(
            [
                f"{KCD_LABELS[kind]}{f', {ratio} kept' if ratio else ''}",
                f"{100 * entry['accuracy']['mean']:.2f} %{deviation}",
                points(minus.get("kd")) if kind != "student" else "",
                points(minus.get(f"random {ratio}")) if kind == "kcd" else "",
                _passes(passes, "student"),
                _passes(passes, "teacher"),
                f"{entry['seconds' if gpu else 'cpu_seconds']['mean']:.0f} s",
            ]
        )
    header = ["method", "accuracy ± sd", "minus KD", "minus random"]
    header += ["student's passes", "teacher's passes", "time" if gpu else "CPU time"]
    settings, teacher = found["settings"], found["teacher"]
    images = f"{settings['images']:,}" if settings["images"] else "all"
    tested = next(iter(found["runs"].values()))["test_images"]
    note = (
        f"{settings['teacher']} ({100 * teacher['accuracy']:.2f} %, {teacher['epochs']} epochs "
        f"over {teacher['images']:,} images) teaches {settings['student']} on {images} images, "
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, tested on {tested:,}. "
        "Differences are in points, paired by seed, with their 95 % interval."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def kcd_time() -> str:
    return kcd_time_table("kcd_time", "python benchmarks/kcd.py --time")


def kcd_time_table(name: str, command: str) -> str:
    """What condensation saves where the teacher answers every batch: counted, and by the clock."""
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet: `{command}`.*"
    found = load(name)
    entries = found["comparison"].get("time", {})
    if not entries:
        return f"*Not measured yet: `{command} --parts time`.*"
    plain = entries.get("kd")
    rows = []
    for method, entry in entries.items():
        passes = [entry["forwards"][seed] for seed in entry["forwards"]]
        counted = ""
        if plain is not None and method != "kd":
            theirs = sum(p["student"] + p["teacher"] for p in plain["forwards"].values())
            ours = sum(p["student"] + p["teacher"] for p in passes)
            counted = f"{1 - ours / len(passes) / (theirs / len(plain['forwards'])):.1%}"
        rows.append(
            [
                f"{KCD_LABELS[method.partition(' ')[0]]} {method.partition(' ')[2]}".strip(),
                _passes(passes, "student"),
                _passes(passes, "teacher"),
                counted,
                f"{entry['seconds']['mean']:.1f} s",
                _share(entry.get("time_saved")),
                _share(entry.get("cpu_saved")),
            ]
        )
    header = ["method", "student's passes", "teacher's passes", "fewer passes", "training"]
    header += ["less time", "less CPU time"]
    return f"{markdown(header, rows)}\n\n{origin(found)}"


def _passes(passes: list[dict[str, int]], network: str) -> str:
    counts = {entry[network] for entry in passes}
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


def _share(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['mean']:.1%}, one seed"
    return f"{found['mean']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
