"""How methods meet PyTorch's optimizers: seeing a step come, and what a loss scaler does to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

__all__ = [
    "Owned",
    "belongs_to_a_method",
    "mark_as_owned",
    "overflowed",
    "parameters_of",
    "unscale",
    "watch_optimizers",
]


class Owned(nn.Module):
    """Carries an owned module on a model; passes its input on where a Sequential calls it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


_owned: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def mark_as_owned(optimizer: Optimizer) -> None:
    """Note that a method steps this optimizer itself: its steps are nobody's training step."""
    _owned.add(optimizer)


def belongs_to_a_method(optimizer: Optimizer) -> bool:
    """Tell whether any method steps this optimizer itself."""
    return optimizer in _owned


_watching: list[tuple[weakref.WeakMethod[Callable[[Optimizer], None]], Callable[[], None]]] = []


def watch_optimizers(will_step: Callable[[Optimizer], None]) -> Callable[[], None]:
    """Call a bound method ahead of every optimizer's step; return what ends that.

    PyTorch's hook is global. It holds the method's object weakly, so that a loop that was given up
    doesn't keep its model alive.
    """
    # The hooks of loops that were given up go now, not when their objects are collected: that may
    # be in the middle of an optimizer's step, while PyTorch is walking through its hooks.
    for entry in [entry for entry in _watching if entry[0]() is None]:
        entry[1]()
        _watching.remove(entry)
    reference = weakref.WeakMethod(will_step)

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(value) for value in (*args[1:], kwargs.get("closure"))):
            return  # the backward pass is still to come, inside the closure
        watching = reference()
        if watching is not None:
            watching(optimizer)

    handle = register_optimizer_step_pre_hook(hook)
    _watching.append((reference, handle.remove))
    return handle.remove


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return all parameters that an optimizer holds."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def unscale(optimizer: Optimizer) -> bool:
    """Unscale the gradients where a loss scaler has left that to a fused optimizer's kernel.

    Returns:
        False if they overflowed, so that the kernel is about to skip the step.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if not isinstance(scale, Tensor):
        return True
    overflow = getattr(optimizer, "found_inf", None)
    if isinstance(overflow, Tensor) and bool(overflow):
        return False
    for parameter in parameters_of(optimizer):
        if parameter.grad is not None:
            parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined] # done here, once
    return True


def overflowed(model: nn.Module) -> bool:
    """Tell whether a gradient of the model is not finite."""
    return any(
        not bool(torch.isfinite(parameter.grad).all())
        for parameter in model.parameters()
        if parameter.grad is not None
    )
