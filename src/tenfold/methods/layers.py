"""Choose the layers that a weight method treats, with a reason for each that it leaves alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tenfold.errors import UserError, nearest
from tenfold.methods.base import LayerPlan

__all__ = ["Layer", "choose_layers", "edge_layers"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Subclasses with a forward of their own that is known to use the weight as it is.
_KNOWN_TO_BE_PLAIN = frozenset({"Conv2dSame", "Linear"})

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def choose_layers(
    model: nn.Module,
    treatment: str,
    misfit: Callable[[Layer], str | None],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    kept: float = 1.0,
    everywhere: bool = False,
) -> list[LayerPlan]:
    """List every convolution and linear layer with its treatment or the reason for none.

    By default every layer is treated but the first convolution, the last linear layer, depthwise
    convolutions and layers that don't fit.

    Args:
        model: any module.
        treatment: what a treated layer gets, as shown to the user.
        misfit: returns why a layer can't be treated, or None.
        include: names or patterns (`layer1.*`); exactly these layers are treated.
        exclude: names or patterns of layers to leave alone.
        kept: share of a treated layer's weights that will not be zero.
        everywhere: treat first, last and depthwise layers too.

    Raises:
        UserError: a pattern matches no layer, an included layer doesn't fit, or none is left.
    """
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear))
    }
    for pattern in (*(include or ()), *(exclude or ())):
        if not fnmatch.filter(layers, pattern):
            raise UserError(
                f"layer {pattern!r} matches no convolution or linear layer: "
                f"{nearest(pattern, layers)}"
            )
    shared = _shared_weights(model, layers)
    defaults = {} if everywhere else _default_exclusions(model, layers)
    plan = []
    for name, layer in layers.items():
        named = include is not None and _matches(name, include)
        reason: str | None = None
        if exclude is not None and _matches(name, exclude):
            reason = "excluded by the recipe"
        elif include is not None and not named:
            reason = "not among the included layers"
        elif not named:
            reason = defaults.get(name)
        if reason is None:
            why = _unfit(layer, shared.get(name), misfit, everywhere)
            if why is not None and named:
                raise UserError(
                    f"layer {name} can't be made {treatment}: {why}; exclude it, or choose "
                    "other values"
                )
            reason = why
        plan.append(
            LayerPlan(
                name=name,
                type=type(layer).__name__,
                shape=tuple(_weight(layer).shape),
                treatment=treatment if reason is None else None,
                reason=reason,
                kept=kept if reason is None else 1.0,
            )
        )
    plan.extend(_fused_projections(model))
    if not any(layer.treatment for layer in plan):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in plan[:4])
        raise UserError(
            f"no layer is left to be made {treatment} "
            f"({reasons or 'the model has no convolution or linear layer'}): choose other values, "
            "or include layers by name"
        )
    return plan


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def edge_layers(model: nn.Module) -> set[str]:
    """Return the names of the first convolution, and of the last linear layer or classifier."""
    kinds = (*_CONVOLUTIONS, nn.Linear)
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, kinds)
    }
    return set(_default_exclusions(model, layers))


def _default_exclusions(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    find_heads: Any = getattr(model, "get_classifier", None)  # timm's; two of them in DeiT
    heads = find_heads() if callable(find_heads) else ()
    for name, layer in layers.items():
        if any(layer is head for head in (heads if isinstance(heads, tuple | list) else (heads,))):
            reasons[name] = "classifier, kept dense"
    convolutions = [name for name, layer in layers.items() if isinstance(layer, _CONVOLUTIONS)]
    linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    # Depthwise convolutions have no channels to choose among; their own reason says so.
    if convolutions:
        reasons[convolutions[0]] = "first convolution, kept dense"
    if linears:
        reasons.setdefault(linears[-1], "last linear layer, kept dense")
    return reasons


def _unfit(
    layer: nn.Module,
    twin: str | None,
    misfit: Callable[[Layer], str | None],
    everywhere: bool,
) -> str | None:
    if isinstance(layer, _TRANSPOSED):
        return "transposed convolution"
    if twin is not None:
        return f"shares its weight with {twin}"
    assert isinstance(layer, (*_CONVOLUTIONS, nn.Linear))
    depthwise = isinstance(layer, _CONVOLUTIONS) and layer.weight.shape[1] == 1 < layer.groups
    if depthwise and not everywhere:
        return "depthwise convolution"
    if not _uses_weight_as_it_is(layer):
        return f"{type(layer).__name__} changes its weight in forward"
    latent = _latent_weight(layer)
    if latent is None:
        return "its weight is computed by another parametrization"
    if not latent.requires_grad:
        return "frozen (requires_grad is off)"
    return misfit(layer)


def _uses_weight_as_it_is(layer: Layer) -> bool:
    """Tell whether forward multiplies by the weight itself, not by something made of it.

    timm's StdConv2d standardises its weight first, for one: zeros that are stored would not be
    zeros that are used.
    """
    own = type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)
    if own.__name__ in _KNOWN_TO_BE_PLAIN:
        return True
    plain = next(base for base in (*_CONVOLUTIONS, nn.Linear) if isinstance(layer, base))
    return all(
        getattr(own, name, None) is getattr(plain, name, None)
        for name in ("forward", "_conv_forward")
    )


def _latent_weight(layer: nn.Module) -> Tensor | None:
    """Return the parameter behind the weight, or None where something foreign computes it.

    Parametrizations that keep every weight in its place (a quantizer before a mask) say so by an
    attribute `elementwise = True`; norms, which mix weights, don't.
    """
    plain = layer._parameters.get("weight")
    if plain is not None:
        return plain
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain: Any = layer.parametrizations
    if not all(getattr(one, "elementwise", False) for one in chain["weight"]):
        return None
    original = getattr(chain["weight"], "original", None)
    return original if isinstance(original, Tensor) else None


def _fused_projections(model: nn.Module) -> list[LayerPlan]:
    """List the weights that hide in `nn.MultiheadAttention`, so that none is passed over unsaid."""
    return [
        LayerPlan(
            name=f"{name}.in_proj_weight",
            type=type(module).__name__,
            shape=tuple(module.in_proj_weight.shape),
            treatment=None,
            reason="one fused parameter of nn.MultiheadAttention, not a layer (timm's ViTs have "
            "a linear layer there)",
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    ]


def _shared_weights(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Return, for each layer whose weight is used elsewhere too, one of those other places."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        own = f"{name}.weight" if name else "weight"
        others = [n for n in owners.get(id(weight), []) if n != own]
        if others:
            shared[name] = others[0].removesuffix(".weight")
    return shared
