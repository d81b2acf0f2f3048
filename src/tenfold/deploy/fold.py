"""Fold BatchNorm into the convolution or linear layer before it.

In eval mode BatchNorm is an affine map per channel, so it can be merged into the layer that feeds
it. Which layer feeds which BatchNorm is read from the `torch.export` graph, not from module names,
so that any network works. A pair is folded only when the layer's result goes to that BatchNorm
alone and both modules are called once. Folding scales whole output channels: a zero weight stays
zero, so N:M patterns survive. In a quantized layer it changes scales and bias, never the integers.
A Winograd layer is many operations in the graph: the module that the last of them belongs to says
which layer it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from tenfold.errors import UserError
from tenfold.measure.inputs import ExampleInputs, as_inputs, run_once
from tenfold.measure.quiet import quiet, reason
from tenfold.nn.quantized import QUANTIZED, QuantizedLayer
from tenfold.nn.winograd import WinogradConv3d

__all__ = ["Folded", "eval_copy", "fold_batch_norm", "norm_replacement", "remove_norm"]

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# timm's BatchNorm with dropout and activation in one module; named, not imported.
_NORMS_WITH_ACTIVATION = {"BatchNormAct2d", "SyncBatchNormAct"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_LAYER_OPS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "convolution", "linear",
}  # fmt: skip


@dataclass(frozen=True)
class Folded:
    """What `fold_batch_norm` returns.

    Attributes:
        model: The copy in eval mode.
        folded: Names of the BatchNorm modules that are gone, in the order of their calls.
        reason: Why nothing could be folded, or None.
    """

    model: nn.Module
    folded: list[str] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class _Pair:
    layer: str
    norm: str


def fold_batch_norm(model: nn.Module, example_inputs: ExampleInputs) -> Folded:
    """Return a copy of `model` in eval mode with BatchNorm folded into the layers before it.

    The argument is not changed. When the model can't be traced, or its outputs would change, the
    copy comes back unfolded with the reason.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> fold_batch_norm(network, torch.zeros(2, 3, 8, 8)).folded
    ['1']

    Args:
        model: Any network.
        example_inputs: Tensor `(B, ...)`, or several.

    Raises:
        UserError: If the model can't be copied, or fails on the example inputs.
    """
    inputs = as_inputs(example_inputs)
    unfolded = eval_copy(model)
    expected = run_once(unfolded, inputs, "the model")
    if all(norm_replacement(module) is None for module in unfolded.modules()):
        return Folded(unfolded)  # tracing a large network takes long
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(unfolded, inputs)
    except Exception as error:
        return Folded(unfolded, reason=f"torch.export can't trace the model: {reason(error)}")
    folded = copy.deepcopy(unfolded)
    pairs = [pair for pair in _pairs(program) if _fold_pair(folded, pair)]
    if not pairs:
        return Folded(unfolded)
    try:
        outputs = run_once(folded, inputs, "the folded model")
    except UserError as error:
        return Folded(unfolded, reason=str(error))
    # A layer class may use its weight in a way that the graph does not show.
    if not _close(outputs, expected):
        return Folded(unfolded, reason="the outputs would change")
    return Folded(folded, [pair.norm for pair in pairs])


def eval_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy in eval mode.

    Raises:
        UserError: If the model holds something that can't be copied.
    """
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} can't be copied: {reason(error)}: keep only parameters, "
            "buffers and plain values on the module, and call finalize on its methods first"
        ) from error


def _pairs(program: torch.export.ExportedProgram) -> list[_Pair]:
    """Find layer -> BatchNorm pairs whose tensors and results are used nowhere else."""
    signature = program.graph_signature
    calls = _quantized_calls(program)
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    pairs = []
    for norm in program.graph.nodes:
        if _op(norm) != "batch_norm" or norm.args[5] is not False:
            continue
        layer = norm.args[0]
        if not isinstance(layer, Node) or len(layer.users) != 1:
            continue
        quantized = _quantized(layer, calls)
        if quantized is not None:
            norm_module = _owner(norm.args[1:5], names)
            if norm_module is not None:
                pairs.append(_Pair(quantized, norm_module))
            continue
        if _op(layer) in _LAYER_OPS:
            layer_module = _owner(layer.args[1:3], names) if _per_channel(layer) else None
        else:
            layer_module = _winograd_module(layer, names)
        norm_module = _owner(norm.args[1:5], names)
        if layer_module is not None and norm_module is not None:
            pairs.append(_Pair(layer_module, norm_module))
    return pairs


