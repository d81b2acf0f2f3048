"""Fuse activations, residual additions and maximum pooling into the packed layers before them.

The network is traced by `torch.fx`; layers of PyTorch, packed layers, and modules whose code can't
be traced stay whole. What is fused in the graph:

    packed -> activation                       ReLU, ReLU6, GELU (exact), SiLU
    packed -> + other [-> activation]          of equal shape and type
    packed 3-D -> [...] -> MaxPool3d           windows of 1 or 2 side by side, without padding

Only where nothing else reads the intermediate result. Dropout (in eval mode) and Identity don't
stand in the way. A fused addition is computed where the addition was, so both operands are there;
it is left alone when something in between may write into one of them.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from tenfold.deploy.trace import trace
from tenfold.nn.kernel_layer import KernelLayer
from tenfold.nn.winograd import WinogradConv3d

__all__ = ["NO_POOL", "Epilogue", "apply_epilogues", "fuse", "unfuse"]

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", nn.SiLU: "silu",
}  # fmt: skip
_FUNCTIONS: dict[object, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu",
    F.relu6: "relu6", F.gelu: "gelu", F.silu: "silu",
}  # fmt: skip
_METHODS = {"relu": "relu", "relu_": "relu"}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_WRITING = {
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and name.removeprefix("i") in ("add", "sub", "mul", "truediv", "pow",
    "floordiv", "mod", "matmul", "and", "or", "xor", "lshift", "rshift")
} | {operator.setitem, operator.delitem}  # fmt: skip
# Arguments of a maximum pooling, and their defaults.
_POOLING: dict[str, Any] = {
    "kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
    "return_indices": False,
}  # fmt: skip
_WITHOUT_EFFECTS = ("torch", "_operator", "operator", "math", "builtins", "torchvision.ops")


NO_POOL = (1, 1, 1)


@dataclass(frozen=True)
class Epilogue:
    """What a packed layer does after its product: an addition, an activation, a maximum."""

    add: bool = False
    activation: str = "none"
    pool: tuple[int, int, int] = NO_POOL

    def __str__(self) -> str:
        parts = ["add"] * self.add + [self.activation] * (self.activation != "none")
        parts += [f"max {'x'.join(map(str, self.pool))}"] * (self.pool != NO_POOL)
        return ", ".join(parts)


def fuse(
    network: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[fx.GraphModule, dict[str, Epilogue]]:
    """Return the network as a graph with its packed layers fused, and what each of them took.

    The graph shares the modules of the network, whose packed layers it sets to their activation.

    Args:
        network: in eval mode; holds packed layers.
        inputs: example inputs, by which equal shapes are recognised.

    Raises:
        Exception: whatever tracing the network raises.
    """
    graph = trace(network, len(inputs))
    _drop_idle(graph)
    with torch.no_grad():
        ShapeProp(graph).propagate(*inputs)

    def equal(layer: fx.Node, other: fx.Node) -> bool:
        a, b = layer.meta.get("tensor_meta"), other.meta.get("tensor_meta")
        shapes = [getattr(meta, "shape", None) for meta in (a, b)]
        types = [getattr(meta, "dtype", None) for meta in (a, b)]
        return shapes[0] is not None and shapes[0] == shapes[1] and types[0] == types[1]

    return graph, _rewrite(graph, equal)


def apply_epilogues(
    network: nn.Module, epilogues: Mapping[str, Epilogue], inputs: int
) -> fx.GraphModule | None:
    """Fuse what `fuse` found earlier in an equal network, without example inputs.

    Args:
        network: in eval mode; holds packed layers.
        epilogues: by the name of their packed layer.
        inputs: how many tensors the network takes.

    Returns:
        The graph, or None when this network doesn't lead to the same epilogues.
    """
    try:
        graph = trace(network, inputs)
    except Exception:
        return None
    _drop_idle(graph)
    known = {name: epilogue for name, epilogue in epilogues.items() if str(epilogue)}
    found = _rewrite(graph, lambda layer, _: epilogues.get(str(layer.target), Epilogue()).add)
    if found != known:
        unfuse(network)
        return None
    return graph


def unfuse(network: nn.Module) -> None:
    """Take the activations and maxima out of a network's packed layers again."""
    for module in network.modules():
        if isinstance(module, KernelLayer):
            module.activation, module.pool = "none", NO_POOL


def _drop_idle(graph: fx.GraphModule) -> None:
    """Remove Identity and dropout, which hand on their input in eval mode."""
    for node in list(graph.graph.nodes):
        if _idle(node, graph):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _idle(node: fx.Node, graph: fx.GraphModule) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return len(node.args) == 1 and (
            type(module) is nn.Identity
            or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training)
        )
    # torchvision's stochastic depth is named, not imported.
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or not (
        name == "stochastic_depth"
        or (
            (name.endswith("dropout") or name.startswith("dropout"))
            and getattr(F, name, None) is node.target
        )
    ):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    bound.apply_defaults()
    return bound.arguments.get("training") is False


