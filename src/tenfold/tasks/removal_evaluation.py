"""Figures of a remover of shadows over held-out photos, and of the photos as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.data.shadows import ShadowData
from tenfold.deploy.shadow_photo import remove_shadow
from tenfold.errors import UserError
from tenfold.measure.shadow_baselines import (
    NARROW_REACH,
    LabAffineFit,
    oracle_gain,
    ring_gain,
    ring_guess,
    untouched,
)
from tenfold.measure.shadow_errors import FIGURES, REGIONS, ShadowErrors, shadow_errors
from tenfold.nn.shadow_remover import ShadowRemover

__all__ = [
    "RemovalEvaluation",
    "baseline_errors",
    "errors_of_batch",
    "evaluate_remover",
    "floats",
    "measured",
    "removed",
    "summarised",
]

Remover = Callable[[Tensor, Tensor], Tensor]
Table = dict[str, dict[str, float | None]]  # by region and figure; None: infinite, or no pixel
MOST_FITTED = 256  # training photos that the affine fit is learnt from, at most


@dataclass(frozen=True)
class RemovalEvaluation:
    """Figures over held-out photos, means of the photos' own (PI).

    Attributes:
        result: by region (shadow, non-shadow, all) and figure: lab_mae, which the field calls
            RMSE, lab_rmse, psnr and ssim; None without photos free of shadow.
        untouched: likewise, of the photos as they are.
        images: how many there are.
        data: name of the data set.
        runtime: pytorch, onnxruntime or openvino.
    """

    result: Table | None
    untouched: Table | None
    images: int
    data: str
    runtime: str = "pytorch"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "result": self.result,
            "untouched": self.untouched,
            "images": self.images,
            "data": self.data,
            "runtime": self.runtime,
            "unit": "image",
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RemovalEvaluation:
        """Return what `to_dict` wrote."""
        given = {key: value for key, value in values.items() if key != "unit"}
        return cls(**given)

    @property
    def score(self) -> float:
        """What a better remover has less of: the LAB error in the shadow."""
        found = None if self.result is None else self.result["shadow"]["lab_mae"]
        return math.inf if found is None else found

    def figures(self, prefix: str = "test_") -> dict[str, float]:
        """Return the figures by name, for a log: `test_shadow_lab_mae` and so on."""
        return {
            f"{prefix}{region.replace('-', '')}_{name}": value
            for region, row in (self.result or {}).items()
            for name, value in row.items()
            if value is not None
        }

    def __str__(self) -> str:
        """Write a few lines for a person: result and input by region."""
        if self.result is None or self.untouched is None:
            return (
                f"{self.data}: {self.images} held-out photos, and none of them without its shadow: "
                "nothing to measure by"
            )
        lines = [
            f"{self.data}: {self.images} held-out photos ({self.runtime}), means of their own "
            "figures",
            f"{'':<12}{'LAB MAE, called RMSE':>22}{'LAB RMSE':>18}{'PSNR':>17}{'SSIM':>17}",
        ]
        for region in REGIONS:
            pairs = [(self.untouched[region][name], self.result[region][name]) for name in FIGURES]
            cells = [
                f"{_shown(before, digits)} → {_shown(after, digits)}"
                for (before, after), digits in zip(pairs, (2, 2, 2, 4), strict=True)
            ]
            widths = (22, 18, 17, 17)
            lines.append(
                f"{region:<12}"
                + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            )
        return "\n".join(lines)


def evaluate_remover(
    remover: Remover,
    data: ShadowData,
    *,
    device: torch.device | str = "cpu",
    runtime: str = "pytorch",
) -> RemovalEvaluation:
    """Take the shadows out of the held-out photos, and compare them with those without.

    Args:
        remover: maps photos in [0, 1] and masks to photos, such as a `ShadowRemover`.
        data: held-out photos.
        device: where `remover` takes its photos.
        runtime: its name.
    """
    return measured(remover, data, device=device, runtime=runtime)[0]


def measured(
    remover: Remover,
    data: ShadowData,
    *,
    device: torch.device | str = "cpu",
    runtime: str = "pytorch",
) -> tuple[RemovalEvaluation, ShadowErrors | None]:
    """Return the figures, as `evaluate_remover` does, and the errors of each photo.

    Args:
        remover: maps photos in [0, 1] and masks to photos.
        data: held-out photos.
        device: where `remover` takes its photos.
        runtime: its name.
    """
    count = data.test_size
    if not data.test_has_targets:
        return RemovalEvaluation(None, None, count, data.name, runtime), None
    found: list[ShadowErrors] = []
    before: list[ShadowErrors] = []
    for batch in data.test_loader(batch_size=1):
        found.append(errors_of_batch(remover, batch, device))
        before.append(errors_of_batch(untouched, batch, device))
    made = RemovalEvaluation(summarised(found), summarised(before), count, data.name, runtime)
    return made, ShadowErrors.joined(found)


def errors_of_batch(
    remover: Remover, batch: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> ShadowErrors:
    """Return the errors of a batch, of results in 8 bits, as they are written to files.

    Args:
        remover: maps photos in [0, 1] and masks to photos.
        batch: `image`, `mask` and `target` of a held-out batch.
        device: where `remover` takes its photos.
    """
    images, mask, target = floats(batch, device)
    made = removed(remover, images, mask).mul(255).round().clamp(0, 255).to(torch.uint8)
    return shadow_errors(made, target.mul(255).round().to(torch.uint8), mask > 0)


def removed(remover: Remover, images: Tensor, mask: Tensor) -> Tensor:
    """Return photos without their shadows, made as `predict` makes them, in [0, 1].

    A remover that sees small copies alone is given them, one photo at a time.

    Args:
        remover: maps photos in [0, 1] and masks to photos.
        images: `(B, 3, H, W)`.
        mask: `(B, 1, H, W)` of zeros and ones.
    """
    side = remover.side if isinstance(remover, ShadowRemover) else None
    if side is None or side >= min(images.shape[-2:]):
        with torch.no_grad():
            return remover(images, mask)
    assert isinstance(remover, ShadowRemover)
    network, device = remover.network, images.device
    # Photos are worked on where their bytes are; only the network is on the device.
    remover = copy.copy(remover)
    remover.network = lambda codes, shadow: network(codes.to(device), shadow.to(device)).cpu()
    made = []
    for image, shadow in zip(images, mask, strict=True):
        pixels = image[None].mul(255).round().to(torch.uint8)
        if not bool(shadow.any()):
            made.append(image[None])
            continue
        found = remove_shadow(remover, pixels.cpu(), shadow[0].to(torch.uint8).cpu(), side=side)
        made.append(found.pixels.to(device).float().div(255))
    return torch.cat(made)


def floats(
    batch: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return photos in [0, 1], masks of zeros and ones, and photos without shadow, all floats.

    Raises:
        UserError: the batch has no photos without shadow.
    """
    if "target" not in batch:
        raise UserError(
            "the data has no photos without shadow to compare with: expected triplets of photo, "
            "mask and photo without shadow"
        )
    images, mask, target = (
        batch[name].to(device, non_blocking=True) for name in ("image", "mask", "target")
    )
    return images.float().div(255), mask.float(), target.float().div(255)


