"""A method that chooses among samples, in a plain loop: it gives the data, and counts the epochs.

An engine asks such a method by the hooks of `Requests`, and counts steps. Here the same hooks are
behind a data set and a sampler for a DataLoader, and the loop says when an epoch is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import StateError, UserError
from tenfold.methods.base import Method
from tenfold.methods.condensed_data import (
    CondensedSampler,
    CondensedSet,
    Transform,
    training_set_of,
)

__all__ = ["SampleMethod"]


class SampleMethod(Method):
    """The base of a method that is given a data set by a plain loop."""

    _loop: tuple[CondensedSet, CondensedSampler] | None = None

    def attach(
        self,
        model: nn.Module,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | Sequence[int] | None = None,
        dataset: Any = None,
        epochs: int | None = None,
        transform: Transform | None = None,
        views: int | None = None,
        seed: int = 0,
    ) -> nn.Module:
        """Put the student into training form, in place, and return it.

        A loop of your own gives `dataset` and `epochs`, draws from `kcd.dataset` by `kcd.sampler`,
        and calls `loss` and `epoch_end`; an engine calls `prepare`, and gives steps instead.

        Args:
            model: the student; attach before DDP wraps it.
            total_steps: optimizer steps of the whole run, given by an engine.
            steps_per_epoch: one int an epoch, likewise.
            dataset: of (image, label), with a length; an index is an id.
            epochs: of the run.
            transform: what is done to an image after mixing; images in `dataset` are uint8 then.
            views: how many different images the transform can make of one; for `teacher_cache`.
            seed: of the order of samples.

        Raises:
            StateError: this object is already attached.
            UserError: no data set, or something in it or in the networks doesn't fit.
        """
        if dataset is not None and epochs is not None and total_steps is None:
            if self.schedule is None:  # otherwise the base says what is wrong
                self._prepare_loop(model, CondensedSet(dataset, transform), epochs, views, seed)
            total_steps, steps_per_epoch = epochs, 1
        elif dataset is not None or epochs is not None or total_steps is None:
            raise UserError(
                f"{type(self).__name__} chooses among samples, so a loop of your own gives it "
                "both: attach(student, dataset=…, epochs=…), and no total_steps"
            )
        model = super().attach(model, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self.note_repeats()
        return model

    def _prepare_loop(
        self, model: nn.Module, data: CondensedSet, epochs: int, views: int | None, seed: int
    ) -> None:
        self.prepare(model, training_set_of(data, views), epochs)
        data.mixing = self.mixing()
        ids = torch.arange(len(data))

        def drawn() -> Tensor:
            return self.epoch_ids(self.epoch, ids)

        self._loop = data, CondensedSampler(drawn, lambda: self.epoch, len(data), seed)

    @property
    def dataset(self) -> CondensedSet:
        """The data set for a DataLoader of your own, of (image, label, id)."""
        return self._own_loop()[0]

    @property
    def sampler(self) -> CondensedSampler:
        """The sampler that goes with it; the number of batches changes from stage to stage."""
        return self._own_loop()[1]

    def _own_loop(self) -> tuple[CondensedSet, CondensedSampler]:
        if self._loop is None:
            raise StateError(
                f"{type(self).__name__} has a dataset and a sampler in a loop of your own: "
                "attach(student, dataset=…, epochs=…) first"
            )
        return self._loop

    def note_repeats(self) -> None:
        """Say which samples this process draws in vain in the epoch that begins."""
        if self._loop is not None:
            self.epoch_repeats(self._loop[1].repeats())

    def step(self) -> None:
        """Act after the optimizer's update; in a loop of your own `epoch_end` keeps the time."""
        self._attached_model()
        if self._loop is None:
            super().step()

    def epoch_end(self) -> None:
        """End an epoch in a loop of your own: every so often the set is condensed here.

        Raises:
            StateError: not attached, an engine keeps the time, or all epochs are done.
            UserError: the data set has another length now, a sample was never visited, or logits
                were not finite.
        """
        self._attached_model()
        name = type(self).__name__
        if self._loop is None:
            raise StateError(
                f"the engine that attached {name} ends its epochs: leave epoch_end out"
            )
        if self.finished():
            raise StateError(f"all {self.steps_done} epochs are done: finalize the student")
        data, sampler = self._loop
        if len(data) != sampler.size:
            raise UserError(
                f"the dataset has {len(data)} samples and had {sampler.size} when {name} was "
                "attached: keep it as it is, because an index is an id"
            )
        self.on_epoch_end()
        self.steps_done += 1
        self.epoch_start(self.steps_done)
        self.note_repeats()

    def on_epoch_end(self) -> None:
        """Take in what all processes have seen, ahead of `on_epoch_start`."""

    def finalize(self, model: nn.Module) -> nn.Module:
        """Take everything of the method off the student and return it, otherwise untouched.

        Raises:
            StateError: not attached, another model, or epochs are left.
        """
        if self._loop is not None and not self.finished():
            raise StateError(
                f"{type(self).__name__} has not finished: {self.steps_done} epochs are done; call "
                "epoch_end() after each one, to the last"
            )
        return super().finalize(model)
