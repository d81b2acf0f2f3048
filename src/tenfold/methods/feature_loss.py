"""One of the feature distillers, made for the layers of a student and a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.methods.contrast import ContrastLoss
from tenfold.methods.distillers import (
    DISTILLERS,
    VariationalLoss,
    attention_loss,
    channels,
    neighbour_loss,
    relation_loss,
    similarity_loss,
)

__all__ = ["FeatureLoss"]

_PURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "at": attention_loss,
    "sp": similarity_loss,
    "rkd": relation_loss,
    "pkt": neighbour_loss,
}


class FeatureLoss(nn.Module):
    """Sum a distiller's loss over layers.

    Args:
        name: of the distiller: at, sp, rkd, pkt, vid or contrast.
        student: shapes of the student's features, of any batch size.
        teacher: shapes of the teacher's, layer by layer.
        labels: returns the class of every id; asked by `contrast` alone.
        negatives: of `contrast`.

    Raises:
        UserError: features that the distiller can't compare.
    """

    def __init__(
        self,
        name: str,
        student: Sequence[Sequence[int]],
        teacher: Sequence[Sequence[int]],
        labels: Callable[[], Tensor],
        negatives: int,
    ):
        super().__init__()
        self.name = name
        check_features(name, student, teacher)
        pairs = list(zip(student, teacher, strict=True))
        made: list[nn.Module] = []
        # Weights of their own: the same in every run, whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for ours, theirs in pairs:
                if name == "vid":
                    made.append(VariationalLoss(channels(ours), channels(theirs)))
                elif name == "contrast":
                    made.append(
                        ContrastLoss(
                            channels(ours), channels(theirs), labels(), negatives=negatives
                        )
                    )
        self.parts = nn.ModuleList(made)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], ids: Tensor) -> Tensor:
        """Return the loss of a batch: features by layer, `(B, ...)`, and the ids `(B,)`."""
        losses = []
        for index, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
            if self.name in _PURE:
                losses.append(_PURE[self.name](ours, theirs))
            elif self.name == "contrast":
                losses.append(self.parts[index](ours, theirs, ids))
            else:
                losses.append(self.parts[index](ours, theirs))
        return torch.stack(losses).sum()

    @property
    def local_buffers(self) -> list[str]:
        """Names of buffers that every process computes alike."""
        return [name for name, _ in self.named_buffers()]


def check_features(
    name: str, student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]
) -> None:
    """Refuse shapes of features that a distiller can't compare."""
    for ours, theirs in zip(student, teacher, strict=True):
        if not (2 <= len(ours) <= 4 and 2 <= len(theirs) <= 4):
            raise UserError(
                f"features of shape {tuple(ours)} and {tuple(theirs)}: expected maps "
                "(B, C, H, W), tokens (B, N, C) or vectors (B, C); name other layers"
            )
        if name == "at" and 2 in (len(ours), len(theirs)):
            raise UserError(
                "distiller at compares where features are large, and these layers give "
                "vectors: name layers ahead of the pooling"
            )


def check_layers(
    distiller: str, layers: Sequence[str] | None, teacher_layers: Sequence[str] | None
) -> None:
    """Refuse numbers of layers that a distiller has no use for."""
    wanted = DISTILLERS[distiller].layers
    if wanted == "none":
        if layers or teacher_layers:
            raise UserError(
                "distiller kd compares logits alone, and layers are given: leave them out, or "
                f"choose one of {', '.join(name for name in DISTILLERS if name != 'kd')}"
            )
        return
    if not layers:
        raise UserError(
            f"distiller {distiller} compares features: name the modules they come from, such as "
            + ("layers: [layer3]" if wanted == "one" else "layers: [layer1, layer2, layer3]")
        )
    if wanted == "one" and len(layers) != 1:
        raise UserError(f"distiller {distiller} compares one layer: expected one, got {layers}")
    if teacher_layers is not None and len(teacher_layers) != len(layers):
        raise UserError(
            f"layers names {len(layers)} modules and teacher_layers {len(teacher_layers)}: "
            "expected one of the teacher's for each of the student's"
        )
