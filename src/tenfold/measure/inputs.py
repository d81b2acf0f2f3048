"""Example inputs: check them once, and make batches of any size from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tenfold.errors import UserError
from tenfold.measure.quiet import reason

__all__ = ["ExampleInputs", "as_inputs", "at_batch", "outputs_of", "random_like", "run_once"]

ExampleInputs = Tensor | Sequence[Tensor]
"""One tensor `(B, ...)`, or several that share their first dimension, in `forward`'s order."""


def as_inputs(example_inputs: ExampleInputs) -> tuple[Tensor, ...]:
    """Return the example inputs as a tuple of tensors that share their batch dimension.

    Raises:
        UserError: If something is not a tensor, has no batch dimension, or the batches differ.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(inputs, tuple | list) or not inputs:
        given = type(example_inputs).__name__
        raise UserError(
            f"example_inputs is {'empty' if isinstance(inputs, tuple | list) else given}; expected "
            "a tensor (B, ...) or a tuple of tensors: pass one batch as the model takes it"
        )
    for position, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            raise UserError(
                f"example_inputs[{position}] is {type(value).__name__}; expected a tensor: "
                "pass one batch as the model takes it"
            )
        if value.dim() == 0 or value.shape[0] == 0:
            raise UserError(
                f"example_inputs[{position}] has shape {tuple(value.shape)}; expected a first "
                "dimension that counts the samples: add it with .unsqueeze(0)"
            )
    batches = {value.shape[0] for value in inputs}
    if len(batches) > 1:
        raise UserError(
            f"example_inputs have batch sizes {sorted(batches)}; expected one: give each tensor "
            "the same first dimension"
        )
    return tuple(value.detach() for value in inputs)


def at_batch(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Repeat or cut the rows of every input so that it has `batch` of them."""
    rows = torch.arange(batch) % inputs[0].shape[0]
    return tuple(value[rows.to(value.device)].contiguous() for value in inputs)


def random_like(inputs: tuple[Tensor, ...], batch: int, seed: int) -> tuple[Tensor, ...]:
    """Draw standard normal inputs of the examples' shapes; integers keep the examples' values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for value, repeated in zip(inputs, at_batch(inputs, batch), strict=True):
        if value.is_floating_point():
            noise = torch.randn(repeated.shape, generator=generator, dtype=torch.float32)
            repeated = noise.to(device=value.device, dtype=value.dtype)
        drawn.append(repeated)
    return tuple(drawn)


def outputs_of(result: object) -> tuple[Tensor, ...]:
    """Return the tensors of a model's result in order, whatever holds them."""
    return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def run_once(
    model: Callable[..., object], inputs: tuple[Tensor, ...], name: str
) -> tuple[Tensor, ...]:
    """Run a model without gradients and return its output tensors.

    Raises:
        UserError: If the model raises on these inputs, or returns no tensor.
    """
    try:
        with torch.no_grad():
            outputs = outputs_of(model(*inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise UserError(
            f"{name} fails on the example inputs {shapes}: {reason(error)}: pass inputs of the "
            "shape, type and device that the model takes"
        ) from error
    if not outputs:
        raise UserError(f"{name} returns no tensor; expected a tensor or a tuple of tensors")
    return outputs
