"""Which samples still teach: values of samples, their ranking, and the schedule of condensation.

Paper: "Knowledge Condensation Distillation", ECCV 2022 (arXiv 2207.05409), equations 7 and 12-15.

    H(x)     = -sum_c p(c|x) log p(c|x)     entropy of the student's prediction, in nats (eq. 7)
    V(x)     = mean of H over all visits of x since the first epoch (eq. 12)
    score(x) = V(x) * F(x)^0.03, F = number of visits; ranked over all samples (eq. 13)
    K_t      = max(floor(r N), K_{t-1} - floor(N (1 - r) / S))    samples kept after condensation t

Sums and counts are added on the device of the batches, without waiting for it. Several processes
count their own samples and add their sums up at the end of each epoch; sums may be added in any
order, means may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tenfold.errors import UserError

__all__ = [
    "Condensation",
    "ValueTable",
    "condense",
    "condensed_sizes",
    "prediction_entropy",
    "several_processes",
]


def prediction_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each prediction, the value of a sample to this student (eq. 7).

    Args:
        logits: `(B, C)`, C >= 2.

    Returns:
        `(B,)` in nats, from 0 (sure) to log C (no idea); of the logits' precision, at least
        float32.

    Raises:
        UserError: not two axes, or fewer than two classes.

    >>> prediction_entropy(torch.tensor([[2.0, 0.0, -1.0], [200.0, 0.0, 0.0]]))
    tensor([0.5243, 0.0000])
    """
    check_logits(logits)
    if logits.dtype != torch.float64:
        logits = logits.float()
    # exp(log p) * log p: where p is too small for a float this is 0, and never 0 * inf.
    logarithm = functional.log_softmax(logits, dim=1)
    found = (logarithm.exp() * logarithm).sum(dim=1).neg().clamp(min=0.0)
    return found + 0.0  # a plain zero for the surest


