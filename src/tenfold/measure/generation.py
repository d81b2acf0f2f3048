"""How far generated images are from real ones: Fréchet and kernel distances (FID, KID).

Martin Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash
equilibrium", 2017 (FID), and Mikołaj Bińkowski et al., "Demystifying MMD GANs", 2018 (KID). Both
compare vectors that an extractor makes of images:

    FID = |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))
    KID = E k(a, a') + E k(b, b') - 2 E k(a, b),  k(x, y) = (x^T y / D + 1)^3,  pairs a != a'

Published figures are of Inception v3. In another extractor's space both are other quantities, and
FID with few images is biased upwards: a figure never stands without the extractor's name, the hash
of its weights, and the numbers of images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.measure.image_features import (
    SHOWN,
    FeatureExtractor,
    inception_extractor,
    module_extractor,
    state_hash,
    to_uint8,
)

__all__ = [
    "Distances",
    "FeatureExtractor",
    "extract",
    "feature_distances",
    "frechet_distance",
    "generation_distances",
    "inception_extractor",
    "kernel_distance",
    "module_extractor",
    "state_hash",
    "to_uint8",
]


@dataclass(frozen=True)
class Distances:
    """How far a set of generated images is from one of real ones, in an extractor's space.

    Attributes:
        fid: Fréchet distance.
        kid: kernel distance; may be slightly negative for equal distributions, being unbiased.
        kid_std: its deviation over subsets; None for one estimate over all images.
        images: how many were generated.
        reference_images: how many real ones.
        dimensions: of a feature vector. With no more images than that the covariances are
            rank-deficient: compare the Fréchet distance at equal numbers of images only.
        extractor: its name.
        extractor_hash: sha256 of its weights.
    """

    fid: float
    kid: float
    kid_std: float | None
    images: int
    reference_images: int
    dimensions: int
    extractor: str
    extractor_hash: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values by name."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line that names the extractor, its hash and the numbers of images.

        >>> print(Distances(81.234, 0.0123, None, 50, 50, 256, "stagenet", "1a2b3c" * 11))
        FID[stagenet 1a2b3c1a2b3c, N=50] 81.2, KID[same] 0.0123
        """
        counts = f"N={self.images}"
        if self.images != self.reference_images:
            counts += f" against {self.reference_images}"
        spread = "" if self.kid_std is None else f" ± {self.kid_std:.2g}"
        return (
            f"FID[{self.extractor} {self.extractor_hash[:SHOWN]}, {counts}] "
            f"{_short_number(self.fid)}, KID[same] {self.kid:.3g}{spread}"
        )


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Return the Fréchet distance of the Gaussians that fit two sets of vectors, in float64.

    With A and B the centred sets by (n - 1)^(1/2), S_a = A^T A and the eigenvalues of S_a S_b are
    the squared singular values of A B^T, so the trace of the root is the sum of those. That needs
    no root of a matrix, and is exact for sets of fewer vectors than dimensions, where roots lose
    digits and turn complex.

    Args:
        features_a: `(N, D)`, N at least 2.
        features_b: `(M, D)`, M at least 2.

    Raises:
        UserError: sets that don't fit each other, or values that are not finite.

    >>> a = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
    >>> b = torch.tensor([[3.0], [7.0]])  # mean 5, variance 8
    >>> round(frechet_distance(a, b), 6)  # 16 + (8**0.5 - 2**0.5)**2
    18.0
    """
    a, b = _checked(features_a, features_b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    a = (a - mean_a) / (len(a) - 1) ** 0.5
    b = (b - mean_b) / (len(b) - 1) ** 0.5
    trace = a.square().sum() + b.square().sum()
    root = torch.linalg.svdvals(_short(a) @ _short(b).T).sum()
    return float((mean_a - mean_b).square().sum() + trace - 2 * root)


def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float | None]:
    """Return the kernel distance of two sets of vectors, in float64, and its deviation.

    With no more than `size` vectors in the smaller set, that is the unbiased estimate over all
    vectors and the deviation None: subsets would hold the same vectors again and again.

    Args:
        features_a: `(N, D)`, N at least 2.
        features_b: `(M, D)`, M at least 2.
        subsets: how many are drawn, without replacement within one.
        size: vectors of each set in a subset.
        seed: of the draws.

    Returns:
        Mean and standard deviation over subsets.

    Raises:
        UserError: sets that don't fit each other, or numbers out of range.

    >>> a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    >>> kernel_distance(a, b)  # 1 + 343 - 46.5
    (297.5, None)
    """
    a, b = _checked(features_a, features_b)
    if subsets < 1 or size < 2:
        raise UserError(f"subsets={subsets} and size={size}: expected at least 1 and 2")
    if min(len(a), len(b)) <= size:
        return _unbiased(a, b), None
    generator = torch.Generator().manual_seed(seed)
    found = torch.tensor(
        [
            _unbiased(
                a[torch.randperm(len(a), generator=generator)[:size].to(a.device)],
                b[torch.randperm(len(b), generator=generator)[:size].to(b.device)],
            )
            for _ in range(subsets)
        ],
        dtype=torch.float64,
    )
    return float(found.mean()), float(found.std(correction=0))


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """Return the vectors of all images, `(N, D)` on the CPU.

    Keep those of the reference images: they are the same at every evaluation.

    Args:
        extractor: of `open_extractor`, `module_extractor` or `inception_extractor`.
        batches: uint8 `(B, C, H, W)` each.

    Raises:
        UserError: no images, or none of the expected kind.
    """
    vectors = [extractor(batch).cpu() for batch in batches]
    if not vectors:
        raise UserError(f"no images for the extractor {extractor}: expected at least 2")
    return torch.cat(vectors)


def feature_distances(
    extractor: FeatureExtractor, generated: Tensor, reference: Tensor, *, seed: int = 0
) -> Distances:
    """Compare two sets of vectors that `extract` made with one extractor.

    Raises:
        UserError: fewer than two vectors in a set, or values that are not finite.
    """
    kid, kid_std = kernel_distance(generated, reference, seed=seed)
    return Distances(
        fid=frechet_distance(generated, reference),
        kid=kid,
        kid_std=kid_std,
        images=len(generated),
        reference_images=len(reference),
        dimensions=generated.shape[1],
        extractor=extractor.name,
        extractor_hash=extractor.sha256,
    )


def generation_distances(
    extractor: FeatureExtractor,
    generated_batches: Iterable[Tensor],
    reference_batches: Iterable[Tensor],
    seed: int = 0,
) -> Distances:
    """Compare generated with real images by an extractor.

    Args:
        extractor: turns images into vectors.
        generated_batches: uint8 `(B, C, H, W)` each; see `to_uint8`.
        reference_batches: likewise.
        seed: of the subsets, where there are images enough for some.

    Raises:
        UserError: fewer than two images in a set, or none of the expected kind.
    """
    generated = extract(extractor, generated_batches)
    reference = extract(extractor, reference_batches)
    return feature_distances(extractor, generated, reference, seed=seed)


def _checked(features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) < 2:
            raise UserError(
                f"features are {tuple(features.shape)}: expected (N, D) of at least 2 images"
            )
        if not bool(torch.isfinite(features).all()):
            raise UserError("features have values that are not finite: look at images and weights")
    if features_a.shape[1] != features_b.shape[1]:
        raise UserError(
            f"features have {features_a.shape[1]} and {features_b.shape[1]} dimensions: expected "
            "those of one extractor"
        )
    return features_a.double(), features_b.double()


def _short(centred: Tensor) -> Tensor:
    """Return rows R with R^T R = X^T X, no more of them than columns."""
    if centred.shape[0] <= centred.shape[1]:
        return centred
    rows: Tensor = torch.linalg.qr(centred, mode="r").R
    return rows


def _unbiased(a: Tensor, b: Tensor) -> float:
    """Return the unbiased estimate over all pairs, those of a vector with itself left out."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        products = kernel(x, x)
        return (products.sum() - products.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def _short_number(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
