"""Which 3-D convolutions can live in the Winograd domain."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from tenfold.errors import UserError

__all__ = ["refuse_unconvertible", "unconvertible", "zero_padding"]


def unconvertible(layer: nn.Module) -> str | None:
    """Say why a layer can't become a Winograd layer, or return None when it can.

    >>> unconvertible(nn.Conv3d(8, 8, 3, stride=2))
    'stride (2, 2, 2), expected 1'
    """
    if isinstance(layer, nn.ConvTranspose3d):
        return "transposed convolution"
    if not isinstance(layer, nn.Conv3d):
        return f"{type(layer).__name__} is no 3-D convolution"
    own = type(layer)
    # A subclass may compute something else.
    if (own.forward, own._conv_forward) != (nn.Conv3d.forward, nn.Conv3d._conv_forward) and not (
        parametrize.is_parametrized(layer)
    ):
        return f"{own.__name__} has a forward of its own"
    for name, given, expected in (
        ("kernel", layer.kernel_size, 3),
        ("stride", layer.stride, 1),
        ("dilation", layer.dilation, 1),
    ):
        if any(size != expected for size in given):
            return f"{name} {tuple(given)}, expected {expected}"
    if layer.groups != 1:
        return f"{layer.groups} groups, expected 1"
    if layer.padding_mode != "zeros":
        return f"padding_mode {layer.padding_mode!r}, expected zeros"
    if parametrize.is_parametrized(layer):
        return "its weight is computed by a parametrization: call finalize on that method first"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which a new layer would lose"
    if not layer.weight.is_floating_point():
        return f"its weight is {layer.weight.dtype}, expected a floating type"
    return None


def refuse_unconvertible(layer: nn.Module, name: str | None = None) -> None:
    """Raise a UserError that names the layer when `unconvertible` has something against it."""
    why = unconvertible(layer)
    if why is not None:
        raise UserError(
            f"layer {name or type(layer).__name__} can't become a Winograd layer: {why}; exclude it"
        )


def zero_padding(layer: nn.Conv3d) -> tuple[int, int, int]:
    """Return the zeros at every side of a 3x3x3 convolution, in depth, height and width.

    >>> zero_padding(nn.Conv3d(1, 1, 3, padding="same"))
    (1, 1, 1)
    """
    if isinstance(layer.padding, str):
        each = {"same": 1, "valid": 0}[layer.padding]
        return each, each, each
    depth, height, width = layer.padding
    return int(depth), int(height), int(width)
