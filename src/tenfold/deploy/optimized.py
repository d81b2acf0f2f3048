"""The network that `optimize` returns, and how it is compared with the one that was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tenfold.deploy.dense import replace_named
from tenfold.deploy.edits import replaced_nodes
from tenfold.deploy.fuse import Epilogue, apply_epilogues
from tenfold.deploy.plan import OptimizePlan
from tenfold.errors import UserError, unknown_name
from tenfold.nn.winograd_packed import PackedWinogradConv3d

__all__ = [
    "MEMORY_FORMATS",
    "OptimizedModel",
    "hand_on_channels_last",
    "in_memory_format",
    "in_parts",
    "largest_difference",
    "reopen",
]

# Of the weights of 2-D and of 3-D convolutions.
MEMORY_FORMATS = {
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.channels_last_3d),
}


class OptimizedModel(nn.Module):
    """A network for one machine: called like the one it was made from, always in eval mode.

    It is for inference: its parameters need no gradient, `train()` has no effect, and a packed
    layer refuses an input that needs one.

    Attributes:
        plan: what was done, `print(fast.plan)`.
        network: the network inside: a graph where layers were fused, else a plain module.
        edits: how to make the network from the one that was given, for the artifact.

    Args:
        network: as above.
        plan: as above.
        edits: as above.
    """

    def __init__(
        self, network: nn.Module, plan: OptimizePlan, edits: tuple[dict[str, Any], ...] = ()
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.plan = plan
        self.edits = edits
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the given network's `forward` does."""
        if self.plan.at_once is None or kwargs or torch.compiler.is_compiling():
            return self.network(*args, **kwargs)
        return in_parts(self.network, args, self.plan.at_once)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def __repr__(self) -> str:
        packed, layers = len(self.plan.packed), len(self.plan.layers)
        return (
            f"OptimizedModel({type(self.network).__name__}, {packed} of {layers} layers packed, "
            f"precision={self.plan.precision}); see .plan"
        )


def in_parts(network: nn.Module, inputs: Sequence[Any], at_once: int) -> Any:
    """Run a network on some samples of a batch after the others, and join what it returns.

    What lies between two layers of a batch is larger than the caches; that of one image isn't.

    Args:
        network: computes each sample by itself.
        inputs: tensors with the samples along their first axis; other inputs go in whole.
        at_once: samples of a part.
    """
    lengths = {len(x) if isinstance(x, Tensor) and x.dim() else 0 for x in inputs}
    samples = lengths.pop() if len(lengths) == 1 else 0
    if samples <= at_once:
        return network(*inputs)
    starts = range(0, samples, at_once)
    parts = [network(*(x[start : start + at_once] for x in inputs)) for start in starts]
    return pytree.tree_map(lambda *each: torch.cat(each), *parts)


def reopen(
    network: nn.Module,
    plan: OptimizePlan,
    edits: Sequence[Mapping[str, Any]],
    epilogues: Mapping[str, Epilogue],
) -> OptimizedModel:
    """Return the optimized model that a network, edited and filled, was saved from.

    Where this version of its code leads to another graph, it is run without fusion or without the
    operators that were replaced: the result is the same, and the plan says so.

    Args:
        network: as `edits.replay` leaves it, with its weights.
        plan: as it was saved.
        edits: as they were saved.
        epilogues: what packed layers shall do besides, by name.

    Raises:
        UserError: a plan with an unknown memory format, or parts that can't be.
    """
    if plan.at_once is not None and not (isinstance(plan.at_once, int) and plan.at_once > 0):
        raise UserError(f"the plan has at_once={plan.at_once!r}: expected null or a number from 1")
    if plan.memory_format not in MEMORY_FORMATS:
        raise unknown_name("memory format", str(plan.memory_format), MEMORY_FORMATS)
    network = in_memory_format(network.eval(), plan.memory_format)
    replaced = replaced_nodes(edits)
    if replaced or any(str(epilogue) for epilogue in epilogues.values()):
        graph = apply_epilogues(network, epilogues, plan.inputs)
        if graph is None:
            rows = tuple(replace(row, fused=None) for row in plan.layers)
            plan = _without(replace(plan, layers=rows, replaced={}), "fusion")
        else:
            network = graph
            if not replace_named(graph, replaced):
                plan = _without(replace(plan, replaced={}), ", ".join(sorted({*replaced.values()})))
    return OptimizedModel(network, plan, tuple(dict(edit) for edit in edits))


def _without(plan: OptimizePlan, what: str) -> OptimizePlan:
    why = f"loaded without {what}: the network's code leads to another graph here"
    return replace(plan, reason=f"{plan.reason}; {why}" if plan.reason else why)


def in_memory_format(network: nn.Module, name: str) -> nn.Module:
    """Lay out the weights of a network's dense convolutions in place, and return it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            data, spatial = module.weight.data, isinstance(module, nn.Conv3d)
            module.weight.data = data.contiguous(memory_format=MEMORY_FORMATS[name][spatial])
    return network


def hand_on_channels_last(network: nn.Module, wanted: bool) -> nn.Module:
    """Say in which order packed 3-D convolutions hand on their results, and return the network.

    Inside their channels are last. Else results lie as the layer's input does.
    """
    for module in network.modules():
        if isinstance(module, PackedWinogradConv3d):
            module.channels_last = wanted
    return network


def largest_difference(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference relative to the largest expected value, output by output.

    Other shapes, or NaN in other places, count as infinite.
    """
    if len(outputs) != len(expected):
        return float("inf")
    worst = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        if output.shape != reference.shape:
            return float("inf")
        a, b = output.double(), reference.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = (torch.where(value.isfinite(), value, 0.0) for value in (a, b))
        if b.numel() == 0:
            continue
        difference = float((a - b).abs().max())
        if difference:
            worst = max(worst, difference / max(float(b.abs().max()), 1e-30))
    return worst
