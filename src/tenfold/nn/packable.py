"""Which convolutions and linear layers can be packed, whatever their zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tenfold.errors import UserError

__all__ = ["fixed_padding", "pair", "refuse_unpackable", "unpackable"]


def unpackable(layer: nn.Module) -> str | None:
    """Say why a convolution or linear layer can't be packed whatever its zeros, or None."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    if not isinstance(layer, kind):
        return f"{type(layer).__name__} is no Conv2d or Linear"
    # Subclasses may compute something else, parametrized layers make their weight on the fly.
    own = type(layer)
    if own.forward is not kind.forward or getattr(own, "_conv_forward", None) is not getattr(
        kind, "_conv_forward", None
    ):
        return f"{own.__name__} has a forward of its own"
    if nn.utils.parametrize.is_parametrized(layer):
        return "its tensors are parametrized: call finalize on the method first"
    if _hooked(layer):
        return "it has hooks, which a packed layer would lose"
    if not layer.weight.is_floating_point():
        return f"its weight is {layer.weight.dtype}"
    padding = _padding(layer) if isinstance(layer, nn.Conv2d) else None
    return padding if isinstance(padding, str) else None


def fixed_padding(layer: nn.Conv2d) -> tuple[int, int]:
    """Return the zeros that a convolution puts at every side, in height and width.

    Raises:
        UserError: padding that can't be said in two numbers, or isn't of zeros.

    >>> fixed_padding(nn.Conv2d(1, 1, (3, 5), padding="same"))
    (1, 2)
    """
    padding = _padding(layer)
    if isinstance(padding, str):
        raise UserError(padding)
    return padding


def _hooked(layer: nn.Module) -> bool:
    hooks: Sequence[Mapping[int, Any]] = (layer._forward_hooks, layer._forward_pre_hooks)
    return any(hooks)


def refuse_unpackable(layer: nn.Module, name: str | None) -> None:
    """Raise a UserError that names the layer when `unpackable` has something against it."""
    why = unpackable(layer)
    if why is not None:
        raise UserError(f"{name or type(layer).__name__} can't be packed: {why}")


def _padding(layer: nn.Conv2d) -> tuple[int, int] | str:
    """Return the zeros at every side, or why that can't be said in two numbers."""
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}; packed layers pad with zeros"
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            return f'padding="same" of an even kernel {layer.kernel_size} has uneven sides'
        return total[0] // 2, total[1] // 2
    return pair(layer.padding)


def pair(given: Any) -> tuple[int, int]:
    """Return one of a convolution's sizes as height and width."""
    first, second = given
    return int(first), int(second)
