"""The tables of benchmarks/gan_students.py, gan_step.py and gan_infer.py."""

from __future__ import annotations

from typing import Any

from published import RESULTS, load, markdown, origin

LABELS = {
    "input": "the input, untouched",
    "teacher": "the teacher",
    "plain": "plain student",
    "omgd": "OMGD's terms",
    "dcd": "DCD",
    "crd": "CRD",
    "dcd+crd": "DCD and CRD",
}
DIGITS = {"kid": 4, "fid": 2, "l1": 4, "ssim": 4}


def gan_students() -> str:
    """Return KID and FID of both sets, with the differences to the plain student."""
    found = _students()
    if not found:
        return _missing()
    rows = []
    for name, networks in found["figures"].items():
        for number, (network, figures) in enumerate(networks.items()):
            cells = [cell for figure in ("kid", "fid") for cell in _cells(figures, figure)]
            rows.append([name if number == 0 else "", LABELS[network], *cells])
    run = next(iter(found["runs"].values()))
    space = f"[{run['extractor']}]"
    header = ["set", "network", f"KID{space}", "minus plain", f"FID{space}", "minus plain"]
    return f"{markdown(header, rows)}\n\n{_note(found)}\n\n{origin(found)}"


def gan_students_targets() -> str:
    """Return L1 and SSIM to the targets where there are pairs."""
    found = _students()
    if not found:
        return _missing()
    rows = [
        [name if number == 0 else "", LABELS[network], *_cells(figures, "l1"),
         *_cells(figures, "ssim")]
        for name, networks in found["figures"].items()
        if "l1" in networks["plain"]
        for number, (network, figures) in enumerate(networks.items())
    ]  # fmt: skip
    header = ["set", "network", "L1 to the target", "minus plain", "SSIM to it", "minus plain"]
    return f"{markdown(header, rows)}\n\n{origin(found)}"


def gan_step_dcd() -> str:
    """Return multiplications and times of a step of DCD."""
    found = load("gan_step") if (RESULTS / "gan_step.json").is_file() else {}
    part = found.get("dcd")
    if not part:
        return "*Not measured yet: `python benchmarks/gan_step.py --parts dcd`.*"
    labels = {"direct": "with what the released code wastes", "ours": "tenfold"}
    rows = []
    for name, label in labels.items():
        count, times = part["gmac"][name], part[name]
        spread = f"{times['median_ms']:.0f} ({times['p10_ms']:.0f}-{times['p90_ms']:.0f})"
        rows.append(
            [label, f"{count['convolutions']:.1f}", f"{count['matrix_products']:.1f}", spread]
        )
    speedup = part["speedup"]
    rows.append(
        ["faster, paired (quartiles)", "", "", f"{speedup['median']:.2f}x "
         f"({speedup['quartile_low']:.2f} to {speedup['quartile_high']:.2f})"]
    )  # fmt: skip
    header = ["student's step of DCD", "GMAC of convolutions", "of Gram matrices", "ms (10-90 %)"]
    note = (
        f"One image of {part['side']} pixels, teacher of {part['teacher_ngf']} and student of "
        f"{part['student_ngf']} filters, VGG16; forward and backward, real multiplications."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin({**found, 'threads': part['threads']})}"


def gan_step_relations() -> str:
    """Return times and extra memory of CRD's relation terms."""
    found = load("gan_step") if (RESULTS / "gan_step.json").is_file() else {}
    part = found.get("relations")
    if not part:
        return "*Not measured yet: `python benchmarks/gan_step.py --parts relations`.*"
    labels = {"direct": "all differences at once, as in a textbook", "ours": "tenfold"}
    rows = [
        [
            label,
            f"{part[name]['median_ms']:,.0f} ({part[name]['p10_ms']:,.0f}-"
            f"{part[name]['p90_ms']:,.0f})",
            f"{part['extra_peak_mib'][name]:,.0f} MiB",
        ]
        for name, label in labels.items()
    ]
    speedup, memory = part["speedup"], part["extra_peak_mib"]
    rows.append(
        [
            "paired (quartiles); share",
            f"{speedup['median']:.1f}x ({speedup['quartile_low']:.1f} to "
            f"{speedup['quartile_high']:.1f})",
            f"1/{memory['direct'] / memory['ours']:.0f}",
        ]
    )
    header = ["rows, columns and patches, forward and backward", "ms (10-90 %)", "extra memory"]
    note = (
        f"One image of {part['side']} pixels. The values differ by "
        f"{part['value_relative_difference']:.0e}, the gradients by "
        f"{part['gradient_relative_difference']:.0e}, relatively."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin({**found, 'threads': part['threads']})}"


