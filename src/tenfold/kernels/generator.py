"""A whole image-to-image generator as one operator, `tenfold::generator`, for inference.

Instance norms make each layer wait for the whole map of the one before. The compiled kernel goes
over each map once: it makes the rows that a convolution needs out of what the layer before wrote
(norm, ReLU, residual sum, borders), convolves them, and measures the result for the next norm.

It is a custom operator of PyTorch with shapes for tracing, and has no gradient. What it computes is
a program, see `tenfold.kernels.generator_program`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.kernels.generator_program import sizes, steps_of, weights_needed
from tenfold.kernels.generator_reference import generator_reference

__all__ = ["generator"]


def generator(x: Tensor, weights: Tensor, program: Sequence[int], epsilon: float = 1e-5) -> Tensor:
    """Return the images that a generator makes of images, in [-1, 1].

    Args:
        x: `(B, C, H, W)`.
        weights: of all steps, one-dimensional.
        program: fields of all steps.
        epsilon: of the instance norms.

    Raises:
        UserError: a program, weights or sizes that don't fit.
    """
    if native.usable(x):
        return _run(x, weights, program, epsilon)
    result: Tensor = torch.ops.tenfold.generator(x, weights, list(program), epsilon)
    return result


def _run(x: Tensor, weights: Tensor, program: Sequence[int], epsilon: float) -> Tensor:
    program = tuple(program)
    _check(x, weights, program)
    if weights.dtype != torch.float32 or weights.device.type != "cpu":
        return generator_reference(x, weights, program, epsilon)
    x, weights = x.contiguous(), weights.contiguous()
    out = torch.empty(len(x), steps_of(program)[-1].outputs, *x.shape[2:])
    if out.numel():
        native.extension().generator(
            program, weights.data_ptr(), x.data_ptr(), out.data_ptr(), len(x), *x.shape[2:],
            epsilon, torch.get_num_threads(),
        )  # fmt: skip
    return out


def _check(x: Tensor, weights: Tensor, program: Sequence[int]) -> None:
    """Refuse what the kernel doesn't take: it checks nothing."""
    channels, needed = steps_of(program)[0].channels, weights_needed(program)
    if x.dim() != 4 or x.shape[1] != channels:
        raise UserError(
            f"a generator got images of shape {tuple(x.shape)}: expected (B, {channels}, H, W)"
        )
    if weights.dim() != 1 or len(weights) < needed:
        raise UserError(
            f"a generator's weights have shape {tuple(weights.shape)}: expected {needed} in a row"
        )
    sizes(program, x.shape[2], x.shape[3])


@torch.library.custom_op("tenfold::generator", mutates_args=())
def _generator(x: Tensor, weights: Tensor, program: Sequence[int], epsilon: float) -> Tensor:
    if native.fits(x):
        return _run(x, weights, program, epsilon)
    _check(x, weights, program)
    return generator_reference(x, weights, program, epsilon).contiguous()


@_generator.register_fake
def _(x: Tensor, weights: Tensor, program: Sequence[int], epsilon: float) -> Tensor:
    return x.new_empty(x.shape[0], steps_of(program)[-1].outputs, x.shape[2], x.shape[3])
