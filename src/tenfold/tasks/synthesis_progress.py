"""What a run that learns to paint shadows tells: figures as it goes, a record with pictures."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tenfold.methods.hqss import HQSS
from tenfold.tasks.folder import RunFolder, write_json
from tenfold.tasks.records import png
from tenfold.tasks.shadow_synthesis import ShadowSynthesis
from tenfold.tasks.synthesis_evaluation import Painted, evaluate_synthesis, painted_photos
from tenfold.tasks.synthesis_setup import SynthesisExperiment

__all__ = ["SynthesisProgress", "write_synthesis_record"]

SHARE = 10  # figures are taken so often in a run
WATCHED = 32  # of so many held-out photos
PICTURES = 4
LARGEST = 256  # pixels of a picture's longer side in the record
# Title, axis, and column of metrics.csv by label.
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Lightness of regions of held-out photos",
        "mean L",
        {
            "test_painted_lightness": "painted shadow",
            "test_shadow_lightness": "real shadow",
            "test_lit_lightness": "lit, as it is",
        },
    ),
    (
        "Losses of encoder and generator",
        "weighted, mean of an epoch",
        {
            "self_reconstruction": "self-reconstruction",
            "cycle": "cycle",
            "adversarial": "adversarial",
            "colour": "colour",
            "light": "light",
        },
    ),
    (
        "Losses of the discriminators",
        "mean of an epoch",
        {"shadow_discriminator": "of shadows", "lit_discriminator": "of lit regions"},
    ),
)


class SynthesisProgress(pl.Callback):
    """Look at held-out photos ten times in a run."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the figures, and log them."""
        assert isinstance(pl_module, ShadowSynthesis)
        experiment = pl_module.experiment
        epochs, done = experiment.recipe.train.epochs, pl_module.current_epoch + 1
        if done % max(1, epochs // SHARE) and done != epochs:
            return
        found = evaluate_synthesis(
            pl_module.model, experiment.data, experiment.pairs.shapes, WATCHED
        )
        for name, value in found.figures().items():
            pl_module.log(name, value)


def write_synthesis_record(experiment: SynthesisExperiment, model: HQSS, folder: RunFolder) -> None:
    """Write `methods.json`: facts, curves and pictures, for the report.

    Args:
        experiment: of the run.
        model: trained, on the CPU.
        folder: of the run.
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
        "method": "hqss",
        "facts": [list(pair) for pair in _facts(experiment)],
        "charts": charts,
        "images": [_pictures(experiment, model)],
    }
    write_json(folder.records, {"format": 1, "methods": [entry]})


def _facts(experiment: SynthesisExperiment) -> list[tuple[str, str]]:
    data, training = experiment.data, experiment.training
    weights = {
        name: getattr(training, name)
        for name in ("self_reconstruction", "adversarial", "colour", "cycle", "feature_cycle")
    }
    return [
        ("weights of the losses", ", ".join(f"{name} {w:g}" for name, w in weights.items())),
        ("training photos", f"{data.train_size:,} of {data.name}, with masks"),
        ("photos without shadow", "none are read"),
        ("shapes of lit regions", f"{len(experiment.pairs.shapes):,} masks"),
    ]


def _pictures(experiment: SynthesisExperiment, model: HQSS) -> dict[str, Any]:
    data, shapes = experiment.data, experiment.pairs.shapes
    items = [
        {
            "png": png(drawn(one)),
            "caption": f"{data.name_of(one.number)}: photo, lit region, pseudo shadow",
        }
        for one in islice(painted_photos(model, data, shapes), PICTURES)
    ]
    return {"title": "Shadows painted onto held-out photos", "items": items, "wide": True}


def drawn(one: Painted) -> Tensor:
    """Return a photo, its lit region and the pseudo shadow side by side, uint8 `(3, h, w)`."""
    row = torch.cat(
        [one.image, one.image * one.lit, one.pseudo.mul(255).round().to(torch.uint8)], dim=3
    )
    largest = max(one.image.shape[2:])
    if largest > LARGEST:
        row = (
            torch.nn.functional.interpolate(
                row.float(), scale_factor=LARGEST / largest, mode="bilinear", antialias=True
            )
            .round()
            .to(torch.uint8)
        )
    return row[0]
