"""Find layers whose scale doesn't matter, because a normalisation stands directly behind them."""

from __future__ import annotations

from torch import nn

__all__ = ["before_norm"]


def before_norm(model: nn.Module, name: str) -> bool:
    """Tell whether the next module behind a layer normalises the layer's own channels.

    Read from the order in which modules are registered, which is the order of their calls in all
    but unusual networks; a norm counts when it has as many channels as the layer has outputs.

    >>> before_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "0")
    True
    """
    leaves = [(key, module) for key, module in model.named_modules() if _is_leaf(module)]
    names = [key for key, _ in leaves]
    if name not in names or names.index(name) + 1 == len(leaves):
        return False
    layer, following = (leaves[names.index(name) + i][1] for i in (0, 1))
    outputs = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    return outputs is not None and outputs == _channels(following)


def _is_leaf(module: nn.Module) -> bool:
    """Take layers under training as leaves too, whatever their parametrizations."""
    parts = [child for key, child in module.named_children() if key != "parametrizations"]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True  # timm's carry an activation along
    return not parts and not isinstance(module, nn.Identity)


def _channels(module: nn.Module) -> int | None:
    """Return how many channels a norm has, or None for other modules."""
    for attribute in ("num_features", "num_channels"):
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            return value
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if isinstance(shape, tuple) and len(shape) == 1 else None
