"""Count what one image costs: multiply-adds and parameters, dense and without the zeros.

Counted with PyTorch's FLOP counter while the model runs once on one sample, so attention and
anything else that has a FLOP formula is included. A custom operator joins by registering its own
with `torch.utils.flop_counter.register_flop_formula`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tenfold.measure.inputs import ExampleInputs, as_inputs, at_batch, run_once
from tenfold.measure.quiet import quiet
from tenfold.nn.kernel_layer import KernelLayer
from tenfold.nn.quantized import QuantizedLayer
from tenfold.nn.winograd import WinogradConv3d

__all__ = ["Cost", "LayerCost", "count_cost"]


@dataclass(frozen=True)
class LayerCost:
    """One layer with a weight matrix or kernel.

    Attributes:
        name: The module's name in the network.
        type: Its class.
        shape: The weight's shape.
        parameters: Elements of weight and bias.
        macs: Multiply-adds for one sample, all weights counted; of a Winograd layer those of its
            products, kept columns alone, without the additions of its transforms.
        kept: Share of the weight's elements that are not zero.
        effective_macs: Multiply-adds that are left when zero weights are skipped.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    kept: float
    effective_macs: int


@dataclass(frozen=True)
class Cost:
    """The cost of one sample, per layer and in total.

    Attributes:
        layers: One row per convolution, linear layer or similar, in the network's order.
        macs: Multiply-adds of all operators, attention included.
        effective_macs: The same without those on zero weights of `layers`.
        parameters: Elements of all parameters; a parametrized weight counts as the one it yields.
        nonzero_parameters: Those that are not zero.
        bytes: Size of these parameters and the buffers as they are stored in memory.
    """

    layers: tuple[LayerCost, ...]
    macs: int
    effective_macs: int
    parameters: int
    nonzero_parameters: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as JSON-able values."""
        return asdict(self)


def count_cost(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Count multiply-adds (FLOPs / 2, biases and activations not counted) and parameters.

    Runs the model once in eval mode on the first sample. Mode, buffers and gradients of the model
    stay as they are. Parametrized weights (`torch.nn.utils.parametrize`) count as what they yield.

    >>> count_cost(nn.Linear(8, 4), torch.zeros(2, 8)).macs
    32

    Args:
        model: Any network.
        example_inputs: Tensor `(B, ...)`, or several.

    Raises:
        UserError: If the model fails on the example inputs.
    """
    inputs = at_batch(as_inputs(example_inputs), 1)
    with torch.no_grad(), _in_eval(model), parametrize.cached():
        layers = _layers(model)
        weights = {name: layer.weight for name, layer in layers.items()}  # packed ones made dense
        macs_by_layer, macs = _count(model, inputs, layers, weights)
        rows = tuple(
            _row(name, layer, weights[name], macs_by_layer[name]) for name, layer in layers.items()
        )
        parameters = _parameters(model)
        counted = [*parameters, *_packed_parameters(model)]
        return Cost(
            layers=rows,
            macs=macs,
            effective_macs=macs - sum(row.macs - row.effective_macs for row in rows),
            parameters=sum(tensor.numel() for tensor in counted),
            nonzero_parameters=sum(int(torch.count_nonzero(tensor)) for tensor in counted),
            bytes=sum(tensor.nbytes for tensor in [*parameters, *model.buffers()]),
        )


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Set eval mode flag by flag: a module's own `train()` may do more than that."""
    before = [(module, module.training) for module in model.modules()]
    # The fused attention of nn.MultiheadAttention is one operator without a FLOP formula.
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for module, training in before:
            module.training = training


