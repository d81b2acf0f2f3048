"""The tables of benchmarks/smmix.py."""

from __future__ import annotations

from typing import Any

from published import RESULTS, load, markdown, origin, points

SMMIX_LABELS = {"none": "nothing mixed", "cutmix": "Mixup and CutMix", "smmix": "SMMix"}
STEPS = {
    "plain": "nothing mixed",
    "cutmix": "Mixup and CutMix, timm's",
    "mixup step": "SMMix, a step of Mixup",
    "smmix step": "SMMix, a step that mixes by attention",
}


def smmix_time() -> str:
    command = "python benchmarks/smmix.py --parts time mixing"
    found = load("smmix") if (RESULTS / "smmix.json").is_file() else {}
    if not found.get("time"):
        return f"*Not measured yet: `{command}`.*"
    rows = []
    for title, result in found["time"].items():
        for kind, label in STEPS.items():
            times, ratio = result["times"][kind], result["to_cutmix"][kind]
            spread = f"{times['median_ms']:.0f} ({times['p10_ms']:.0f}-{times['p90_ms']:.0f})"
            shown = "" if kind == "cutmix" else _ratio(ratio)
            rows.append([title if kind == "plain" else "", label, spread, shown])
        average = _ratio(result["to_cutmix"]["average"])
        rows.append(["", "SMMix, on average over both", "", f"**{average}**"])
    header = ["network", "training step", "median ms (10-90 %)", "to Mixup and CutMix, paired"]
    return f"{markdown(header, rows)}\n\n{origin(found)}"


def smmix_mixing() -> str:
    command = "python benchmarks/smmix.py --parts time mixing"
    found = load("smmix") if (RESULTS / "smmix.json").is_file() else {}
    if not found.get("mixing"):
        return f"*Not measured yet: `{command}`.*"
    mixing = found["mixing"]
    rows = [
        [
            side,
            *[
                f"{result['times'][name]['median_ms']:.1f}"
                for name in ("unfold", "loop", "tenfold")
            ],
            *[f"{result['faster_than'][name]['median']:.2f}x" for name in ("unfold", "loop")],
        ]
        for side, result in mixing["sides"].items()
    ]
    means = [f"**{mixing['faster_than'][name]:.2f}x**" for name in ("unfold", "loop")]
    rows.append(["geometric mean", "", "", "", *means])
    header = ["side of the square, tokens", "unfold and fold, ms", "loop, ms", "tenfold, ms"]
    header += ["faster than unfold", "faster than the loop"]
    note = (
        f"Windows and pasting of {mixing['batch']} images of {mixing['size']} pixels with "
        f"{mixing['tokens']} x {mixing['tokens']} tokens; all three give the same images."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def smmix_accuracy() -> str:
    return smmix_accuracy_table("smmix_accuracy", "python benchmarks/smmix.py --parts accuracy")


def smmix_accuracy_gpu() -> str:
    return smmix_accuracy_table("smmix_gpu_accuracy", "python benchmarks/smmix.py --full")


def smmix_accuracy_table(name: str, command: str) -> str:
    """Accuracy of each way to mix, and its difference to the others, paired by seed."""
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet: `{command}`.*"
    found = load(name)
    rows = []
    for method, entry in found["accuracy"].items():
        deviation = "" if entry["sd"] is None else f" ± {100 * entry['sd']:.2f}"
        rows.append(
            [
                SMMIX_LABELS[method],
                f"{100 * entry['mean']:.2f} %{deviation}",
                *[points(entry["minus"].get(other)) for other in ("none", "cutmix")],
                f"{entry['cpu_seconds']['mean']:.0f} s",
            ]
        )
    header = [
        "mixing",
        "accuracy ± sd",
        "minus nothing mixed",
        "minus Mixup and CutMix",
        "CPU time",
    ]
    settings = found["settings"]
    run: dict[str, Any] = next(iter(found["runs"].values()))
    size = f" ({settings['depth']} blocks, dim {settings['dim']})" if settings["dim"] else ""
    note = (
        f"{settings['model']}{size} on {run['train_images']:,} training images, "
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, tested on "
        f"{run['test_images']:,}. Differences are in points, paired by seed, with their 95 % "
        "interval."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def _ratio(found: dict[str, float]) -> str:
    quartiles = f"{found['quartile_low']:.2f}-{found['quartile_high']:.2f}"
    return f"{found['median']:.2f}x ({quartiles})"
