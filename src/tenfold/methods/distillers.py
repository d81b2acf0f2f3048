"""Losses that let a student follow a teacher, each usable alone.

    KD    T^2 / B * sum_bc q_t (log q_t - log q_s), q = softmax(z / T)   (Hinton 2015)
    AT    where the features are large, summed over layers              (Zagoruyko 2017)
    SP    which samples of a batch look alike                           (Tung 2019)
    RKD   distances between samples, and angles between triples         (Park 2019)
    PKT   probability of being neighbours                               (Passalis 2018)
    VID   log-likelihood of the teacher's features, given the student's (Ahn 2019)

Features are maps `(B, C, H, W)`, tokens `(B, N, C)` or vectors `(B, C)`. The contrastive loss is
in `tenfold.methods.contrast`. No gradient reaches what the teacher gave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError

__all__ = [
    "DISTILLERS",
    "Distiller",
    "VariationalLoss",
    "as_maps",
    "as_vectors",
    "attention_loss",
    "distillation_loss",
    "neighbour_loss",
    "relation_loss",
    "similarity_loss",
]

_TINY = 1e-7


@dataclass(frozen=True)
class Distiller:
    """Default weights of a distiller: of labels, of logits, of features; and what it looks at.

    Attributes:
        label: weight of the cross-entropy with the labels.
        logit: weight of `distillation_loss`.
        feature: weight of the feature loss.
        layers: `maps` compares any number of layers, `one` a single one, `none` no layer.
    """

    label: float
    logit: float
    feature: float
    layers: str


DISTILLERS = {
    "kd": Distiller(0.1, 0.9, 0.0, "none"),
    "at": Distiller(1.0, 0.0, 1000.0, "maps"),
    "sp": Distiller(1.0, 0.0, 3000.0, "one"),
    "rkd": Distiller(1.0, 0.0, 1.0, "one"),
    "pkt": Distiller(1.0, 0.0, 30000.0, "one"),
    "vid": Distiller(1.0, 0.0, 1.0, "maps"),
    "contrast": Distiller(1.0, 0.0, 0.8, "one"),
}


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0
) -> Tensor:
    """Return `T^2 / B * sum KL(teacher | student)` of softened predictions.

    Args:
        student_logits: `(B, C)`.
        teacher_logits: `(B, C)`.
        temperature: T, more than 0.

    Raises:
        UserError: shapes differ, or the temperature is not positive.

    >>> student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
    >>> distillation_loss(student, teacher)
    tensor(0.9487)
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise UserError(
            f"logits of shape {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}: "
            "expected (B, C) of both networks, with the same classes"
        )
    if not temperature > 0:
        raise UserError(f"temperature={temperature}: expected more than 0")
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    total = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return total * (temperature**2 / len(student_logits))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of attention maps: where features are large (AT).

    A map is the mean of squared channels, divided by its length. The larger of two maps is averaged
    down to the smaller.

    Args:
        student: `(B, C, H, W)` or tokens `(B, N, C)`.
        teacher: likewise; channels may differ.

    Raises:
        UserError: vectors, which have no places to attend to.
    """
    for feature in (student, teacher):
        if feature.ndim == 2:
            raise UserError(
                "attention maps of vectors (B, C): expected maps (B, C, H, W) or tokens "
                "(B, N, C); name a layer ahead of the pooling"
            )
    ours, theirs = as_maps(student), as_maps(teacher.detach())
    height = min(ours.shape[2], theirs.shape[2])
    width = min(ours.shape[3], theirs.shape[3])

    def attention(maps: Tensor) -> Tensor:
        if maps.shape[2:] != (height, width):
            maps = functional.adaptive_avg_pool2d(maps, (height, width))
        return functional.normalize(maps.square().mean(dim=1).flatten(1), dim=1)

    return (attention(ours) - attention(theirs)).square().mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how differently the samples of a batch resemble each other (SP).

    `|| rows(S S') - rows(T T') ||^2 / B^2`, with rows divided by their length.

    Args:
        student: `(B, ...)`, any features.
        teacher: `(B, ...)`; the rest of the shape may differ.
    """

    def similarities(features: Tensor) -> Tensor:
        flat = features.flatten(1)
        return functional.normalize(flat @ flat.T, dim=1)

    difference = similarities(student) - similarities(teacher.detach())
    return difference.square().sum() / len(student) ** 2


