"""Drive methods inside a Lightning Trainer: one callback, ours or in anybody's own training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from tenfold.data import EpochSampler
from tenfold.errors import StateError, UserError
from tenfold.methods import Method
from tenfold.methods.ranks import keep_out_of_broadcasts

__all__ = ["MethodCallback", "begin_epoch"]


class MethodCallback(pl.Callback):
    """Attach methods before training, drive them in it, and keep their state in checkpoints.

    Args:
        methods: in the order of their stages.
        network: attribute of the LightningModule that holds the network; "" for the module itself.
        steps_per_epoch: optimizer steps of every epoch, where they are known; by default the
            Trainer's own estimate, spread evenly.

    Example:
        ```python
        callback = MethodCallback([LBC(n=2, m=4)])
        Trainer(max_epochs=90, callbacks=[callback]).fit(module, loader)
        network = callback.finalize(module)
        ```
    """

    def __init__(
        self,
        methods: Sequence[Method],
        network: str = "model",
        steps_per_epoch: Sequence[int] | None = None,
    ):
        super().__init__()
        self.methods = list(methods)
        self.network = network
        self.steps_per_epoch = None if steps_per_epoch is None else list(steps_per_epoch)
        self._attached = False
        self._steps_seen = 0
        for method in self.methods:
            # Lightning runs the backward pass inside the optimizer's step, after any pre-hook.
            method.driven_by_engine = True

    # -- attach: the data is set up, checkpoints load after it, DDP wraps after it -----------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the methods attached at the end of the module's `configure_model`.

        By then its `setup` has run and the network exists, wherever it is built; checkpoints load
        and DDP wraps after it.
        """
        if stage != "fit" or self._attached:
            return
        build = pl_module.configure_model

        def configure_model() -> None:
            build()
            if not self._attached:
                self._attach(trainer, pl_module)

        # An instance's own attribute: Lightning looks the hook up there, and a copy of the module
        # (a running average of it, say) is configured already.
        object.__setattr__(pl_module, "configure_model", configure_model)

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total, sizes = self._steps(trainer)
        network = self._network(pl_module)
        for method in self.methods:
            network = method.attach(network, total_steps=total, steps_per_epoch=sizes)
        self._put_network(pl_module, network)
        # DDP wraps the LightningModule, not the network: the names are longer there.
        prefix = f"{self.network}." if self.network else ""
        names = [prefix + n for method in self.methods for n in method.local_buffers(network)]
        keep_out_of_broadcasts(pl_module, names)
        self._attached = True

    def _steps(self, trainer: pl.Trainer) -> tuple[int, list[int] | None]:
        if self.steps_per_epoch is not None:
            return sum(self.steps_per_epoch), self.steps_per_epoch
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError(
                "the Trainer runs without end: give it max_epochs or max_steps, so that the "
                "methods' schedules have a length"
            )
        total, batches = int(total), trainer.num_training_batches
        if batches == float("inf"):
            return total, None
        size = -(-int(batches) // trainer.accumulate_grad_batches)
        full, rest = divmod(total, size)
        return total, [size] * full + ([rest] if rest else [])

    # -- drive ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the count of steps from the Trainer, which has just restored it on a resume."""
        self._steps_seen = trainer.global_step
        wrapper = trainer.strategy.model
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            for method in self.methods:
                method.on_wrapped(wrapper)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announce the epoch, and have the loader draw what the methods want of it."""
        if begin_epoch(self.methods, trainer.train_dataloader, trainer.current_epoch):
            _tell_lengths(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Show the gradients, reduced and unscaled, to the methods."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and _overflowed(optimizer):
            return  # the scaler is about to skip this step
        for method in self.methods:
            method.before_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Let the methods act after an update; a micro-batch without one passes."""
        if trainer.global_step == self._steps_seen:
            return
        self._steps_seen = trainer.global_step
        for method in self.methods:
            method.step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the methods find worth a line."""
        for method in self.methods:
            for name, value in method.metrics().items():
                pl_module.log(name, value, sync_dist=True)

    # -- checkpoints and the end -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the methods' states for Lightning's checkpoint."""
        return {method.key(): method.state_dict() for method in self.methods}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the methods' states."""
        for method in self.methods:
            if method.key() not in state_dict:
                raise UserError(
                    f"this checkpoint was written without {method.key()}: go on with the same "
                    "methods, or start anew"
                )
            method.load_state_dict(state_dict[method.key()])

    def finalize(self, pl_module: pl.LightningModule) -> nn.Module:
        """Finalize the methods in reverse order and return the network.

        Raises:
            StateError: training has not been done, or not to its end.
        """
        if not self._attached:
            raise StateError("nothing was trained yet: call finalize after trainer.fit")
        network = self._network(pl_module)
        for method in reversed(self.methods):
            network = method.finalize(network)
        self._put_network(pl_module, network)
        self._attached = False
        return network

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        network = getattr(pl_module, self.network, None) if self.network else pl_module
        if not isinstance(network, nn.Module):
            raise UserError(
                f"{type(pl_module).__name__} has no network {self.network!r}: name the attribute "
                'that holds it, MethodCallback(…, network="…"), or "" for the module itself'
            )
        return network

    def _put_network(self, pl_module: pl.LightningModule, network: nn.Module) -> None:
        if self.network:
            setattr(pl_module, self.network, network)


def begin_epoch(methods: Sequence[Method], loader: Any, epoch: int) -> bool:
    """Announce an epoch to methods, and have the loader draw what they want of it.

    Returns:
        Whether a method chooses among the samples.
    """
    for method in methods:
        method.epoch_start(epoch)
    sampler = getattr(loader, "sampler", None)
    choosing = [method for method in methods if type(method).epoch_ids is not Method.epoch_ids]
    if not isinstance(sampler, EpochSampler) or not choosing:
        return False
    ids = sampler.pool
    for method in choosing:
        ids = method.epoch_ids(epoch, ids)
    sampler.restrict(ids)
    sampler.set_epoch(epoch)
    for method in choosing:
        method.epoch_repeats(sampler.repeats())
    return True


def _tell_lengths(trainer: pl.Trainer) -> None:
    """Tell Lightning how many batches the epoch has: it has looked once, before the first one."""
    if trainer.limit_train_batches != 1.0:
        return
    batches = len(trainer.train_dataloader)  # type: ignore[arg-type]
    trainer.fit_loop.max_batches = batches
    interval = trainer.val_check_interval
    if isinstance(interval, float) and trainer.check_val_every_n_epoch is not None:
        trainer.val_check_batch = max(1, int(batches * interval))


def _overflowed(optimizer: Optimizer) -> bool:
    return any(
        not bool(torch.isfinite(parameter.grad).all())
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )
