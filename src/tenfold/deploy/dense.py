"""Hand attention, norms and pooling of a fused graph to kernels of ours, where that is faster here.

Nodes go by their names in the graph: the same network, traced again, has the same ones. That is how
a saved model finds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tenfold.deploy.choose import LAYER_SECONDS
from tenfold.kernels import native
from tenfold.kernels.attention import attention
from tenfold.kernels.normalize import layer_norm
from tenfold.kernels.pooling import max_pool2d, mean_pool
from tenfold.measure.timing import interleave

__all__ = ["replace_dense", "replace_named"]


@dataclass(frozen=True)
class _Match:
    """Nodes of PyTorch's, the last of which gives the result, and a call that can replace them."""

    kind: str
    nodes: tuple[fx.Node, ...]
    call: Callable[..., Tensor]
    inputs: tuple[fx.Node, ...]
    options: tuple[Any, ...]
    parameters: tuple[str | None, ...] = ()  # between both, by their names in the graph

    @property
    def name(self) -> str:
        """Return the name of the node that gives the result."""
        return self.nodes[-1].name


def replace_dense(graph: fx.GraphModule, inputs: tuple[Tensor, ...], choose: str) -> dict[str, str]:
    """Replace attention, norms and pooling of a graph in place.

    Args:
        graph: as `fuse` returns it, with the shapes of its nodes.
        inputs: example inputs; off the CPU nothing is replaced.
        choose: "time" leaves what is faster in PyTorch, "packed" doesn't time.

    Returns:
        What was replaced: the name of each node and its kind.
    """
    if inputs[0].device.type != "cpu" or (choose == "time" and native.missing()):
        return {}
    faster: dict[object, bool] = {}  # equal sizes are timed once
    matches = []
    for match in _matches(graph):
        layouts = [layout for layout in map(_layout, match.inputs) if layout is not None]
        if len(layouts) < len(match.inputs) or not _fits(match.kind, layouts):
            continue
        key = (match.kind, match.options, *layouts)
        if key not in faster:
            faster[key] = choose != "time" or _is_faster(graph, match, layouts)
        if faster[key]:
            matches.append(match)
    return _replace(graph, matches)


def replace_named(graph: fx.GraphModule, nodes: Mapping[str, str]) -> bool:
    """Replace in place what `replace_dense` had replaced in an equal graph, without shapes.

    Args:
        graph: of the network that is loaded.
        nodes: what `replace_dense` returned.

    Returns:
        Whether this graph has all of them; if not, nothing is replaced.
    """
    matches = [match for match in _matches(graph) if match.name in nodes]
    if {match.name: match.kind for match in matches} != dict(nodes):
        return False
    _replace(graph, matches)
    return True


def _matches(graph: fx.GraphModule) -> list[_Match]:
    found = (
        _attention(node)
        or _layer_norm(node, graph)
        or _max_pool(node, graph)
        or _mean_pool(node, graph)
        for node in graph.graph.nodes
    )
    return [match for match in found if match is not None]


def _attention(node: fx.Node) -> _Match | None:
    if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
        return None
    given = _arguments(
        node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    )
    qkv = [given.get(name) for name in ("query", "key", "value")]
    scale = given.get("scale")
    plain = not any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    if given.get("attn_mask") is not None or not plain or not isinstance(scale, float | None):
        return None
    inputs = tuple(each for each in qkv if isinstance(each, fx.Node))
    return _Match("attention", (node,), attention, inputs, (scale,)) if len(inputs) == 3 else None


def _layer_norm(node: fx.Node, graph: fx.GraphModule) -> _Match | None:
    names = ("normalized_shape", "weight", "bias", "eps")
    given: dict[str, Any]
    parameters: list[str | None]
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if type(module) is not nn.LayerNorm:
            return None
        given = {name: getattr(module, name) for name in names} | _arguments(node, "input")
        both = ("weight", "bias")
        parameters = [f"{node.target}.{name}" if given[name] is not None else None for name in both]
    elif node.op == "call_function" and node.target is F.layer_norm:
        given = {"weight": None, "bias": None, "eps": 1e-5, **_arguments(node, "input", *names)}
        parameters = []
        for each in (given["weight"], given["bias"]):
            if each is not None and not (isinstance(each, fx.Node) and each.op == "get_attr"):
                return None
            parameters.append(None if each is None else str(each.target))
    else:
        return None
    x, shape, epsilon = given["input"], given["normalized_shape"], given["eps"]
    if not isinstance(x, fx.Node) or not isinstance(epsilon, float):
        return None
    if not isinstance(shape, tuple | list) or [type(size) for size in shape] != [int]:
        return None
    return _Match("layer_norm", (node,), layer_norm, (x,), (epsilon,), tuple(parameters))


