"""Time the dense and the packed form of layers and networks on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn

from tenfold.deploy.candidates import Layer
from tenfold.measure.timing import interleave

__all__ = ["LayerTimes", "time_layers", "time_networks"]

# A layer of a millisecond gets seven rounds of some samples each; see `interleave`.
LAYER_SECONDS = 0.05
NETWORK_SECONDS = 0.5

LayerTimes = tuple[float, float]
"""Milliseconds of the dense layer, in the better memory format, and of the packed one."""


def time_layers(
    layers: list[Layer],
    make_packed: Callable[[Layer], nn.Module],
    like: Tensor,
) -> dict[str, LayerTimes]:
    """Time each layer alone, dense against packed; layers of equal sizes and pattern once.

    Args:
        layers: with a pattern and an input shape.
        make_packed: returns a layer's packed form.
        like: a tensor of the type and on the device of the inputs.
    """
    measured: dict[object, LayerTimes] = {}
    times = {}
    for layer in layers:
        key = _sizes(layer)
        if key not in measured:
            measured[key] = _time_layer(layer, make_packed(layer), like)
        times[layer.name] = measured[key]
    return times


def time_networks(
    networks: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]
) -> dict[str, float]:
    """Return the milliseconds of whole networks, timed in alternation."""
    return _medians({name: _call(network, inputs) for name, network in networks.items()}, inputs)


def _time_layer(layer: Layer, packed: nn.Module, like: Tensor) -> LayerTimes:
    assert layer.input is not None
    dtype = like.dtype if like.is_floating_point() else torch.float32
    x = torch.randn(layer.input, dtype=torch.float32).to(device=like.device, dtype=dtype)
    calls = {"dense": _call(layer.module, (x,)), "packed": _call(packed, (x,))}
    if isinstance(layer.module, nn.Conv2d):
        reordered = copy.deepcopy(layer.module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        last = x.contiguous(memory_format=torch.channels_last)
        calls["channels_last"] = _call(reordered, (last,))
    times = _medians(calls, (x,), LAYER_SECONDS)
    return min(times["dense"], times.get("channels_last", times["dense"])), times["packed"]


def _medians(
    calls: Mapping[str, Callable[[], object]],
    inputs: tuple[Tensor, ...],
    seconds: float = NETWORK_SECONDS,
) -> dict[str, float]:
    synchronise = torch.cuda.synchronize if inputs[0].is_cuda else None
    with torch.no_grad():
        samples = interleave(calls, seconds, synchronise)
    return {name: median(values) for name, values in samples.items()}


def _call(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: module(*inputs)


def _sizes(layer: Layer) -> tuple[object, ...]:
    module = layer.module
    sizes = (layer.kind, layer.pattern, layer.input, tuple(module.weight.shape), module.bias is None)
    if isinstance(module, nn.Conv2d):
        return (*sizes, module.stride, module.padding, module.dilation, module.groups)
    return sizes
