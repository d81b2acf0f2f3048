"""Edits: how an optimized network differs from the one that the artifact's network builds.

Each is a mapping of `module`, `type` and `arguments`, JSON-able. The types are a closed list; a
file can't name anything else:

    FoldedNorm   a BatchNorm module is gone
    Bias         a layer without a bias has one
    NMConv2d     a convolution is packed: n, m, shape, precision, bias, add, activation
    NMLinear     the same of a linear layer
    PackedWinogradConv3d  a 3-D convolution is packed: tile, columns (null where it is dense),
                 points, short, channels_last, bias, add, activation, pool
    WinogradConv3d  see `winograd_edits`
    PackedGenerator  a whole generator is one kernel: program, size, epsilon, multiple
    PackedLABNet  a whole LAB-Net is run by kernels: width, attention_size
    Replaced     nodes of the fused graph that kernels of ours compute: nodes, their names and kinds
    Quantized…   a layer has integer weights: see `quantized_edits`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tenfold.deploy.candidates import replace_layers
from tenfold.deploy.fold import remove_norm
from tenfold.deploy.fuse import NO_POOL, Epilogue
from tenfold.deploy.generators import (
    PACKED_GENERATOR,
    PACKED_LABNET,
    Packed,
    packed_kind,
    replayed,
)
from tenfold.deploy.generators import packed_arguments as generator_arguments
from tenfold.deploy.quantized_edits import QUANTIZED_EDITS, quantized_layer
from tenfold.deploy.winograd_edits import (
    PACKED_WINOGRAD,
    WINOGRAD,
    packed_arguments,
    packed_layer,
    winograd_layer,
)
from tenfold.errors import UserError
from tenfold.kernels import nm
from tenfold.nn.packed import NMConv2d, NMLinear, PackedLayer
from tenfold.nn.packing import pack_nm, unpack_nm
from tenfold.nn.winograd_packed import PackedWinogradConv3d

__all__ = ["EDITS", "describe_edits", "from_stored", "replaced_nodes", "replay", "to_stored"]

_PACKED: dict[str, type[NMConv2d] | type[NMLinear]] = {"NMConv2d": NMConv2d, "NMLinear": NMLinear}
EDITS = (
    "FoldedNorm", "Bias", "Replaced", *_PACKED, PACKED_WINOGRAD, WINOGRAD, PACKED_GENERATOR,
    PACKED_LABNET, *QUANTIZED_EDITS,
)  # fmt: skip


def describe_edits(
    given: nn.Module,
    network: nn.Module,
    folded: Sequence[str],
    epilogues: Mapping[str, Epilogue],
    replaced: Mapping[str, str],
) -> tuple[dict[str, Any], ...]:
    """Return the edits that lead from a network to its optimized form.

    Args:
        given: as it was built.
        network: with BatchNorm folded and layers packed.
        folded: names of BatchNorm modules.
        epilogues: what packed layers do besides, by name.
        replaced: nodes of its graph, see `tenfold.deploy.dense`.
    """
    edits = [_edit(name, "FoldedNorm", {}) for name in folded]
    now = dict(network.named_modules())
    for name, module in given.named_modules():
        other = now.get(name)
        if isinstance(other, PackedLayer | PackedWinogradConv3d):
            epilogue = epilogues.get(name, Epilogue())
            arguments: dict[str, Any]
            if isinstance(other, PackedLayer):
                arguments = {
                    "n": other.n,
                    "m": other.m,
                    "shape": list(other.shape),
                    "precision": other.precision,
                    "bias": other.bias is not None,
                }
            else:
                arguments = {**packed_arguments(other), "pool": list(epilogue.pool)}
            arguments |= {"add": epilogue.add, "activation": epilogue.activation}
            edits.append(_edit(name, type(other).__name__, arguments))
        elif isinstance(other, Packed):
            edits.append(_edit(name, packed_kind(other), generator_arguments(other)))
        elif (
            other is not None
            and "bias" in module._parameters
            and module._parameters["bias"] is None
            and isinstance(getattr(other, "bias", None), Tensor)
        ):
            edits.append(_edit(name, "Bias", {}))
    if replaced:
        edits.append(_edit("", "Replaced", {"nodes": dict(replaced)}))
    return tuple(edits)


def replay(
    network: nn.Module, edits: Sequence[Mapping[str, Any]]
) -> tuple[nn.Module, dict[str, Epilogue]]:
    """Make the edits in a fresh network, in place.

    Returns:
        The network, unfused and with packed layers to fill, and the epilogues to fuse.

    Raises:
        UserError: an edit that isn't of the list, or doesn't fit the network.
    """
    epilogues = {}
    for edit in edits:
        try:
            name, kind, arguments = edit["module"], edit["type"], edit["arguments"]
            module = network.get_submodule(name)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"an edit of the artifact doesn't fit the network: {error}: give the network that "
                "was saved"
            ) from error
        if kind == WINOGRAD:
            network = _put(network, module, winograd_layer(module, name, arguments))
        elif kind in _PACKED or kind == PACKED_WINOGRAD:
            packed = (
                packed_layer(module, name, arguments)
                if kind == PACKED_WINOGRAD
                else _packed(kind, module, name, arguments)
            )
            network = replace_layers(network, {name: packed})
            epilogues[name] = _epilogue(name, arguments)
        elif kind in (PACKED_GENERATOR, PACKED_LABNET):
            network = replace_layers(network, {name: replayed(kind, module, name, arguments)})
        elif kind in QUANTIZED_EDITS:
            network = _put(network, module, quantized_layer(kind, module, name, arguments))
        elif kind == "FoldedNorm" and name and remove_norm(network, module):
            continue
        elif kind == "Replaced" and not name:
            replaced_nodes([edit])
        elif kind == "Bias" and "bias" in module._parameters:
            _add_bias(module, name)
        else:
            raise UserError(
                f"{kind} of {name or 'the model'} doesn't fit {type(module).__name__}: expected "
                f"one of {', '.join(EDITS)}, in the network that was saved"
            )
    return network, epilogues


def replaced_nodes(edits: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the nodes of the graph that kernels of ours compute, and their kinds.

    Raises:
        UserError: an edit that doesn't say so in names.
    """
    found: dict[str, str] = {}
    for edit in edits:
        if edit["type"] != "Replaced":
            continue
        nodes = edit["arguments"].get("nodes")
        if not isinstance(nodes, dict) or not all(isinstance(kind, str) for kind in nodes.values()):
            raise UserError(f"Replaced has nodes={nodes!r}: expected names and their kinds")
        found.update(nodes)
    return found


