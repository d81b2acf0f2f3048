"""LBC: learn which N of every M weights to keep, while the network trains from scratch.

Paper: "Learning Best Combination for Efficient N:M Sparsity", NeurIPS 2022 (arXiv 2206.06662).

Blocks of M weights lie along the input channels. Each block has C = binom(M, N) candidates, the
N-subsets of its positions, in lexicographic order (P, a C x M table of zeros and ones). Training
removes candidates until one is left in every block, and the network is exactly N:M.

    forward    W_eff = mask * W, where a position is kept iff some alive candidate contains it
    scores     dL/dS[b, j] = alive[b, j] * sum over p in candidate j of g[b, p] * W[b, p]
               (g = dL/dW_eff; the straight-through gradient of the candidates' choice)
    removal    at time e, the lowest-scored k(e) candidates of each block are gone for good:
               k(e) = (C-1) - ceil((C-1) * (1-u)^p), u = (e-start)/(end-start), in integers

An alive candidate only covers unmasked positions, where W.grad = g. So the scores need no autograd
graph of their own: dL/dS = alive * (blocks(W.grad * W) @ P.T), read after the backward pass.

Two forms of the scores, chosen by the optimizer at the first step:

- accumulator, for SGD (with momentum, weight decay): its update is linear, hence S[b, j] = c + the
  sum over p in j of A[b, p] with one number A per weight. Exact, and C/M times smaller.
- full, for Adam and AdamW, which are not linear: one S per candidate, updated like a weight.

What differs from the authors' code: removal is permanent (theirs lets momentum revive a candidate);
evaluation uses the trained mask (theirs a drifted one); the removal schedule is computed in
integers (theirs is off by one where the product is whole); blocks never straddle kernel positions.
Ties go to the lower index, which is removed first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer

from tenfold.errors import StateError, UserError
from tenfold.methods.base import Kind, LayerPlan, Method, Stage
from tenfold.methods.layers import Layer, choose_layers
from tenfold.methods.ranks import check_agreement
from tenfold.methods.schedule import Schedule, Window, check_time
from tenfold.methods.scores import Scores, choose_form
from tenfold.nn.bits import pack_bits, unpack_bits
from tenfold.nn.blocks import from_blocks, to_blocks

__all__ = ["LBC", "candidates", "from_blocks", "removed_candidates", "to_blocks"]

# Share of the run at which the pattern is final, and the power of the schedule, as the paper trains
# residual networks (60 of 120 epochs) and DeiT (200 of 300).
PRESETS: dict[str, tuple[float, int]] = {"resnet": (0.5, 3), "deit": (2 / 3, 4)}
MOST_CANDIDATES = 20_000
_ROWS_AT_ONCE = 2**24  # elements of a (blocks, candidates) table that is formed at a time


def candidates(n: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return P, the table of all N-subsets of M positions in lexicographic order.

    Args:
        n: positions kept, at least 1 and less than `m`.
        m: block length.
        dtype: of the table.

    Returns:
        `(binom(m, n), m)` of zeros and ones; each row sums to `n`.

    Raises:
        UserError: n or m out of range, or more than 20,000 candidates.

    >>> candidates(2, 4, torch.int64).tolist()[:3]
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    """
    _check_pattern(n, m)
    return _table(n, m).to(dtype, copy=True)


@functools.lru_cache(maxsize=16)
def _table(n: int, m: int) -> Tensor:
    rows = torch.tensor(list(itertools.combinations(range(m), n)))
    return torch.zeros(len(rows), m, dtype=torch.uint8).scatter_(1, rows, 1)


