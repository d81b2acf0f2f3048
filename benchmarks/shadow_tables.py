"""The tables of the benchmarks of shadow removal."""

from __future__ import annotations

from typing import Any

from published import RESULTS, load, markdown, origin

REMOVERS = {
    "input": "the photo as it is",
    "one affine LAB fit": "one affine LAB fit, learnt from the training scenes",
    "ring-matched gain": "ring-matched gain, narrow ring",
    "ring-matched gain, wide ring": "ring-matched gain, wide ring",
    "the guess by the ring": "the guess that all networks below start from",
    "oracle gain (knows the truth)": "oracle gain, which knows the truth",
    "pairs": "LAB-Net, width 8, from pairs",
    "hqss": "the same, from HQSS's pseudo pairs",
    "rendered": "the same, from rendered shadows alone",
    "unet": "RGB U-Net, from pairs",
    "wide": "LAB-Net, width 16, from pairs",
    "distilled": "LAB-Net, width 8, distilled from width 16",
    "sparse": "LAB-Net, width 16 at 1:4, distilled from width 16",
}
ENGINES = {
    "naive": "the released code's loop form",
    "pytorch": "PyTorch, as it is",
    "torch.compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tenfold": "`tenfold.optimize`",
}
NETWORKS = {
    "c32": "width 32, attention 256",
    "c8": "width 8, attention 64",
    "c16": "width 16, attention 64",
    "c16_1:4": "width 16 at 1:4, attention 64",
}


def shadow_training() -> str:
    """Return errors of what removes shadows, trained or not, on the held-out scenes."""
    found = _found("shadow_training")
    if not found:
        return "*Not measured yet: `python benchmarks/shadow_training.py`.*"
    rows = []
    wide = found["untrained"]["scenes_of_ring_gain"]
    for name, figures in found["untrained"]["figures"].items():
        rows.append([REMOVERS[name], "", "", *_figures(figures), ""])
    for name, figures in found["figures"].items():
        run = next(run for key, run in found["runs"].items() if key.startswith(f"{name}-"))
        below = sum(mine < ring for mine, ring in zip(figures["scenes"], wide, strict=True))
        rows.append(
            [
                REMOVERS[name],
                f"{run['nonzero_parameters']:,}",
                f"{run['gmacs']:.1f}",
                *_figures(figures),
                f"{below} of {len(wide)}",
            ]
        )
    header = ["", "weights that aren't 0", "GMACs at 256²", "shadow", "non-shadow", "all"]
    header += ["PSNR", "scenes below the wide ring"]
    seeds = len({run["seed"] for run in found["runs"].values()})
    settings = found["settings"]
    note = (
        f'LAB MAE (the field\'s "RMSE") and PSNR of {len(wide)} held-out scenes at 256 x 256, '
        f"means of the scenes' own, and of {seeds} seeds with their standard deviation. "
        f"{settings['epochs']} epochs of 32 photos, crops of {settings['size']} pixels; networks "
        f"see copies with a shorter side of {settings['side']}."
    )
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def labnet_speed() -> str:
    """Return times of LAB-Net in every engine, everything included."""
    found = _found("labnet")
    if not found:
        return "*Not measured yet: `python benchmarks/labnet.py`.*"
    rows = []
    for size, part in found["sizes"].items():
        for name, network in part["networks"].items():
            for number, (engine, cell) in enumerate(network["engines"].items()):
                label = f"{size}, {NETWORKS[name]}" if number == 0 else ""
                if "median_ms" not in cell:
                    rows.append([label, ENGINES[engine], "not run", "", "", ""])
                    continue
                faster = network["times_faster"].get(engine)
                share = cell["share_of_limit"]
                rows.append(
                    [
                        label,
                        ENGINES[engine],
                        f"{cell['median_ms']:,.0f}",
                        f"{cell['images_a_second']:.2f}",
                        f"{faster['median']:.2f}x" if faster else "",
                        f"{share:.0%}" if share else "",
                    ]
                )
    header = ["", "engine", "ms an image", "images a second", "tenfold is faster by"]
    header += ["share of the FMA limit"]
    part = next(iter(found["sizes"].values()))
    note = (
        f"From an RGB image and a mask to an RGB image, {part['threads']} threads, medians of "
        "rounds in turn. Multiply-adds with zero weights count for the share."
    )
    timed = {**found, "threads": part["threads"]}
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(timed)}"


