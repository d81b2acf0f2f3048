"""Find the layers of a network that can be packed, and say why the others can't."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tenfold.kernels.winograd import kernel_points
from tenfold.measure.inputs import run_once
from tenfold.nn.blocks import nm_pattern
from tenfold.nn.packable import unpackable
from tenfold.nn.packed import NMConv2d, NMLinear, PackedLayer
from tenfold.nn.winograd import WinogradConv3d
from tenfold.nn.winograd_fit import unconvertible

__all__ = ["Layer", "find_layers", "pack", "replace_layers"]


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a network.

    Attributes:
        name: in the network.
        module: the layer.
        pattern: `(n, m)` of its zeros, or None; of 3-D convolutions always None.
        input: shape of its input at its first call, or None when it isn't called.
        reason: why it can't be packed, or None.
    """

    name: str
    module: nn.Conv2d | nn.Linear | nn.Conv3d | WinogradConv3d
    pattern: tuple[int, int] | None
    input: tuple[int, ...] | None
    reason: str | None

    @property
    def spatial(self) -> bool:
        """Tell whether it is a 3-D convolution, whose packed form is Winograd's."""
        return isinstance(self.module, nn.Conv3d | WinogradConv3d)

    @property
    def kind(self) -> str:
        """Return the name of its class."""
        return type(self.module).__name__


def find_layers(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Layer]:
    """Return every Conv2d, Linear and 3-D convolution of a network in eval mode, in its order.

    Runs the network once. Patterns are read from the weights, whoever made them.

    Args:
        network: is not changed.
        inputs: example inputs.

    Raises:
        UserError: if the network fails on the inputs.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Conv3d | WinogradConv3d):
            names[module].append(name)
    uses = Counter(
        id(tensor)
        for module in set(network.modules())
        for tensor in module._parameters.values()
        if tensor is not None
    )
    # Before the hooks: a layer's own ones are a reason to leave it.
    reasons = {module: _unpackable(module) for module in names}
    calls = _record(network, inputs, list(names))
    found = []
    for module, known in names.items():
        shape, how = calls.get(module, (None, "not called with the example inputs"))
        reason = reasons[module]
        if reason is None and len(known) > 1:
            reason = f"the module stands under several names: {', '.join(known)}"
        weight = module._parameters.get("weight")
        if reason is None and uses[id(weight)] > 1:
            reason = "its weight is shared with another layer"
        reason = reason or how
        pattern = None
        if isinstance(module, nn.Conv2d | nn.Linear):
            pattern = nm_pattern(module.weight)
            reason = reason or (None if pattern else "no N:M pattern")
        found.append(Layer(known[0], module, pattern, shape, reason))  # type: ignore[arg-type]
    return found


def pack(layer: Layer, precision: str) -> PackedLayer:
    """Return the packed form of a layer that has a pattern.

    Raises:
        UserError: if the kernels can't take it, saying why.
    """
    assert layer.pattern is not None
    if isinstance(layer.module, nn.Conv2d):
        return NMConv2d.from_dense(layer.module, *layer.pattern, precision, layer.name)
    assert isinstance(layer.module, nn.Linear)
    return NMLinear.from_dense(layer.module, *layer.pattern, precision, layer.name)


def replace_layers(network: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put modules into a network in place, by name; the empty name is the network itself."""
    for name, module in replacements.items():
        if not name:
            return module
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)
    return network


def _unpackable(module: nn.Module) -> str | None:
    if isinstance(module, WinogradConv3d):
        if kernel_points(module.points, module.tile) is None:
            return f"the kernel takes pairs of points, a and -a, and not {module.points!r}"
        return "it has hooks" if module._forward_hooks or module._forward_pre_hooks else None
    return unconvertible(module) if isinstance(module, nn.Conv3d) else unpackable(module)


def _dimensions(module: nn.Module, x: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return 4
    return 5 if isinstance(module, nn.Conv3d) else x.dim()


def _record(
    network: nn.Module, inputs: tuple[Tensor, ...], layers: list[nn.Module]
) -> dict[nn.Module, tuple[tuple[int, ...] | None, str | None]]:
    """Return each called layer's first input shape, and what speaks against packing in a call."""
    calls: dict[nn.Module, tuple[tuple[int, ...] | None, str | None]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor):
            calls.setdefault(module, (None, "it isn't called with one tensor"))
            return
        against = None
        if x.is_complex() or not x.is_floating_point():
            against = f"its input is {x.dtype}"
        elif x.dim() != _dimensions(module, x):
            against = "its input has no batch dimension"
        if module not in calls or (against and not calls[module][1]):
            calls[module] = (tuple(calls.get(module, (x.shape,))[0] or x.shape), against)

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        run_once(network, inputs, "the model")
    finally:
        for handle in handles:
            handle.remove()
    return calls
