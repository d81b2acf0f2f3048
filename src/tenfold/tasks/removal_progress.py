"""What a run that removes shadows shows as it goes and at its end: lines, curves and pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tenfold.measure.shadow_errors import REGIONS, ShadowErrors
from tenfold.nn.lab import rgb_to_lab
from tenfold.tasks.folder import RunFolder, write_json
from tenfold.tasks.records import png
from tenfold.tasks.removal_evaluation import (
    RemovalEvaluation,
    Table,
    floats,
    removed,
)
from tenfold.tasks.removal_setup import RemovalExperiment
from tenfold.tasks.shadow_removal import ShadowRemoval

__all__ = ["RemovalProgress", "error_map", "pictures_of", "write_removal_record"]

COLUMNS, LINE = 3, 2  # of a picture; pixels between its parts
FULL_SCALE = 60.0  # |dL| + |da| + |db| that is white in an error map
# Black, violet, red, yellow, white: brighter is worse, and it reads in grey as well.
_COLOURS = ((0, 0, 0), (70, 20, 110), (200, 50, 60), (250, 190, 60), (255, 255, 255))
# Title, axis, and column of metrics.csv by label.
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "LAB error of held-out photos (MAE, the field's RMSE)",
        "|dL| + |da| + |db|",
        {
            "test_shadow_lab_mae": "shadow",
            "test_nonshadow_lab_mae": "non-shadow",
            "test_all_lab_mae": "all",
        },
    ),
    ("PSNR of held-out photos", "dB", {"test_all_psnr": "all", "test_shadow_psnr": "shadow"}),
    (
        "Parts of the loss",
        "without weights, mean of an epoch",
        {
            f"loss_{name}": name
            for name in ("perceptual", "gradient", "mse", "distillation", "removal", "refinement",
                         "area")
        },
    ),
)  # fmt: skip


class RemovalProgress(pl.Callback):
    """Say what was found on held-out photos, and write the record and the report anew.

    Args:
        experiment: the objects of the run.
        folder: of the run.
    """

    def __init__(self, experiment: RemovalExperiment, folder: RunFolder) -> None:
        self.experiment = experiment
        self.folder = folder
        self._told: RemovalEvaluation | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of an epoch that was evaluated, once its row is in `metrics.csv`."""
        assert isinstance(pl_module, ShadowRemoval)
        found = pl_module.evaluated
        if not trainer.is_global_zero or found is None or found is self._told:
            return
        self._told = found
        assert found.result is not None
        assert found.untouched is not None
        if not sys.stdout.isatty():
            parts = [
                f"{region} {_number(found.untouched[region]['lab_mae'])} → "
                f"{_number(row['lab_mae'])}"
                for region, row in found.result.items()
            ]
            print(f"   held out, LAB MAE: {', '.join(parts)}", flush=True)
        write_removal_record(self.experiment, self.folder)
        from tenfold.report import write_report

        write_report(self.folder.path)


def write_removal_record(
    experiment: RemovalExperiment,
    folder: RunFolder,
    evaluation: RemovalEvaluation | None = None,
    baselines: Mapping[str, Table] | None = None,
    pictures: Sequence[dict[str, Any]] = (),
) -> None:
    """Write `methods.json`: facts, curves and pictures, for the report.

    Args:
        experiment: the objects of the run.
        folder: of the run.
        evaluation: of the finished network.
        baselines: figures of what removes shadows without one, by name.
        pictures: groups of them, as `pictures_of` returns.
    """
    rows = folder.metrics()
    charts = []
    for title, y_label, names in CURVES:
        lines = [
            {
                "label": label,
                "points": [
                    [float(row["epoch"]), float(row[name])] for row in rows if row.get(name)
                ],
            }
            for name, label in names.items()
        ]
        lines = [line for line in lines if line["points"]]
        if lines:
            charts.append({"title": title, "x_label": "epoch", "y_label": y_label, "lines": lines})
    entry = {
        "method": "the removal of shadows",
        "facts": [list(pair) for pair in _facts(experiment, evaluation, baselines or {})],
        "charts": charts,
        "images": list(pictures),
    }
    others = [
        {"method": method.key(), **record, "images": []}
        for method in experiment.methods
        if (record := method.record())
    ]
    write_json(folder.records, {"format": 1, "methods": [entry, *others]})


