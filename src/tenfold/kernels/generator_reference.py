"""What a generator's program computes, in plain PyTorch: the form without compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.kernels.generator_program import (
    IMAGE,
    NOTHING,
    Activation,
    Norm,
    Op,
    Step,
    steps_of,
    unpack_weight,
)

__all__ = ["generator_reference"]


def generator_reference(
    x: Tensor, weights: Tensor, program: Sequence[int], epsilon: float
) -> Tensor:
    """See `tenfold.kernels.generator.generator`; in any floating-point type."""
    maps = {IMAGE: x}
    weights = weights.to(x.dtype)
    for step in steps_of(program):
        made = _made(step, maps, weights, epsilon)
        if step.keep != NOTHING:
            maps[step.keep] = made
        maps[step.writes] = _convolved(step, made, weights)
    return torch.tanh(maps[IMAGE])


def _made(step: Step, maps: dict[int, Tensor], weights: Tensor, epsilon: float) -> Tensor:
    """Normalise, activate and add."""
    x = maps[step.reads]
    if step.norm == Norm.INSTANCE:
        x = F.group_norm(x, x.shape[1], eps=epsilon)
    elif step.norm == Norm.GIVEN:
        given = weights[step.norms : step.norms + 2 * step.channels].reshape(2, -1, 1, 1)
        x = x * given[0] + given[1]
    if step.activation == Activation.RELU:
        x = F.relu(x)
    elif step.activation == Activation.CLAMP:
        x = x.clamp(-1, 1)
    return x if step.add == NOTHING else x + maps[step.add]


def _convolved(step: Step, x: Tensor, weights: Tensor) -> Tensor:
    weight = unpack_weight(step, weights)
    bias = None if step.bias == NOTHING else weights[step.bias : step.bias + step.outputs]
    if step.op == Op.UP:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)
    if step.op == Op.DOWN:
        return F.conv2d(x, weight, bias, stride=2, padding=1)
    border = step.kernel // 2
    if border:
        x = F.pad(x, (border,) * 4, mode="reflect")
    return F.conv2d(x, weight, bias, groups=step.channels if step.op == Op.DEPTHWISE else 1)
