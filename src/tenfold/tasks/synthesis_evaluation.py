"""How dark painted shadows are, beside real ones; and pictures of them.

There is no truth to compare a pseudo shadow with: nobody has seen the photo with a shadow there.
How light lit regions are before and after, and how light the real shadows of the same photos, tells
whether they are painted at all, and about as dark. What they are worth shows in a remover that
learns from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tenfold.data.region_pairs import MaskShapes
from tenfold.data.shadows import ShadowData
from tenfold.methods.hqss import HQSS, synthesize
from tenfold.nn.lab import rgb_to_lab

__all__ = ["Painted", "SynthesisEvaluation", "evaluate_synthesis", "painted_photos"]


@dataclass(frozen=True)
class SynthesisEvaluation:
    """Mean lightness L of regions, 0 to 100, over held-out photos; None without any.

    Attributes:
        lit: of lit regions as they are.
        painted: of the same with a shadow painted on.
        shadow: of the photos' real shadows.
        images: how many photos have both regions.
        data: name of the data set.
        runtime: pytorch.
    """

    lit: float | None
    painted: float | None
    shadow: float | None
    images: int
    data: str
    runtime: str = "pytorch"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "unit": "image"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SynthesisEvaluation:
        """Return what `to_dict` wrote."""
        return cls(**{key: value for key, value in values.items() if key != "unit"})

    def figures(self) -> dict[str, float]:
        """Return the figures by name, for a log."""
        found = {"lit": self.lit, "painted": self.painted, "shadow": self.shadow}
        return {
            f"test_{name}_lightness": value for name, value in found.items() if value is not None
        }

    def __str__(self) -> str:
        """Write one line for a person."""
        if self.painted is None:
            return f"{self.data}: no held-out photo has a shadow and a lit region of its size"
        return (
            f"{self.data}: L of lit regions {self.lit:.1f}, with a shadow painted on "
            f"{self.painted:.1f}, of real shadows {self.shadow:.1f}; {self.images} held-out photos "
            f"({self.runtime})"
        )


@dataclass(frozen=True)
class Painted:
    """One held-out photo and what was made of it.

    Attributes:
        image: the photo, uint8 `(1, 3, H, W)`.
        mask: its shadow, uint8 `(1, 1, H, W)`.
        lit: its lit region, likewise.
        pseudo: the photo with a shadow painted onto that, float in [0, 1], `(1, 3, H, W)`.
        number: its id.
    """

    image: Tensor
    mask: Tensor
    lit: Tensor
    pseudo: Tensor
    number: int


def painted_photos(network: HQSS, data: ShadowData, shapes: MaskShapes) -> Iterator[Painted]:
    """Paint a shadow onto each held-out photo that has a lit region; the same one each time.

    Args:
        network: on any device.
        data: held-out photos.
        shapes: of lit regions, the training photos'.
    """
    device = next(network.parameters()).device
    for batch in data.test_loader(batch_size=1):
        number = int(batch["id"][0])
        lit = shapes.fitted(batch["mask"][0, 0], 0, number)
        if lit is None:
            continue
        parts = batch["image"], batch["mask"], lit[None, None]
        pseudo = synthesize(network, *(part.to(device) for part in parts)).cpu()
        yield Painted(*parts, pseudo, number)


def evaluate_synthesis(
    network: HQSS, data: ShadowData, shapes: MaskShapes, limit: int | None = None
) -> SynthesisEvaluation:
    """Paint shadows onto held-out photos, and see how dark they are.

    Args:
        network: on any device.
        data: held-out photos.
        shapes: of lit regions.
        limit: look at so many photos only.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for one in islice(painted_photos(network, data, shapes), limit):
        real, made = rgb_to_lab(one.image)[:, 0], rgb_to_lab(one.pseudo)[:, 0]
        regions = ((real, one.lit), (made, one.lit), (real, one.mask))
        sums += torch.stack([light[mask[:, 0] > 0].mean() for light, mask in regions]).double()
        count += 1
    lit, painted, shadow = (sums / count).tolist() if count else (None, None, None)
    return SynthesisEvaluation(lit, painted, shadow, count, data.name)
