"""LTS: train on few bits, and stop updating the weights that have settled on their level.

Paper: "Exploiting the Partly Scratch-off Lottery Ticket for Quantization-Aware Training"
(arXiv 2211.08544).

Weights and inputs of convolutions and linear layers are quantized to b bits between trained bounds
(`quantizers`). Most weights reach the level they will end on long before training does. Each one's
distance to its level is averaged over time, and where it is below a threshold that grows after a
warm-up the weight is frozen for good (`freezing`). What needs no gradient any more is left out of
the backward pass (`live_filters`): the saving is real, and exact.

What differs from the authors' code:

- Frozen weights keep their code by default (`pin="code"`) and give no gradient to anything. There,
  only the latent value is pinned, and codes move on with the bounds (`pin="latent"`).
- First and last layer have 8 bits by default. There, all layers have b (`first_last="same"`).
- Layers with no norm behind them compute in their own units by default (`rescale`).
- The momentum of the distance is less in short runs; counters survive a resume.
- Freezing happens once an optimizer step, before the update, whatever the number of forward passes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.methods.base import Kind, LayerPlan, Method, Stage
from tenfold.methods.freezing_schedule import (
    FreezingSchedule,
    default_momentum,
    freeze_threshold,
    warmup_steps,
)
from tenfold.methods.frozen_reduction import leave_out_of_reduction
from tenfold.methods.layers import choose_layers, edge_layers
from tenfold.methods.measured_saving import Example, MeasuredSaving, measure_saving, some_loss
from tenfold.methods.norms import before_norm
from tenfold.methods.quantizers import Bounds, quantize_input, quantize_weight
from tenfold.methods.ranks import check_agreement
from tenfold.methods.savings import Savings
from tenfold.methods.schedule import Schedule, check_time
from tenfold.methods.treated_layers import TreatedLayer, misfit, weight_of

__all__ = ["LTS", "default_momentum", "freeze_threshold", "quantize_input", "quantize_weight"]


@dataclass(kw_only=True, eq=False)
class LTS(Method):
    """Train on 2 to 8 bits, and freeze each weight that has settled on its level.

    Start from a trained network. The first training batch sets the clipping bounds.

    Args:
        bits: of weights and of layers' inputs.
        threshold: up to which distance weights freeze, in level spacings: "linear" or "sine" in the
            time after the warm-up, or a constant from 0 to 1; 0 freezes nothing.
        warmup: when freezing may begin: a share of the run, or epochs as an int; by default a
            fifth. While a mask that follows is still being chosen, nothing freezes.
        momentum: of the distance, in [0, 1); by default 0.99, and less in runs under 6,900 steps.
        pin: what is kept of a frozen weight: "code", or "latent" as in the authors' code.
        first_last: bits of the first convolution and of the last linear layer, or "same".
        rescale: whether layers compute in their own units; by default those without a norm
            directly behind them.
        include: names or patterns of layers to quantize, and no others.
        exclude: names or patterns of layers to leave alone.
        bounds_lr: learning rate of the bounds (Adam); it follows the schedule of the weights'.
        freeze_clipped: freeze weights beyond the bounds too, which the paper's rule never does.
        save_backward: leave out of the backward pass what needs no gradient; by default with
            `pin="code"`.

    Example: training a small network to 2 bits.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))
    >>> quantization = LTS(bits=2)
    >>> model = quantization.attach(model, total_steps=12)
    >>> optimizer = torch.optim.SGD(quantization.parameters_for(model), lr=0.01)
    >>> for _ in range(12):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     quantization.step()
    >>> model = quantization.finalize(model)
    >>> model[2]
    QuantizedLinear(16x16, bits=2)
    """

    kind: ClassVar[Kind] = Kind.WEIGHTS
    stage: ClassVar[Stage] = Stage.QUANTIZE
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "translation", "shadow_removal"})
    wants_trained_start: ClassVar[bool] = True

    bits: int
    threshold: float | Literal["linear", "sine"] = "linear"
    warmup: int | float | None = None
    momentum: float | None = None
    pin: Literal["code", "latent"] = "code"
    first_last: int | Literal["same"] = 8
    rescale: bool | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    bounds_lr: float = 1e-4
    freeze_clipped: bool = False
    save_backward: bool | None = None

    def validate(self) -> None:
        """Check the fields."""
        _check_bits("bits", self.bits)
        if self.first_last != "same":
            _check_bits("first_last", self.first_last, " or 'same'")
        if isinstance(self.threshold, str):
            if self.threshold not in ("linear", "sine"):
                raise UserError(f"threshold={self.threshold!r}: expected linear, sine or a number")
        elif isinstance(self.threshold, bool) or not 0 <= self.threshold <= 1:
            raise UserError(
                f"threshold={self.threshold}: expected 0 (nothing freezes) to 1 level spacing"
            )
        if self.warmup is not None:
            check_time("warmup", self.warmup)
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum}: expected at least 0 and less than 1")
        if self.pin not in ("code", "latent"):
            raise UserError(f"pin={self.pin!r}: expected code or latent")
        if not self.bounds_lr >= 0:
            raise UserError(f"bounds_lr={self.bounds_lr}: expected at least 0")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if patterns is not None and (
                isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns)
            ):
                raise UserError(f"{name}={patterns!r}: expected a list of layer names or patterns")
        if self.save_backward and self.pin == "latent":
            raise UserError(
                "save_backward=True with pin='latent': the bounds' gradients need the gradient of "
                "every weight then; expected pin='code'"
            )
        self._layers: list[TreatedLayer] = []
        self._updates = 0
        self._updated_in: int | None = None
        self._alone = False  # a copy whose steps are timed: no other rank does the same
        self._rate = 1.0
        self._first_rate: float | None = None
        self._example = Example()

    @property
    def freezes(self) -> bool:
        """Whether weights freeze at all."""
        return self.threshold != 0

    # -- planning -----------------------------------------------------------------------------

    def plan(self, model: nn.Module) -> list[LayerPlan]:
        """List the layers that are quantized with their bits, and the others with the reason."""
        plans = choose_layers(
            model, "quantized", misfit, self.include, self.exclude, everywhere=True
        )
        edges = edge_layers(model)
        return [
            dataclasses.replace(one, treatment=f"{self._bits_of(one.name, edges)} bits")
            if one.treatment
            else one
            for one in plans
        ]

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuse a warm-up that leaves no time to freeze anything."""
        warmup_steps(self.warmup, schedule)

    def _bits_of(self, name: str, edges: set[str]) -> int:
        return int(self.first_last) if self.first_last != "same" and name in edges else self.bits

    # -- the contract -------------------------------------------------------------------------

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Give every chosen layer its quantizers; it computes in floats until calibrated."""
        assert self.schedule is not None
        total = self.schedule.total_steps
        warmup = warmup_steps(self.warmup, self.schedule)
        self._freezing = FreezingSchedule(self.threshold, warmup, total)
        self._beta = default_momentum(total) if self.momentum is None else self.momentum
        names = [one.name for one in self.plan(model) if one.treatment]
        edges = edge_layers(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        bounds = Bounds(names, weight_of(model.get_submodule(names[0])).detach())
        self._bounds = bounds
        self._optimizer = torch.optim.Adam(bounds.parameters(), lr=self.bounds_lr)
        self.own(bounds, self._optimizer)
        saving = self.pin == "code" if self.save_backward is None else self.save_backward
        rescaled = {name: self._rescales(model, name) for name in names}
        self._layers = [
            TreatedLayer(
                name,
                model.get_submodule(name),
                bounds,
                row,
                2 ** self._bits_of(name, edges),
                rescale=rescaled[name],
                pin_code=self.pin == "code",
                freezes=self.freezes,
                freeze_clipped=self.freeze_clipped,
                saving=saving,
            )
            for row, name in enumerate(names)
        ]
        self._example.watch(model)
        parameters = sum(p.numel() for p in trained) + bounds.values.numel()
        self.savings = Savings(parameters)
        return model

    def _rescales(self, model: nn.Module, name: str) -> bool:
        if self.rescale:
            return True
        normed = before_norm(model, name)
        if self.rescale is None:
            return not normed
        if not normed:
            warnings.warn(
                f"layer {name} has no norm behind it, and rescale=False: its outputs come in units "
                "of the quantized weights; leave rescale out to have such layers rescaled",
                stacklevel=2,
            )
        return False

    @torch.no_grad()
    def calibrate(self, *inputs: Tensor) -> None:
        """Set the bounds of all layers from one batch, instead of from the first training step.

        Runs the model once in training mode, so that each layer sees what the layers before it have
        quantized; running statistics of norms take it in.

        Args:
            inputs: as the model takes them.

        Raises:
            StateError: not attached.
            UserError: a layer's weight or input is constant or not finite.
        """
        model = self._attached_model()
        modes = [(module, module.training) for module in model.modules()]
        self._bounds.known = [False] * len(self._layers)
        model.train()
        try:
            model(*inputs)
        finally:
            for module, training in modes:
                module.training = training

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Follow the distances, freeze what has settled, and let settled layers go."""
        self._follow_rate(optimizer)
        if self._updated_in != self.steps_done:  # once a step, however many optimizers there are
            self._updated_in = self.steps_done
            if self.freezes:
                self._update()
        for treated in self._layers:
            if treated.forward.saving and treated.forward.whole:
                weight = treated.weight
                weight.grad = None  # an optimizer passes over it then: no decay, no momentum
                optimizer.state.pop(weight, None)

    def _update(self) -> None:
        masks_final = all(treated.masks_final for treated in self._layers)
        rho = self._freezing.at(self.steps_done, masks_final)
        momentum = self._beta if self._updates > 1 else None
        self._updates += 1
        for treated in self._layers:
            treated.update(momentum, rho)

    def _follow_rate(self, optimizer: Optimizer) -> None:
        """Note by what factor the weights' learning rate stands to that at the start."""
        mine = {id(treated.weight) for treated in self._layers}
        for group in optimizer.param_groups:
            if any(id(p) in mine for p in group["params"]):
                if self._first_rate is None:
                    self._first_rate = float(group.get("initial_lr", group["lr"]))
                start = float(group.get("initial_lr", self._first_rate))
                self._rate = float(group["lr"]) / start if start > 0 else 1.0
                return

    def on_step(self) -> None:
        """Move the bounds, and put the frozen weights back to where they were."""
        values = self._bounds.values
        if self._updated_in != self.steps_done - 1:  # an overflow: the optimizer didn't step
            values.grad = None
            return
        if values.grad is not None:
            held = [t.row for t in self._layers if t.forward.whole]
            before = values.detach()[held].clone()
            self._optimizer.param_groups[0]["lr"] = self.bounds_lr * self._rate
            self._optimizer.step()
            with torch.no_grad():  # of a layer that is frozen whole: no momentum moves them on
                values[held, :2] = before[:, :2]
            values.grad = None
        self._bounds.check()
        for treated in self._layers:
            treated.restore()
        self._look_through()

    def _look_through(self) -> None:
        """Count what is frozen, and choose the filters of the next step's gradients."""
        going = [t for t in self._layers if t.quantizer.any_frozen and not t.covered]
        found = [treated.forward.survey() for treated in going]
        if found:
            table = [torch.stack([one.live, one.frozen, one.free]) for one in found]
            sizes = [len(one.live) for one in found]
            on_cpu = torch.split(torch.cat(table, dim=1).cpu(), sizes, dim=1)  # one transfer
            for treated, rows in zip(going, on_cpu, strict=True):
                free = int(rows[2].sum())
                treated.forward.choose(rows[0], free)
                self.savings.frozen[treated.name] = int(rows[1].sum())
                if treated.forward.saving and free == 0:  # no optimizer touches it from now on
                    treated.cover()
        self.savings.count({t.name: (t.forward.macs, t.weight.numel()) for t in self._layers})

    def on_epoch_start(self, epoch: int) -> None:
        """Compare what is frozen over all ranks."""
        if self._freezing.start is None or self._alone:
            return
        frozen = {t.name: t.quantizer.frozen for t in self._layers}
        check_agreement(
            f"the frozen weights at step {self.steps_done}",
            {name: one for name, one in frozen.items() if one is not None},
        )

    def on_wrapped(self, wrapper: nn.Module) -> None:
        """Have layers that are frozen whole left out of what DistributedDataParallel sums up."""
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            leave_out_of_reduction(wrapper, [t.forward for t in self._layers])

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Put layers with integer weights in the place of the trained ones."""
        missing = [t.name for t in self._layers if not self._bounds.known[t.row]]
        if missing:
            raise UserError(
                f"{', '.join(missing[:4])} have no clipping bounds, because they were never called "
                "in training: exclude them, or call calibrate(images) before training"
            )
        self._example.forget()
        for treated in self._layers:
            done = treated.finish(self._bounds.values[treated.row].detach())
            if treated.layer is model:
                model = done
            for parent in list(model.modules()):
                for name, child in list(parent._modules.items()):
                    if child is treated.layer:
                        setattr(parent, name, done)
        self._layers.clear()
        return model

    def local_buffers(self, model: nn.Module) -> list[str]:
        """Return the names of all buffers of the method: each rank derives them alike."""
        mine = {id(b) for t in self._layers for b in t.quantizer.buffers()}
        mine.add(id(self._bounds.calibrated))
        return [name for name, buffer in model.named_buffers() if id(buffer) in mine]

    def metrics(self) -> dict[str, float]:
        """Return the share of frozen weights, what was saved up to now, and what is left out."""
        if not self.freezes:
            return {}
        work = sum(t.forward.macs for t in self._layers)
        computed = sum(t.forward.macs * t.forward.share_computed for t in self._layers)
        return {**self.savings.metrics(), "left_out": 1 - computed / work if work else 0.0}

    def measure(self, loss_of: Callable[[nn.Module], Tensor], *, rounds: int = 5) -> MeasuredSaving:
        """Time whole training steps with the saving on and off, in turn, as things stand now.

        Args:
            loss_of: computes a loss with the model that it is given, such as
                `lambda model: criterion(model(images), labels)`.
            rounds: pairs of steps to time.

        Returns:
            Times, and by how much the gradients of both differ. The model is not changed.
        """

        def switch(method: LTS, saving: bool) -> None:
            method._beta = 1.0  # distances stay, and so does the frozen set
            method._first_rate = 1.0  # so that the bounds stay too, at learning rate 0
            method._alone = method._freezing.warned = True
            for treated in method._layers:
                treated.forward.saving = saving and treated.forward.saving
                treated.covered = treated.covered and treated.forward.saving

        return measure_saving(self, self._attached_model(), loss_of, switch, rounds=rounds)

    def record(self) -> dict[str, Any]:
        """Return what a finished run tells: updates saved, counted and measured backward work."""
        if not self.freezes:
            return {}
        counted = self.savings
        facts = [
            ["weight updates saved", f"{counted.updates:.1%}"],
            ["backward work saved, counted", f"{counted.backward:.1%}"],
            ["the same, by each layer's work", f"{counted.backward_by_work:.1%}"],
        ]
        found: dict[str, Any] = {
            "updates": counted.updates,
            "backward": counted.backward,
            "backward_by_work": counted.backward_by_work,
        }
        inputs = self._example.inputs
        if inputs is not None and any(t.forward.saving for t in self._layers):
            measured = self.measure(lambda model: some_loss(model(*inputs)), rounds=3)
            found["measured"] = dataclasses.asdict(measured)
            facts.append(
                [
                    "a step at the end of training, measured",
                    f"{measured.saving_ms:.3g} ms instead of {measured.dense_ms:.3g} ms, "
                    f"{measured.share:.1%} saved",
                ]
            )
        return {"facts": facts, "saved": found}

    # -- checkpoints --------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return counters and settings; distances, codes, frozen sets are in the model's state."""
        assert self.schedule is not None
        return {
            "bits": {t.name: t.bits for t in self._layers},
            "shapes": {t.name: list(t.weight.shape) for t in self._layers},
            "macs": {t.name: t.forward.macs for t in self._layers},
            "total_steps": self.schedule.total_steps,
            "start": self._freezing.start,
            "updates": self._updates,
            "first_rate": self._first_rate,
            "savings": self.savings.state_dict(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        own = self.extra_state()
        for key, what in (
            ("bits", "bits of layers"),
            ("shapes", "layers"),
            ("total_steps", "total_steps"),
        ):
            if state[key] != own[key]:
                raise UserError(
                    f"this checkpoint has other {what} ({_difference(state[key], own[key])}): go "
                    "on with the same model, settings and length of the run"
                )
        for treated in self._layers:
            treated.reset(int(state["macs"][treated.name]))
        self._freezing.start = state["start"]
        self._updates = int(state["updates"])
        self._first_rate = state["first_rate"]
        self.savings.load_state_dict(state["savings"])


def _check_bits(name: str, value: object, other: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise UserError(f"{name}={value!r}: expected an int from 2 to 8{other}")


def _difference(saved: Any, own: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        for name in [*saved, *own]:
            if saved.get(name) != own.get(name):
                return f"{name}: {saved.get(name)}, now {own.get(name)}"
    return f"{saved}, now {own}"
