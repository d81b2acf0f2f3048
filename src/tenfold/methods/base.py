"""The contract of a method: how LBC and its nine siblings meet a model and a training loop.

A method is a class. Its keyword-only fields are its configuration, validated and never reassigned;
its state lives beside them; one object attaches to one model. In anybody's loop it takes three
lines, and the training engine calls the same ones:

    model = method.attach(model, total_steps=…)      # training form
    …  loss.backward(); optimizer.step()
    method.step()                                    # after the optimizer
    model = method.finalize(model)                   # training state gone

There are two moments in a step. `before_step` sees the reduced, unscaled gradient together with the
weights that it belongs to; `step` comes after the update. In a plain loop `attach` wires
`before_step` to the optimizer by itself; an engine that runs the backward pass inside the
optimizer's step (Lightning does) sets `driven_by_engine` and calls it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tenfold.errors import StateError, UserError
from tenfold.methods.hooks import (
    Owned,
    belongs_to_a_method,
    mark_as_owned,
    overflowed,
    parameters_of,
    unscale,
    watch_optimizers,
)
from tenfold.methods.ranks import keep_out_of_broadcasts
from tenfold.methods.schedule import Schedule
from tenfold.methods.training_set import Requests

__all__ = ["Kind", "LayerPlan", "Method", "Stage", "in_order"]

State = dict[str, Any]


class Stage(enum.IntEnum):
    """Where a method acts; methods attach in this order, whatever their order in the recipe."""

    NETWORK = 0
    QUANTIZE = 1
    MASK = 2
    SAMPLES = 3
    LOSS = 4


class Kind(enum.Enum):
    """What a method works on."""

    WEIGHTS = "weights"  # attach / step / finalize change layers
    LOSS = "loss"  # own loss, sampler or auxiliary modules; finalize returns the student untouched
    NETWORK = "network"  # is itself a network; nothing to attach


@dataclass(frozen=True)
class LayerPlan:
    """What a method will do with one layer, or why it leaves the layer alone."""

    name: str
    type: str
    shape: tuple[int, ...]
    treatment: str | None
    reason: str | None = None
    kept: float = 1.0  # share of the layer's weights that will not be zero


@dataclass(kw_only=True, eq=False)
class Method(Requests):
    """Base of all methods. A subclass is a `@dataclass(kw_only=True, eq=False)` in its own file.

    It declares its kind, stage and tasks, checks its fields in `validate`, and overrides the hooks
    that it needs: `on_attach`, `on_before_step`, `on_step`, `on_epoch_start`, `on_finalize`,
    `plan`, `extra_state`, `load_extra_state`, `training_loss`, and those of `Requests`, by which it
    asks a run for other networks, for samples, or for a place in its records.
    """

    kind: ClassVar[Kind]
    stage: ClassVar[Stage]
    wants_trained_start: ClassVar[bool] = False  # whether a run without `init` is worth a warning
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    conflicts: ClassVar[frozenset[str]] = frozenset()
    replaces_loss: ClassVar[bool] = False
    takes_mixed_labels: ClassVar[bool] = False  # its loss also takes labels `(B, K)` of MixUp
    makes_targets: ClassVar[bool] = False  # its loss smooths labels itself
    needs_ids: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.driven_by_engine = False
        self.schedule: Schedule | None = None
        self.steps_done = 0
        self.epoch = 0
        self._model: nn.Module | None = None
        self._owned: dict[str, nn.Module] = {}
        self._own_optimizers: list[Optimizer] = []
        self._gradient_seen = False
        self._remove_hook: Callable[[], None] | None = None
        self.validate()
        self._frozen_fields = frozenset(field.name for field in dataclasses.fields(self))

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__.get("_frozen_fields", ()):
            raise StateError(
                f"{type(self).__name__}.{name} is configuration and is never reassigned: "
                f"make a new {type(self).__name__}({name}=…)"
            )
        super().__setattr__(name, value)

    # -- configuration ------------------------------------------------------------------------

    @classmethod
    def key(cls) -> str:
        """Return the registry key, which is also the section in a recipe: `lbc` for LBC."""
        return cls.__name__.lower()

    def config(self) -> dict[str, Any]:
        """Return the fields as the section of a recipe; unset ones are left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def validate(self) -> None:
        """Check the fields; raise `UserError` naming what was given and what is expected."""

    # -- planning -----------------------------------------------------------------------------

    def plan(self, model: nn.Module) -> list[LayerPlan]:
        """Say which layers get what, and why others are skipped. Changes nothing."""
        return []

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuse a run that the method's times don't fit into. Changes nothing.

        Raises:
            UserError: such as an end beyond the last epoch.
        """

    # -- the three lines ----------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        steps_per_epoch: int | Sequence[int] | None = None,
    ) -> nn.Module:
        """Put the model into training form, in place, and return it.

        Args:
            model: any module; attach before DDP wraps it.
            total_steps: optimizer steps of the whole run.
            steps_per_epoch: an int, or one int an epoch; may be left out when no field counts
                epochs.

        Raises:
            StateError: this object is already attached.
            UserError: the schedule doesn't fit the run, or no layer can be treated.
        """
        if self.schedule is not None:  # kept by finalize: what was trained can't be trained again
            raise StateError(
                f"this {type(self).__name__} has been attached already: one object serves one "
                f"model once; make another {type(self).__name__}(…)"
            )
        self.schedule = Schedule(total_steps, steps_per_epoch)
        self._model = model
        try:
            model = self.on_attach(model)
        except BaseException:
            self._model = None
            self.schedule = None
            raise
        self._model = model
        for name, module in self._owned.items():
            model.add_module(name, module)
        keep_out_of_broadcasts(model, self.local_buffers(model))
        if not self.driven_by_engine:
            self._remove_hook = watch_optimizers(self._optimizer_will_step)
        self.on_epoch_start(0)
        return model

    def before_step(self, optimizer: Optimizer) -> None:
        """Read the gradients, reduced and unscaled, ahead of the optimizer's update.

        Called by the hook that `attach` registers, or by the engine.

        Raises:
            StateError: not attached.
            UserError: the optimizer holds parameters that belong to the method.
        """
        self._attached_model()
        self._refuse_owned(optimizer)
        self._gradient_seen = True
        self.on_before_step(optimizer)

    def step(self) -> None:
        """Act after the optimizer's update; once per optimizer step, not per micro-batch.

        Raises:
            StateError: not attached, or no optimizer stepped since the last call.
        """
        model = self._attached_model()
        if not self._gradient_seen and not overflowed(model):
            # A loss scaler that met an overflow skips the optimizer's step: no gradient, no error.
            raise StateError(
                f"{type(self).__name__}.step() came without a step of the optimizer before it: "
                "call it once after each optimizer.step(), ahead of zero_grad() where a gradient "
                "scaler may skip steps; with an optimizer that takes a closure, or holds none of "
                "this model's parameters, call before_step(optimizer) yourself after the "
                "backward pass"
            )
        self._gradient_seen = False
        self.steps_done += 1
        self.on_step()
        self._follow_epochs()

    def finalize(self, model: nn.Module) -> nn.Module:
        """Remove all training state and return the model for inference, or for any other use.

        Raises:
            StateError: not attached, another model, or the schedule has not ended.
        """
        if model is not self._attached_model():
            raise StateError(
                f"finalize got another model than attach returned: pass the same object "
                f"({type(self).__name__} serves one model)"
            )
        assert self.schedule is not None
        if not self.finished():
            raise StateError(
                f"{type(self).__name__} has not finished: {self.steps_done} of "
                f"{self.schedule.total_steps} steps done; train to the end of its schedule, or "
                "attach with the true total_steps"
            )
        model = self.on_finalize(model)
        for name in self._owned:
            if name in model._modules:  # else `on_finalize` has replaced the model itself
                delattr(model, name)
        self._owned.clear()
        if self._remove_hook is not None:
            self._remove_hook()
            self._remove_hook = None
        self._model = None
        return model

    # -- time ---------------------------------------------------------------------------------

    def epoch_start(self, epoch: int) -> None:
        """Announce that epoch `epoch` (from 0) begins. An engine calls it; a loop needn't."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.on_epoch_start(epoch)

    def finished(self) -> bool:
        """Tell whether the schedule has ended, so that `finalize` may be called."""
        return self.schedule is not None and self.steps_done >= self.schedule.total_steps

    def _follow_epochs(self) -> None:
        schedule = self.schedule
        if schedule is None or schedule.epochs is None:
            return
        # An engine announces the epochs' starts, but nobody announces that the last one is over.
        if not self.driven_by_engine or self.steps_done >= schedule.total_steps:
            for epoch in range(self.epoch + 1, schedule.epoch_at(self.steps_done) + 1):
                self.epoch_start(epoch)

    # -- parameters that the method owns --------------------------------------------------------

    def own(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Register auxiliary parameters; call it from `on_attach`.

        The module is put on the model under `tenfold_<key>`, so that it moves between devices, is
        wrapped by DDP and lies in the model's checkpoints. The method steps it by its own
        optimizer; `finalize` takes it away.
        """
        number = f"_{len(self._owned) + 1}" if self._owned else ""
        self._owned[f"tenfold_{self.key()}{number}"] = Owned(module)
        if optimizer is not None:
            self._own_optimizers.append(optimizer)
            mark_as_owned(optimizer)

    def owned_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the method steps itself."""
        return [parameter for module in self._owned.values() for parameter in module.parameters()]

    def parameters_for(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that belong into the user's optimizer: all but the owned ones."""
        owned = {id(parameter) for parameter in self.owned_parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in owned]

    def _refuse_owned(self, optimizer: Optimizer) -> None:
        owned = {id(parameter) for parameter in self.owned_parameters()}
        if owned and any(id(p) in owned for p in parameters_of(optimizer)):
            raise UserError(
                f"the optimizer holds parameters that {type(self).__name__} trains itself: build "
                f"it with {type(self).__name__.lower()}.parameters_for(model)"
            )

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return tensors and plain values from which `load_state_dict` goes on bit for bit."""
        return {
            "method": self.key(),
            "steps_done": self.steps_done,
            "epoch": self.epoch,
            "optimizers": [optimizer.state_dict() for optimizer in self._own_optimizers],
            **self.extra_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Attach first; load the model's own state beside it.

        Raises:
            StateError: not attached.
            UserError: the state is of another method or of another configuration.
        """
        self._attached_model()
        if state.get("method") != self.key():
            raise UserError(
                f"this state belongs to {state.get('method')!r}: expected one of {self.key()!r}"
            )
        self.steps_done = int(state["steps_done"])
        self.epoch = int(state["epoch"])
        for optimizer, saved in zip(self._own_optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.load_extra_state(state)

    # -- hooks for subclasses -------------------------------------------------------------------

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Change the model into its training form; register owned modules by `own`."""
        return model

    def on_epoch_start(self, epoch: int) -> None:
        """Act when an epoch begins; also called once with the number of epochs, after the last."""

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Read gradients and the weights that they belong to."""

    def on_step(self) -> None:
        """Act after the update; `steps_done` already counts it."""

    def on_wrapped(self, wrapper: nn.Module) -> None:
        """Take note of the DistributedDataParallel that wraps the model, where there is one.

        An engine calls it ahead of the first step; in a loop of your own call it after wrapping.
        """

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Take the training form away and return the model."""
        return model

    def extra_state(self) -> State:
        """Return the method's own part of `state_dict`."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the method's own part of a state."""

    def training_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        criterion: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the batch's loss in place of the task's own; only where `replaces_loss`.

        Args:
            model: the student in training mode.
            batch: `image` `(B, C, H, W)` normalised, `label` `(B,)`, and `id` `(B,)` if there.
            criterion: the task's loss of logits and labels.
        """
        raise StateError(f"{type(self).__name__} leaves the loss to the task")

    def local_buffers(self, model: nn.Module) -> list[str]:
        """Return the names of buffers that every rank computes alike, so that DDP sends none."""
        return []

    def metrics(self) -> dict[str, float]:
        """Return figures that are worth a line in the log of an epoch."""
        return {}

    # -- inner workings -------------------------------------------------------------------------

    def _attached_model(self) -> nn.Module:
        if self._model is None:
            raise StateError(
                f"this {type(self).__name__} is attached to no model: call "
                "attach(model, total_steps=…) first, and not after finalize"
            )
        return self._model

    def _optimizer_will_step(self, optimizer: Optimizer) -> None:
        model = self._model
        if model is None or belongs_to_a_method(optimizer):
            return
        held = {id(parameter) for parameter in parameters_of(optimizer)}
        if any(id(parameter) in held for parameter in model.parameters()) and unscale(optimizer):
            self.before_step(optimizer)


def in_order(methods: Sequence[Method], task: str) -> list[Method]:
    """Sort methods by stage, and refuse a combination that makes no sense before anything starts.

    Raises:
        UserError: two of a kind that exclude each other, or a method that doesn't serve the task.
    """
    for method in methods:
        if task not in method.tasks:
            raise UserError(
                f"{method.key()} doesn't serve the task {task!r}: "
                f"it serves {', '.join(sorted(method.tasks))}"
            )
    keys = [method.key() for method in methods]
    for method in methods:
        if keys.count(method.key()) > 1:
            raise UserError(f"{method.key()} is given twice: one object serves one model")
        for other in sorted(method.conflicts.intersection(keys)):
            raise UserError(f"{method.key()} and {other} exclude each other: drop one of them")
    replacing = [method.key() for method in methods if method.replaces_loss]
    if len(replacing) > 1:
        raise UserError(
            f"{' and '.join(replacing)} both replace the batch's loss: keep one of them"
        )
    return sorted(methods, key=lambda method: method.stage)
