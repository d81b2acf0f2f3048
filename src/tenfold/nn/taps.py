"""Maps inside a generator, by the names of its modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name

__all__ = ["forward_with_taps", "hooked", "maps_at", "taps_of"]


def forward_with_taps(
    network: nn.Module, x: Tensor, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a network's output, and the outputs of some of its modules by name.

    Our own generators hand the maps on, so that `torch.compile` sees one graph; others are hooked.

    Args:
        network: any module that takes one tensor.
        x: its input.
        names: of modules.

    Raises:
        UserError: a name that the network doesn't have.
    """
    own: Any = getattr(network, "forward_with_taps", None)
    if own is not None:
        found: tuple[Tensor, dict[str, Tensor]] = own(x, names)
        return found
    return hooked(network, x, names)


def hooked(network: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a network's output, and the outputs of some of its modules, taken by hooks.

    Raises:
        UserError: a name that the network doesn't have.
    """
    modules = dict(network.named_modules())
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        # A copy: an activation that follows may work in place.
        return lambda module, inputs, output: maps.__setitem__(name, output.clone())

    for name in names:
        if name not in modules:
            raise unknown_name("tap", name, modules)
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        image: Tensor = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return image, {name: maps[name] for name in names}


def taps_of(network: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names given, or the network's own choice.

    Raises:
        UserError: none are given, and the network has no choice of its own.
    """
    if names is not None:
        return tuple(names)
    own = getattr(network, "taps", None)
    if not isinstance(own, tuple):
        raise UserError(
            f"{type(network).__name__} doesn't say where to tap it: name the modules whose maps "
            "are compared"
        )
    return own


def maps_at(
    network: nn.Module, names: Sequence[str], size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Return maps of an image of zeros, to read their shapes; changes nothing in the network.

    Args:
        network: any module that takes one tensor.
        names: of modules.
        size: height and width of the image; by default a small one that the network takes.
    """
    side = max(32, int(getattr(network, "multiple", 1)))
    height, width = size or (side, side)
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    parameter = next(network.parameters())
    zeros = torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            return forward_with_taps(network, zeros, names)[1]
    finally:
        for module, training in modes:
            module.training = training
