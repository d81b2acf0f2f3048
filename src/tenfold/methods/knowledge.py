"""The knowledge set of KCD: what every sample is worth, and which ones are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tenfold.errors import UserError
from tenfold.methods.condensation import (
    Condensation,
    ValueTable,
    condense,
    condensed_sizes,
    several_processes,
)
from tenfold.methods.mixing import CurrentMixing, LazyMixing
from tenfold.methods.training_set import TrainingSet

__all__ = ["KnowledgeSet"]


class KnowledgeSet:
    """The samples of the present stage, and how they are chosen.

    Args:
        data: the training images.
        keep_ratio: share that is kept in the end.
        stages: how often the set is condensed.
        visit_power: see `condense`.
        mix_max: see `condense`; 0 mixes nothing.
        revive: whether samples that are out may come back.
        drop_window: see `condense`.
        mix_source: `current` or `original`, see `tenfold.methods.mixing`.
        unseen: see `condense`.

    Raises:
        UserError: nothing would be left, too many would leave at once, or images can't be mixed.
    """

    def __init__(
        self,
        data: TrainingSet,
        *,
        keep_ratio: float,
        stages: int,
        visit_power: float,
        mix_max: float,
        revive: bool,
        drop_window: Literal["step", "all"],
        mix_source: Literal["current", "original"],
        unseen: Literal["refuse", "keep"],
    ):
        self.data = data
        self.sizes = condensed_sizes(len(data.ids), keep_ratio, stages)
        self.visit_power = visit_power
        self.mix_max = mix_max
        self.revive = revive
        self.drop_window = drop_window
        self.unseen = unseen
        self.table = ValueTable(data.size)
        self.keep = data.ids
        self.done = 0
        self.revived: list[int] = []
        # Of every image's pixels: 0 as they are stored, else a checksum of the mixed ones.
        self.versions = torch.zeros(data.size, dtype=torch.int32)
        leaving = self._leaving()
        for stage, count in enumerate(leaving, 1):
            if count > self.sizes[stage]:
                raise UserError(
                    f"{count} samples would leave in stage {stage} and only {self.sizes[stage]} "
                    "stay, too few to mix them into: raise keep_ratio or stages, or "
                    "drop_window='step'"
                )
        self.mixing = self._make_mixing(mix_source, leaving)

    def _leaving(self) -> list[int]:
        if self.drop_window == "all" and self.revive:
            return [self.sizes[0] - size for size in self.sizes[1:]]
        return [before - after for before, after in zip(self.sizes, self.sizes[1:], strict=False)]

    def _make_mixing(self, source: str, leaving: list[int]) -> CurrentMixing | LazyMixing | None:
        if not self.mix_max or not any(leaving):
            return None
        if source == "original":
            return LazyMixing(self.data.size)
        if self.data.stored is None:
            raise UserError(
                f"the images of {self.data.name} are not of one size ahead of augmentation "
                f"({self.data.augment}), so they can't be mixed there: use mix_source: original, "
                "which mixes augmented images, or augment_max: 0"
            )
        shape = tuple(self.data.stored(self.data.ids[:1]).shape[1:])
        capacity = min(len(self.data.ids), sum(leaving))
        return CurrentMixing(self.data.size, capacity, shape)

    @property
    def ids(self) -> Tensor:
        """The ids of the present stage, ascending."""
        return self.keep.sort().values

    def condense(self) -> None:
        """Go on to the next stage; all processes call it, and do what the first one decides.

        Raises:
            UserError: see `tenfold.methods.condense`.
        """
        size, previous = self.sizes[self.done + 1], self.sizes[self.done]
        self.done += 1
        if size == previous:
            self.revived.append(0)
            return  # at the floor: the same samples go on
        device = self.table.sums.device
        among = self.data.ids if self.revive else self.keep
        found = condense(
            self.table.values,
            self.table.counts,
            size=size,
            previous=previous,
            visit_power=self.visit_power,
            mix_max=self.mix_max,
            among=among.to(device),
            drop_window=self.drop_window,
            unseen=self.unseen,
        )
        found = _of_the_first_process(found)
        self.revived.append(int((~torch.isin(found.keep, self.keep)).sum()))
        self.keep = found.keep
        self._mix(found)

    def _mix(self, found: Condensation) -> None:
        if isinstance(self.mixing, LazyMixing):
            self.mixing.pair(found.boundary, found.drop, found.shares)
        elif self.mixing is not None:
            assert self.data.stored is not None
            images, partners = (
                self.mixing.replaced(ids, self.data.stored(ids))
                for ids in (found.boundary, found.drop)
            )
            changed = self.mixing.mix(found.boundary, images, partners, found.shares)
            self.versions[changed] = self.mixing.checksums(changed)

    def cacheable(self, ids: Tensor) -> Tensor:
        """Tell whose views are those of one image alone: bool `(B,)`."""
        if isinstance(self.mixing, LazyMixing):
            return self.mixing.partners[ids] < 0
        return torch.ones_like(ids, dtype=torch.bool)

    def record(
        self, epoch_sizes: Sequence[int], images: int = 12, bins: int = 40
    ) -> dict[str, Any]:
        """Return charts and images for a run's report; see `Method.record`.

        Args:
            epoch_sizes: samples of every epoch.
            images: how many of the most and of the least valuable ones.
            bins: of the distribution of values.
        """
        ids = self.data.ids
        values = self.table.values.cpu()
        kept = torch.zeros(self.data.size, dtype=torch.bool)
        kept[self.keep] = True
        most = max(float(values[ids].max()), 1e-6)
        lines = []
        for label, chosen in (("trained on", ids[kept[ids]]), ("out", ids[~kept[ids]])):
            counts = torch.histc(values[chosen], bins, 0.0, most)
            points = [
                [round((at + 0.5) * most / bins, 6), int(count)]
                for at, count in enumerate(counts.tolist())
            ]
            if len(chosen):
                lines.append({"label": label, "points": points})
        order = ids[values[ids].sort(descending=True, stable=True).indices]
        sizes = [[epoch, size] for epoch, size in enumerate(epoch_sizes)]
        return {
            "charts": [
                {
                    "title": "Samples that are trained on",
                    "x_label": "Epoch",
                    "y_label": "Samples",
                    "from_zero": True,
                    "lines": [{"label": "", "points": sizes}],
                },
                {
                    "title": "Value of the samples at the end",
                    "x_label": "Mean entropy of the student's prediction, nats",
                    "y_label": "Samples",
                    "from_zero": True,
                    "lines": lines,
                },
            ],
            "images": [
                {
                    "title": title,
                    "ids": chosen.tolist(),
                    "notes": [f"{value:.2f}" for value in values[chosen].tolist()],
                }
                for title, chosen in (
                    ("Most valuable to this student", order[:images]),
                    ("Least valuable", order[-images:].flip(0)),
                )
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is known and what was decided."""
        return {
            "table": self.table.state_dict(),
            "keep": self.keep.clone(),
            "done": self.done,
            "revived": list(self.revived),
            "versions": self.versions.clone(),
            "mixing": None if self.mixing is None else self.mixing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it.

        Raises:
            UserError: the state mixes images and this set doesn't, or the other way round.
        """
        if (state["mixing"] is None) != (self.mixing is None):
            raise UserError(
                "this checkpoint was written with another augment_max or mix_source: go on with "
                "the same"
            )
        self.table.load_state_dict(state["table"])
        self.keep = state["keep"].clone()
        self.done = int(state["done"])
        self.revived = [int(count) for count in state["revived"]]
        self.versions.copy_(state["versions"])
        if self.mixing is not None:
            self.mixing.load_state_dict(state["mixing"])


def _of_the_first_process(found: Condensation) -> Condensation:
    """Return the first process's decision on the CPU; all have the same sums, but one decides."""
    parts = [found.keep, found.drop, found.boundary, found.shares]
    if several_processes():
        for part in parts:
            dist.broadcast(part, src=0)
    return Condensation(*(part.cpu() for part in parts))