def shadow_speed() -> str:
    """Return how fast the evaluator and the loader are, beside loops with scikit-image."""
    rows = []
    sources = []
    found = _found("shadow_evaluation")
    if found:
        sources.append(found)
        for part, label in (("figures", "errors of photos in memory, 256 x 256"),
                            ("folders", f"folders of {found['folders']['files']}")):  # fmt: skip
            cell = found[part]
            rows.append(
                [
                    f"`evaluate-shadows`: {label}",
                    f"{cell['loop']['median_ms_per_image']:.1f}",
                    f"{cell['ours']['median_ms_per_image']:.1f}",
                    _ratio(cell["speedup"]),
                ]
            )
    found = _found("shadow_batches")
    if found:
        sources.append(found)
        for cell in found.values():
            if isinstance(cell, dict) and "loader" in cell:
                rows.append(
                    [
                        f"batches to train on: {cell['files']}, crops of {cell['crop']}",
                        f"{cell['loader']['median_ms_per_photo']:.1f}",
                        f"{cell['ours']['median_ms_per_photo']:.1f}",
                        _ratio(cell["speedup"]),
                    ]
                )
    if not rows:
        return "*Not measured yet: `python benchmarks/shadow_evaluation.py`, `shadow_batches.py`.*"
    header = ["", "photo by photo with scikit-image, ms", "tenfold, ms", "faster by (quartiles)"]
    notes = "\n\n".join(origin(each) for each in sources)
    return f"{markdown(header, rows)}\n\nMilliseconds a photo.\n\n{notes}"


def shadow_photo() -> str:
    """Return what a photo of twelve million pixels takes from file to file."""
    found = _found("shadow_photo")
    if not found:
        return "*Not measured yet: `python benchmarks/shadow_photo.py`.*"
    rows = []
    for width, cell in found["widths"].items():
        memory = cell["memory"]
        rows.append(
            [
                f"LAB-Net of width {width}",
                *(f"{cell[part]['median_ms'] / 1000:.2f} s" for part in ("whole", "network")),
                f"{memory['largest_mb'] - memory['before_mb']:.0f} MB",
            ]
        )
    part = next(iter(found["widths"].values()))
    size = " x ".join(str(side) for side in reversed(found["size"]))
    note = (
        f"A JPEG of {size} pixels, {found['threads']} threads: read, mask, the network on a copy "
        f'of {part["seen"][1]} x {part["seen"][0]}, and written. "The network in PyTorch" is that '
        "alone without compiled kernels, which the whole uses. Memory is what the process's "
        f"largest grew by; the photo itself has {part['memory']['photo_mb']:.0f} MB."
    )
    header = ["", "from file to file", "the network in PyTorch", "memory beyond the network's"]
    return f"{markdown(header, rows)}\n\n{note}\n\n{origin(found)}"


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.1f}x ({value['quartile_low']:.1f} to {value['quartile_high']:.1f})"


def _found(name: str) -> dict[str, Any]:
    return load(name) if (RESULTS / f"{name}.json").is_file() else {}


def _figures(figures: dict[str, Any]) -> list[str]:
    names = ("shadow_lab_mae", "non-shadow_lab_mae", "all_lab_mae", "all_psnr")
    return [_spread(figures[name]) for name in names]


def _spread(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:.2f}"
    deviation = "" if value["sd"] is None else f" ± {value['sd']:.2f}"
    return f"{value['mean']:.2f}{deviation}"