def baseline_errors(data: ShadowData) -> dict[str, Table]:
    """Return the figures of what removes shadows without a network, by name.

    The affine fit is learnt from at most 256 training photos; it is left out where those have no
    photos without shadow.
    """
    removers: dict[str, Remover] = {
        "ring-matched gain": lambda images, mask: ring_gain(images, mask, NARROW_REACH, 0.0),
        "ring-matched gain, wide ring": ring_gain,
        "the guess by the ring": ring_guess,
    }
    found: dict[str, list[ShadowErrors]] = {}
    if data.has_targets:
        removers = {"one affine LAB fit": LabAffineFit.learnt(_training(data)), **removers}
    for batch in data.test_loader(batch_size=1):
        truth = floats(batch)[2]
        known: dict[str, Remover] = {
            **removers,
            "oracle gain (knows the truth)": lambda images, mask, truth=truth: oracle_gain(  # type: ignore[misc]
                images, mask, truth
            ),
        }
        for name, remover in known.items():
            found.setdefault(name, []).append(errors_of_batch(remover, batch))
    return {name: summarised(errors) for name, errors in found.items()}


def summarised(errors: list[ShadowErrors]) -> Table:
    """Return the means of the photos' figures, by region and figure."""
    means = ShadowErrors.joined(errors).mean_of_images().tolist()
    return {
        region: {
            name: value if math.isfinite(value) else None
            for name, value in zip(FIGURES, row, strict=True)
        }
        for region, row in zip(REGIONS, means, strict=True)
    }


def _training(data: ShadowData) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    loader = data.train_loader(batch_size=1, seed=0, augment="none", workers=0)
    for number, batch in enumerate(loader):
        if number == MOST_FITTED:
            break
        yield floats(batch)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
