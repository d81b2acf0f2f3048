"""Figures of a generator over held-out images: distance to the targets, FID and KID."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data.translation import TranslationData
from tenfold.measure.generation import Distances, extract, feature_distances
from tenfold.measure.image_features import FeatureExtractor, to_uint8

__all__ = ["Reference", "TranslationEvaluation", "evaluate_generator", "in_evaluation"]

BATCH = 8


@dataclass(frozen=True)
class TranslationEvaluation:
    """Figures over held-out images.

    Attributes:
        l1: mean distance to the targets, of images in [-1, 1]; None without targets.
        ssim: mean structural similarity to them, of images in 0..255; None without targets.
        distances: FID and KID; None without an extractor.
        images: how many were translated.
        data: name of the data set.
        runtime: pytorch, onnxruntime or openvino.
    """

    l1: float | None
    ssim: float | None
    distances: Distances | None
    images: int
    data: str
    runtime: str = "pytorch"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "l1": self.l1,
            "ssim": self.ssim,
            "distances": None if self.distances is None else self.distances.to_dict(),
            "images": self.images,
            "data": self.data,
            "runtime": self.runtime,
            "unit": "image",
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TranslationEvaluation:
        """Return what `to_dict` wrote."""
        given = {key: value for key, value in values.items() if key != "unit"}
        distances = given.pop("distances")
        return cls(**given, distances=None if distances is None else Distances(**distances))

    @property
    def score(self) -> float:
        """What a better generator has less of: FID, else the distance to the targets."""
        if self.distances is not None:
            return self.distances.fid
        return float("inf") if self.l1 is None else self.l1

    def figures(self, prefix: str = "test_") -> dict[str, float]:
        """Return the figures by name, for a log."""
        found = {"l1": self.l1, "ssim": self.ssim}
        if self.distances is not None:
            found |= {"fid": self.distances.fid, "kid": self.distances.kid}
        return {f"{prefix}{name}": value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        """Write one line for a person."""
        parts = []
        if self.l1 is not None:
            parts.append(f"L1 {self.l1:.4f}, SSIM {self.ssim:.4f} to the targets")
        if self.distances is not None:
            parts.append(str(self.distances))
        if not parts:
            parts.append("no targets and no gan.extractor: nothing to measure by")
        return f"{self.data}: {'; '.join(parts)}, {self.images} held-out images ({self.runtime})"


class Reference:
    """An extractor and its features of the real target images, which are computed once.

    Args:
        extractor: for FID and KID.
        data: whose target images are the reference.
    """

    def __init__(self, extractor: FeatureExtractor, data: TranslationData) -> None:
        self.extractor = extractor
        self.data = data
        self._features: Tensor | None = None

    def distances(self, made: Tensor, seed: int = 0) -> Distances:
        """Return the distances of features `(N, d)` of made images from those of real ones."""
        if self._features is None:
            self._features = extract(self.extractor, self.data.test_targets(BATCH))
        return feature_distances(self.extractor, made, self._features, seed=seed)


def evaluate_generator(
    forward: Callable[[Tensor], Tensor],
    data: TranslationData,
    reference: Reference | None = None,
    *,
    device: torch.device | str = "cpu",
    runtime: str = "pytorch",
) -> TranslationEvaluation:
    """Translate the held-out images, and compare them with what is wanted.

    Args:
        forward: maps images in [-1, 1] to images; a generator in evaluation mode.
        data: held-out images.
        reference: for FID and KID.
        device: where `forward` takes its images.
        runtime: its name.
    """
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    similarity = StructuralSimilarityIndexMeasure(data_range=255.0)
    total, count, features = 0.0, 0, []
    for batch in data.test_loader(batch_size=BATCH):
        with torch.no_grad():
            made = forward(data.normalize(batch["source"]).to(device)).float().cpu()
        count += len(made)
        if "target" in batch:
            wanted = data.normalize(batch["target"])
            total += float((made - wanted).abs().mean((1, 2, 3)).sum())
            similarity.update((made.clamp(-1, 1) + 1) * 127.5, batch["target"].float())
        if reference is not None:
            features.append(reference.extractor(to_uint8(made)))
    return TranslationEvaluation(
        l1=total / count if data.paired else None,
        ssim=float(torch.as_tensor(similarity.compute())) if data.paired else None,
        distances=None if reference is None else reference.distances(torch.cat(features)),
        images=count,
        data=data.name,
        runtime=runtime,
    )


@contextlib.contextmanager
def in_evaluation(network: nn.Module) -> Iterator[nn.Module]:
    """Put a network into evaluation mode, and back into what it was part by part."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield network.eval()
    finally:
        for module, training in modes:
            module.training = training
