"""Contrastive distillation: tell a sample's own teacher features from those of other classes (CRD).

Paper: "Contrastive Representation Distillation", ICLR 2020 (arXiv 1910.10699).

Two memory banks hold one embedding a sample, of the student and of the teacher, by the sample's
original id. For each sample its own entry is the positive, K entries of other classes are the
negatives; with x = exp(v . m / t) / Z, chance c = K / N,

    loss = -mean over the batch of [ log(x+ / (x+ + c)) + sum over negatives log(c / (x- + c)) ]

once for the student's embedding against the teacher's bank, once the other way round. Z is set by
the first batch. With condensation, entries of samples that are out stay as they were: they still
serve as negatives.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.methods.condensation import several_processes
from tenfold.methods.distillers import as_vectors

__all__ = ["ContrastLoss"]

_TINY = 1e-7


class ContrastLoss(nn.Module):
    """The contrastive loss, with its embeddings and memory banks.

    Args:
        student_channels: C of the student's features.
        teacher_channels: D of the teacher's.
        labels: class of every id, `(N,)`; negatives are of other classes.
        negatives: K, drawn with replacement for every sample.
        width: of the embeddings.
        temperature: t.
        momentum: share of a bank's entry that stays at an update.
        seed: of the banks' start and of the negatives.

    Raises:
        UserError: fewer than two classes.

    >>> loss = ContrastLoss(8, 16, labels=torch.arange(20) % 2, negatives=4)
    >>> ids = torch.tensor([3, 4])
    >>> loss(torch.randn(2, 8), torch.randn(2, 16), ids).shape
    torch.Size([])
    """

    student_bank: Tensor
    teacher_bank: Tensor
    scale: Tensor
    drawn: Tensor
    by_class: Tensor
    starts: Tensor
    sizes: Tensor
    labels: Tensor

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        labels: Tensor,
        *,
        negatives: int = 16384,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        labels = labels.cpu().long()
        counts = labels.bincount()
        if int((counts > 0).sum()) < 2:
            raise UserError("contrast needs samples of at least two classes, to tell them apart")
        self.negatives, self.temperature = negatives, temperature
        self.momentum, self.seed = momentum, seed
        self.student_embedding = nn.Linear(student_channels, width)
        self.teacher_embedding = nn.Linear(teacher_channels, width)
        generator = torch.Generator().manual_seed(seed)
        for name in ("student_bank", "teacher_bank"):
            start = torch.randn(len(labels), width, generator=generator)
            self.register_buffer(name, functional.normalize(start, dim=1))
        self.register_buffer("scale", torch.zeros(2))  # Z of both directions; 0: not known yet
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        # Ids class by class: all but one class are then two runs, from which one number draws.
        constant = {
            "labels": labels,
            "by_class": labels.argsort(stable=True),
            "starts": counts.cumsum(0) - counts,
            "sizes": counts,
        }
        for name, values in constant.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of a batch, and move the banks towards its embeddings.

        Args:
            student: features `(B, C)`; maps and tokens are averaged.
            teacher: features `(B, D)`, likewise.
            ids: original ids `(B,)`.
        """
        ids = ids.to(self.labels.device)
        ours = functional.normalize(self.student_embedding(as_vectors(student)), dim=1)
        theirs = functional.normalize(self.teacher_embedding(as_vectors(teacher.detach())), dim=1)
        among = torch.cat([ids.unsqueeze(1), self.draw(ids)], dim=1)
        loss = self._contrast(ours, self.teacher_bank[among], 0)
        loss = loss + self._contrast(theirs, self.student_bank[among], 1)
        self._update(ids, ours.detach(), theirs.detach())
        return loss

    @torch.no_grad()
    def draw(self, ids: Tensor) -> Tensor:
        """Return ids `(B, K)` of other classes than those of `ids` `(B,)`, uniformly."""
        # Seeded by the count of draws alone, so that a resumed run draws the same.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.drawn))
        self.drawn += 1
        label = self.labels[ids].unsqueeze(1)
        uniform = torch.rand(len(ids), self.negatives, generator=generator, dtype=torch.float64)
        others = len(self.labels) - self.sizes[label]
        at = (uniform.to(ids.device) * others).long()
        at = torch.where(at >= self.starts[label], at + self.sizes[label], at)
        return self.by_class[at]

    def _contrast(self, anchors: Tensor, entries: Tensor, direction: int) -> Tensor:
        """Compare anchors `(B, W)` with entries `(B, 1 + K, W)`, the positive first."""
        found = (torch.einsum("bw,bkw->bk", anchors, entries) / self.temperature).exp()
        if float(self.scale[direction]) == 0:
            mean = found.detach().mean()
            if several_processes():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            self.scale[direction] = mean * len(self.labels)
        found = found / self.scale[direction].clone()  # the other direction writes its own beside
        chance = self.negatives / len(self.labels)
        positive = (found[:, 0] / (found[:, 0] + chance + _TINY)).log()
        negative = (chance / (found[:, 1:] + chance + _TINY)).log().sum(dim=1)
        return -(positive + negative).mean()

    @torch.no_grad()
    def _update(self, ids: Tensor, ours: Tensor, theirs: Tensor) -> None:
        if several_processes():  # so that all have the same banks
            ids, ours, theirs = (_gathered(values) for values in (ids, ours, theirs))
        for bank, values in ((self.student_bank, ours), (self.teacher_bank, theirs)):
            mixed = self.momentum * bank[ids] + (1 - self.momentum) * values.to(bank.dtype)
            bank[ids] = functional.normalize(mixed, dim=1)


def _gathered(values: Tensor) -> Tensor:
    of_ranks = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, values.contiguous())
    return torch.cat(of_ranks)