def check_logits(logits: Tensor) -> None:
    """Refuse what can't be a classifier's output."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(
            f"logits of shape {tuple(logits.shape)}: expected (B, C) with at least 2 classes; "
            "give what a classifier returns"
        )


def condensed_sizes(samples: int, keep_ratio: float, stages: int) -> list[int]:
    """Return how many samples are kept in each stage: K_0, K_1, ... K_S.

    The last one, K_S, is reached after stage S; it trains nothing unless epochs are left over.

    Args:
        samples: N, of the whole training set.
        keep_ratio: r, share that is kept in the end, in (0, 1].
        stages: S, at least 1.

    Raises:
        UserError: a value out of range, or nothing would be left.

    >>> condensed_sizes(50_000, 0.7, 6)
    [50000, 47500, 45000, 42500, 40000, 37500, 35000]
    """
    if not 0 < keep_ratio <= 1:
        raise UserError(f"keep_ratio={keep_ratio}: expected a share in (0, 1], such as 0.7")
    if stages < 1:
        raise UserError(f"stages={stages}: expected at least 1")
    # In plain floats 600 * (1 - 0.9) / 6 is 9.999...
    least = math.floor(samples * keep_ratio + 1e-9)
    if least < 1:
        raise UserError(
            f"keep_ratio={keep_ratio} keeps none of {samples} samples: give a larger share"
        )
    step = math.floor(samples * (1 - keep_ratio) / stages + 1e-9)
    sizes = [samples]
    for _ in range(stages):
        sizes.append(max(least, sizes[-1] - step))
    return sizes


@dataclass(frozen=True)
class Condensation:
    """What one condensation decides.

    Attributes:
        keep: ids to train on, best first, `(K,)`.
        drop: ids that leave, best first, `(L,)`; some may have been out before.
        boundary: the L least valuable of `keep`, best first, `(L,)`.
        shares: how much of `drop[i]` is mixed into `boundary[i]`, `(L,)`, float32, from 0 up.
    """

    keep: Tensor
    drop: Tensor
    boundary: Tensor
    shares: Tensor


def condense(
    values: Tensor,
    visits: Tensor,
    *,
    size: int,
    previous: int,
    visit_power: float = 0.03,
    mix_max: float = 0.3,
    among: Tensor | None = None,
    drop_window: Literal["step", "all"] = "step",
    unseen: Literal["refuse", "keep"] = "refuse",
) -> Condensation:
    """Choose the samples of the next stage (eq. 13-15).

    Ranked by `values * visits^visit_power`, from high to low, ties by the lower id. The first
    `size` are kept; the next, up to `previous`, leave and are mixed into the last that were kept.

    Args:
        values: V, mean entropy of every id, `(N,)`.
        visits: F, visits of every id, `(N,)`.
        size: samples to keep, K.
        previous: samples of the stage that ends, P.
        visit_power: alpha; what has been visited often and is still unsure ranks higher.
        mix_max: the largest share of a mixed image that comes from a dropped one, in [0, 1).
        among: the ids to rank; all by default, so that dropped ones may come back.
        drop_window: `step`: those between `size` and `previous` leave (the authors' code); `all`:
            everything that is out counts as leaving (the paper's text).
        unseen: what to do about ids without a visit: refuse, or keep them.

    Raises:
        UserError: an id without a visit, more that leave than are kept, or a value out of range.

    >>> values = torch.tensor([1.2, 0.4, 0.9, 0.1, 0.7, 1.5, 0.3, 0.6])
    >>> found = condense(values, torch.full((8,), 2), size=6, previous=8)
    >>> found.keep.tolist(), found.drop.tolist(), found.boundary.tolist()
    ([5, 0, 2, 4, 7, 1], [6, 3], [7, 1])
    """
    if not 0 <= mix_max < 1:
        raise UserError(f"mix_max={mix_max}: expected a share in [0, 1)")
    if visit_power < 0:
        raise UserError(f"visit_power={visit_power}: expected at least 0")
    ids = torch.arange(len(values), device=values.device) if among is None else among.sort().values
    if not 1 <= size <= previous <= len(ids):
        raise UserError(
            f"size={size}, previous={previous} of {len(ids)} ids: expected "
            "1 <= size <= previous <= ids"
        )
    seen = visits[ids] > 0
    if unseen == "refuse" and not bool(seen.all()):
        never = ids[~seen]
        raise UserError(
            f"{len(never)} of {len(ids)} samples have not been visited yet (ids "
            f"{shown(never)}), so nothing is known of their value: let every epoch draw all of "
            "them, or keep them by unseen='keep'"
        )
    score = values[ids].double() * visits[ids].double() ** visit_power
    score = torch.where(seen, score, math.inf)
    order = ids[score.sort(descending=True, stable=True).indices]
    last = len(order) if drop_window == "all" else previous
    keep, drop = order[:size], order[size:last]
    if len(drop) > size:
        raise UserError(
            f"{len(drop)} samples would leave and only {size} stay, too few to mix them into: "
            "raise keep_ratio or stages"
        )
    shares = mix_max * torch.arange(len(drop), device=values.device) / max(1, len(drop))
    return Condensation(keep, drop, keep[size - len(drop) :], shares.float())


def shown(ids: Tensor, count: int = 8) -> str:
    """Write the first few ids for an error."""
    few = ", ".join(str(number) for number in ids[:count].tolist())
    return few + (", …" if len(ids) > count else "")


class ValueTable:
    """Sum of entropies and number of visits of every id; 12 bytes a sample.

    Args:
        size: ids are 0 to size - 1.
    """

    def __init__(self, size: int):
        self.size = size
        self.sums = torch.zeros(size, dtype=torch.float64)
        self.counts = torch.zeros(size, dtype=torch.int32)
        self._new_sums = torch.zeros_like(self.sums)
        self._new_counts = torch.zeros_like(self.counts)

    def record(self, ids: Tensor, entropies: Tensor) -> None:
        """Add one visit of each id `(B,)` with its entropy `(B,)`, on the entropies' device."""
        # Apple's GPUs have no float64: there the table stays on the CPU.
        device = torch.device("cpu") if entropies.device.type == "mps" else entropies.device
        if self._new_sums.device != device:
            self._move(device)
        ids = ids.to(device, torch.int64)
        self._new_sums.index_add_(0, ids, entropies.detach().to(device, torch.float64))
        ones = torch.ones_like(ids, dtype=torch.int32)
        self._new_counts.index_add_(0, ids, ones)

    def share(self) -> None:
        """Take in what was recorded since the last call, by all processes; all of them call it.

        Raises:
            UserError: an entropy was not finite; its ids are named.
        """
        if several_processes():
            dist.all_reduce(self._new_sums)
            dist.all_reduce(self._new_counts)
        self.sums += self._new_sums
        self.counts += self._new_counts
        self._new_sums.zero_()
        self._new_counts.zero_()
        bad = torch.nonzero(~torch.isfinite(self.sums)).flatten()
        if len(bad):
            raise not_finite(bad)

    @property
    def values(self) -> Tensor:
        """V, the mean entropy of every id `(N,)`, float64; 0 where there was no visit."""
        return self.sums / self.counts.clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums and counts, with what this process alone has not shared yet."""
        return {
            "sums": (self.sums + self._new_sums).cpu(),
            "counts": (self.counts + self._new_counts).cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        device = self.sums.device
        self.sums = state["sums"].to(device, torch.float64, copy=True)
        self.counts = state["counts"].to(device, torch.int32, copy=True)
        self._new_sums = torch.zeros_like(self.sums)
        self._new_counts = torch.zeros_like(self.counts)

    def _move(self, device: torch.device) -> None:
        self.sums, self.counts = self.sums.to(device), self.counts.to(device)
        self._new_sums = self._new_sums.to(device)
        self._new_counts = self._new_counts.to(device)


def not_finite(ids: Tensor, whose: str = "student") -> UserError:
    """Return the error for samples for which a network's logits are not finite."""
    advice = ", or train with a lower learning rate" if whose == "student" else " and the teacher"
    return UserError(
        f"the {whose}'s logits are not finite for {len(ids)} samples (ids {shown(ids)}): look at "
        f"these images{advice}"
    )


def several_processes() -> bool:
    """Tell whether other processes train the same model."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
