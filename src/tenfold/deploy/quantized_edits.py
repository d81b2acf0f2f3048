"""Quantized layers in an artifact: their codes on b bits, and how the network gets the layers.

An edit's type is the layer's class (`QuantizedConv2d` and so on); its arguments are

    bits, shape, rescale, bias, per_channel   as of the layer
    removed   "none", "marked" (one bit a weight says which are kept) or [N, M]

The tensor `<layer>.codes`, and `<layer>.index` where weights are removed, stand for the layer's
integers; see `tenfold.nn.quantized.pack_codes`. All its other tensors are stored as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.nn.quantized import (
    QUANTIZED,
    QuantizedLayer,
    pack_codes,
    quantized_like,
    unpack_codes,
)

__all__ = ["QUANTIZED_EDITS", "quantized_layer", "store_quantized", "stored_integers"]

QUANTIZED_EDITS = tuple(QUANTIZED)


def store_quantized(model: nn.Module) -> tuple[dict[str, Tensor], set[str], list[dict[str, Any]]]:
    """Pack the quantized layers of a model.

    Returns:
        Tensors by name, the names of the model's state that they stand for, and the edits.
    """
    tensors: dict[str, Tensor] = {}
    replaced: set[str] = set()
    edits = []
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        prefix = f"{name}." if name else ""
        packed, pattern = pack_codes(layer.integers, layer.bits)
        tensors |= {f"{prefix}{key}": value for key, value in packed.items()}
        replaced.add(f"{prefix}integers")
        arguments = {
            "bits": layer.bits,
            "shape": list(layer.shape),
            "rescale": layer.rescale,
            "bias": layer.bias is not None,
            "per_channel": layer.weight_scale.numel() > 1,
            "removed": pattern or ("marked" if "index" in packed else "none"),
        }
        edits.append({"module": name, "type": type(layer).__name__, "arguments": arguments})
    return tensors, replaced, edits


def quantized_layer(
    kind: str, module: nn.Module, name: str, arguments: Mapping[str, Any]
) -> QuantizedLayer:
    """Return the layer of an edit, to be filled, in the place of a float one.

    Raises:
        UserError: arguments that don't fit the network's layer.
    """
    try:
        if not isinstance(module, QUANTIZED[kind].kind):
            raise UserError(f"the network has {type(module).__name__} there")
        layer = quantized_like(
            module,
            arguments.get("bits"),  # type: ignore[arg-type]
            rescale=arguments.get("rescale") is True,
            bias=arguments.get("bias") is True,
            per_channel=arguments.get("per_channel") is True,
        )
        if list(layer.shape) != arguments.get("shape"):
            raise UserError(f"{arguments.get('shape')} was saved and {list(layer.shape)} is needed")
    except UserError as error:
        raise UserError(f"{kind} of {name or 'the model'} doesn't fit: {error}") from error
    return layer.eval()


def stored_integers(state: dict[str, Tensor], prefix: str, arguments: Mapping[str, Any]) -> None:
    """Put a layer's integers into a state, in the place of its codes.

    Raises:
        UserError: codes that are missing, or whose number doesn't fit the shape.
    """
    shape, bits, removed = (arguments.get(key) for key in ("shape", "bits", "removed"))
    whole = isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape)
    if not whole or type(bits) is not int or not 2 <= bits <= 8:
        raise UserError(f"a quantized layer of the artifact has bits={bits!r}, shape={shape!r}")
    assert isinstance(shape, list)
    pattern: tuple[int, int] | None = None
    if isinstance(removed, list):
        if len(removed) != 2 or not all(type(n) is int for n in removed):
            raise UserError(f"a quantized layer of the artifact has removed={removed!r}")
        n, m = removed
        if not 0 < n < m or math.prod(shape) % m:
            raise UserError(f"a quantized layer of the artifact is {n}:{m} of shape {shape}")
        pattern = (n, m)
    elif removed not in ("none", "marked"):
        raise UserError(f"a quantized layer of the artifact has removed={removed!r}")
    names = ("codes",) if removed == "none" else ("codes", "index")
    missing = [f"{prefix}{name}" for name in names if f"{prefix}{name}" not in state]
    if missing:
        raise UserError(f"the artifact lacks the packed weight {missing[0]}")
    codes = state.pop(f"{prefix}codes")
    index = state.pop(f"{prefix}index") if removed != "none" else None
    state[f"{prefix}integers"] = unpack_codes(codes, index, bits, tuple(shape), pattern)
