"""The rivals and the control that LBC is measured beside, on its contract and its layers.

Magnitude, NVIDIA's ASP recipe: train dense, once remove all but the N largest weights of every M,
then go on training with that mask. Attaching is the moment of pruning. ASP trains to the end and
then repeats the whole training; here both parts share the epochs of one run. ASP's search for a
better order of channels is left out: every method here sees the same blocks.

SR-STE, Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021: the mask is that of the N largest weights of every M at every step; the gradient goes
straight through it to all weights, and pruned ones are drawn to zero:

    forward    W_eff = mask(W) * W
    backward   dL/dW = dL/dW_eff + decay * (1 - mask(W)) * W

And a control, random removal: LBC whose scores are random numbers at each removal. What LBC reaches
beyond it is what its scores add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.methods import LBC, Kind, LayerPlan, Method, Stage
from tenfold.methods.lbc import Mask
from tenfold.methods.scores import AccumulatorScores, Scores
from tenfold.nn.blocks import from_blocks, to_blocks


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Return where the `n` largest of every `m` weights lie, bool of the weight's shape."""
    blocks = to_blocks(weight.detach().abs(), m)
    largest = blocks.topk(n, dim=1, sorted=False).indices
    kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, largest, True)
    return from_blocks(kept, weight.shape)


@dataclass(kw_only=True, eq=False)
class _Rival(Method):
    """A method that treats the layers of LBC's default choice by one parametrization each."""

    kind: ClassVar[Kind] = Kind.WEIGHTS
    stage: ClassVar[Stage] = Stage.MASK

    n: int
    m: int

    def validate(self) -> None:
        LBC(n=self.n, m=self.m)  # refuses the patterns that it refuses
        self._treated: list[str] = []

    def plan(self, model: nn.Module) -> list[LayerPlan]:
        return LBC(n=self.n, m=self.m).plan(model)

    def parametrization(self, weight: Tensor) -> nn.Module:
        raise NotImplementedError

    def on_attach(self, model: nn.Module) -> nn.Module:
        self._treated = [layer.name for layer in self.plan(model) if layer.treatment]
        for name in self._treated:
            layer = model.get_submodule(name)
            weight: Any = layer.weight
            parametrize.register_parametrization(
                layer, "weight", self.parametrization(weight.detach())
            )
        return model

    def on_finalize(self, model: nn.Module) -> nn.Module:
        for name in self._treated:
            parametrize.remove_parametrizations(
                model.get_submodule(name), "weight", leave_parametrized=True
            )
        return model


@dataclass(kw_only=True, eq=False)
class Magnitude(_Rival):
    """Keep the N largest of every M weights, chosen once, when attached to a trained model."""

    def parametrization(self, weight: Tensor) -> nn.Module:
        fixed = Mask(weight)
        fixed.mask.copy_(magnitude_mask(weight, self.n, self.m))
        return fixed


@dataclass(kw_only=True, eq=False)
class SRSTE(_Rival):
    """Choose the N largest of every M weights anew at every step; `decay` is the paper's lambda."""

    decay: float = 2e-4

    def validate(self) -> None:
        super().validate()
        if not self.decay >= 0:
            raise UserError(f"decay={self.decay}: expected at least 0, such as 0.0002")

    def parametrization(self, weight: Tensor) -> nn.Module:
        return _LargestOfEachStep(self.n, self.m, self.decay)


class _LargestOfEachStep(nn.Module):
    def __init__(self, n: int, m: int, decay: float):
        super().__init__()
        self.n, self.m, self.decay = n, m, decay

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = _StraightThrough.apply(weight, self.n, self.m, self.decay)
        return masked


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int, decay: float) -> Tensor:
        pruned = ~magnitude_mask(weight, n, m)
        ctx.save_for_backward(weight, pruned)
        ctx.decay = decay
        return weight.masked_fill(pruned, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, pruned = ctx.saved_tensors
        return gradient + ctx.decay * (weight * pruned), None, None, None


class RandomScores(AccumulatorScores):
    name = "random"

    def of_candidates(self, part: slice) -> Tensor:
        return torch.rand_like(super().of_candidates(part))


@dataclass(kw_only=True, eq=False)
class RandomRemoval(LBC):
    """LBC's schedule and candidates, with random numbers in the place of its scores."""

    def _make_scores(self, weight: Tensor, optimizer: Optimizer) -> Scores:
        return RandomScores(weight.detach(), self._table, self.m)