NETWORKS = {
    "resnet9_64": "ResNet-9, 64 filters",
    "mobile9_64": "mobile ResNet-9, 64 filters: the teacher",
    "mobile9_16": "mobile ResNet-9, 16 filters: the student",
    "mobile9_8": "mobile ResNet-9, 8 filters",
}


def gan_infer() -> str:
    """Return the time of each generator in each engine."""
    if not (RESULTS / "gan_infer.json").is_file():
        return "*Not measured yet: `python benchmarks/gan_infer.py`.*"
    found = load("gan_infer")
    engines = list(found["networks"]["mobile9_16"]["engines"])
    rows = []
    for name, network in found["networks"].items():
        times = {engine: network["engines"].get(engine) for engine in engines}
        best = min((t["median_ms"] for t in times.values() if t), default=0.0)
        cells = [
            "" if t is None else f"**{t['median_ms']:.0f}**" if t["median_ms"] == best
            else f"{t['median_ms']:.0f}"
            for t in times.values()
        ]  # fmt: skip
        rows.append([NETWORKS[name], f"{network['gmacs']:.2f}", *cells])
    header = ["ms for one image", "GMAC", *engines]
    ratios = []
    for pair, ratio in found["ratios"].items():
        large, small = pair.split(" / ")
        for key, label in (("out_of_the_box", "without tenfold"), ("with_tenfold", "with it")):
            entry = ratio[key]
            ratios.append(
                [
                    f"{NETWORKS[small].split(':')[0]}, against {NETWORKS[large].split(':')[0]}",
                    label,
                    f"{entry['teacher']} / {entry['student']}",
                    f"**{entry['times_faster']:.1f}x** ({entry['low']:.1f} to {entry['high']:.1f})",
                ]
            )
    versus = ["best engine on each side", "", "engines", "times faster"]
    limit = found["limit_gmacs_a_second"]
    note = (
        f"{found['size']} pixels, batch {found['batch']}, {found['threads']} threads, "
        f"{found['instruction_set']}; the machine's own limit of multiply-adds is about "
        f"{limit:.0f} GMAC/s. Medians of interleaved rounds; real multiplications."
    )
    return f"{markdown(header, rows)}\n\n{markdown(versus, ratios)}\n\n{note}\n\n{origin(found)}"


def _students() -> dict[str, Any]:
    return load("gan_students") if (RESULTS / "gan_students.json").is_file() else {}


def _missing() -> str:
    return "*Not measured yet: `python benchmarks/gan_students.py`.*"


def _cells(figures: dict[str, Any], figure: str) -> list[str]:
    entry, digits = figures[figure], DIGITS[figure]
    deviation = "" if entry["sd"] is None else f" ± {entry['sd']:.{digits}f}"
    found = entry.get("minus_plain")
    if found is None:
        versus = ""
    elif found["low"] is None:
        versus = f"{found['mean']:+.{digits}f}, {found['verdict']}"
    else:
        versus = (
            f"{found['mean']:+.{digits}f} ({found['low']:+.{digits}f} to "
            f"{found['high']:+.{digits}f}), {found['verdict']}"
        )
    return [f"{entry['mean']:.{digits}f}{deviation}", versus]


def _note(found: dict[str, Any]) -> str:
    settings, parts = found["settings"], []
    for name in found["figures"]:
        run = next(run for run in found["runs"].values() if run["set"] == name)
        steps = run["steps"]
        parts.append(
            f"{name}: {run['train_images']} training images, {steps['teacher']:,} steps of the "
            f"teacher and {steps['students']:,} of each student, figures of N={run['test_images']} "
            f"held-out images against {run['reference_images']} real ones"
        )
    return (
        f"{settings['size']} pixels, batch {settings['batch_size']}, mobile ResNet-9 of "
        f"{settings['teacher']} filters as teacher and of {settings['student']} as students, "
        f"discriminators of {settings['ndf']}. {'; '.join(parts)}. "
        "The plain student learns from the discriminator and the L1 distance to the target "
        "(weight 100), or without pairs to the teacher's image (10); all others from the "
        f"discriminator, style x {settings['style']:g} and feature x {settings['feature']:g} in "
        "the extractor's space, and their methods. Last weights, nothing chosen by these figures. "
        "Differences are paired by seed, with their 95 % interval. Another space than Inception's: "
        "no figure here compares with published ones; with so few images FID is biased upwards."
    )
