"""Slices of images and the relations between them; `crd.py` says what they are for.

For N slices v_1..v_N of one image, with q_i = |v_i|^2 of the centred ones:

    D_ij    = |v_i - v_j|^2 = q_i + q_j - 2 <v_i, v_j>,   d_ij = sqrt(D_ij),   r_ij = 1 / d_ij
    delta   = d_ij / mu,   mu = sum_ij d_ij / (N (N - 1))
    a_ijk   = (D_ij + D_ik - D_jk) r_ij r_ik / 2        cosine at vertex i, by the law of cosines
    L_dist  = sum_ij h(delta^S - delta^T) / N^2,   L_ang = sum_ijk h(a^S - a^T) / N^3

h is the Huber function with threshold 1; its derivative, w, is its argument clamped to [-1, 1]. All
of it is a function of D alone, and its gradient is known in closed form:

    N^3 dL_ang/dD_ij = sum_k w_ijk r_ij r_ik - r_ij^2 sum_k w_ijk a_ijk - sum_m w_mij r_mi r_mj / 2
    dL/dv_i          = 2 sum_j (g_ij + g_ji) (v_i - v_j),   g = dL/dD

So the forward pass walks over a few vertices i at a time and adds up value and g together. No array
of N x N x D or N x N x N is ever made, and the backward pass is one product of N x N by N x D.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenfold.errors import UserError

__all__ = [
    "column_strips",
    "pairwise_distance_angle_loss",
    "patches",
    "relations_and_dead",
    "row_strips",
    "warn_of_identical_slices",
]

SAME = 1e-6  # slices nearer than this share of mean(q) are one: their direction is round-off
# Cosines at once. On a CPU near what its caches hold, yet threads shall seldom wait for each other.
CPU_ENTRIES = 2**20
GPU_ENTRIES = 2**23  # enough work for a kernel


# -- slices ----------------------------------------------------------------------------------------


def row_strips(images: Tensor, strip: int = 1, *, drop_remainder: bool = False) -> Tensor:
    """Cut images into horizontal strips.

    Args:
        images: `(B, C, H, W)`.
        strip: height of one, in pixels.
        drop_remainder: leave out the lines that don't fill a strip.

    Returns:
        `(B, H / strip, C * strip * W)`, from the top down.

    Raises:
        UserError: no images, or a height that is no multiple of `strip`.

    >>> row_strips(torch.zeros(2, 3, 64, 96)).shape
    torch.Size([2, 64, 288])
    """
    _check_images(images)
    count = _pieces(images.shape[2], "height", strip, "strip", drop_remainder)
    batch, channels, _, width = images.shape
    cut = images[:, :, : count * strip].reshape(batch, channels, count, strip, width)
    return cut.permute(0, 2, 1, 3, 4).flatten(2)


def column_strips(images: Tensor, strip: int = 1, *, drop_remainder: bool = False) -> Tensor:
    """Cut images into vertical strips.

    Args:
        images: `(B, C, H, W)`.
        strip: width of one, in pixels.
        drop_remainder: leave out the lines that don't fill a strip.

    Returns:
        `(B, W / strip, H * C * strip)`, from left to right.

    Raises:
        UserError: no images, or a width that is no multiple of `strip`.
    """
    _check_images(images)
    count = _pieces(images.shape[3], "width", strip, "strip", drop_remainder)
    batch, channels, height, _ = images.shape
    cut = images[..., : count * strip].reshape(batch, channels, height, count, strip)
    return cut.permute(0, 3, 2, 1, 4).flatten(2)


def patches(images: Tensor, size: int = 32, *, drop_remainder: bool = False) -> Tensor:
    """Cut images into square patches that don't overlap.

    Args:
        images: `(B, C, H, W)`.
        size: side of one, in pixels.
        drop_remainder: leave out the pixels at the right and at the bottom that don't fill one.

    Returns:
        `(B, (H / size) * (W / size), C * size * size)`, line by line.

    Raises:
        UserError: no images, or a side that is no multiple of `size`.
    """
    _check_images(images)
    down = _pieces(images.shape[2], "height", size, "patch", drop_remainder)
    across = _pieces(images.shape[3], "width", size, "patch", drop_remainder)
    batch, channels = images.shape[:2]
    cut = images[:, :, : down * size, : across * size]
    cut = cut.reshape(batch, channels, down, size, across, size)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _check_images(images: Tensor) -> None:
    if images.dim() != 4:
        raise UserError(f"images of shape {tuple(images.shape)}: expected (B, C, H, W)")


def _pieces(side: int, name: str, length: int, piece: str, drop_remainder: bool) -> int:
    if length < 1:
        raise UserError(f"{piece}={length}: expected at least 1 pixel")
    if side % length and not drop_remainder:
        raise UserError(
            f"an image's {name} of {side} is no multiple of {piece}={length}: crop or resize the "
            "images, give another size, or leave the rest out by drop_remainder=True"
        )
    return side // length


# -- relations -------------------------------------------------------------------------------------


def pairwise_distance_angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    block: int | None = None,
) -> Tensor:
    """Compare how the slices of an image lie to each other: R of CRD, section "relations".

    Shift, scale and rotation of all slices of an image together change nothing. Images are never
    related to each other. The teacher gets no gradient, the student's mean distance does. Sums are
    of float32 (float64 where the student is), Gram matrices of float64, under autocast too.

    Args:
        student: slices `(B, N, D)`, N at least 3.
        teacher: likewise.
        distance_weight: of the distances, each over their mean.
        angle_weight: of the cosines at every vertex between every two others.
        block: vertices at once, of all images; None: as many as suit the device. Takes memory of
            about 12 * B * block * N * N bytes, and has no influence on the result but rounding.

    Returns:
        The mean over the images, a scalar. An image all of whose slices are identical counts as 0,
        with a warning; two slices that are identical get zero angles and no gradient.

    Raises:
        UserError: shapes that differ, integers, fewer than 3 slices, or values that are not finite.

    >>> teacher = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]])
    >>> student = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> print(f"{pairwise_distance_angle_loss(student, teacher):.6f}")
    0.004970
    """
    loss, dead = relations_and_dead(
        student,
        teacher,
        distance_weight=distance_weight,
        angle_weight=angle_weight,
        block=block,
    )
    if not torch.compiler.is_compiling():  # a compiled graph can't stop to look at values
        fine, some_dead = torch.stack([torch.isfinite(loss.detach()), dead.any()]).tolist()
        if not fine:
            raise UserError("slices hold NaN or infinity: expected finite values")
        if some_dead:
            warn_of_identical_slices()
    return loss


def relations_and_dead(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss as above, and which images have only identical slices, `(B,)`, bool.

    It never looks at values, so that a device needn't be waited for.
    """
    _check_slices(student, teacher)
    for name, weight in (("distance_weight", distance_weight), ("angle_weight", angle_weight)):
        if not 0 <= weight < float("inf"):
            raise UserError(f"{name}={weight}: expected a finite weight of at least 0")
    if block is None:
        entries = CPU_ENTRIES if student.device.type == "cpu" else GPU_ENTRIES
        block = max(1, entries // (len(student) * student.shape[1] ** 2))
    elif block < 1:
        raise UserError(f"block={block}: expected at least 1 vertex")
    wants_gradient = torch.is_grad_enabled() and student.requires_grad
    found: tuple[Tensor, Tensor] = _Relations.apply(
        student, teacher.detach(), distance_weight, angle_weight, block, wants_gradient
    )
    return found


def warn_of_identical_slices() -> None:
    """Warn that an image was left out."""
    warnings.warn(
        "all slices of an image are identical (it is of one colour): it has no relations and "
        "counts as 0",
        stacklevel=3,
    )


def _check_slices(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise UserError(
            f"slices of the student are {tuple(student.shape)}, of the teacher "
            f"{tuple(teacher.shape)}: expected one shape"
        )
    if student.dim() != 3:
        raise UserError(f"slices of shape {tuple(student.shape)}: expected (B, N, D)")
    if student.shape[1] < 3:
        raise UserError(
            f"{student.shape[1]} slices an image have no angles: expected at least 3; give larger "
            "images, or thinner strips and smaller patches"
        )
    if 0 in student.shape:
        raise UserError(f"slices of shape {tuple(student.shape)}: expected none of it 0")
    for slices in (student, teacher):
        if not slices.is_floating_point():
            raise UserError(f"slices of {slices.dtype}: expected floating point values")


class _Distances(NamedTuple):
    """Of B images, all over the mean of q; zeros between identical slices."""

    slices: Tensor  # centred, `(B, N, D)`
    scale: Tensor  # square root of the mean of q, `(B, 1, 1)`; 0 where all slices are identical
    squared: Tensor  # D, `(B, N, N)`
    inverse: Tensor  # r


def _distances(slices: Tensor) -> _Distances:
    # float64: round-off of the Gram matrix would be all that is left of the distance of two similar
    # rows. It is 1 % of the work. MPS has none.
    wide = torch.float32 if slices.device.type == "mps" else torch.float64
    slices = slices.to(wide)
    slices = slices - slices[:, :1]  # identical slices are exact zeros from here on
    slices = slices - slices.mean(dim=1, keepdim=True)
    scale = slices.square().sum(dim=(1, 2), keepdim=True).div(slices.shape[1]).sqrt()
    slices = slices / torch.where(scale == 0, 1.0, scale)
    gram = torch.bmm(slices, slices.mT)
    squares = gram.diagonal(dim1=1, dim2=2)
    squared = squares[:, :, None] + squares[:, None, :] - 2 * gram
    same = ~(squared > SAME) | torch.eye(gram.shape[1], dtype=torch.bool, device=gram.device)
    squared = squared.masked_fill(same, 0.0)
    inverse = squared.masked_fill(same, 1.0).rsqrt().masked_fill(same, 0.0)
    return _Distances(slices, scale, squared, inverse)


class _Relations(torch.autograd.Function):
    """The loss, whose gradient is found on the way forward and kept as one N x N matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        distance_weight: float,
        angle_weight: float,
        block: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(student.device.type, enabled=False):
            ours, theirs = _distances(student), _distances(teacher)
            dead = (ours.scale == 0) | (theirs.scale == 0)
            narrow = torch.float64 if student.dtype == torch.float64 else torch.float32
            loss, gradient = _distance_part(ours, theirs, dead, distance_weight)
            if angle_weight:
                value, part = _angle_part(ours, theirs, dead, narrow, block, wants_gradient)
                loss = loss + angle_weight * value
                gradient = gradient + angle_weight * part
            if wants_gradient:
                both = gradient + gradient.mT
                # sum_j h_ij (v_i - v_j) as a matrix on v: diag(h 1) - h.
                matrix = torch.diag_embed(both.sum(dim=2)) - both
                matrix = matrix * (2 / torch.where(dead, 1.0, ours.scale))
                ctx.save_for_backward(matrix, ours.slices)
        ctx.dtype = student.dtype
        dead = dead.flatten()
        ctx.mark_non_differentiable(dead)
        return loss.to(narrow), dead

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        matrix, slices = ctx.saved_tensors
        with torch.autocast(slices.device.type, enabled=False):
            found = torch.bmm(matrix * gradient, slices).to(ctx.dtype)
        return found, None, None, None, None, None


def _distance_part(
    ours: _Distances, theirs: _Distances, dead: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Return the distances' part of the loss and its derivative by D, `(B, N, N)`."""
    batch, count, _ = ours.squared.shape
    pairs = count * (count - 1)
    (mean, delta), (_, other) = ((m, d / m) for d, m in map(_with_mean, (ours, theirs)))
    z = (delta - other).masked_fill(dead, 0.0)
    slope = z.clamp(-1, 1)
    value = (slope * (z - slope / 2)).sum()
    # Every distance is also part of mu, by which all are divided.
    through_mean = (slope * delta).sum(dim=(1, 2), keepdim=True) / pairs
    by_distance = (slope - through_mean) / mean
    gradient = (by_distance * ours.inverse / 2).masked_fill(dead, 0.0)
    factor = weight / (batch * count**2)
    return value * factor, gradient * factor


def _with_mean(found: _Distances) -> tuple[Tensor, Tensor]:
    distances = found.squared * found.inverse
    count = distances.shape[1]
    return distances, distances.sum(dim=(1, 2), keepdim=True) / (count * (count - 1))


def _angle_part(
    ours: _Distances,
    theirs: _Distances,
    dead: Tensor,
    dtype: torch.dtype,
    block: int,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the angles' part of the loss and its derivative by D, `(B, N, N)`."""
    batch, count, _ = ours.squared.shape
    half, inverse = ((ours.squared / 2).to(dtype), ours.inverse.masked_fill(dead, 0.0).to(dtype))
    other = ((theirs.squared / 2).to(dtype), theirs.inverse.masked_fill(dead, 0.0).to(dtype))
    value = torch.zeros((), dtype=ours.squared.dtype, device=half.device)
    opposite = torch.zeros_like(ours.squared)
    beside = torch.zeros_like(ours.squared)
    # The same memory for every block: fresh pages would cost more than the sums.
    room = half.new_empty(3, batch, min(block, count), count, count)
    for start in range(0, count, block):
        here = slice(start, min(start + block, count))
        cosines, z, slope = room[:, :, : here.stop - start]
        _cosines(half, inverse, here, cosines)
        _cosines(*other, here, z)
        torch.sub(cosines, z, out=z)
        torch.clamp(z, -1, 1, out=slope)
        flat = slope.flatten()
        value += torch.dot(flat, z.flatten()) - torch.dot(flat, flat) / 2
        if not wants_gradient:
            continue
        near = inverse[:, here]
        turned = cosines.mul_(slope).sum(dim=3)
        slope.mul_(near[:, :, :, None]).mul_(near[:, :, None, :])
        opposite += slope.sum(dim=1)
        beside[:, here] = slope.sum(dim=3) - near * near * turned
    factor = 1 / (batch * count**3)
    return value * factor, (beside - opposite / 2) * factor


def _cosines(half: Tensor, inverse: Tensor, vertices: slice, out: Tensor) -> None:
    """Write the cosines at some vertices, `(B, vertices, N, N)`, of D / 2 and r."""
    near, scale = half[:, vertices], inverse[:, vertices]
    torch.sub(near[:, :, :, None], half[:, None], out=out)
    out.add_(near[:, :, None, :])
    out.mul_(scale[:, :, :, None]).mul_(scale[:, :, None, :])
