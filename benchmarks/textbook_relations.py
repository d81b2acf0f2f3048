"""Relations of slices as a paper states them: every difference vector is made, N x N x D of them.

The rival of `gan_step.py`, and vectorised as one would write it down: distances by their Gram
matrix (relational knowledge distillation does as much), angles by differences that are normalised
and multiplied, the teacher without gradients, autograd for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["all_relations", "relation_loss", "slices_of"]


def distances(vectors: Tensor) -> Tensor:
    """Return all distances between vectors `(N, D)`, over their mean, `(N, N)`."""
    count = len(vectors)
    gram = vectors @ vectors.T
    squares = gram.diagonal()
    found = (squares[:, None] + squares - 2 * gram).clamp(min=1e-12).sqrt()
    found = found * (1 - torch.eye(count, dtype=found.dtype, device=found.device))
    return found / (found.sum() / (count * (count - 1)))


def angles(vectors: Tensor) -> Tensor:
    """Return the cosine at vertex i between j and k, of vectors `(N, D)`, `(N, N, N)`."""
    differences = vectors[None, :, :] - vectors[:, None, :]
    units = functional.normalize(differences, dim=2)
    return units @ units.transpose(1, 2)


def relation_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 1.0, angle_weight: float = 2.0
) -> Tensor:
    """Return the loss of one image's slices `(N, D)`."""
    with torch.no_grad():
        teacher_distances, teacher_angles = distances(teacher), angles(teacher)
    distance = functional.smooth_l1_loss(distances(student), teacher_distances)
    angle = functional.smooth_l1_loss(angles(student), teacher_angles)
    return distance_weight * distance + angle_weight * angle


def slices_of(image: Tensor, patch: int = 32) -> dict[str, Tensor]:
    """Return rows, columns and patches of an image `(C, H, W)`, each `(N, D)`."""
    tiles = functional.unfold(image[None], patch, stride=patch)[0].T
    return {
        "rows": image.permute(1, 0, 2).flatten(1),
        "columns": image.permute(2, 1, 0).flatten(1),
        "patches": tiles,
    }


def all_relations(student: Tensor, teacher: Tensor, weight: float = 25.0) -> Tensor:
    """Return CRD's relation terms of a batch `(B, C, H, W)`: the mean over its images."""
    losses = [
        relation_loss(ours, theirs)
        for one, other in zip(student, teacher, strict=True)
        for ours, theirs in zip(slices_of(one).values(), slices_of(other).values(), strict=True)
    ]
    return weight * torch.stack(losses).sum() / len(student)
