"""Winograd layers in an artifact: how the network that it names gets them.

An edit of the type `WinogradConv3d` puts a 3-D convolution into the Winograd domain. It is made by
`finalize` and `convert`, before any optimizing, and its arguments are

    tile, columns, points, bias, allow_half   as of the layer

Its tensors are stored as they are, and are only taken by a layer of the same tile, points, padding
and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tenfold.errors import UserError
from tenfold.nn.winograd import WinogradConv3d

__all__ = ["WINOGRAD", "winograd_edits", "winograd_layer"]

WINOGRAD = "WinogradConv3d"


def winograd_edits(network: nn.Module) -> list[dict[str, Any]]:
    """Return the edits that put a network's 3-D convolutions into the Winograd domain."""
    return [
        {
            "module": name,
            "type": WINOGRAD,
            "arguments": {
                "tile": list(module.tile),
                "columns": list(module.kept),
                "points": module.points,
                "bias": module.bias is not None,
                "allow_half": module.allow_half,
            },
        }
        for name, module in network.named_modules()
        if isinstance(module, WinogradConv3d)
    ]


def winograd_layer(module: nn.Module, name: str, arguments: Mapping[str, Any]) -> WinogradConv3d:
    """Return the layer of an edit, to be filled, in the place of a convolution.

    Args:
        module: what the network has there; a Winograd layer is handed back.
        name: of the layer.
        arguments: of the edit.

    Raises:
        UserError: arguments that don't fit the network's layer.
    """
    if isinstance(module, WinogradConv3d):  # given as it was finalized; its state is checked
        return module
    try:
        if not isinstance(module, nn.Conv3d):
            raise UserError(f"the network has {type(module).__name__} there")
        columns = arguments.get("columns")
        if not isinstance(columns, list) or not all(type(column) is int for column in columns):
            raise UserError("expected columns as a list of ints")
        return WinogradConv3d.like(
            module,
            arguments.get("tile"),  # type: ignore[arg-type]  # refused there if it's no tile
            columns,
            points=str(arguments.get("points")),
            bias=arguments.get("bias") is True,
            allow_half=arguments.get("allow_half") is True,
            name=name,
        )
    except UserError as error:
        raise UserError(f"{WINOGRAD} of {name or 'the model'} doesn't fit: {error}") from error