def _rewrite(
    graph: fx.GraphModule, may_add: Callable[[fx.Node, fx.Node], bool]
) -> dict[str, Epilogue]:
    """Fuse in place; `may_add(layer, other)` decides about additions that the graph allows."""
    nodes = list(graph.graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    writes = [_may_write(node, graph) for node in nodes]
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    found: dict[str, Epilogue] = {}

    def unpooled(node: object) -> KernelLayer | None:
        """Return the packed layer whose result can still take a maximum in."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
            return None
        module = graph.get_submodule(str(node.target))
        if not isinstance(module, KernelLayer) or calls[node.target] != 1 or node.kwargs:
            return None
        return module if module.pool == NO_POOL else None

    def open_layer(node: object) -> KernelLayer | None:
        """Return the packed layer whose result can still take anything in."""
        module = unpooled(node)
        return module if module is not None and module.activation == "none" else None

    def note(node: fx.Node, **taken: Any) -> None:
        """Write down what a layer takes in from a node, whose place it takes."""
        layer = node.args[0]
        assert isinstance(layer, fx.Node)
        name = str(layer.target)
        found[name] = replace(found.get(name, Epilogue()), **taken)
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)

    for node in nodes:
        operands = _addition(node)
        if operands is not None:
            left, right = operands
            pairs = [(left, right)] if _writes_first(node) else [(left, right), (right, left)]
            # The later one: less lies between it and the addition.
            pairs.sort(key=lambda pair: order[pair[0]], reverse=True)
            for layer, other in pairs:
                quiet = not any(writes[order[layer] + 1 : order[node]])
                if len(layer.args) == 1 and open_layer(layer) and quiet and may_add(layer, other):
                    _fuse_addition(graph, node, layer, other, order)
                    found[str(layer.target)] = Epilogue(add=True)
                    break
            continue
        activation = _activation(node, graph)
        module = open_layer(node.args[0]) if activation else None
        if module is not None:
            module.activation = str(activation)
            note(node, activation=module.activation)
            continue
        pool = _pooling(node, graph)
        module = unpooled(node.args[0]) if pool else None
        if module is not None and module.can_pool:
            module.pool = pool or NO_POOL
            node.args[0].meta = dict(node.meta)  # its shape, for additions that follow
            note(node, pool=module.pool)
    graph.graph.lint()
    graph.recompile()
    return found


def _fuse_addition(
    graph: fx.GraphModule, node: fx.Node, layer: fx.Node, other: fx.Node, order: dict[fx.Node, int]
) -> None:
    with graph.graph.inserting_before(node):
        fused = graph.graph.call_module(str(layer.target), (layer.args[0], other))
    fused.meta = dict(node.meta)
    order[fused] = order[node]
    node.replace_all_uses_with(fused)
    graph.graph.erase_node(node)
    graph.graph.erase_node(layer)


def _addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the operands of a plain sum of two tensors."""
    is_sum = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__")
    )
    if not is_sum or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    return left, right


def _writes_first(node: fx.Node) -> bool:
    """Tell whether an addition writes into its first operand."""
    return node.target in (operator.iadd, "add_", "__iadd__")


def _activation(node: fx.Node, graph: fx.GraphModule) -> str | None:
    """Return the activation that a node applies to its first argument, if it's one of ours."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return None
        return _MODULES.get(type(module)) if len(node.args) == 1 and not node.kwargs else None
    if node.op == "call_method":
        return _METHODS.get(str(node.target)) if len(node.args) == 1 and not node.kwargs else None
    name = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name is None:
        return None
    # Whether it writes in place doesn't matter: nothing else reads what it would write into.
    rest = {**node.kwargs, **{str(position): value for position, value in enumerate(node.args[1:])}}
    rest.pop("inplace", None)
    if rest.pop("approximate", "none") != "none":
        return None
    return name if all(isinstance(value, bool) for value in rest.values()) else None


def _pooling(node: fx.Node, graph: fx.GraphModule) -> tuple[int, int, int] | None:
    """Return the windows of a maximum that a packed 3-D convolution can take."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        module = graph.get_submodule(str(node.target))
        if type(module) is not nn.MaxPool3d:
            return None
        given = {name: getattr(module, name) for name in _POOLING}
    elif node.op == "call_function" and node.target in (F.max_pool3d, torch.max_pool3d):
        positional = dict(zip(_POOLING, node.args[1:], strict=False))
        given = {**_POOLING, **positional, **node.kwargs}
    else:
        return None
    window = _triple(given["kernel_size"])
    # Without a stride of its own, windows lie side by side.
    expected = {**_POOLING, "kernel_size": window, "stride": window}
    given["stride"] = given["stride"] or window
    for name in ("kernel_size", "stride", "padding", "dilation"):
        given[name], expected[name] = _triple(given[name]), _triple(expected[name])
    return window if window and set(window) <= {1, 2} and given == expected else None


def _triple(size: object) -> tuple[int, int, int] | None:
    """Return a size as depth, height and width, or None when it isn't written out."""
    sizes = (size,) * 3 if isinstance(size, int) else size
    if not isinstance(sizes, Sequence) or len(sizes) != 3:
        return None
    depth, height, width = sizes
    whole = all(isinstance(each, int) for each in (depth, height, width))
    return (depth, height, width) if whole else None


def _may_write(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Tell whether a node may change a tensor that is there already."""
    if node.op == "call_module":
        module: Any = graph.get_submodule(str(node.target))
        if isinstance(module, KernelLayer | WinogradConv3d):
            return False
        own = not type(module).__module__.startswith("torch.nn")
        return own or any(getattr(part, "inplace", False) for part in module.modules())
    if node.op == "call_method":
        return str(node.target).endswith("_") and node.target not in ("__getitem__", "__add__")
    if node.op != "call_function":
        return False
    given = [*node.args, *node.kwargs.values()]
    name = getattr(node.target, "__name__", "_")
    module_name = getattr(node.target, "__module__", None) or "torch"
    return (
        node.target in _WRITING
        or "out" in node.kwargs
        or any(value is True for value in given)  # such as inplace
        or (name.endswith("_") and not name.endswith("__"))
        or not module_name.startswith(_WITHOUT_EFFECTS)
    )
