"""The two forms of LBC's scores, and how an optimizer's own rule moves them.

A score is a parameter in all but name: it follows the learning rate, momentum and weight decay of
the weights that it judges. It is kept outside the model, because autograd never sees it and DDP
would wait for its gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.nn.blocks import to_blocks

__all__ = ["AccumulatorScores", "FullScores", "Scores", "choose_form"]

_CACHED = 2**16  # elements that stay in a core's cache while several operations pass over them


class Scores(ABC):
    """Scores of one layer's candidates."""

    name: ClassVar[str]
    table_sized: ClassVar[bool]
    forms: ClassVar[dict[str, type[Scores]]] = {}

    def __init_subclass__(cls) -> None:
        Scores.forms[cls.name] = cls

    @abstractmethod
    def __init__(self, weight: Tensor, table: Tensor, m: int):
        """Start the scores for `weight` with the candidates `table` `(C, M)`."""

    @abstractmethod
    def update(self, weight: Tensor, group: Mapping[str, Any], alive: Tensor) -> None:
        """Take one step along the scores' gradient, by the rule of the optimizer's group."""

    @abstractmethod
    def of_candidates(self, part: slice) -> Tensor:
        """Return the scores `(blocks, C)` of some blocks, up to a constant within each block."""

    @abstractmethod
    def forget(self, dead: Tensor) -> None:
        """Clear what is kept of removed candidates, `(blocks, C)` bool."""

    @abstractmethod
    def finite(self) -> bool:
        """Tell whether every score is finite."""

    def to(self, device: torch.device) -> None:
        """Move to a device, if elsewhere."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the tensors to go on from."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def choose_form(wanted: str, optimizer: Optimizer) -> type[Scores]:
    """Choose the form for an optimizer: the exact small one where its update is linear.

    Raises:
        UserError: the accumulator was insisted on, and the optimizer is not linear.
    """
    linear = isinstance(optimizer, torch.optim.SGD)
    if wanted == "accumulator" and not linear:
        raise UserError(
            f"scores='accumulator' is exact only for SGD, and {type(optimizer).__name__} is not "
            "linear: use scores='auto' or 'full'"
        )
    return AccumulatorScores if linear and wanted != "full" else FullScores


class AccumulatorScores(Scores):
    """One number A a weight; a candidate's score is the sum over its positions."""

    name = "accumulator"
    table_sized = False

    def __init__(self, weight: Tensor, table: Tensor, m: int):
        """Start at zero, in the weight's own layout and at least single precision."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.value = torch.zeros_like(weight, dtype=dtype)
        self.momentum: Tensor | None = None
        self._table = table.to(weight.device, dtype)
        self._m = m

    @torch.no_grad()
    def update(self, weight: Tensor, group: Mapping[str, Any], alive: Tensor) -> None:
        """Take a step of SGD with gradient `W.grad * W`.

        On the CPU in pieces that stay in cache: the update is bound by memory otherwise.
        """
        assert weight.grad is not None
        first = self.momentum is None and group.get("momentum", 0) != 0
        if first:
            self.momentum = torch.zeros_like(self.value)
        tensors = [weight.detach(), weight.grad, self.value]
        if self.momentum is not None:
            tensors.append(self.momentum)
        numel = weight.numel()
        alike = all(t.stride() == weight.stride() for t in tensors)
        dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
        if not (alike and dense) or weight.is_cuda or numel <= _CACHED:
            _sgd(*tensors, first=first, group=group)
            return
        flat = [t.as_strided((numel,), (1,)) for t in tensors]
        for start in range(0, numel, _CACHED):
            _sgd(*[t[start : start + _CACHED] for t in flat], first=first, group=group)

    def of_candidates(self, part: slice) -> Tensor:
        """Return `A @ P.T`, `(blocks, C)`."""
        return to_blocks(self.value, self._m)[part] @ self._table.T

    def forget(self, dead: Tensor) -> None:
        """Do nothing: a masked position has no gradient, and its number is never read again."""

    def finite(self) -> bool:
        """Tell whether every number is finite."""
        return bool(torch.isfinite(self.value).all())

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and momentum."""
        return {"value": self.value, "momentum": self.momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore numbers and momentum."""
        self.value.copy_(state["value"])
        saved = state["momentum"]
        self.momentum = None if saved is None else torch.empty_like(self.value).copy_(saved)


def _sgd(
    weight: Tensor,
    gradient: Tensor,
    value: Tensor,
    momentum: Tensor | None = None,
    *,
    first: bool,
    group: Mapping[str, Any],
) -> None:
    """Move `value` by SGD with gradient `gradient * weight`, as torch.optim.SGD moves a weight."""
    lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    sign = -1.0 if group.get("maximize", False) else 1.0
    if value.dtype != weight.dtype:
        weight, gradient = weight.to(value.dtype), gradient.to(value.dtype)
    if momentum is None or (not first and not decay and not group.get("nesterov", False)):
        # The common cases need no temporary.
        if momentum is None:
            if decay:
                value.mul_(1 - lr * decay)
            value.addcmul_(weight, gradient, value=-lr * sign)
            return
        momentum.mul_(group["momentum"])
        momentum.addcmul_(weight, gradient, value=sign * (1 - group.get("dampening", 0.0)))
        value.add_(momentum, alpha=-lr)
        return
    step = torch.mul(weight, gradient).mul_(sign) if sign < 0 else torch.mul(weight, gradient)
    if decay:
        step.add_(value, alpha=decay)
    _momentum(step, momentum, first, group)
    value.add_(step, alpha=-lr)


def _momentum(step: Tensor, momentum: Tensor, first: bool, group: Mapping[str, Any]) -> None:
    """Turn a gradient into SGD's step, in place, and keep the running momentum."""
    if first:
        momentum.copy_(step)
    else:
        momentum.mul_(group["momentum"]).add_(step, alpha=1 - group.get("dampening", 0.0))
    if group.get("nesterov", False):
        step.add_(momentum, alpha=group["momentum"])
    else:
        step.copy_(momentum)


class FullScores(Scores):
    """One number S a candidate, started at 1 / binom(M-1, N-1)."""

    name = "full"
    table_sized = True

    def __init__(self, weight: Tensor, table: Tensor, m: int):
        """Start with equal scores."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._table = table.to(weight.device, dtype)
        self._m = m
        n = int(table[0].sum())
        self.value = torch.full(
            (weight.numel() // m, len(table)),
            1 / math.comb(m - 1, n - 1),
            dtype=dtype,
            device=weight.device,
        )
        self.momentum: Tensor | None = None
        self.second: Tensor | None = None
        self.steps = 0

    @torch.no_grad()
    def update(self, weight: Tensor, group: Mapping[str, Any], alive: Tensor) -> None:
        """Take a step with gradient `alive * (blocks(W.grad * W) @ P.T)`.

        By SGD's rule under SGD, by Adam's (with the group's betas, where it has a pair) under any
        other optimizer.
        """
        dtype = self.value.dtype
        product = weight.grad.to(dtype) * weight.detach().to(dtype)  # type: ignore[union-attr]
        gradient = (to_blocks(product, self._m) @ self._table.T).mul_(alive)
        if group.get("maximize", False):
            gradient.neg_()
        self.steps += 1
        if "dampening" in group:  # torch.optim.SGD's own mark
            self._sgd(gradient, group)
        else:
            self._adam(gradient, group)
        self.forget(~alive)

    def _sgd(self, gradient: Tensor, group: Mapping[str, Any]) -> None:
        decay = float(group.get("weight_decay", 0.0))
        if decay:
            gradient = gradient.add(self.value, alpha=decay)
        if group.get("momentum", 0):
            first = self.momentum is None
            if self.momentum is None:
                self.momentum = torch.zeros_like(self.value)
            _momentum(gradient, self.momentum, first, group)
        self.value.add_(gradient, alpha=-float(group["lr"]))

    def _adam(self, gradient: Tensor, group: Mapping[str, Any]) -> None:
        lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        betas = group.get("betas")
        beta1, beta2 = (
            betas if isinstance(betas, tuple | list) and len(betas) == 2 else (0.9, 0.999)
        )
        if self.momentum is None or self.second is None:
            self.momentum, self.second = torch.zeros_like(self.value), torch.zeros_like(self.value)
        if decay and group.get("decoupled_weight_decay", False):
            self.value.mul_(1 - lr * decay)
        elif decay:
            gradient = gradient.add(self.value, alpha=decay)
        self.momentum.lerp_(gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = math.sqrt(1 - beta2**self.steps)
        denominator = self.second.sqrt().div_(scale).add_(group.get("eps", 1e-8))
        self.value.addcdiv_(self.momentum, denominator, value=-lr / (1 - beta1**self.steps))

    def of_candidates(self, part: slice) -> Tensor:
        """Return the scores themselves, `(blocks, C)`."""
        return self.value[part]

    def forget(self, dead: Tensor) -> None:
        """Zero the scores and moments of removed candidates, so that none comes back."""
        for kept in (self.value, self.momentum, self.second):
            if kept is not None:
                kept.masked_fill_(dead, 0.0)

    def finite(self) -> bool:
        """Tell whether every score is finite."""
        return bool(torch.isfinite(self.value).all())

    def state_dict(self) -> dict[str, Any]:
        """Return scores, moments and the count of steps."""
        return {
            "value": self.value,
            "momentum": self.momentum,
            "second": self.second,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore scores, moments and the count of steps."""
        self.value.copy_(state["value"])
        for name in ("momentum", "second"):
            saved = state[name]
            setattr(self, name, None if saved is None else saved.to(self.value).clone())
        self.steps = int(state["steps"])
