"""Several processes, one model: what every rank decides for itself must be decided alike."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tenfold.errors import StateError

__all__ = ["check_agreement", "keep_out_of_broadcasts", "sum_over_ranks", "take_from_rank_zero"]

# DistributedDataParallel reads this list from the module that it wraps.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def check_agreement(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Compare checksums of tensors over all ranks; does nothing in a single process.

    Ranks see the same reduced gradients, so that their decisions agree by themselves. If one drifts
    all the same (a hook that differs, a rank that loaded another checkpoint), training would go on
    and end in a model that is nobody's.

    Args:
        what: what the tensors are, for the error.
        tensors: by the name of their layer.

    Raises:
        StateError: a rank differs; the first layer and the ranks are named. All ranks raise.
    """
    if not _several():
        return
    sums = [
        zlib.crc32(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for value in tensors.values()
    ]
    device = next((value.device for value in tensors.values()), torch.device("cpu"))
    mine = torch.tensor(sums, dtype=torch.int64, device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    for index, name in enumerate(tensors):
        found = [int(of_rank[index]) for of_rank in of_ranks]
        if len(set(found)) > 1:
            other = [rank for rank, checksum in enumerate(found) if checksum != found[0]]
            raise StateError(
                f"{what} of {name} differ between rank 0 and rank {', '.join(map(str, other))}: "
                "the ranks saw different gradients or started from different checkpoints; start "
                "all of them from the same one"
            )


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place; does nothing in a single process."""
    if _several():
        dist.all_reduce(value)
    return value


@torch.no_grad()
def take_from_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values into every rank's tensors; does nothing in a single process.

    For what a method computes from weights at attach and keeps out of DDP's own broadcasts.
    """
    if not _several():
        return
    for tensor in tensors:
        # NCCL moves tensors on GPUs only, and a network may still be on the CPU.
        device = torch.device("cuda") if dist.get_backend() == "nccl" else tensor.device
        value = tensor.detach().to(device, copy=True).contiguous()
        dist.broadcast(value, 0)
        tensor.copy_(value)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def keep_out_of_broadcasts(module: nn.Module, buffers: Iterable[str]) -> None:
    """Keep buffers that every rank computes alike out of DDP's broadcast ahead of each forward.

    Args:
        module: what DDP will wrap.
        buffers: names relative to it.
    """
    known = list(getattr(module, _IGNORED, []))
    names = [*known, *(name for name in buffers if name not in known)]
    # A plain attribute: nn.Module would register neither a list of names nor a parameter here.
    object.__setattr__(module, _IGNORED, names)
