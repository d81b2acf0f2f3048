"""CRD: distil an image translator by how the pieces of an image lie to each other.

Paper: "Exploring Content Relationships for Distilling Efficient GANs" (arXiv 2212.11091). Its
relations are those of "Relational Knowledge Distillation", CVPR 2019.

Both networks' outputs are cut into slices: rows and columns one pixel thick, and patches of 32 x 32
that don't overlap. The student shall put its slices where the teacher's are, up to shift, scale and
rotation; nothing is compared across images. For N slices v_1..v_N of one image

    delta_ij = |v_i - v_j| / mean of all |v_i - v_j|,  i != j
    a_ijk    = cosine of the angle at v_i between v_j and v_k
    R        = 1 / N^2 sum_ij h(delta^S - delta^T) + 2 / N^3 sum_ijk h(a^S - a^T),  h: Huber's
    L        = weight * mean over the images of (R_rows + R_columns + R_patches)

Absolute colour must come from other losses: of style and features, and of a discriminator that is
trained with the teacher alone.

What differs from the released code, and why:

- all patches of each image are related, as the paper has it, on paired data too; the code relates
  the three colours of the batch's first patches there;
- one weight of the mean over images: 25 for unpaired data, 10 for paired data (2.5 of the sum over
  a batch of 4); the code has a sum there, and takes unpaired images one by one;
- rows and columns of contiguous images: the code's views fail on them;
- two identical slices get zero angles and no gradient, but count in the means; the code normalises
  a vector of length zero there, with gradients of 4e9;
- the teacher never gets a graph;
- no array of N x N x D: see `relations`, which has the equations as they are computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.methods.relations import (
    column_strips,
    pairwise_distance_angle_loss,
    patches,
    relations_and_dead,
    row_strips,
    warn_of_identical_slices,
)
from tenfold.methods.translation import StudentStep, TranslationMethod, check_image_pair

__all__ = ["CRD", "column_strips", "pairwise_distance_angle_loss", "patches", "row_strips"]

UNPAIRED_WEIGHT = 25.0
PAIRED_WEIGHT = 10.0


@dataclass(kw_only=True, eq=False)
class CRD(TranslationMethod):
    """Distil a generator by the relations between rows, columns and patches of its images.

    Args:
        weight: of the relations, of the mean over the images. None: 25 for unpaired and 10 for
            paired data, as the run says; 25 in a loop of your own.
        rows: share of the rows in it.
        columns: share of the columns.
        patches: share of the patches.
        distance_weight: of the distances between slices.
        angle_weight: of the angles.
        strip: thickness of rows and columns, in pixels. More is faster, and not the paper's.
        patch: side of a patch, in pixels.
        drop_remainder: leave out pixels that fill no strip or patch; otherwise they are refused.

    Raises:
        UserError: a value is out of range.

    Example:
        ```python
        crd = CRD()
        student = crd.attach(student, total_steps=epochs * len(loader))
        for photo in loader_of_all_epochs:
            with torch.no_grad():
                expected = teacher(photo)
            image = student(photo)
            loss = crd.loss(image, expected) + the_other_losses(image)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            crd.step()
        student = crd.finalize(student)
        ```

    >>> image = torch.rand(1, 3, 64, 64) * 2 - 1
    >>> float(CRD().loss(image / 2 + 0.1, image)) < 1e-6  # scale and shift are no relations
    True
    """

    weight: float | None = None
    rows: float = 1.0
    columns: float = 1.0
    patches: float = 1.0
    distance_weight: float = 1.0
    angle_weight: float = 2.0
    strip: int = 1
    patch: int = 32
    drop_remainder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paired: bool | None = None

    def validate(self) -> None:
        """Check the fields."""
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(
                f"weight={self.weight}: expected more than 0, or None for the data's preset"
            )
        for names in (("rows", "columns", "patches"), ("distance_weight", "angle_weight")):
            values = [getattr(self, name) for name in names]
            given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            if not all(math.isfinite(value) and value >= 0 for value in values):
                raise UserError(f"{given}: expected finite weights of at least 0")
            if not any(values):
                raise UserError(f"{given}: expected one of them above 0, or no CRD at all")
        for name in ("strip", "patch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1 pixel")

    # -- what a run says ------------------------------------------------------------------------

    def use_setting(self, paired: bool, size: tuple[int, int]) -> None:
        """Take note whether the run's images come in pairs, and see whether they can be cut.

        Raises:
            UserError: a side that is no multiple of the patch or the strip, or too few slices.
        """
        self.paired = paired
        self.check_sides(*size)

    def check_sides(self, height: int, width: int) -> None:
        """Refuse images that can't be cut, or that give fewer than three slices.

        Raises:
            UserError: such a side.
        """
        slices = self._slices(torch.empty(1, 1, height, width, device="meta"))
        for name, found in slices.items():
            if found.shape[1] < 3:
                raise UserError(
                    f"images of {height}x{width} have {found.shape[1]} {name}, which have no "
                    f"angles: expected at least 3; give larger images, smaller ones of strip="
                    f"{self.strip} and patch={self.patch}, or {name}: 0"
                )

    # -- the loss -------------------------------------------------------------------------------

    def loss(self, student_image: Tensor, teacher_image: Tensor) -> Tensor:
        """Return the weighted sum of all relations, a scalar.

        Args:
            student_image: the student's output `(B, C, H, W)`, in [-1, 1].
            teacher_image: the teacher's for the same inputs; it gets no gradient.

        Raises:
            UserError: shapes that differ, integers, values that are not finite or outside [-1, 1],
                or sides that can't be cut.
        """
        shares = {"rows": self.rows, "columns": self.columns, "patches": self.patches}
        terms = self.terms(student_image, teacher_image)
        weight = self.weight
        if weight is None:
            weight = PAIRED_WEIGHT if self.paired else UNPAIRED_WEIGHT
        return weight * torch.stack([shares[name] * term for name, term in terms.items()]).sum()

    def terms(self, student_image: Tensor, teacher_image: Tensor) -> dict[str, Tensor]:
        """Return R of `rows`, `columns` and `patches`, unweighted; those of share 0 are left out.

        Arguments and errors are those of `loss`.
        """
        check_image_pair(student_image, teacher_image)
        teacher_image = teacher_image.detach()
        self.check_sides(*student_image.shape[-2:])
        ours, theirs = self._slices(student_image), self._slices(teacher_image)
        found = {
            name: relations_and_dead(
                ours[name],
                theirs[name],
                distance_weight=self.distance_weight,
                angle_weight=self.angle_weight,
            )
            for name in ours
        }
        if not torch.compiler.is_compiling():  # a compiled graph can't stop to look at values
            dead = torch.stack([dead for _, dead in found.values()])
            if bool(dead.any()):
                warn_of_identical_slices()
        return {name: loss for name, (loss, _) in found.items()}

    def student_losses(self, step: StudentStep) -> dict[str, Tensor]:
        """Return the weighted loss of a step of the student, under the name `relations`."""
        return {"relations": self.loss(step.student, step.teacher)}

    def _slices(self, images: Tensor) -> dict[str, Tensor]:
        drop, found = self.drop_remainder, {}
        if self.rows:
            found["rows"] = row_strips(images, self.strip, drop_remainder=drop)
        if self.columns:
            found["columns"] = column_strips(images, self.strip, drop_remainder=drop)
        if self.patches:
            found["patches"] = patches(images, self.patch, drop_remainder=drop)
        return found
