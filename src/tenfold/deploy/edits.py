"""Edits: how an optimized network differs from the one that the artifact's network builds.

Each is a mapping of `module`, `type` and `arguments`, JSON-able. The types are a closed list; a
file can't name anything else:

    FoldedNorm   a BatchNorm module is gone
    Bias         a layer without a bias has one
    NMConv2d     a convolution is packed: n, m, precision, bias, add, activation
    NMLinear     the same of a linear layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.deploy.candidates import replace_layers
from tenfold.deploy.fold import remove_norm
from tenfold.deploy.fuse import Epilogue
from tenfold.errors import UserError
from tenfold.kernels.nm import ACTIVATIONS
from tenfold.nn.bits import pack_bits, unpack_bits
from tenfold.nn.packed import NMConv2d, NMLinear, PackedLayer

__all__ = ["EDITS", "describe_edits", "replay", "to_indexes", "to_places"]

_PACKED: dict[str, type[NMConv2d] | type[NMLinear]] = {"NMConv2d": NMConv2d, "NMLinear": NMLinear}
EDITS = ("FoldedNorm", "Bias", *_PACKED)


def describe_edits(
    given: nn.Module,
    network: nn.Module,
    folded: Sequence[str],
    epilogues: Mapping[str, Epilogue],
) -> tuple[dict[str, Any], ...]:
    """Return the edits that lead from a network to its optimized form.

    Args:
        given: as it was built.
        network: with BatchNorm folded and layers packed.
        folded: names of BatchNorm modules.
        epilogues: what packed layers do besides, by name.
    """
    edits = [_edit(name, "FoldedNorm", {}) for name in folded]
    now = dict(network.named_modules())
    for name, module in given.named_modules():
        other = now.get(name)
        if isinstance(other, PackedLayer):
            epilogue = epilogues.get(name, Epilogue())
            arguments = {
                "n": other.n,
                "m": other.m,
                "precision": other.precision,
                "bias": other.bias is not None,
                "add": epilogue.add,
                "activation": epilogue.activation,
            }
            edits.append(_edit(name, type(other).__name__, arguments))
        elif (
            other is not None
            and "bias" in module._parameters
            and module._parameters["bias"] is None
            and isinstance(getattr(other, "bias", None), Tensor)
        ):
            edits.append(_edit(name, "Bias", {}))
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
        if kind in _PACKED:
            network = replace_layers(network, {name: _packed(kind, module, name, arguments)})
            epilogues[name] = _epilogue(name, arguments)
        elif kind == "FoldedNorm" and name and remove_norm(network, module):
            continue
        elif kind == "Bias" and "bias" in module._parameters:
            _add_bias(module, name)
        else:
            raise UserError(
                f"{kind} of {name or 'the model'} doesn't fit {type(module).__name__}: expected "
                f"one of {', '.join(EDITS)}, in the network that was saved"
            )
    return network, epilogues


def to_places(index: Tensor, m: int) -> Tensor:
    """Return a packed layer's index as places inside its blocks, in as few bits as they need."""
    return pack_bits(index.cpu().to(torch.int64) % m, _bits(m))


def to_indexes(places: Tensor, values: Tensor, n: int, m: int) -> Tensor:
    """Undo `to_places`.

    Args:
        places: what it returned.
        values: `(O, S)`, the packed values.
        n: kept weights a block.
        m: block length.

    Raises:
        UserError: sizes that don't agree, or more weights an output than an index can say.
    """
    if values.dim() != 2 or places.dim() != 1 or places.dtype != torch.uint8:
        raise UserError(
            f"packed values {tuple(values.shape)} and places {tuple(places.shape)} of "
            f"{places.dtype}: expected (O, S) and one row of bytes"
        )
    inside = unpack_bits(places, _bits(m), values.numel()).to(torch.int64).reshape(values.shape)
    index = inside + torch.arange(values.shape[1]) // n * m
    if index.numel() and int(index.max()) > torch.iinfo(torch.uint16).max:
        raise UserError("an index of the packed weight exceeds 65,535")
    return index.to(torch.uint16)


def _packed(
    kind: str, module: nn.Module, name: str, arguments: Mapping[str, Any]
) -> NMConv2d | NMLinear:
    n, m, precision = (arguments.get(key) for key in ("n", "m", "precision"))
    if not isinstance(n, int) or not isinstance(m, int) or not isinstance(precision, str):
        raise UserError(f"{kind} of {name}: expected n and m as numbers and a precision")
    bias = arguments.get("bias") is True
    try:
        if kind == "NMConv2d" and isinstance(module, nn.Conv2d):
            return NMConv2d.like(module, n, m, precision, bias)
        if kind == "NMLinear" and isinstance(module, nn.Linear):
            return NMLinear.like(module, n, m, precision, bias)
    except UserError as error:
        raise UserError(f"{kind} of {name} doesn't fit the network: {error}") from error
    raise UserError(f"{kind} of {name or 'the model'} doesn't fit {type(module).__name__}")


def _epilogue(name: str, arguments: Mapping[str, Any]) -> Epilogue:
    activation = arguments.get("activation", "none")
    if activation not in ACTIVATIONS:
        raise UserError(f"{name} has activation {activation!r}: known: {', '.join(ACTIVATIONS)}")
    return Epilogue(arguments.get("add") is True, activation)


def _add_bias(module: nn.Module, name: str) -> None:
    outputs = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    weight = module._parameters.get("weight")
    if outputs is None or weight is None:
        raise UserError(f"Bias of {name}: {type(module).__name__} has no outputs to add it to")
    module.bias = nn.Parameter(torch.zeros(outputs, dtype=weight.dtype, device=weight.device))


def _edit(module: str, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"module": module, "type": kind, "arguments": arguments}


def _bits(m: int) -> int:
    return (m - 1).bit_length()