def _winograd_module(last: Node, names: dict[str, str]) -> str | None:
    """Return the name of the Winograd layer whose result a node is, if it is called once."""
    stack = list((last.meta.get("nn_module_stack") or {}).values())
    if not stack or not str(stack[-1][1]).endswith(WinogradConv3d.__name__):
        return None
    name = stack[-1][0]
    values = [n for n in last.graph.nodes if names.get(n.name) == f"{name}.values"]
    return name if len(values) == 1 and len(values[0].users) == 1 else None


def _quantized_calls(program: torch.export.ExportedProgram) -> dict[str, set[str]]:
    """Return the calls of each quantized layer, by its name."""
    calls: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        for call, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
            if str(kind).rpartition(".")[2] in QUANTIZED:
                calls.setdefault(path, set()).add(call)
    return calls


def _quantized(result: Node, calls: dict[str, set[str]]) -> str | None:
    """Return the name of the quantized layer whose result a node is, if it is called once."""
    stack = list((result.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else None
    if path is None or len(calls.get(path, ())) != 1:
        return None
    # Of a linear layer, the last dimension is the output channel, and BatchNorm takes the second.
    linear = str(stack[-1][1]).endswith("QuantizedLinear")
    return None if linear and result.meta["val"].dim() != 2 else str(path)


def _op(node: Node) -> str:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::")


def _per_channel(layer: Node) -> bool:
    """Tell whether dimension 1 of the layer's result is its output channel."""
    value, weight = layer.meta["val"], layer.args[1]
    if not isinstance(weight, Node):
        return False
    # A linear layer on (B, T, C) is followed by a norm over T; a convolution may lack a batch.
    dimensions = 2 if _op(layer) == "linear" else weight.meta["val"].dim()
    return bool(value.dim() == dimensions)


def _owner(tensors: tuple[object, ...], names: dict[str, str]) -> str | None:
    """Return the one module that owns all tensors, or None when it isn't one or they are shared."""
    owners = set()
    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Node) or tensor.name not in names or len(tensor.users) != 1:
            return None
        owners.add(names[tensor.name].rpartition(".")[0])
    return owners.pop() if len(owners) == 1 else None


def _fold_pair(model: nn.Module, pair: _Pair) -> bool:
    layer, norm = model.get_submodule(pair.layer), model.get_submodule(pair.norm)
    if norm_replacement(norm) is None or not pair.norm:
        return False
    mean, variance = norm.running_mean, norm.running_var
    if not (isinstance(mean, Tensor) and isinstance(variance, Tensor)):
        return False
    epsilon = cast(float, norm.eps)
    scale = norm.weight if isinstance(norm.weight, Tensor) else torch.ones_like(mean)
    shift = norm.bias if isinstance(norm.bias, Tensor) else torch.zeros_like(mean)
    if isinstance(layer, nn.Linear):
        weight, bias = fuse_linear_bn_weights(
            layer.weight, layer.bias, mean, variance, epsilon, scale, shift
        )
    elif isinstance(layer, QuantizedLayer):
        factor = scale / (variance + epsilon).sqrt()
        layer.fold(factor.detach(), (shift - mean * factor).detach())
        remove_norm(model, norm)
        return True
    elif isinstance(layer, _CONVOLUTIONS):
        transposed = isinstance(layer, _TRANSPOSED)
        if transposed and layer.groups > 1:  # its output channels lie in two dimensions
            return False
        weight, bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, mean, variance, epsilon, scale, shift, transposed
        )
    elif isinstance(layer, WinogradConv3d):
        weight, bias = fuse_conv_bn_weights(
            layer.values.transpose(0, 1), layer.bias, mean, variance, epsilon, scale, shift
        )
        layer.fold(weight.transpose(0, 1), bias)
        remove_norm(model, norm)
        return True
    else:
        return False
    layer.weight, layer.bias = weight, bias
    remove_norm(model, norm)
    return True


def remove_norm(model: nn.Module, norm: nn.Module) -> bool:
    """Put what is left of a BatchNorm module when it has been folded in its place.

    Returns:
        False when it is a module of another type; nothing is changed then.
    """
    replacement = norm_replacement(norm)
    if replacement is None:
        return False
    # The network may hold the module under several names.
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is norm:
                setattr(parent, name, replacement)
    return True


def norm_replacement(norm: nn.Module) -> nn.Module | None:
    """Return what a BatchNorm module does besides normalising, or None for other modules."""
    if type(norm) in _PLAIN_NORMS:
        return nn.Identity().eval()
    if type(norm).__name__ in _NORMS_WITH_ACTIVATION:
        drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
        if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
            return nn.Sequential(drop, act).eval()
    return None


def _close(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    for output, reference in zip(outputs, expected, strict=True):
        size = max(1.0, float(reference.abs().max()))
        # NaN, as in a diverged model, is not a reason to refuse.
        if float((output - reference).abs().nan_to_num().max()) > 1e-3 * size:
            return False
    return True
