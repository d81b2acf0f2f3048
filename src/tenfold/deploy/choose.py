"""Choose the form of each layer: by what the device can do, and by timing both forms on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tenfold.deploy import semi_structured
from tenfold.deploy.candidates import Layer, pack
from tenfold.deploy.plan import LayerChoice
from tenfold.deploy.winograd_options import Option, Ranking, options, pack_option, rank
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.measure.timing import interleave
from tenfold.nn.winograd import WinogradConv3d

__all__ = ["CHOICES", "Choices", "Target", "choose_layers", "time_layer", "time_networks"]

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
        """Return the packed form of a layer with an N:M pattern.

        Raises:
            UserError: there is none, saying why.
        """
        assert isinstance(layer.module, nn.Conv2d | nn.Linear)
        if self.device.type == "cuda":
            return semi_structured.compress(layer.module)
        if layer.module.weight.dtype != torch.float32:
            raise UserError(
                f"its weight is {layer.module.weight.dtype}; the kernels compute in torch.float32"
            )
        return pack(layer, self.precision)

    def refuses(self, layer: Layer) -> str | None:
        """Say why a 3-D convolution can't be computed by the kernels, or None."""
        if self.device.type == "cuda" and isinstance(layer.module, WinogradConv3d):
            return "it is computed by Triton kernels as it is, where there is Triton"
        if self.device.type != "cpu":
            return f"the kernels of 3-D convolutions are for a CPU, and this is on {self.device}"
        tensor = next(iter(layer.module.state_dict().values()))
        return (
            None
            if tensor.dtype == torch.float32
            else f"its weight is {tensor.dtype}; the kernels compute in torch.float32"
        )


@dataclass
class Choices:
    """What may stand in the place of a network's layers.

    Attributes:
        rows: of the plan, one a layer.
        packed: packed form of the N:M layers that are better packed, by name.
        rankings: of the 3-D convolutions that can be computed in the Winograd domain, by name.
    """

    rows: list[LayerChoice] = field(default_factory=list)
    packed: dict[str, nn.Module] = field(default_factory=dict)
    rankings: dict[str, Ranking] = field(default_factory=dict)
    _layers: dict[str, Layer] = field(default_factory=dict)
    _made: dict[tuple[str, Option], nn.Module] = field(default_factory=dict)

    @property
    def levels(self) -> list[int]:
        """Return the levels of rounding that are chosen from, the fastest first."""
        found = sorted({o.level for r in self.rankings.values() for o in r.options}) or [0]
        chosen = [self.options(level) for level in found]
        # A level that changes nothing needs no look.
        kept = [n for n in range(len(found)) if n == 0 or chosen[n] != chosen[n - 1]]
        return [found[n] for n in reversed(kept)]

    def options(self, level: int) -> dict[str, Option]:
        """Return the option of each 3-D convolution that is better so, of at most a level."""
        best = {name: ranking.best(level) for name, ranking in self.rankings.items()}
        return {name: option for name, option in best.items() if option is not None}

    def modules(self, chosen: Mapping[str, Option]) -> dict[str, nn.Module]:
        """Return all packed layers, by name, with these options of the 3-D convolutions."""
        for name, option in chosen.items():
            if (name, option) not in self._made:
                self._made[name, option] = pack_option(self._layers[name], option)
        return {**self.packed, **{name: self._made[name, o] for name, o in chosen.items()}}


def choose_layers(layers: list[Layer], target: Target, choose: str) -> Choices:
    """Pack and time layers, and say what may stand in their place.

    Args:
        layers: of the network.
        target: packs them.
        choose: one of `CHOICES`.
    """
    packed: dict[str, nn.Module] = {}
    on_gpu = target.device.type == "cuda"
    reasons = {layer.name: layer.reason for layer in layers}
    for layer in layers:
        if layer.reason is not None:
            continue
        if choose == "dense":
            reasons[layer.name] = "dense was asked for"
        elif choose == "time" and target.missing and not (on_gpu and layer.spatial):
            reasons[layer.name] = "no kernels for it here"
        elif layer.spatial:
            reasons[layer.name] = target.refuses(layer)
        else:
            try:
                packed[layer.name] = target.pack(layer)
            except UserError as error:
                reasons[layer.name] = str(error)
    spatial = [layer for layer in layers if layer.spatial and reasons[layer.name] is None]
    rankings = _rank(spatial, choose)
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
        ranking = rankings.get(layer.name)
        if ranking is not None:
            timed = [ms for ms in ranking.options.values() if ms is not None]
            dense_ms, packed_ms = ranking.dense_ms, min(timed, default=None)
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
    return Choices(rows, packed, rankings, {layer.name: layer for layer in spatial})


def _rank(layers: list[Layer], choose: str) -> dict[str, Ranking]:
    rankings: dict[str, Ranking] = {}
    measured: dict[object, Ranking] = {}
    for layer in layers:
        key = _sizes(layer)
        if key not in measured:
            found = options(layer)
            measured[key] = (
                rank(layer, found) if choose == "time" else Ranking(None, dict.fromkeys(found))
            )
        rankings[layer.name] = measured[key]
    return rankings


def time_layer(layer: Layer, packed: nn.Module) -> tuple[float, float]:
    """Return milliseconds of the layer, in its better memory format, and of its packed form."""
    assert isinstance(layer.module, nn.Conv2d | nn.Linear)
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
    networks: Mapping[str, Callable[..., object]], inputs: tuple[Tensor, ...]
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


def _call(module: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: module(*inputs)


def _sizes(layer: Layer) -> tuple[object, ...]:
    module = layer.module
    if isinstance(module, WinogradConv3d):
        channels = module.in_channels, module.out_channels
        return (layer.input, channels, module.tile, module.kept, module.padding, module.points)
    sizes = (type(module), layer.pattern, layer.input, module.weight.shape, module.bias is None)
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return (*sizes, module.stride, module.padding, module.dilation, module.groups)
    return sizes