def pictures_of(
    experiment: RemovalExperiment, remover: Any, errors: ShadowErrors
) -> list[dict[str, Any]]:
    """Return the best, the median and the worst held-out photo, by the error in the shadow.

    Each is one picture: input, mask and the input's error in LAB, below result, truth and the
    result's error.

    Args:
        experiment: the objects of the run.
        remover: maps photos and masks to photos.
        errors: its errors of each held-out photo.
    """
    data, figures = experiment.data, errors.per_image()[..., 0]
    ranked = figures[:, 0].nan_to_num(0.0).argsort().tolist()
    chosen = {"worst": ranked[-1], "median": ranked[len(ranked) // 2], "best": ranked[0]}
    names = {place: name for name, place in chosen.items()}  # a set of one photo has one picture
    items: dict[str, dict[str, str]] = {}
    for place, batch in enumerate(data.test_loader(batch_size=1)):
        if place not in names:
            continue
        images, mask, target = floats(batch)
        made = removed(remover, images, mask)
        parts = [
            images, mask.expand(-1, 3, -1, -1), error_map(images, target),
            made, target, error_map(made, target),
        ]  # fmt: skip
        drawn = _grid([_small(part[0]) for part in parts], COLUMNS)
        shown = ", ".join(
            f"{region} {_number(value)}"
            for region, value in zip(REGIONS, figures[place].tolist(), strict=True)
        )
        name = data.name_of(int(batch["id"][0]))
        caption = f"{names[place]}: {name}; LAB MAE {shown}"
        items[names[place]] = {"png": png(drawn), "caption": caption}
    title = (
        "Best, median and worst held-out photo: input, mask and the input's error; below, result, "
        f"truth and the result's error (in LAB: black 0, white {FULL_SCALE:g} and more)"
    )
    ordered = [items[name] for name in ("best", "median", "worst") if name in items]
    return [{"title": title, "items": ordered, "wide": True}]


def error_map(made: Tensor, truth: Tensor) -> Tensor:
    """Return |dL| + |da| + |db| as colours, `(B, 3, H, W)` in [0, 1]: black is 0, white 60 or more.

    Args:
        made: RGB in [0, 1], `(B, 3, H, W)`.
        truth: likewise.
    """
    level = (rgb_to_lab(made) - rgb_to_lab(truth)).abs().sum(1).div(FULL_SCALE).clamp(0, 1)
    colours = torch.tensor(_COLOURS, dtype=level.dtype, device=level.device) / 255
    at = level * (len(colours) - 1)
    low = at.long().clamp(max=len(colours) - 2)
    mixed = torch.lerp(colours[low], colours[low + 1], (at - low)[..., None])
    return mixed.movedim(3, 1)


def _facts(
    experiment: RemovalExperiment,
    evaluation: RemovalEvaluation | None,
    baselines: Mapping[str, Table],
) -> list[tuple[str, str]]:
    notes = [] if experiment.own_losses else experiment.training.notes()
    facts = [(note.split(None, 1)[0], note.split(None, 1)[1]) for note in notes]
    if experiment.synthesis is not None:
        facts.append(("pairs", "painted by HQSS; no photo without shadow was read"))
    facts += [(other.role, other.origin) for other in experiment.others]
    data = experiment.data
    facts.append(("held-out photos", f"{data.test_size} of {data.name}"))
    if evaluation is None or evaluation.result is None or evaluation.untouched is None:
        return facts
    tables = {"this network": evaluation.result, "the photo as it is": evaluation.untouched}
    for name, table in (tables | dict(baselines)).items():
        parts = [f"{region} {_number(row['lab_mae'])}" for region, row in table.items()]
        psnr, ssim = table["all"]["psnr"], table["all"]["ssim"]
        facts.append(
            (name, f"LAB MAE {', '.join(parts)}; PSNR {_number(psnr)}, SSIM {_number(ssim, 4)}")
        )
    facts.append(
        ("LAB MAE", "what the field calls RMSE: |dL| + |da| + |db|; means of the photos' own")
    )
    return facts


def _grid(tiles: Sequence[Tensor], columns: int) -> Tensor:
    """Return tiles `(3, h, w)` in rows, with white lines between them."""
    height, width = tiles[0].shape[1:]
    rows = -(-len(tiles) // columns)
    shape = (3, rows * (height + LINE) - LINE, columns * (width + LINE) - LINE)
    grid = torch.full(shape, 255, dtype=torch.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (height + LINE), place % columns * (width + LINE)
        grid[:, top : top + height, left : left + width] = tile
    return grid


def _small(image: Tensor) -> Tensor:
    """Return a float image as uint8 `(3, h, w)`, at most 256 pixels high."""
    height, width = image.shape[1:]
    if height > 256:
        size = (256, max(1, round(width * 256 / height)))
        image = torch.nn.functional.interpolate(
            image[None], size, mode="bilinear", antialias=True, align_corners=False
        )[0]
    return image.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
