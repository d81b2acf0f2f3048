"""Read the outputs of named modules while a network runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tenfold.errors import StateError, UserError, nearest

__all__ = ["Taps", "evaluated"]


class Taps:
    """Hooks that keep the latest outputs of some modules of one network.

    Args:
        network: whose modules are watched.
        names: of modules, such as `layer3`.
        kind: what the network is called in errors.
        training_only: keep nothing unless the network trains and gradients are on, so that an
            evaluation in between leaves nothing behind.

    Raises:
        UserError: no module of that name.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], kind: str, training_only: bool = False
    ):
        self.names = list(names)
        self.kind = kind
        self.training_only = training_only
        self._network = network
        self._kept: dict[str, Tensor] = {}
        known = dict(network.named_modules())
        for name in names:
            if name not in known or not name:
                raise UserError(
                    f"the {kind} has no module {name!r}: {nearest(name, [n for n in known if n])}"
                )
        self._handles = [self._watch(known[name], name) for name in names]

    def _watch(self, module: nn.Module, name: str) -> RemovableHandle:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if self.training_only and not (self._network.training and torch.is_grad_enabled()):
                return
            if not isinstance(output, Tensor):
                raise UserError(
                    f"module {name} of the {self.kind} returns {type(output).__name__}: expected "
                    "one tensor; name another layer"
                )
            self._kept[name] = output

        return module.register_forward_hook(keep)

    def take(self) -> list[Tensor]:
        """Return the outputs in the order of the names, and forget them.

        Raises:
            StateError: a module has not run since the last call.
        """
        missing = [name for name in self.names if name not in self._kept]
        if missing:
            raise StateError(
                f"module {missing[0]} of the {self.kind} did not run: call the network in training "
                "mode once ahead of the loss, or name a layer that every forward pass uses"
            )
        found = [self._kept[name] for name in self.names]
        self._kept.clear()
        return found

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._kept.clear()


def evaluated(network: nn.Module, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Run images through a network in evaluation mode and return the outputs of some modules.

    The network is left as it was, modes and all.
    """
    modes = [(module, module.training) for module in network.modules()]
    taps = Taps(network, layers, "student")
    weight = next(network.parameters(), None)
    network.eval()
    try:
        with torch.no_grad():  # not inference mode: what a network caches is trained with later
            network(images if weight is None else images.to(weight.device, weight.dtype))
        return taps.take()
    finally:
        taps.remove()
        for module, training in modes:
            module.training = training
