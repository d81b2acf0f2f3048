"""Which columns of Winograd-domain weights go, and when: the pruning half of `Winograd3d`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.methods.ranks import check_agreement, sum_over_ranks
from tenfold.methods.winograd_columns import compensation, eliminate, error_matrix, kept_columns
from tenfold.methods.winograd_layer import WinogradTraining

__all__ = ["SCORES", "ColumnPruner", "Score"]

Score = Literal["taylor", "magnitude", "output_error", "random"]
SCORES = ("taylor", "magnitude", "output_error", "random")
# Columns go in at least so many portions, where there are steps for them.
_FEWEST_EVENTS = 10


class ColumnPruner:
    """Collects scores and second moments, and removes columns at the planned steps.

    Args:
        layers: by name; may be filled later, up to `plan`.
        score: by what columns are ranked.
        compensate: whether those that stay take over for those that go.
        scope: `layer`, or `global` for one budget of multiplications.
        final: columns that a layer keeps in the end (on average, with `global`).
        seed: of the score `random`.
    """

    def __init__(
        self,
        layers: dict[str, WinogradTraining],
        *,
        score: Score,
        compensate: bool,
        scope: Literal["layer", "global"],
        final: int,
        seed: int,
    ) -> None:
        self.layers = layers
        self.score, self.compensate, self.scope = score, compensate, scope
        self.final, self.seed = final, seed
        self.columns = self.start = self.end = 0
        self.scores: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.events: list[int] = []

    def plan(self, columns: int, start: int, end: int, every: int) -> None:
        """Plan the removals: after `start`, at most `every` steps apart, the last one at `end`."""
        self.columns, self.start, self.end = columns, start, end
        if self.final < columns:
            step = max(1, min(every, (end - start) // _FEWEST_EVENTS))
            self.events = [*range(start + step, end, step), end]
        self._watch(0)

    @property
    def finished(self) -> bool:
        """Tell whether the last columns have been removed."""
        return not self.events

    def forget(self) -> None:
        """Let go of scores and moments."""
        self.scores.clear()
        self.moments.clear()

    def _watch(self, step: int) -> None:
        """Have the layers keep what the next removal needs, and nothing more."""
        going_on = not self.finished
        for layer in self.layers.values():
            layer.scoring = going_on and self.score == "taylor"
            layer.observing = going_on and (self.compensate or self.score == "output_error")
            layer.turn = step
        if not going_on:
            self.forget()

    # -- every step --------------------------------------------------------------------------------

    def collect(self) -> None:
        """Take over what the layers kept in this step, summed over all ranks.

        Every step, so that all ranks hold the same sums, and a checkpoint of one serves all.
        """
        if self.finished:
            return
        found: list[Tensor] = []
        for layer in self.layers.values():
            if layer.scoring:
                found.append(_or_zeros(layer.score, layer, layer.count))
            if layer.observing:
                total, count = layer.moment or (None, 0)
                found.append(_or_zeros(total, layer, layer.count**2))
                found.append(found[-1].new_full((1,), count))
            layer.score = layer.moment = None
        if not found:
            return
        summed = sum_over_ranks(torch.cat(found))
        sums = iter(torch.split(summed, [len(part) for part in found]))
        for name, layer in self.layers.items():
            if layer.scoring:
                _add(self.scores, name, next(sums))
            if layer.observing:
                _add(self.moments, name, next(sums).reshape(layer.count, layer.count))
                self.counts[name] = self.counts.get(name, 0.0) + float(next(sums))

    def step(self, step: int) -> None:
        """Remove columns, if it is time; `step` steps are done."""
        for layer in self.layers.values():
            # What is left here belongs to a step that a loss scaler skipped.
            layer.score = layer.moment = None
            layer.turn = step
        if self.events and step >= self.events[0]:
            self.remove(step)
            self.events = [event for event in self.events if event > step]
            self._watch(step)

    # -- removal -----------------------------------------------------------------------------------

    def remove(self, step: int) -> None:
        """Bring every layer down to the columns that are kept at a step."""
        goal = kept_columns(step, self.columns, self.final, self.start, self.end)
        needed = self.compensate or self.score == "output_error"
        gammas = {name: self._gamma(name) for name in self.layers} if needed else {}
        if self.scope == "global":
            removed = self._choose_globally(goal)
        else:
            removed = {name: self._choose(name, goal, gammas.get(name)) for name in self.layers}
        for name, layer in self.layers.items():
            gone = removed[name]
            if not gone:
                continue
            stay = sorted(set(layer.kept) - set(gone))
            layer.remove(gone, compensation(gammas[name], stay, gone) if self.compensate else None)
        check_agreement(
            f"the kept columns at step {step}",
            {name: layer.mask for name, layer in self.layers.items()},
        )
        if self.compensate:
            check_agreement(
                f"the compensated weights at step {step}",
                {name: layer.values().detach() for name, layer in self.layers.items()},
            )
        self.scores.clear()
        for name in self.moments:  # the features drift while the network learns: forget by halves
            self.moments[name] = self.moments[name] * 0.5
            self.counts[name] *= 0.5

    def _gamma(self, name: str) -> Tensor:
        layer, total, count = self.layers[name], self.moments.get(name), self.counts.get(name, 0.0)
        if total is None or not count:
            raise UserError(
                f"layer {name} has seen no training input so far, so there is nothing to "
                "compensate its columns by: exclude it, or run it while training"
            )
        moment = total / count
        if not bool(torch.isfinite(moment).all()):
            raise UserError(f"layer {name}: its inputs are not finite; lower the learning rate")
        return error_matrix(layer.tile, moment, layer.points)

    def _choose(self, name: str, goal: int, gamma: Tensor | None) -> list[int]:
        """Return the columns that one layer loses."""
        layer = self.layers[name]
        count = len(layer.kept) - goal
        if count <= 0:
            return []
        if self.score == "output_error":
            assert gamma is not None
            return eliminate(gamma, layer.scaled_weight(), layer.kept, count)
        order = self._column_scores(name)[list(layer.kept)].argsort(stable=True)[:count]
        return [layer.kept[int(place)] for place in order]

    def _choose_globally(self, goal: int) -> dict[str, list[int]]:
        """Return the columns that each layer loses under one budget of multiplications."""
        ranked, costs = [], {}
        for index, (name, layer) in enumerate(self.layers.items()):
            costs[name] = layer.in_channels * layer.out_channels * layer.tiles
            scores = self._column_scores(name)
            shares = scores / scores.sum()
            ranked += [(float(shares[column]), index, column, name) for column in layer.kept]
        left = {name: len(layer.kept) for name, layer in self.layers.items()}
        spent = sum(costs[name] * count for name, count in left.items())
        budget = goal * sum(costs.values())
        removed: dict[str, list[int]] = {name: [] for name in self.layers}
        for _, _, column, name in sorted(ranked):
            if spent <= budget:
                break
            # Fewer columns than a tile has outputs make the outputs depend on each other.
            if left[name] > min(self.final, math.prod(self.layers[name].tile)):
                removed[name].append(column)
                left[name] -= 1
                spent -= costs[name]
        return removed

    def _column_scores(self, name: str) -> Tensor:
        """Return the scores of all columns `(t^3,)`, on the CPU."""
        layer = self.layers[name]
        found: Tensor
        if self.score == "magnitude":
            found = torch.linalg.vector_norm(layer.scaled_weight(), dim=1)
        elif self.score == "random":
            # One order for the whole run, whatever the other layers are.
            mixed = zlib.crc32(f"{self.seed} {name}".encode())
            found = torch.rand(layer.count, generator=torch.Generator().manual_seed(mixed))
        else:
            known = self.scores.get(name)
            if known is None or not bool(known.any()):
                raise UserError(
                    f"layer {name} has had no gradient from the optimizer so far, so there is "
                    "nothing to choose its columns by: exclude it, or let the optimizer train it"
                )
            found = known.cpu()
        if not bool(torch.isfinite(found).all()):
            raise UserError(
                f"layer {name}: its scores are not finite, so its gradients have diverged; lower "
                "the learning rate, or go on from the last good checkpoint"
            )
        return found

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the kept columns, and what was collected, by layer."""
        return {
            "kept": {name: list(layer.kept) for name, layer in self.layers.items()},
            "scores": dict(self.scores),
            "moments": dict(self.moments),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restore them; `step` steps were done."""
        for name, kept in state["kept"].items():
            self.layers[name].keep(kept)
        self.scores, self.moments = dict(state["scores"]), dict(state["moments"])
        self.counts = dict(state["counts"])
        self.events = [event for event in self.events if event > step]
        self._watch(step)


def _or_zeros(value: Tensor | None, layer: WinogradTraining, size: int) -> Tensor:
    """Return a layer's vector in double precision; zeros where it wasn't run in this step."""
    if value is None:
        return torch.zeros(size, dtype=torch.float64, device=layer.mask.device)
    return value.double().flatten()


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    known = totals.get(name)
    totals[name] = value.clone() if known is None else known.to(value.device) + value
