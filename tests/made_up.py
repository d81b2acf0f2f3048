"""Two methods that exist for the tests alone, so that the contract doesn't fit LBC only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.methods import Kind, Method, Stage


class Scale(nn.Module):
    """The parameter that `Gain` owns."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))


@dataclass(kw_only=True, eq=False)
class Gain(Method):
    """Learn one factor on the logits with an optimizer of its own; gone after finalize."""

    kind: ClassVar[Kind] = Kind.WEIGHTS
    stage: ClassVar[Stage] = Stage.QUANTIZE
    rate: float = 0.05

    def validate(self) -> None:
        if not self.rate > 0:
            raise UserError(f"rate={self.rate}: expected more than 0")
        self.calls: list[str] = []

    def on_attach(self, model: nn.Module) -> nn.Module:
        self.scale = Scale()
        self.optimizer = torch.optim.Adam(self.scale.parameters(), lr=self.rate)
        self.own(self.scale, self.optimizer)
        self.hook = model.register_forward_hook(lambda _, __, out: out * self.scale.value)
        return model

    def on_epoch_start(self, epoch: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def on_before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen = self.scale.value.grad is not None
        self.calls.append("before_step")

    def on_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.calls.append("step")

    def on_finalize(self, model: nn.Module) -> nn.Module:
        self.hook.remove()
        return model

    def metrics(self) -> dict[str, float]:
        return {"gain": float(self.scale.value.detach())}


@dataclass(kw_only=True, eq=False)
class Focal(Method):
    """Weigh each image by how unsure the network is of it; `share` draws fewer from epoch 1 on."""

    kind: ClassVar[Kind] = Kind.LOSS
    stage: ClassVar[Stage] = Stage.LOSS
    replaces_loss: ClassVar[bool] = True
    needs_ids: ClassVar[bool] = True
    gamma: float = 2.0
    share: float = 1.0

    def validate(self) -> None:
        self.ids: dict[int, set[int]] = {}

    def epoch_samples(self, dataset_size: int, epochs: int) -> list[int]:
        return [dataset_size] + [round(dataset_size * self.share)] * (epochs - 1)

    def epoch_ids(self, epoch: int, ids: Tensor) -> Tensor:
        return ids if epoch == 0 else ids[: round(len(ids) * self.share)]

    def training_loss(self, model: Any, batch: Any, criterion: Any) -> Tensor:
        self.ids.setdefault(self.epoch, set()).update(batch["id"].tolist())
        logits = model(batch["image"])
        sure = logits.detach().softmax(dim=1).gather(1, batch["label"].unsqueeze(1)).squeeze(1)
        losses = nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return ((1 - sure) ** self.gamma * losses).mean()


@dataclass(kw_only=True, eq=False)
class OtherLoss(Focal):
    """A second method that replaces the loss."""


@dataclass(kw_only=True, eq=False)
class Hermit(Method):
    """A method that can't stand `Gain`."""

    kind: ClassVar[Kind] = Kind.WEIGHTS
    stage: ClassVar[Stage] = Stage.MASK
    conflicts: ClassVar[frozenset[str]] = frozenset({"gain"})
