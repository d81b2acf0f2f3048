"""Winograd3d: 3-D convolutions that live, train and lose columns in the Winograd domain.

Paper: "Low-Rank Winograd Transformation for 3D Convolutional Neural Networks", Qin, Lin and Lin
(arXiv 2301.11180). Its full text and code could not be had; from the abstract are the Winograd
parameters, the low-rank pair of tensors that is trained in their place, and the column-wise
importance by which they are pruned. All formulas here are our own.

    domain      What = G-transform of the kernel, (O, C, t^3): one column a coordinate, t = m + 2
    forward     y = A-transform( sum over C of What * B-transform(x) ), kept columns alone
    training    What = base + left @ right (`residual`), left @ right (`factor`), What (`dense`)
    importance  Z_j += sum over O, C of |What_j * dL/dWhat_j| at every step (`taylor`)
    pruning     kept(u) = K + (t^3 - K) (1 - u)^3, K = round(keep_ratio * t^3), for good
    repair      the kept columns take over, in closed form, what the lost ones did to the output

How many columns are kept decides the multiplications at inference; the rank doesn't: it saves
trained parameters and optimizer state. The product of What is formed once a step.

`finalize` leaves `tenfold.nn.winograd.WinogradConv3d` layers, which hold the kept columns alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError, unknown_name
from tenfold.kernels.winograd_transforms import (
    POINTS,
    column_count,
    gain_scales,
    tile_of,
    transforms,
    winograd_weight,
)
from tenfold.methods.base import Kind, LayerPlan, Method, Stage
from tenfold.methods.layers import Layer, choose_layers
from tenfold.methods.ranks import take_from_rank_zero
from tenfold.methods.schedule import Schedule, check_time
from tenfold.methods.winograd_convert import convert
from tenfold.methods.winograd_layer import Mode, WinogradTraining, replace_module
from tenfold.methods.winograd_pruning import SCORES, ColumnPruner, Score
from tenfold.nn.winograd_fit import unconvertible

__all__ = ["Winograd3d", "convert", "gain_scales", "transforms", "winograd_weight"]

MODES = ("residual", "factor", "dense")


@dataclass(kw_only=True, eq=False)
class Winograd3d(Method):
    """Train 3x3x3 convolutions in the Winograd domain by low-rank factors, and prune its columns.

    Args:
        tile: outputs of a tile, 2, 4 or three of them for depth, height and width.
        rank: of the trained factors, in the modes `residual` and `factor`.
        mode: `residual` trains a low-rank change of the frozen weight, `factor` a low-rank weight,
            `dense` the whole Winograd-domain weight.
        keep_ratio: share of the columns that are left in the end, in (0, 1]; 1 prunes none.
        score: by what columns are ranked: `taylor`, `magnitude`, `output_error` or `random`.
        compensate: have the kept columns take over for the lost ones at every removal.
        scope: `layer` keeps the same share in every layer; `global` shares one budget of
            multiplications among the layers.
        start: until when nothing is removed; a share of the run, or epochs.
        end: when the last columns are removed; a share of the run, or epochs.
        every: optimizer steps between two removals, at most.
        min_channels: layers with fewer input channels stay as they are.
        points: set of the transforms' points; see `transforms`.
        normalize: train the weights multiplied by the gains' powers of two.
        allow_half: let half precision (of autocast, say) into the products of F(4,3).
        include: names or patterns of the layers to treat, instead of the default choice.
        exclude: names or patterns of layers to leave alone.
        seed: of the score `random`.

    Raises:
        UserError: a value is out of range.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv3d(1, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 3))
    >>> winograd = Winograd3d(tile=2, rank=4, keep_ratio=0.5)
    >>> model = winograd.attach(model, total_steps=4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(2, 1, 8, 8, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     winograd.step()
    >>> winograd.finalize(model)[2]
    WinogradConv3d(16, 16, tile=(2, 2, 2), columns=32 of 64)
    """

    kind: ClassVar[Kind] = Kind.WEIGHTS
    # Other methods then find what is left of the dense layers.
    stage: ClassVar[Stage] = Stage.NETWORK

    tile: int | list[int] = 2
    rank: int = 8
    mode: Mode = "residual"
    keep_ratio: float = 0.5
    score: Score = "taylor"
    compensate: bool = True
    scope: Literal["layer", "global"] = "layer"
    start: int | float = 0.1
    end: int | float = 0.5
    every: int = 100
    min_channels: int = 16
    points: Literal["standard", "dyadic", "accurate"] = "accurate"
    normalize: bool = True
    allow_half: bool = False
    include: list[str] | None = None
    exclude: list[str] | None = None
    seed: int = 0

    def validate(self) -> None:
        """Check the fields."""
        self._sizes = tile_of(self.tile)
        self._count = column_count(self._sizes)
        for name, given, known in (
            ("mode", self.mode, MODES),
            ("score", self.score, SCORES),
            ("scope", self.scope, ("layer", "global")),
            ("points", self.points, tuple(POINTS)),
        ):
            if given not in known:
                raise unknown_name(name, str(given), known)
        for name in ("rank", "every", "min_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name}={value!r}: expected an int of at least 1")
        if isinstance(self.keep_ratio, bool) or not 0 < self.keep_ratio <= 1:
            raise UserError(f"keep_ratio={self.keep_ratio!r}: expected a share in (0, 1]")
        self._final = round(self.keep_ratio * self._count)
        if self._final < 1:
            raise UserError(
                f"keep_ratio={self.keep_ratio} keeps none of {self._count} columns: expected at "
                f"least {1 / self._count:.4f}"
            )
        check_time("start", self.start)
        check_time("end", self.end)
        if self.end == 0:
            raise UserError("end=0: expected a share in (0, 1) or at least 1 epoch")
        if type(self.start) is type(self.end) and self.end <= self.start:
            raise UserError(f"start={self.start}, end={self.end}: expected start < end")
        if self.scope == "global" and self.score not in ("taylor", "magnitude"):
            raise UserError(
                f"scope='global' with score={self.score!r}: expected taylor or magnitude, whose "
                "shares can be compared between layers"
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if patterns is not None and (
                isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns)
            ):
                raise UserError(f"{name}={patterns!r}: expected a list of layer names or patterns")
        self._layers: dict[str, WinogradTraining] = {}
        self._pruner = ColumnPruner(
            self._layers,
            score=self.score,
            compensate=self.compensate,
            scope=self.scope,
            final=self._final,
            seed=self.seed,
        )

    # -- planning -----------------------------------------------------------------------------

    def plan(self, model: nn.Module) -> list[LayerPlan]:
        """List the layers that will live in the Winograd domain; the others with the reason."""
        name = "x".join(str(m) for m in self._sizes)
        how = "" if self.mode == "dense" else f" rank {self.rank}"
        return choose_layers(
            model,
            f"Winograd {name} {self.mode}{how}",
            self._misfit,
            self.include,
            self.exclude,
            kept=self._final / self._count,
        )

    def _misfit(self, layer: Layer) -> str | None:
        why = unconvertible(layer)
        if why is not None:
            return why
        outputs, channels = layer.weight.shape[:2]
        if channels < self.min_channels:
            return f"{channels} input channels, fewer than min_channels={self.min_channels}"
        most = min(outputs * channels, self._count)
        if self.mode != "dense" and self.rank > most:
            return f"rank {self.rank} is more than {most}, the most that its weight can have"
        return None

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuse a run that the pruning's start and end don't fit into."""
        self._window_in(schedule)

    def _window_in(self, schedule: Schedule) -> tuple[int, int]:
        """Return the steps at which pruning starts and ends."""
        found = []
        for name, value in (("start", self.start), ("end", self.end)):
            if isinstance(value, float):
                found.append(round(value * schedule.total_steps))
            elif value == 0:
                found.append(0)
            elif schedule.epochs is None:
                raise UserError(
                    f"{name}={value} counts epochs, and this loop has none: give "
                    "steps_per_epoch=…, or a share of the run such as 0.5"
                )
            elif value > schedule.epochs:
                raise UserError(
                    f"{name}={value}: the run has {schedule.epochs} epochs only; expected one of "
                    "them, or a share such as 0.5"
                )
            else:
                found.append(schedule.epoch_ends[value - 1])
        start, end = found[0], max(1, found[1])
        if end <= start:
            raise UserError(
                f"start={self.start}, end={self.end}: expected the end after the start (here both "
                f"fall on step {start} of {schedule.total_steps}); train longer or move them apart"
            )
        return start, end

    # -- the contract -------------------------------------------------------------------------

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Put every chosen layer into the Winograd domain; the network computes the same."""
        assert self.schedule is not None
        start, end = self._window_in(self.schedule)
        names = [layer.name for layer in self.plan(model) if layer.treatment]
        outputs = math.prod(self._sizes)
        if self._final < outputs:
            warnings.warn(
                f"keep_ratio={self.keep_ratio} keeps {self._final} columns, fewer than the "
                f"{outputs} outputs of a tile {self._sizes}: the outputs of a tile will depend on "
                f"each other; keep at least {outputs / self._count:.3f}",
                stacklevel=4,
            )
        layers = {name: model.get_submodule(name) for name in names}
        take_from_rank_zero(p.data for layer in layers.values() for p in layer.parameters())
        made = {}
        for name, layer in layers.items():
            assert isinstance(layer, nn.Conv3d)
            made[name] = WinogradTraining(
                layer,
                self._sizes,
                self.mode,
                self.rank,
                self.points,
                normalize=self.normalize,
                allow_half=self.allow_half,
                name=name,
            )
        self._layers.update(made)
        for name, layer in layers.items():
            model = replace_module(model, layer, made[name])
        self._pruner.plan(self._count, start, end, self.every)
        return model

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Take over the scores and moments of this step, summed over all ranks."""
        self._pruner.collect()

    def on_step(self) -> None:
        """Remove columns, if their time has come."""
        self._pruner.step(self.steps_done)

    def finished(self) -> bool:
        """Tell whether the last columns have been removed."""
        return self.schedule is not None and self._pruner.finished

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Merge factors, scales and masks; leave layers that hold the kept columns alone."""
        for layer in self._layers.values():
            model = replace_module(model, layer, layer.inference())
        self._layers.clear()
        self._pruner.forget()
        return model

    def local_buffers(self, model: nn.Module) -> list[str]:
        """Return the names of masks, frozen weights and scales, which every rank computes alike."""
        own = {id(b) for layer in self._layers.values() for b in layer.buffers()}
        return [name for name, buffer in model.named_buffers() if id(buffer) in own]

    def metrics(self) -> dict[str, float]:
        """Return the share of the treated layers' columns that are left."""
        if not self._layers:
            return {}
        kept = sum(len(layer.kept) for layer in self._layers.values())
        return {"columns": kept / (self._count * len(self._layers))}

    # -- checkpoints --------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return tile, mode, rank and points, and by layer the kept columns, scores and moments."""
        return {"form": self._form(), **self._pruner.state_dict()}

    def _form(self) -> dict[str, Any]:
        return {
            "tile": list(self._sizes),
            "mode": self.mode,
            "rank": self.rank,
            "points": self.points,
            "normalize": self.normalize,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the kept columns, scores and moments."""
        for name, value in self._form().items():
            if state["form"][name] != value:
                raise UserError(
                    f"this checkpoint has {name}={state['form'][name]!r}, and this Winograd3d "
                    f"{name}={value!r}: go on with the same"
                )
        if set(state["kept"]) != set(self._layers):
            other = sorted(set(state["kept"]) ^ set(self._layers))
            raise UserError(
                f"this checkpoint treats other layers ({', '.join(other[:4])}): go on with the "
                "same model, include and exclude"
            )
        self._pruner.load_state_dict(state, self.steps_done)
