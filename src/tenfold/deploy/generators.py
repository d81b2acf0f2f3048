"""Put one kernel in the place of whole generators, where that is faster.

A generator is `ResNetGenerator` or `MobileResNetGenerator`, the network itself or a part of it. Its
layers are no candidates for anything else then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.deploy.candidates import replace_layers
from tenfold.deploy.choose import Target, time_networks
from tenfold.deploy.plan import LayerChoice
from tenfold.errors import UserError
from tenfold.measure.inputs import run_once
from tenfold.nn.generators import ResNetGenerator
from tenfold.nn.packed_generator import PackedGenerator, unpackable_generator

__all__ = ["PACKED_GENERATOR", "Generators", "pack_generators", "packed_arguments", "replayed"]

PACKED_GENERATOR = "PackedGenerator"


@dataclass(frozen=True)
class Generators:
    """What became of a network's generators.

    Attributes:
        network: the one that was given, or a copy with packed generators.
        rows: of the plan, one a generator.
        network_ms: milliseconds by form, where the network is a generator itself.
    """

    network: nn.Module
    rows: tuple[LayerChoice, ...] = ()
    network_ms: dict[str, float] = field(default_factory=dict)

    @property
    def packed(self) -> tuple[str, ...]:
        """Return the names of the packed ones."""
        return tuple(row.layer for row in self.rows if row.chosen == "packed")

    def without(self, network: nn.Module, why: str) -> Generators:
        """Return the same with nothing packed."""
        rows = tuple(
            LayerChoice(row.layer, row.kind, input=row.input, dense_ms=row.dense_ms,
                        packed_ms=row.packed_ms, reason=row.reason or why)
            for row in self.rows
        )  # fmt: skip
        return Generators(network, rows, self.network_ms)


def pack_generators(
    network: nn.Module, inputs: tuple[Tensor, ...], target: Target, choose: str
) -> Generators:
    """Pack the generators of a network, and say which of them are faster so.

    Args:
        network: in eval mode; is not changed.
        inputs: example inputs.
        target: device and precision.
        choose: "time", "packed" or "dense".

    Raises:
        UserError: the network fails on the inputs.
    """
    found = {n: m for n, m in network.named_modules() if isinstance(m, ResNetGenerator)}
    if not found or target.device.type != "cpu":
        return Generators(network)
    shapes = _shapes(network, inputs, found)
    rows, fresh, network_ms = [], dict[str, nn.Module](), dict[str, float]()
    for name, generator in found.items():
        shape, reason = shapes[name]
        reason = reason or unpackable_generator(generator)
        if reason is None and choose == "dense":
            reason = "dense was asked for"
        if reason is None and choose == "time" and target.missing:
            reason = "no kernels for it here"
        dense_ms = packed_ms = None
        if reason is None:
            packed = PackedGenerator.from_network(generator)
            times: Mapping[str, float] = {}
            if choose == "time":
                assert shape is not None
                times = _time(generator, packed, shape)
                packed_ms = times["packed"]
                dense_ms = min(ms for form, ms in times.items() if form != "packed")
            if not times or times["packed"] < dense_ms:  # type: ignore[operator]
                fresh[name] = packed
            if not name:
                network_ms = dict(times)
        rows.append(
            LayerChoice(
                name,
                type(generator).__name__,
                input=shape,
                dense_ms=dense_ms,
                packed_ms=packed_ms,
                chosen="packed" if name in fresh else "dense",
                reason=reason,
            )
        )
    if not fresh:
        return Generators(network, (*rows,), network_ms)
    # What is replaced isn't copied.
    kept = {id(found[name]): found[name] for name in fresh}
    made = replace_layers(copy.deepcopy(network, dict(kept)), fresh)
    return Generators(made, (*rows,), network_ms)


def packed_arguments(layer: PackedGenerator) -> dict[str, Any]:
    """Return the arguments of the edit that puts a packed generator in its place."""
    return {
        "program": list(layer.program),
        "size": len(layer.weights),
        "epsilon": layer.epsilon,
        "multiple": layer.multiple,
    }


def replayed(module: nn.Module, name: str, arguments: Mapping[str, Any]) -> PackedGenerator:
    """Return an unfilled packed generator for an edit.

    Raises:
        UserError: another module is there, or arguments that can't be.
    """
    if not isinstance(module, ResNetGenerator):
        raise UserError(
            f"{PACKED_GENERATOR} of {name or 'the model'} doesn't fit: the network has "
            f"{type(module).__name__} there"
        )
    program, size, epsilon, multiple = (
        arguments.get(key) for key in ("program", "size", "epsilon", "multiple")
    )
    whole = isinstance(program, list) and all(type(each) is int for each in program)
    if not (whole and type(size) is int and size > 0 and type(multiple) is int and multiple > 0):
        raise UserError(f"{PACKED_GENERATOR} of {name or 'the model'}: expected whole numbers")
    if not isinstance(epsilon, float) or not epsilon > 0:
        raise UserError(f"{PACKED_GENERATOR} of {name or 'the model'} has epsilon {epsilon!r}")
    assert isinstance(program, list)
    return PackedGenerator(program, size, epsilon, multiple)


def _shapes(
    network: nn.Module, inputs: tuple[Tensor, ...], found: Mapping[str, nn.Module]
) -> dict[str, tuple[tuple[int, ...] | None, str | None]]:
    """Return each generator's first input shape, and what speaks against packing in its calls."""
    shapes: dict[str, tuple[tuple[int, ...] | None, str | None]] = dict.fromkeys(
        found, (None, "not called with the example inputs")
    )

    def record(name: str, args: tuple[Any, ...]) -> None:
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor):
            shapes[name] = None, "it isn't called with one tensor"
        elif x.dtype != torch.float32:
            shapes[name] = tuple(x.shape), f"its input is {x.dtype}"
        elif shapes[name][0] is None:
            shapes[name] = tuple(x.shape), None

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: record(name, args))
        for name, module in found.items()
    ]
    try:
        run_once(network, inputs, "the model")
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _time(
    generator: nn.Module, packed: PackedGenerator, shape: tuple[int, ...]
) -> dict[str, float]:
    """Return the milliseconds of a generator in each form, timed in alternation."""
    x = 2 * torch.rand(shape) - 1
    last = copy.deepcopy(generator).to(memory_format=torch.channels_last)
    forms = {"packed": packed, "dense": generator, "dense, channels_last": last}
    return time_networks(forms, (x,))
