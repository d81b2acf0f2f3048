"""What the layers of an optimized network have in common: one kernel, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tenfold.errors import StateError, UserError
from tenfold.kernels.reference import ACTIVATIONS

__all__ = ["KernelLayer", "finish"]


class KernelLayer(nn.Module):
    """A layer whose kernel also adds, activates and, where `can_pool`, takes a maximum.

    `forward(x, add=None)` computes `maximum(activation(layer(x) + add))`. It is for inference: its
    tensors are buffers, and an input that needs a gradient is refused.

    Attributes:
        activation: one of `tenfold.kernels.reference.ACTIVATIONS`.
        pool: windows of the maximum, by axis.
    """

    can_pool = False

    def __init__(self) -> None:
        super().__init__()
        self.activation = "none"
        self.pool = (1, 1, 1)

    @property
    def weight(self) -> Tensor:
        """Return the weight that the layer stands for."""
        raise NotImplementedError

    def macs(self, output: Tensor) -> int:
        """Return the multiply-adds behind an output."""
        raise NotImplementedError

    def _check_types(self, x: Tensor, *given: Tensor | None) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise StateError(
                "a packed layer has no gradient: run it under torch.inference_mode(), or use the "
                "model that was given to optimize"
            )
        for tensor in given:
            if tensor is not None and tensor.dtype != x.dtype and x.dtype.is_floating_point:
                raise UserError(
                    f"the input is {x.dtype} and the packed layer's bias or scale {tensor.dtype}: "
                    "expected one type; the kernels compute in torch.float32"
                )


def finish(
    run: Callable[[Tensor | None, str], Tensor],
    x: Tensor,
    add: Tensor | None,
    shape: Sequence[int],
    activation: str,
) -> Tensor:
    """Add inside the kernel where the operand has the result's shape and type, else outside."""
    if add is None or (tuple(add.shape) == tuple(shape) and add.dtype == x.dtype):
        return run(add, activation)
    return ACTIVATIONS[activation](run(None, "none") + add)
