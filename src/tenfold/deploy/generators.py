"""Put kernels of ours in the place of whole generators and shadow removers, where that is faster.

A generator is `ResNetGenerator` or `MobileResNetGenerator`, a remover `LABNet`, the network itself
or a part of it. Its layers are no candidates for anything else then.
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
from tenfold.nn.labnet import LABNet
from tenfold.nn.packed_generator import PackedGenerator, unpackable_generator
from tenfold.nn.packed_labnet import PackedLABNet, unpackable_labnet

__all__ = [
    "PACKED_GENERATOR", "PACKED_LABNET", "Generators", "Packed", "pack_generators",
    "packed_arguments", "packed_kind", "replayed",
]  # fmt: skip

PACKED_GENERATOR, PACKED_LABNET = "PackedGenerator", "PackedLABNet"

Packed = PackedGenerator | PackedLABNet


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
    found = {n: m for n, m in network.named_modules() if isinstance(m, ResNetGenerator | LABNet)}
    if not found or target.device.type != "cpu":
        return Generators(network)
    calls = _calls(network, inputs, found)
    rows, fresh, network_ms = [], dict[str, nn.Module](), dict[str, float]()
    for name, generator in found.items():
        given, reason = calls[name]
        reason = reason or _unpackable(generator)
        if reason is None and choose == "dense":
            reason = "dense was asked for"
        if reason is None and choose == "time" and target.missing:
            reason = "no kernels for it here"
        dense_ms = packed_ms = None
        if reason is None:
            packed = _pack(generator)
            times: Mapping[str, float] = {}
            if choose == "time":
                times = _time(generator, packed, given)
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
                input=tuple(given[0].shape) if given else None,
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


def packed_kind(layer: Packed) -> str:
    """Return the type of the edit that puts a packed network in its place."""
    return PACKED_GENERATOR if isinstance(layer, PackedGenerator) else PACKED_LABNET


def packed_arguments(layer: Packed) -> dict[str, Any]:
    """Return the arguments of the edit that puts a packed network in its place."""
    if isinstance(layer, PackedLABNet):
        return {"width": layer.width, "attention_size": list(layer.attention_size)}
    return {
        "program": list(layer.program),
        "size": len(layer.weights),
        "epsilon": layer.epsilon,
        "multiple": layer.multiple,
    }


def replayed(kind: str, module: nn.Module, name: str, arguments: Mapping[str, Any]) -> Packed:
    """Return an unfilled packed network for an edit.

    Raises:
        UserError: another module is there, or arguments that can't be.
    """
    if not isinstance(module, ResNetGenerator if kind == PACKED_GENERATOR else LABNet):
        raise UserError(
            f"{kind} of {name or 'the model'} doesn't fit: the network has "
            f"{type(module).__name__} there"
        )
    if isinstance(module, LABNet):
        own = {"width": module.width, "attention_size": list(module.attention_size)}
        if arguments != own:
            raise UserError(
                f"{kind} of {name or 'the model'} has {dict(arguments)}, and the network {own}"
            )
        return PackedLABNet(module.width, module.attention_size)
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


def _unpackable(network: nn.Module) -> str | None:
    is_generator = isinstance(network, ResNetGenerator)
    return unpackable_generator(network) if is_generator else unpackable_labnet(network)


def _pack(network: nn.Module) -> Packed:
    is_generator = isinstance(network, ResNetGenerator)
    return (PackedGenerator if is_generator else PackedLABNet).from_network(network)


def _calls(
    network: nn.Module, inputs: tuple[Tensor, ...], found: Mapping[str, nn.Module]
) -> dict[str, tuple[tuple[Tensor, ...], str | None]]:
    """Return each one's inputs at its first call, and what speaks against packing in its calls."""
    calls: dict[str, tuple[tuple[Tensor, ...], str | None]] = dict.fromkeys(
        found, ((), "not called with the example inputs")
    )

    def record(
        name: str, module: nn.Module, args: tuple[Any, ...], more: Mapping[str, Any]
    ) -> None:
        wanted = "one tensor" if isinstance(module, ResNetGenerator) else "codes and masks"
        number = (1,) if isinstance(module, ResNetGenerator) else (2, 3)
        if more or len(args) not in number or not all(isinstance(x, Tensor) for x in args):
            calls[name] = (), f"it isn't called with {wanted}"
        elif args[0].dtype != torch.float32:
            calls[name] = args, f"its input is {args[0].dtype}"
        elif not calls[name][0]:
            calls[name] = args, None

    handles = [
        module.register_forward_pre_hook(
            lambda module, args, more, name=name: record(name, module, args, more),
            with_kwargs=True,
        )
        for name, module in found.items()
    ]
    try:
        run_once(network, inputs, "the model")
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _time(network: nn.Module, packed: Packed, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the milliseconds of a network in each form, timed in alternation."""
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    forms = {"packed": packed, "dense": network, "dense, channels_last": last}
    return time_networks(forms, inputs)