def _max_pool(node: fx.Node, graph: fx.GraphModule) -> _Match | None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if type(module) is not nn.MaxPool2d or module.return_indices:
            return None
        given |= {name: getattr(module, name) for name in names}
        given |= _arguments(node, "input")
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
        given |= _arguments(node, "input", *names, "return_indices")
    else:
        return None
    if given.pop("return_indices", False):
        return None
    x, kernel, stride = given["input"], given["kernel_size"], given["stride"]
    sizes = [
        _pair(each) for each in (kernel, stride or kernel, given["padding"], given["dilation"])
    ]
    if not isinstance(x, fx.Node) or None in sizes or not isinstance(given["ceil_mode"], bool):
        return None
    if sizes[3] == (1, 1) and _own_relu(x, graph):  # so every window holds a pixel
        before = x.all_input_nodes[0]
        options = (*sizes, given["ceil_mode"], True)
        return _Match("relu and max_pool2d", (x, node), max_pool2d, (before,), options)
    options = (*sizes, given["ceil_mode"], False)
    return _Match("max_pool2d", (node,), max_pool2d, (x,), options)


def _own_relu(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Tell whether a node is a ReLU that one node reads; what it may write into, no other does."""
    if node.op != "call_module" or len(node.users) != 1 or len(node.all_input_nodes) != 1:
        return False
    module = graph.get_submodule(str(node.target))
    before = node.all_input_nodes[0]
    if type(module) is not nn.ReLU or before.op != "call_module" or len(before.users) != 1:
        return False
    return isinstance(graph.get_submodule(str(before.target)), nn.Conv2d | nn.BatchNorm2d)


def _mean_pool(node: fx.Node, graph: fx.GraphModule) -> _Match | None:
    given: dict[str, Any]
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if type(module) is not nn.AdaptiveAvgPool2d:
            return None
        given = {"output_size": module.output_size, **_arguments(node, "input")}
    elif node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        given = _arguments(node, "input", "output_size")
    else:
        return None
    if not isinstance(given["input"], fx.Node) or _pair(given["output_size"]) != (1, 1):
        return None
    return _Match("mean_pool", (node,), mean_pool, (given["input"],), ())


def _pair(size: object) -> tuple[int, int] | None:
    both = (size, size) if isinstance(size, int) else size
    if isinstance(both, tuple | list) and [type(each) for each in both] == [int, int]:
        return both[0], both[1]
    return None


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


@dataclass(frozen=True)
class _Layout:
    """Shape and strides of a float32 tensor on the example."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _layout(node: fx.Node) -> _Layout | None:
    meta: Any = node.meta.get("tensor_meta")
    if getattr(meta, "dtype", None) != torch.float32:
        return None
    return _Layout(tuple(meta.shape), tuple(meta.stride))


def _fits(kind: str, layouts: list[_Layout]) -> bool:
    shape = layouts[0].shape
    if kind == "layer_norm":
        return True
    if len(shape) != 4:
        return False
    if kind == "attention":
        others = [layout.shape for layout in layouts[1:]]
        return all(other == (*shape[:2], others[0][2], shape[3]) for other in others)
    # In the order that the kernels take.
    return torch.empty_strided(shape, layouts[0].stride, device="meta").is_contiguous()


def _is_faster(graph: fx.GraphModule, match: _Match, layouts: list[_Layout]) -> bool:
    inputs = [torch.empty_strided(layout.shape, layout.stride).normal_() for layout in layouts]
    networks = {"theirs": _alone(graph, match, ours=False), "ours": _alone(graph, match, ours=True)}
    calls = {name: functools.partial(network, *inputs) for name, network in networks.items()}
    with torch.no_grad():
        times = interleave(calls, LAYER_SECONDS)
    return min(times["ours"]) < min(times["theirs"])


def _alone(graph: fx.GraphModule, match: _Match, ours: bool) -> fx.GraphModule:
    """Return a network of the match alone, as it is or replaced, that takes its inputs."""
    alone = fx.Graph()
    placed = [alone.placeholder(f"x{position}") for position in range(len(match.inputs))]
    if ours:
        result = _call(alone, match, placed)
    else:
        copies = dict(zip(match.inputs, placed, strict=True))
        for read in match.nodes[0].all_input_nodes:
            if read.op == "get_attr":
                copies[read] = alone.node_copy(read)
        for node in match.nodes:
            result = copies[node] = alone.node_copy(node, copies.__getitem__)
    alone.output(result)
    return fx.GraphModule(graph, alone)


def _call(graph: fx.Graph, match: _Match, inputs: Sequence[fx.Node]) -> fx.Node:
    parameters = [None if name is None else graph.get_attr(name) for name in match.parameters]
    return graph.call_function(match.call, (*inputs, *parameters, *match.options))


def _replace(graph: fx.GraphModule, matches: list[_Match]) -> dict[str, str]:
    now: dict[fx.Node, fx.Node] = {}  # an input may have been replaced itself
    for match in matches:
        last = match.nodes[-1]
        with graph.graph.inserting_before(last):
            inputs = [now.get(node, node) for node in match.inputs]
            ours = now[last] = _call(graph.graph, match, inputs)
        ours.meta = dict(last.meta)
        last.replace_all_uses_with(ours)
        read = last.all_input_nodes
        for node in reversed(match.nodes):
            graph.graph.erase_node(node)
        for node in read:
            if node.op == "get_attr" and not node.users:
                graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return {match.name: match.kind for match in matches}
