"""Turn a network into a `torch.fx` graph that keeps its names, its state and its signature."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from tenfold.nn.kernel_layer import KernelLayer
from tenfold.nn.quantized import QuantizedLayer
from tenfold.nn.winograd import WinogradConv3d

__all__ = ["trace"]


def trace(network: nn.Module, inputs: int) -> fx.GraphModule:
    """Trace a network in eval mode; the graph shares its modules and has the same state.

    A module whose code can't be traced, because it branches on values, is called as a whole.
    Arguments of `forward` beyond the inputs keep their defaults.

    Args:
        network: is not changed.
        inputs: how many tensors it takes.

    Raises:
        Exception: what the network's own `forward` raises while it is traced.
    """
    whole: set[type[nn.Module]] = set()
    while True:
        tracer = _Tracer(whole)
        try:
            graph = tracer.trace(network, _defaults(network, inputs))
        except Exception:
            failed = tracer.failed
            if failed is None or type(failed) in whole:
                raise
            whole.add(type(failed))
        else:
            break
    _drop_defaults(graph, inputs)
    traced = fx.GraphModule(network, graph, type(network).__name__)
    _complete(traced, network)
    return traced.eval()


class _Tracer(fx.Tracer):
    """Keeps PyTorch's, packed and quantized layers whole, and remembers which module failed."""

    def __init__(self, whole: set[type[nn.Module]]) -> None:
        super().__init__()
        self.whole = whole
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = KernelLayer | QuantizedLayer | WinogradConv3d
        if isinstance(m, whole) or type(m) in self.whole:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:  # the innermost
                self.failed = m
            raise


def _defaults(network: nn.Module, inputs: int) -> dict[str, Any] | None:
    import inspect

    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = list(inspect.signature(network.forward).parameters.values())
    by_position = [parameter for parameter in known if parameter.kind in kinds]
    named = [p for p in known if p.kind is inspect.Parameter.KEYWORD_ONLY]
    rest = [p for p in [*by_position[inputs:], *named] if p.default is not inspect.Parameter.empty]
    return {parameter.name: parameter.default for parameter in rest} or None


def _drop_defaults(graph: fx.Graph, inputs: int) -> None:
    """Remove the arguments that were given their defaults, with the checks that fx made of them."""
    for node in [node for node in graph.nodes if node.op == "placeholder"][inputs:]:
        if str(node.target).startswith("*"):
            continue
        readers = [node]
        for reader in readers:
            readers += [user for user in reader.users if user not in readers]
        if any(reader.op == "output" for reader in readers):
            raise ValueError(f"forward() takes {node.target}, which has no default")
        for reader in reversed(readers):
            if not reader.users:
                graph.erase_node(reader)


def _complete(traced: fx.GraphModule, network: nn.Module) -> None:
    """Give the graph what its network holds beyond it, so that both have the same state."""
    before = set(traced.state_dict())
    for key, value in network.state_dict(keep_vars=True).items():
        if key in before:
            continue
        path, _, name = key.rpartition(".")
        owner = _container(traced, path)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)
    # fx registers every tensor as a buffer that is saved; also constants of forward().
    saved = set(network.state_dict())
    for path, module in traced.named_modules():
        for name, tensor in module._buffers.items():
            key = f"{path}.{name}" if path else name
            if isinstance(tensor, Tensor) and key not in saved:
                module._non_persistent_buffers_set.add(name)


def _container(traced: fx.GraphModule, path: str) -> nn.Module:
    module: nn.Module = traced
    for name in path.split(".") if path else ():
        if name not in module._modules:
            module.add_module(name, nn.Module())
        child = module._modules[name]
        module = child if child is not None else module
    return module