def removed_candidates(epoch: int, n_candidates: int, start: int, end: int, power: int) -> int:
    """Return how many of a block's candidates are gone at `epoch`, k(e).

    The ceiling is computed in integers: in floats it is off by one where the product is whole.

    Args:
        epoch: the moment, in the unit of `start` and `end`.
        n_candidates: C, all candidates of a block.
        start: no candidate is removed up to here.
        end: from here on one candidate is left.
        power: exponent of the schedule, an int of at least 1.

    Raises:
        UserError: an empty span or a power below 1.

    >>> [removed_candidates(e, 6, 0, 60, 3) for e in (4, 5, 10, 16, 25, 59, 60)]
    [0, 1, 2, 3, 4, 4, 5]
    """
    if start < 0 or end <= start:
        raise UserError(f"start={start}, end={end}: expected 0 <= start < end")
    if power < 1 or n_candidates < 1:
        raise UserError(f"power={power}, n_candidates={n_candidates}: expected at least 1")
    most = n_candidates - 1
    if epoch <= start:
        return 0
    if epoch >= end:
        return most
    left: int = -((-most * (end - epoch) ** power) // (end - start) ** power)
    return most - left


class Mask(nn.Module):
    """Parametrization of a weight by the positions that are still in the game."""

    mask: Tensor
    elementwise = True  # every weight stays in its place, so that others may stand before it
    final = False  # set when the mask will not change any more

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        """Return `mask * weight`, of the weight's shape."""
        return self.mask * weight


@dataclass(kw_only=True, eq=False)
class LBC(Method):
    """Train a network whose every block of M weights ends with at most N that are not zero.

    Args:
        n: weights kept of every `m`.
        m: block length along the input channels.
        preset: `resnet` (end at 1/2 of the run, power 3) or `deit` (end at 2/3, power 4).
        start: until when nothing is removed; a share of the run, or epochs.
        end: when the pattern is final; a share of the run, or epochs. From the preset if None.
        power: exponent of the removal schedule. From the preset if None.
        include: names or patterns of the layers to treat, instead of the default choice.
        exclude: names or patterns of layers to leave dense.
        scores: `auto` follows the optimizer; `full` and `accumulator` insist on a form.
        memory_limit_gib: the most that scores and candidates may take, in GiB.

    Raises:
        UserError: a value is out of range.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sparsity = LBC(n=2, m=4)
    >>> model = sparsity.attach(model, total_steps=10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     sparsity.step()
    >>> model = sparsity.finalize(model)
    >>> int((model[0].weight != 0).sum())
    32
    """

    kind: ClassVar[Kind] = Kind.WEIGHTS
    stage: ClassVar[Stage] = Stage.MASK
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "translation", "shadow_removal"})

    n: int
    m: int
    preset: Literal["resnet", "deit"] = "resnet"
    start: int | float = 0
    end: int | float | None = None
    power: int | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    scores: Literal["auto", "full", "accumulator"] = "auto"
    memory_limit_gib: float = 8.0

    def validate(self) -> None:
        """Check the fields."""
        _check_pattern(self.n, self.m)
        if self.preset not in PRESETS:
            raise UserError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.scores not in ("auto", "full", "accumulator"):
            raise UserError(f"scores={self.scores!r}: expected auto, full or accumulator")
        check_time("start", self.start)
        if self.end is not None:
            check_time("end", self.end)
            if self.end == 0:
                raise UserError("end=0: expected a share in (0, 1) or at least 1 epoch")
            if type(self.start) is type(self.end) and self.end <= self.start:
                raise UserError(f"start={self.start}, end={self.end}: expected start < end")
        if self.power is not None and (not _is_int(self.power) or self.power < 1):
            raise UserError(f"power={self.power!r}: expected an int of at least 1")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if patterns is not None and (
                isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns)
            ):
                raise UserError(f"{name}={patterns!r}: expected a list of layer names or patterns")
        if not self.memory_limit_gib > 0:
            raise UserError(f"memory_limit_gib={self.memory_limit_gib}: expected more than 0")
        self._table = _table(self.n, self.m)
        self._layers: dict[str, parametrize.ParametrizationList] = {}
        self._scores: dict[str, Scores] = {}
        self._alive: dict[str, Tensor] = {}
        self._removed = 0
        self._window: Window | None = None

    @property
    def n_candidates(self) -> int:
        """Number of candidates of a block, C = binom(M, N)."""
        return len(self._table)

    # -- planning -----------------------------------------------------------------------------

    def plan(self, model: nn.Module) -> list[LayerPlan]:
        """List the layers that become N:M, and the others with the reason why not."""
        return choose_layers(
            model,
            f"{self.n}:{self.m}",
            self._misfit,
            self.include,
            self.exclude,
            kept=self.n / self.m,
        )

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuse a run that is too short for the removal's start and end."""
        self._window_in(schedule)

    def _window_in(self, schedule: Schedule) -> Window:
        end = PRESETS[self.preset][0] if self.end is None else self.end
        return schedule.window(self.start, end, changes=self.n_candidates - 1)

    def _misfit(self, layer: Layer) -> str | None:
        channels = layer.weight.shape[1]
        if channels % self.m:
            return f"{channels} input channels are not divisible by M={self.m}"
        return None

    def score_bytes(self, model: nn.Module, form: Literal["full", "accumulator"]) -> int:
        """Return the memory that scores and alive candidates will take, in bytes.

        Without the optimizer's moments, which double (SGD with momentum) or triple (Adam) the
        scores.
        """
        weights = sum(math.prod(layer.shape) for layer in self.plan(model) if layer.treatment)
        table = weights // self.m * self.n_candidates
        return table + 4 * (table if form == "full" else weights)

    # -- the contract -------------------------------------------------------------------------

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Give every chosen layer its mask, all ones: the model starts exactly dense."""
        assert self.schedule is not None
        self._window = self._window_in(self.schedule)
        self._power = PRESETS[self.preset][1] if self.power is None else self.power
        names = [layer.name for layer in self.plan(model) if layer.treatment]
        self._check_memory(model, "full" if self.scores == "full" else "accumulator")
        for name in names:
            layer = model.get_submodule(name)
            weight: Tensor = layer.weight  # type: ignore[assignment]
            parametrize.register_parametrization(layer, "weight", Mask(weight.detach()))
            parametrized = layer.parametrizations["weight"]  # type: ignore[index]
            assert isinstance(parametrized, parametrize.ParametrizationList)
            self._layers[name] = parametrized
            blocks = weight.numel() // self.m
            self._alive[name] = torch.ones(
                blocks, self.n_candidates, dtype=torch.bool, device=weight.device
            )
        return model

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Move the scores by their gradient, as the optimizer will move the weights."""
        if self._removed == self.n_candidates - 1:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self._layers.items():
            weight = layer.original
            group = groups.get(id(weight))
            if group is None or weight.grad is None:
                continue  # another optimizer's, or unused in this step
            if name not in self._scores:
                self._scores[name] = self._make_scores(weight, optimizer)
            self._alive[name] = self._alive[name].to(weight.device)
            self._scores[name].to(weight.device)  # after a resume the model may have moved
            self._scores[name].update(weight, group, self._alive[name])

    def on_step(self) -> None:
        """Remove candidates, if their time has come."""
        window = self._window
        if window is not None and window.unit == "step":
            self._remove_until(self.steps_done)

    def on_epoch_start(self, epoch: int) -> None:
        """Remove candidates, if their time has come."""
        window = self._window
        if window is not None and window.unit == "epoch":
            self._remove_until(epoch)

    def finished(self) -> bool:
        """Tell whether one candidate is left in every block."""
        return self._removed == self.n_candidates - 1

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Write the zeros into the weights and leave plain layers behind."""
        for name, parametrized in self._layers.items():
            layer = model.get_submodule(name)
            mask = self._mask(name)
            with torch.no_grad():  # true zeros: a product would leave -0.0 behind
                parametrized.original.masked_fill_(mask == 0, 0.0)
            if len(parametrized) > 1:
                continue  # a quantizer stands before the mask: its own finalize takes both away
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            for other in [key for key in layer._parameters if key != "weight"]:
                # PyTorch puts the weight back behind the bias: keep the layer's own order
                layer._parameters[other] = layer._parameters.pop(other)
        self._layers.clear()
        self._scores.clear()
        self._alive.clear()
        return model

    def local_buffers(self, model: nn.Module) -> list[str]:
        """Return the masks' names: each rank derives them from the same reduced gradients."""
        masks = {id(self._mask(name)) for name in self._layers}
        return [name for name, buffer in model.named_buffers() if id(buffer) in masks]

    def metrics(self) -> dict[str, float]:
        """Return the density of the treated layers' weights and the candidates left per block."""
        if not self._layers:
            return {}
        kept = sum(float(self._mask(name).sum()) for name in self._layers)
        return {
            "density": kept / sum(self._mask(name).numel() for name in self._layers),
            "candidates": float(self.n_candidates - self._removed),
        }

    # -- removal ------------------------------------------------------------------------------

    def _remove_until(self, now: int) -> None:
        assert self._window is not None
        goal = removed_candidates(
            now, self.n_candidates, self._window.start, self._window.end, self._power
        )
        if goal <= self._removed:
            return
        for name in self._layers:
            self._remove(name, goal - self._removed)
        self._removed = goal
        check_agreement(
            f"the masks at step {self.steps_done}",
            {name: self._mask(name) for name in self._layers},
        )
        if self.finished():
            self._scores.clear()  # the choice is made; the masks stay as they are
        self._tell_masks()

    @torch.no_grad()
    def _remove(self, name: str, count: int) -> None:
        """Remove the `count` lowest-scored alive candidates of every block of one layer."""
        mask = self._mask(name)
        alive = self._alive[name] = self._alive[name].to(mask.device)
        scores = self._scores.get(name)
        if scores is None:
            raise UserError(
                f"layer {name} has had no gradient from the optimizer so far, so there is nothing "
                "to choose its weights by: exclude it, or let the optimizer train it"
            )
        if not scores.finite():
            raise UserError(
                f"layer {name}: its scores are not finite, so its gradients have diverged; "
                "lower the learning rate, or go on from the last good checkpoint"
            )
        table = self._table.to(mask.device, torch.float32)
        kept = torch.empty(len(alive), self.m, dtype=torch.bool, device=mask.device)
        rows = max(1, _ROWS_AT_ONCE // self.n_candidates)
        for first in range(0, len(alive), rows):
            part = slice(first, first + rows)
            ranked = scores.of_candidates(part).masked_fill(~alive[part], math.inf)
            lowest = ranked.argsort(dim=1, stable=True)[:, :count]
            alive[part].scatter_(1, lowest, False)
            kept[part] = (alive[part].to(torch.float32) @ table) > 0
        mask.copy_(from_blocks(kept, mask.shape))
        scores.forget(~alive)

    def _tell_masks(self) -> None:
        """Let a method before the mask know when the choice is made."""
        for layer in self._layers.values():
            for parametrization in layer:
                if isinstance(parametrization, Mask):
                    parametrization.final = self.finished()

    def _mask(self, name: str) -> Tensor:
        for parametrization in self._layers[name]:
            if isinstance(parametrization, Mask):
                return parametrization.mask
        raise StateError(f"layer {name} has lost its mask: something else removed it")

    # -- scores -------------------------------------------------------------------------------

    def _make_scores(self, weight: Tensor, optimizer: Optimizer) -> Scores:
        form = choose_form(self.scores, optimizer)
        if form.table_sized and not self._scores:
            self._check_memory(self._attached_model(), "full")
        return form(weight.detach(), self._table, self.m)

    def _check_memory(self, model: nn.Module, form: Literal["full", "accumulator"]) -> None:
        if self._layers:
            weights = sum(layer.original.numel() for layer in self._layers.values())
            needed = weights // self.m * self.n_candidates * (5 if form == "full" else 1)
        else:
            needed = self.score_bytes(model, form)
        if needed > self.memory_limit_gib * 2**30:
            raise UserError(
                f"{self.n}:{self.m} has {self.n_candidates} candidates a block, and its scores "
                f"take {needed / 2**20:,.0f} MiB in the {form} form: expected at most "
                f"{self.memory_limit_gib * 1024:,.0f} MiB; choose a smaller M, train with SGD "
                "(accumulator form), or raise memory_limit_gib"
            )

    # -- checkpoints --------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return pattern, candidates left (packed to bits) and scores, by layer."""
        return {
            "pattern": [self.n, self.m],
            "removed": self._removed,
            "alive": {name: pack_bits(alive, 1) for name, alive in self._alive.items()},
            "forms": {name: type(scores).name for name, scores in self._scores.items()},
            "scores": {name: scores.state_dict() for name, scores in self._scores.items()},
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore candidates, masks and scores."""
        if list(state["pattern"]) != [self.n, self.m]:
            n, m = state["pattern"]
            raise UserError(
                f"this checkpoint is {n}:{m}, and this LBC is {self.n}:{self.m}: "
                "go on with the same pattern"
            )
        if set(state["alive"]) != set(self._layers):
            other = sorted(set(state["alive"]) ^ set(self._layers))
            raise UserError(
                f"this checkpoint treats other layers ({', '.join(other[:4])}): go on with the "
                "same model, include and exclude"
            )
        self._removed = int(state["removed"])
        self._scores.clear()
        for name, layer in self._layers.items():
            weight = layer.original
            alive = self._alive[name]
            bits = unpack_bits(state["alive"][name], 1, alive.numel())
            alive.copy_(bits.reshape(alive.shape))
            kept = (alive.float() @ self._table.to(weight.device, torch.float32)) > 0
            self._mask(name).copy_(from_blocks(kept, weight.shape))
            if name in state["scores"]:
                form = Scores.forms[state["forms"][name]]
                self._scores[name] = form(weight.detach(), self._table, self.m)
                self._scores[name].load_state_dict(state["scores"][name])
        self._tell_masks()


def _check_pattern(n: int, m: int) -> None:
    if not _is_int(n) or not _is_int(m):
        raise UserError(f"n={n!r}, m={m!r}: expected two ints, such as n=2, m=4")
    if m < 2 or not 1 <= n < m:
        raise UserError(f"n={n}, m={m}: expected 1 <= n < m and m >= 2, such as n=2, m=4")
    if math.comb(m, n) > MOST_CANDIDATES:
        raise UserError(
            f"{n}:{m} has {math.comb(m, n):,} candidates a block: expected at most "
            f"{MOST_CANDIDATES:,}; choose a smaller M"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
