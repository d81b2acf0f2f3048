"""Style and feature losses between two images in the space of a frozen extractor.

Leon Gatys et al., "Image style transfer using convolutional neural networks", 2016, and Justin
Johnson et al., "Perceptual losses for real-time style transfer and super-resolution", 2016; in the
form in which OMGD (arXiv 2108.06908) and DCD (arXiv 2212.14169) distil generators. With phi_1 to
phi_4 the extractor's four maps, y_S the student's and y_T the teacher's image:

    Gram(f) = f f^T / (C H W)                                               per image
    L_style = lambda_style * sum_i mean|Gram(phi_i(y_S)) - Gram(phi_i(y_T))|
    L_feat  = lambda_feat  * mean|phi_2(y_S) - phi_2(y_T)|

The extractor takes most of a student's step, about 70 % with VGG16. It may run in bfloat16; the
Gram matrices and all distances are float32 always, as a sum over 65,536 pixels overflows float16
and loses most digits in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tenfold.errors import UserError

__all__ = ["Perceptual", "feature_loss", "gram", "style_loss"]

_FEATURE_STAGE = 1  # phi_2: relu2_2 of VGG16


def gram(features: Tensor) -> Tensor:
    """Return the Gram matrices of maps, in float32 whatever the maps and autocast.

    Args:
        features: `(B, C, H, W)`.

    Returns:
        `(B, C, C)`: products of channels, summed over pixels and divided by C H W.

    >>> gram(torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]))
    tensor([[[1.2500, 2.7500],
             [2.7500, 6.2500]]])
    """
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(2)  # of a channels_last map too, this is a view
        return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def style_loss(student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor]) -> Tensor:
    """Return the mean absolute difference of Gram matrices, summed over stages.

    Args:
        student_stages: maps `(B, C_i, H_i, W_i)`.
        teacher_stages: likewise, of the same channels; their sides may differ.

    Raises:
        UserError: another number of maps, of images, or of channels.
    """
    if len(student_stages) != len(teacher_stages) or not student_stages:
        raise UserError(
            f"{len(student_stages)} maps of the student and {len(teacher_stages)} of the teacher: "
            "expected as many of each, at least one"
        )
    terms = []
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        if student.shape[:2] != teacher.shape[:2]:
            raise _differing(student, teacher)
        terms.append((gram(student) - gram(teacher)).abs().mean())
    return torch.stack(terms).sum()


def feature_loss(student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor]) -> Tensor:
    """Return the mean absolute difference of the second stage's maps, in float32.

    Args:
        student_stages: maps `(B, C_i, H_i, W_i)`, at least two.
        teacher_stages: likewise, of the same shapes.

    Raises:
        UserError: fewer maps, or other shapes.
    """
    if min(len(student_stages), len(teacher_stages)) <= _FEATURE_STAGE:
        raise UserError("the feature loss compares the second of the extractor's maps: give two")
    student, teacher = student_stages[_FEATURE_STAGE], teacher_stages[_FEATURE_STAGE]
    if student.shape != teacher.shape:
        raise _differing(student, teacher)
    return (student.float() - teacher.float()).abs().mean()


class Perceptual(nn.Module):
    """Style and feature losses of a student's images against a teacher's.

    The extractor is frozen in place and stays in evaluation mode. Gradients reach the student's
    images only.

    Args:
        extractor: maps images `(B, C, H, W)` in [-1, 1] to four maps, such as `VggStages`.
        style: weight of the style loss, lambda_style.
        feature: weight of the feature loss, lambda_feat.
        precision: in which the extractor runs, whatever the autocast around it. `bfloat16` also
            lays its weights out by channels_last.

    Raises:
        UserError: a negative weight, or none above 0; an unknown precision.

    >>> class Blur(nn.Module):
    ...     def forward(self, images):
    ...         return [nn.functional.avg_pool2d(images, 2**stage) for stage in range(4)]
    >>> losses = Perceptual(Blur())(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    >>> {name: round(loss.item(), 1) for name, loss in losses.items()}
    {'style': 13333.3, 'feature': 10.0}
    """

    def __init__(
        self,
        extractor: nn.Module,
        *,
        style: float = 1e4,
        feature: float = 1e1,
        precision: Literal["float32", "bfloat16"] = "float32",
    ):
        super().__init__()
        if not (style >= 0 and feature >= 0 and style + feature > 0):
            raise UserError(
                f"style={style} and feature={feature}: expected weights of at least 0, one of them "
                "above; leave the perceptual losses out otherwise"
            )
        if precision not in ("float32", "bfloat16"):
            raise UserError(f"precision={precision!r}: expected 'float32' or 'bfloat16'")
        self.extractor = extractor.requires_grad_(False).eval()
        self.style = style
        self.feature = feature
        self.precision = precision
        if precision == "bfloat16":
            self.extractor.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Perceptual:
        """Keep the extractor in evaluation mode."""
        super().train(mode)
        self.extractor.eval()
        return self

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses by name, `style` and `feature`; a weight of 0 gives zero.

        Args:
            student: images `(B, C, H, W)` in [-1, 1].
            teacher: likewise; no gradient flows into them.

        Raises:
            UserError: shapes that differ.
        """
        if student.shape != teacher.shape:
            raise _differing(student, teacher)
        with torch.no_grad():
            teacher_stages = self._stages(teacher)
        student_stages = self._stages(student)
        zero = torch.zeros((), device=student.device)
        return {
            "style": self.style * style_loss(student_stages, teacher_stages)
            if self.style
            else zero,
            "feature": self.feature * feature_loss(student_stages, teacher_stages)
            if self.feature
            else zero,
        }

    def _stages(self, images: Tensor) -> Sequence[Tensor]:
        low = self.precision == "bfloat16"
        if low:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
            stages: Sequence[Tensor] = self.extractor(images.float())
        return stages


def _differing(student: Tensor, teacher: Tensor) -> UserError:
    return UserError(
        f"the student's images or maps are {tuple(student.shape)}, the teacher's "
        f"{tuple(teacher.shape)}: expected equal shapes"
    )