def _put(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replace a module wherever the network holds it, in place; returns the network."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    return new if network is old else network


def to_stored(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Return a packed layer's values and places as files hold them, see `tenfold.nn.packing`.

    The layout in memory is the kernels' own and may change; this one doesn't.
    """
    return pack_nm(layer.stored_weight().cpu(), layer.n, layer.m)


def from_stored(
    values: Tensor, places: Tensor, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return what `to_stored` wrote in the layout of the kernels, as values and index.

    Raises:
        UserError: sizes that don't agree, or a place outside its block.
    """
    n, m, shape = arguments.get("n"), arguments.get("m"), arguments.get("shape")
    if not (_is_size(n) and _is_size(m) and isinstance(shape, list) and all(map(_is_size, shape))):
        raise UserError(f"a packed layer of the artifact has n={n!r}, m={m!r}, shape={shape!r}")
    return nm.pack(unpack_nm(values, places, n, m, shape), n, m)


def _packed(
    kind: str, module: nn.Module, name: str, arguments: Mapping[str, Any]
) -> NMConv2d | NMLinear:
    n, m, precision = (arguments.get(key) for key in ("n", "m", "precision"))
    if not isinstance(n, int) or not isinstance(m, int) or not isinstance(precision, str):
        raise UserError(f"{kind} of {name}: expected n and m as numbers and a precision")
    bias = arguments.get("bias") is True
    try:
        layer: NMConv2d | NMLinear
        if kind == "NMConv2d" and isinstance(module, nn.Conv2d):
            layer = NMConv2d.like(module, n, m, precision, bias)
        elif kind == "NMLinear" and isinstance(module, nn.Linear):
            layer = NMLinear.like(module, n, m, precision, bias)
        else:
            raise UserError(f"the network has {type(module).__name__} there")
        if list(layer.shape) != arguments.get("shape"):
            raise UserError(f"{arguments.get('shape')} was saved and {list(layer.shape)} is needed")
    except UserError as error:
        raise UserError(f"{kind} of {name or 'the model'} doesn't fit: {error}") from error
    return layer


def _epilogue(name: str, arguments: Mapping[str, Any]) -> Epilogue:
    activation = arguments.get("activation", "none")
    if activation not in nm.ACTIVATIONS:
        raise UserError(f"{name} has activation {activation!r}: known: {', '.join(nm.ACTIVATIONS)}")
    pool = arguments.get("pool", list(NO_POOL))
    if not isinstance(pool, list) or len(pool) != 3 or not set(pool) <= {1, 2}:
        raise UserError(f"{name} has pool {pool!r}: expected three windows of 1 or 2")
    return Epilogue(arguments.get("add") is True, activation, (pool[0], pool[1], pool[2]))


def _add_bias(module: nn.Module, name: str) -> None:
    outputs = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    weight = module._parameters.get("weight")
    if outputs is None or weight is None:
        raise UserError(f"Bias of {name}: {type(module).__name__} has no outputs to add it to")
    module.bias = nn.Parameter(torch.zeros(outputs, dtype=weight.dtype, device=weight.device))


def _edit(module: str, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"module": module, "type": kind, "arguments": arguments}


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0
