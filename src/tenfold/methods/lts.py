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
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.methods.base import Kind, LayerPlan, Method, Stage
from tenfold.methods.freezing import WeightQuantizer, default_momentum, freeze_threshold
from tenfold.methods.layers import Layer, choose_layers, edge_layers
from tenfold.methods.live_filters import LiveForward
from tenfold.methods.measured_saving import MeasuredSaving, measure_saving
from tenfold.methods.norms import before_norm
from tenfold.methods.quantizers import Bounds, InputQuantizer, quantize_input, quantize_weight
from tenfold.methods.ranks import check_agreement
from tenfold.methods.savings import Savings
from tenfold.methods.schedule import Schedule, check_time
from tenfold.nn.quantized import quantized_like

__all__ = ["LTS", "default_momentum", "freeze_threshold", "quantize_input", "quantize_weight"]

WARMUP = 0.2  # of the run, as the paper's 80 of 400 and 20 of 100 epochs


@dataclass
class _Treated:
    """What training holds of one layer."""

    name: str
    layer: nn.Module
    quantizer: WeightQuantizer
    forward: LiveForward
    hook: Any
    kept: Tensor | None = None  # weights ahead of the update, while one is under way
    covered: bool = False  # whether freezing is done: nothing is left to freeze


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
    >>> model[2].integers.unique().tolist()
    [-3, -1, 1, 3]
    """

    kind: ClassVar[Kind] = Kind.WEIGHTS
    stage: ClassVar[Stage] = Stage.QUANTIZE
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"classification", "translation", "shadow_removal", "shadow_synthesis"}
    )
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
        self._layers: list[_Treated] = []
        self._start: int | None = None  # W, once freezing may begin
        self._updates = 0
        self._updated_in: int | None = None
        self._rate = 1.0
        self._first_rate: float | None = None
        self._warned = False

    @property
    def freezes(self) -> bool:
        """Whether weights freeze at all."""
        return self.threshold != 0

    # -- planning -----------------------------------------------------------------------------

    def plan(self, model: nn.Module) -> list[LayerPlan]:
        """List the layers that are quantized with their bits, and the others with the reason."""
        plans = choose_layers(
            model, "quantized", _misfit, self.include, self.exclude, everywhere=True
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
        self._warmup_steps(schedule)

    def _bits_of(self, name: str, edges: set[str]) -> int:
        return int(self.first_last) if self.first_last != "same" and name in edges else self.bits

    def _warmup_steps(self, schedule: Schedule) -> int:
        """Return W, the iterations in which nothing freezes."""
        warmup = WARMUP if self.warmup is None else self.warmup
        steps = round(warmup * schedule.total_steps)
        if isinstance(warmup, int) and warmup > 0:
            if schedule.epochs is None:
                raise UserError(
                    f"warmup={warmup} counts epochs, and this loop has none: give "
                    "steps_per_epoch=…, or a share of the run such as 0.2"
                )
            if warmup >= schedule.epochs:
                raise UserError(
                    f"warmup={warmup}: expected less than the {schedule.epochs} epochs of the "
                    "run, or a share such as 0.2"
                )
            steps = schedule.epoch_ends[warmup - 1]
        return min(steps, schedule.total_steps - 1)

    # -- the contract -------------------------------------------------------------------------

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Give every chosen layer its quantizers; it computes in floats until calibrated."""
        assert self.schedule is not None
        self._warmup = self._warmup_steps(self.schedule)
        total = self.schedule.total_steps
        self._beta = default_momentum(total) if self.momentum is None else self.momentum
        names = [one.name for one in self.plan(model) if one.treatment]
        edges = edge_layers(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        bounds = Bounds(names, _weight_of(model.get_submodule(names[0])).detach())
        self._bounds = bounds
        self._optimizer = torch.optim.Adam(bounds.parameters(), lr=self.bounds_lr)
        self.own(bounds, self._optimizer)
        saving = self.pin == "code" if self.save_backward is None else self.save_backward
        rescaled = {name: self._rescales(model, name) for name in names}
        for row, name in enumerate(names):
            layer = model.get_submodule(name)
            levels = 2 ** self._bits_of(name, edges)
            quantizer = WeightQuantizer(
                _weight_of(layer).detach(),
                bounds,
                row,
                levels,
                rescale=rescaled[name],
                pin_code=self.pin == "code",
                freezes=self.freezes,
                freeze_clipped=self.freeze_clipped,
            )
            parametrize.register_parametrization(layer, "weight", quantizer)
            forward = LiveForward(layer, quantizer, saving)
            hook = layer.register_forward_pre_hook(
                InputQuantizer(bounds, row, levels, rescaled[name])
            )
            self._layers.append(_Treated(name, layer, quantizer, forward, hook))
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
                weight = treated.forward.weight
                weight.grad = None  # an optimizer passes over it then: no decay, no momentum
                optimizer.state.pop(weight, None)

    def _update(self) -> None:
        n = self.steps_done
        limit = self._threshold(n)
        momentum = self._beta if self._updates > 1 else None
        self._updates += 1
        for treated in self._layers:
            if treated.covered or not self._bounds.known[treated.quantizer.row]:
                continue
            weight = treated.forward.weight.detach()
            if limit is not None and treated.kept is None:
                treated.kept = torch.empty_like(weight)
            spacing = 1 / (treated.quantizer.levels - 1)
            treated.quantizer.update(
                weight,
                weight if treated.kept is None else treated.kept,
                momentum=momentum,
                limit=None if limit is None else limit * spacing,
            )

    def _threshold(self, n: int) -> float | None:
        """Return rho in iteration n, or None as long as nothing freezes."""
        assert self.schedule is not None
        total = self.schedule.total_steps
        if n >= total and not self._warned:
            self._warned = True
            warnings.warn(
                f"step {n + 1} of {total}: LTS was attached for fewer steps; the threshold stays "
                "at its last value",
                stacklevel=2,
            )
        if self._start is None:
            if n <= self._warmup or not self._masks_final():
                return None
            # Later than planned where a mask took its time.
            self._start = self._warmup if n == self._warmup + 1 else n - 1
        share = (n - self._start) / max(1, total - self._start)
        return freeze_threshold(self.threshold, share)

    def _masks_final(self) -> bool:
        for treated in self._layers:
            chain: Any = treated.layer.parametrizations
            if not all(getattr(one, "final", True) for one in chain["weight"]):
                return False
        return True

    def _follow_rate(self, optimizer: Optimizer) -> None:
        """Note by what factor the weights' learning rate stands to that at the start."""
        mine = {id(treated.forward.weight) for treated in self._layers}
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
            held = [t.quantizer.row for t in self._layers if t.forward.whole]
            before = values.detach()[held].clone()
            self._optimizer.param_groups[0]["lr"] = self.bounds_lr * self._rate
            self._optimizer.step()
            with torch.no_grad():  # of a layer that is frozen whole: no momentum moves them on
                values[held, :2] = before[:, :2]
            values.grad = None
        self._bounds.check()
        for treated in self._layers:
            if treated.kept is not None and not treated.covered:
                treated.quantizer.restore(treated.forward.weight.detach(), treated.kept)
        self._look_through()

    def _look_through(self) -> None:
        """Count what is frozen, and choose the filters of the next step's gradients."""
        going = [t for t in self._layers if t.quantizer.any_frozen and not t.covered]
        found = [treated.forward.survey() for treated in going]
        if found:
            table = [torch.stack([one.live.int(), one.frozen, one.free]) for one in found]
            sizes = [len(one.live) for one in found]
            on_cpu = torch.split(torch.cat(table, dim=1).cpu(), sizes, dim=1)  # one transfer
            for treated, rows in zip(going, on_cpu, strict=True):
                free = int(rows[2].sum())
                treated.forward.choose(rows[0].bool(), free)
                self.savings.frozen[treated.name] = int(rows[1].sum())
                if treated.forward.saving and free == 0:  # no optimizer touches it from now on
                    treated.covered, treated.kept = True, None
        self.savings.count(
            {t.name: (t.forward.macs, t.forward.weight.numel()) for t in self._layers}
        )

    def on_epoch_start(self, epoch: int) -> None:
        """Compare what is frozen over all ranks."""
        if self._start is not None:
            self._check_ranks(f"the frozen weights at step {self.steps_done}")

    def _check_ranks(self, what: str) -> None:
        frozen = {t.name: t.quantizer.frozen for t in self._layers}
        check_agreement(what, {name: one for name, one in frozen.items() if one is not None})

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Put layers with integer weights in the place of the trained ones."""
        missing = [t.name for t in self._layers if not self._bounds.known[t.quantizer.row]]
        if missing:
            raise UserError(
                f"{', '.join(missing[:4])} have no clipping bounds, because they were never called "
                "in training: exclude them, or call calibrate(images) before training"
            )
        self._check_ranks("the frozen weights at the end")
        for treated in self._layers:
            done = self._finished(treated)
            treated.hook.remove()
            treated.forward.remove()
            if treated.layer is model:
                model = done
            for parent in list(model.modules()):
                for name, child in list(parent._modules.items()):
                    if child is treated.layer:
                        setattr(parent, name, done)
        self._layers.clear()
        return model

    def _finished(self, treated: _Treated) -> nn.Module:
        quantizer, weight = treated.quantizer, treated.forward.weight.detach()
        mask = treated.forward.mask
        bits = (quantizer.levels - 1).bit_length()
        done = quantized_like(treated.layer, bits, rescale=quantizer.rescale)
        done.fill(quantizer.codes(weight), self._bounds.values[quantizer.row].detach(), mask)
        bias = treated.layer.bias
        if done.bias is not None and isinstance(bias, Tensor):
            done.bias.copy_(bias.detach())
        return done.train(treated.layer.training)

    def local_buffers(self, model: nn.Module) -> list[str]:
        """Return the names of all buffers of the method: each rank derives them alike."""
        mine = {id(b) for t in self._layers for b in t.quantizer.buffers()}
        mine.add(id(self._bounds.calibrated))
        return [name for name, buffer in model.named_buffers() if id(buffer) in mine]

    def metrics(self) -> dict[str, float]:
        """Return the share of frozen weights, what was saved up to now, and what is left out."""
        if not self.freezes:
            return {}
        filters = sum(len(t.forward.weight) for t in self._layers)
        live = [t.forward.live for t in self._layers]
        kept = sum(
            len(t.forward.weight) if one is None else len(one)
            for t, one in zip(self._layers, live, strict=True)
        )
        left_out = 1 - kept / filters if filters else 0.0
        return {**self.savings.metrics(), "filters_left_out": left_out}

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
            for treated in method._layers:
                treated.forward.saving = saving and treated.forward.saving
                treated.covered = treated.covered and treated.forward.saving

        return measure_saving(self, self._attached_model(), loss_of, switch, rounds=rounds)

    # -- checkpoints --------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return counters and settings; distances, codes, frozen sets are in the model's state."""
        assert self.schedule is not None
        return {
            "bits": {t.name: (t.quantizer.levels - 1).bit_length() for t in self._layers},
            "shapes": {t.name: list(t.forward.weight.shape) for t in self._layers},
            "macs": {t.name: t.forward.macs for t in self._layers},
            "total_steps": self.schedule.total_steps,
            "start": self._start,
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
            treated.forward.macs = int(state["macs"][treated.name])
            treated.covered = False
            treated.kept = None
        self._start = state["start"]
        self._updates = int(state["updates"])
        self._first_rate = state["first_rate"]
        self.savings.load_state_dict(state["savings"])


def _misfit(layer: Layer) -> str | None:
    weight = layer.weight
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight without calling it"
    if weight.dtype not in (torch.float32, torch.float64) or weight.layout != torch.strided:
        return f"its weight is {weight.dtype}, {weight.layout}: expected float32"
    if isinstance(layer, nn.Linear):
        return None if type(layer).forward is nn.Linear.forward else _own_forward(layer)
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    plain = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
    return None if type(layer).forward is plain.forward else _own_forward(layer)


def _own_forward(layer: nn.Module) -> str:
    return f"{type(layer).__name__} has a forward of its own"


def _weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _check_bits(name: str, value: object, other: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise UserError(f"{name}={value!r}: expected an int from 2 to 8{other}")


def _difference(saved: Any, own: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        for name in [*saved, *own]:
            if saved.get(name) != own.get(name):
                return f"{name}: {saved.get(name)}, now {own.get(name)}"
    return f"{saved}, now {own}"
