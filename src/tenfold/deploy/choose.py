"""Choose the form of each layer: by what the device can do, and by timing both forms on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tenfold.deploy import semi_structured
from tenfold.deploy.candidates import Layer, pack
from tenfold.deploy.plan import LayerChoice
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.measure.timing import interleave

__all__ = ["CHOICES", "Target", "choose_layers", "time_layer", "time_networks"]

CHOICES = ("time", "packed", "dense")
# A layer of a millisecond gets seven rounds of some samples each; see `interleave`.
LAYER_SECONDS = 0.05
NETWORK_SECONDS = 0.5
GET_KERNELS = "install a C++ compiler, such as g++, and then tenfold again"


class Target:
    """A device: what it packs layers into, and why it can't.

    Args:
        precision: of packed weights, on a CPU.
        device: of the example inputs.

    Attributes:
        missing: why nothing can be faster packed here, or None.
        instruction_set: that packed layers use, or None.

    Raises:
        UserError: a precision that this device doesn't take.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.precision = precision
        self.device = device
        self.instruction_set: str | None = None
        if device.type == "cpu":
            self.instruction_set = native.instruction_set()
            why = native.missing()
            self.missing = None if why is None else f"{why}: {GET_KERNELS}"
        elif device.type == "cuda":
            if precision != "float32":
                raise UserError(
                    f"precision={precision!r} is for a CPU, and the example is on {device}: "
                    "convert the model and the example by .half() or .bfloat16() instead"
                )
            self.missing = semi_structured.missing(device)
            self.instruction_set = None if self.missing else "2:4 tensor cores"
        else:
            self.missing = f"there are no kernels for {device.type}"

    def pack(self, layer: Layer) -> nn.Module:
        """Return a layer's packed form.

        Raises:
            UserError: there is none, saying why.
        """
        if self.device.type == "cuda":
            return semi_structured.compress(layer.module)
        if layer.module.weight.dtype != torch.float32:
            raise UserError(
                f"its weight is {layer.module.weight.dtype}; the kernels compute in torch.float32"
            )
        return pack(layer, self.precision)


def choose_layers(
    layers: list[Layer], target: Target, choose: str
) -> tuple[list[LayerChoice], dict[str, nn.Module]]:
    """Return a row for each layer, and the packed form of those that are better packed.

    Args:
        layers: of the network.
        target: packs them.
        choose: one of `CHOICES`.
    """
    packed: dict[str, nn.Module] = {}
    reasons = {layer.name: layer.reason for layer in layers}
    for layer in layers:
        if layer.reason is not None:
            continue
        if choose == "dense":
            reasons[layer.name] = "dense was asked for"
        elif choose == "time" and target.missing:
            reasons[layer.name] = "no kernels for it here"
        else:
            try:
                packed[layer.name] = target.pack(layer)
            except UserError as error:
                reasons[layer.name] = str(error)
    times: dict[str, tuple[float, float]] = {}
    if choose == "time":
        measured: dict[object, tuple[float, float]] = {}  # layers of equal sizes once
        for layer in layers:
            if layer.name in packed:
                key = _sizes(layer)
                if key not in measured:
                    measured[key] = time_layer(layer, packed[layer.name])
                times[layer.name] = measured[key]
        packed = {name: each for name, each in packed.items() if times[name][1] < times[name][0]}
    rows = []
    for layer in layers:
        dense_ms, packed_ms = times.get(layer.name, (None, None))
        rows.append(
            LayerChoice(
                layer=layer.name,
                kind=layer.kind,
                pattern=f"{layer.pattern[0]}:{layer.pattern[1]}" if layer.pattern else None,
                input=layer.input,
                dense_ms=dense_ms,
                packed_ms=packed_ms,
                reason=reasons[layer.name],
            )
        )
    return rows, packed


def time_layer(layer: Layer, packed: nn.Module) -> tuple[float, float]:
    """Return milliseconds of the layer, in its better memory format, and of its packed form."""
    weight = layer.module.weight
    x = torch.randn(layer.input or ()).to(device=weight.device, dtype=weight.dtype)
    calls = {"dense": _call(layer.module, (x,)), "packed": _call(packed, (x,))}
    if isinstance(layer.module, nn.Conv2d):
        reordered = copy.deepcopy(layer.module)
        reordered.weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        last = x.contiguous(memory_format=torch.channels_last)
        calls["channels_last"] = _call(reordered, (last,))
    times = _fastest_rounds(calls, x, LAYER_SECONDS)
    return min(times["dense"], times.get("channels_last", times["dense"])), times["packed"]


def time_networks(
    networks: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]
) -> dict[str, float]:
    """Return the milliseconds of whole networks, timed in alternation."""
    calls = {name: _call(network, inputs) for name, network in networks.items()}
    return _fastest_rounds(calls, inputs[0], NETWORK_SECONDS)


def _fastest_rounds(
    calls: Mapping[str, Callable[[], object]], x: Tensor, seconds: float
) -> dict[str, float]:
    with torch.no_grad():
        samples = interleave(calls, seconds, torch.cuda.synchronize if x.is_cuda else None)
    # Other processes only ever add time, and a choice shall not hang on when they did.
    return {name: min(values) for name, values in samples.items()}


def _call(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: module(*inputs)


def _sizes(layer: Layer) -> tuple[object, ...]:
    module = layer.module
    sizes = (type(module), layer.pattern, layer.input, module.weight.shape, module.bias is None)
    if isinstance(module, nn.Conv2d):
        return (*sizes, module.stride, module.padding, module.dilation, module.groups)
    return sizes