def _layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules that multiply with a weight of two or more dimensions."""
    inside = _parametrization_modules(model)
    layers = {}
    for name, module in model.named_modules():
        if module in inside or isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() >= 2:
            layers[name] = module
    return layers


def _parametrization_modules(model: nn.Module) -> set[nn.Module]:
    return {
        part
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for part in module.parametrizations.modules()  # type: ignore[union-attr]
    }


def _parameters(model: nn.Module) -> list[Tensor]:
    """Return each parameter once, a parametrized one as the tensor that it yields."""
    inside = _parametrization_modules(model)
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if module in inside:
            continue
        for tensor in module.parameters(recurse=False):
            found.setdefault(id(tensor), tensor)
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                tensor = getattr(module, name)
                found.setdefault(id(tensor), tensor)
    return list(found.values())


def _packed_parameters(model: nn.Module) -> list[Tensor]:
    """Return the float form of packed and quantized weights, and biases, which are buffers.

    A Winograd layer's weights are its kept columns.
    """
    kinds = (KernelLayer, WinogradConv3d, QuantizedLayer)
    packed = [module for module in model.modules() if isinstance(module, kinds)]
    biases = [bias for layer in packed if isinstance(bias := layer.bias, Tensor)]
    return [*(layer.weight for layer in packed), *biases]


def _row(name: str, layer: nn.Module, weight: Tensor, macs: int) -> LayerCost:
    bias = getattr(layer, "bias", None)
    kept = int(torch.count_nonzero(weight)) / weight.numel() if weight.numel() else 0.0
    return LayerCost(
        name=name,
        type=type(layer).__name__.removeprefix("Parametrized"),
        shape=tuple(weight.shape),
        parameters=weight.numel() + (bias.numel() if isinstance(bias, Tensor) else 0),
        macs=macs,
        kept=kept,
        effective_macs=round(macs * kept),
    )


def _count(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    layers: dict[str, Any],
    weights: dict[str, Tensor],
) -> tuple[dict[str, int], int]:
    """Run once and return the multiply-adds of each layer and of the whole network."""
    # The kernels of packed layers are no operators of PyTorch: their outputs say what they cost.
    packed = {name: layer for name, layer in layers.items() if isinstance(layer, KernelLayer)}
    counter = FlopCounterMode(display=False)
    assign = _Assign(counter, {n: weight for n, weight in weights.items() if n not in packed})
    macs = dict.fromkeys(packed, 0)
    handles = []

    def count(name: str, output: Tensor) -> None:
        macs[name] += packed[name].macs(output)

    for name, layer in packed.items():
        handles.append(layer.register_forward_hook(lambda *a, name=name: count(name, a[-1])))
    for name, layer in layers.items():
        if name in packed:
            continue
        # A method may drop the module from the hook's arguments, so the name is bound here.
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: assign.enter(name)))
        handles.append(layer.register_forward_hook(lambda *_: assign.leave()))
    try:
        with quiet(), counter, assign:
            run_once(model, inputs, "the model")
    finally:
        for handle in handles:
            handle.remove()
    total = counter.get_total_flops() // 2 + sum(macs.values())
    return {**{name: flops // 2 for name, flops in assign.flops.items()}, **macs}, total


class _Assign(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Give each operator's FLOPs to the layer whose weight it reads, else to the running layer.

    By weight, because attention modules read the weight of a layer without calling it; by running
    layer, because a layer may compute with something made from its weight.
    """

    def __init__(self, counter: FlopCounterMode, weights: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
        self._running: list[str] = []
        # Held, for a layer may make its weight anew at each access: the memory of one that is
        # gone is given to other tensors, which would then be taken for it.
        self._weights = weights
        self._by_storage: dict[int, list[str]] = {}
        for name, weight in weights.items():
            self._by_storage.setdefault(_storage(weight), []).append(name)
        self.flops = dict.fromkeys(weights, 0)

    def enter(self, name: str) -> None:
        self._running.append(name)

    def leave(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        if flops:
            name = self._reader(args, kwargs)
            if name is not None:
                self.flops[name] += flops
        return result

    def _reader(self, args: Any, kwargs: Any) -> str | None:
        running = self._running[-1] if self._running else None
        for value in pytree.tree_leaves((args, kwargs)):
            names = self._by_storage.get(_storage(value)) if isinstance(value, Tensor) else None
            if names:  # several where layers share one weight
                return running if running in names else names[0]
        return running


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
