"""Several processes: leave gradients that are zeros on all of them out of what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.methods.live_filters import LiveForward

__all__ = ["leave_out_of_reduction"]


def leave_out_of_reduction(
    wrapper: nn.parallel.DistributedDataParallel, layers: Sequence[LiveForward]
) -> None:
    """Have DistributedDataParallel leave out the gradients of layers that are frozen whole.

    They are zeros on every rank. All others are averaged as ever.

    Args:
        wrapper: that has not made a step yet.
        layers: those whose weights may be left out.

    Raises:
        UserError: it has a communication hook already.
    """
    by_weight = {id(layer.weight): layer for layer in layers}

    def reduce(group: Any, bucket: Any) -> Any:
        of_weights = zip(bucket.parameters(), bucket.gradients(), strict=True)
        live = [gradient for weight, gradient in of_weights if not left_out(weight)]
        whole: Tensor = bucket.buffer()
        if len(live) == len(bucket.gradients()):
            return _averaged(whole, group).then(lambda done: done.value()[0])
        if not live:
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(whole)
            return done
        packed = torch.cat([gradient.flatten() for gradient in live])

        def unpack(done: Any) -> Tensor:
            parts = torch.split(done.value()[0], [gradient.numel() for gradient in live])
            for gradient, part in zip(live, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
            return whole

        return _averaged(packed, group).then(unpack)

    def left_out(weight: Tensor) -> bool:
        layer = by_weight.get(id(weight))
        return layer is not None and layer.saving and layer.whole

    try:
        # PyTorch wants annotations that it knows, or none.
        wrapper.register_comm_hook(
            wrapper.process_group, lambda group, bucket: reduce(group, bucket)
        )
    except RuntimeError as error:
        raise UserError(
            "this DistributedDataParallel has a communication hook already, and LTS needs it: "
            "drop the other one, or use LTS(save_backward=False)"
        ) from error


def _averaged(values: Tensor, group: Any) -> Any:
    values.div_(dist.get_world_size(group))
    return dist.all_reduce(values, group=group, async_op=True).get_future()