def relation_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """Return how differently samples lie to each other: distances and angles (RKD).

    Distances are divided by their mean; both are compared by the smooth L1 loss.

    Args:
        student: `(B, C)` vectors, or maps and tokens, which are averaged to vectors.
        teacher: `(B, D)`, likewise.
        distance_weight: of the distances between pairs.
        angle_weight: of the angles in triples; takes B^3 numbers.
    """
    ours, theirs = as_vectors(student), as_vectors(teacher.detach())
    distance = functional.smooth_l1_loss(_distances(ours), _distances(theirs))
    angle = functional.smooth_l1_loss(_angles(ours), _angles(theirs))
    return distance_weight * distance + angle_weight * angle


def _distances(vectors: Tensor) -> Tensor:
    square = (vectors.unsqueeze(0) - vectors.unsqueeze(1)).square().sum(dim=2)
    # The square root has no slope at 0, where a sample meets itself (or its like).
    found = torch.where(square > 0, square.clamp(min=1e-12).sqrt(), 0.0)
    others = found > 0
    mean = found.sum() / others.sum().clamp(min=1)
    return found / mean.clamp(min=1e-12)


def _angles(vectors: Tensor) -> Tensor:
    """Return cosines `(B, B, B)` of the angle at the first sample between the other two."""
    unit = functional.normalize(vectors.unsqueeze(0) - vectors.unsqueeze(1), dim=2)
    return unit @ unit.transpose(1, 2)


def neighbour_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how differently samples would pick their neighbours (PKT).

    Cosines are mapped to [0, 1] and rows divided by their sum, which gives probabilities p; the
    loss is the mean of `p_teacher * log(p_teacher / p_student)`.

    Args:
        student: `(B, C)` vectors, or maps and tokens, which are averaged to vectors.
        teacher: `(B, D)`, likewise.
    """

    def probabilities(features: Tensor) -> Tensor:
        vectors = functional.normalize(as_vectors(features), dim=1, eps=_TINY)
        likeness = (vectors @ vectors.T + 1) / 2
        return likeness / likeness.sum(dim=1, keepdim=True)

    ours, theirs = probabilities(student), probabilities(teacher.detach())
    return (theirs * ((theirs + _TINY).log() - (ours + _TINY).log())).mean()


class VariationalLoss(nn.Module):
    """How likely the teacher's features are, given the student's (VID); has weights of its own.

    Three 1x1 convolutions guess the teacher's map; each of its channels has a variance of its own,
    learned from 5 on. The loss is the negative log-likelihood without its constant.

    Args:
        student_channels: C of the student's features.
        teacher_channels: D of the teacher's.

    >>> VariationalLoss(8, 16)(torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 4, 4)).shape
    torch.Size([])
    """

    least = 1e-5

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.guess = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        start = math.log(math.expm1(5.0 - self.least))  # softplus of it is the variance
        self.spread = nn.Parameter(torch.full((teacher_channels,), start))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare features `(B, C, H, W)`, tokens or vectors; the larger map is averaged down."""
        ours, theirs = as_maps(student), as_maps(teacher.detach())
        size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
        ours, theirs = (
            maps if maps.shape[2:] == size else functional.adaptive_avg_pool2d(maps, size)
            for maps in (ours, theirs)
        )
        variance = (functional.softplus(self.spread) + self.least).reshape(1, -1, 1, 1)
        error = (self.guess(ours) - theirs).square()
        loss: Tensor = 0.5 * (error / variance + variance.log()).mean()
        return loss


def as_maps(features: Tensor) -> Tensor:
    """Return features as maps `(B, C, H, W)`; tokens `(B, N, C)` become N x 1, vectors 1 x 1."""
    if features.ndim == 4:
        return features
    if features.ndim == 3:
        return features.transpose(1, 2).unsqueeze(3)
    if features.ndim == 2:
        return features[:, :, None, None]
    raise UserError(
        f"features of shape {tuple(features.shape)}: expected maps (B, C, H, W), tokens (B, N, C) "
        "or vectors (B, C); name another layer"
    )


def as_vectors(features: Tensor) -> Tensor:
    """Return features as vectors `(B, C)`: maps and tokens averaged over their places."""
    return features if features.ndim == 2 else as_maps(features).mean(dim=(2, 3))


def channels(shape: Sequence[int]) -> int:
    """Return the channels of features of that shape."""
    return shape[2] if len(shape) == 3 else shape[1]
