"""Make a network fast on this machine: fold, pack, time, fuse, and prove that it is the same.

Every step works on a copy. A layer is packed when that is faster here; what follows it is fused
into it where the graph allows; and before the result is returned its outputs are compared with
those of the network that was given. When they differ, 3-D convolutions get tiles that round less,
then the fusion is undone, then the packing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tenfold.deploy.candidates import find_layers, replace_layers
from tenfold.deploy.choose import CHOICES, Choices, Target, choose_layers, time_networks
from tenfold.deploy.dense import replace_dense
from tenfold.deploy.edits import describe_edits
from tenfold.deploy.fold import Folded, eval_copy, fold_batch_norm
from tenfold.deploy.fuse import Epilogue, fuse, unfuse
from tenfold.deploy.generators import Generators, pack_generators
from tenfold.deploy.optimized import (
    OptimizedModel,
    hand_on_channels_last,
    in_memory_format,
    in_parts,
    largest_difference,
)
from tenfold.deploy.plan import LayerChoice, OptimizePlan
from tenfold.deploy.winograd_options import Option
from tenfold.errors import UserError, unknown_name
from tenfold.kernels.winograd import coordinates
from tenfold.measure.inputs import ExampleInputs, as_inputs, random_like, run_once
from tenfold.measure.quiet import reason
from tenfold.nn.kernel_layer import KernelLayer
from tenfold.nn.packed import PRECISIONS
from tenfold.nn.winograd_packed import PackedWinogradConv3d

__all__ = ["optimize"]

TOLERANCE = 1e-5
# What generators may differ by, if they are no further from the exact result than the model is,
# times a factor: two ways to round are never equally lucky.
ROUNDING, ROUNDING_ALIKE = 1e-4, 2.0
# Another form of the whole network must take this share of the time: two timings are never equal.
CLEARLY = 0.97
# Samples of a batch that are tried to go through the network together.
AT_ONCE = (1, 4, 16)


def optimize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    precision: str = "float32",
    *,
    choose: str = "time",
) -> OptimizedModel:
    """Return a new module that computes what `model` does, as fast as this machine can.

    BatchNorm is folded. Each Conv2d and Linear whose weights follow an N:M pattern, whoever made
    it, is timed dense and packed, and the faster form is kept. So is each 3x3x3 convolution, in
    tiles of several sizes in the Winograd domain. Activations, residual additions and maximum
    pooling are fused into packed layers, and attention and pooling beside them go to kernels of
    ours where those are faster. A ResNet or mobile ResNet generator of images becomes one kernel,
    and a LAB-Net is run by kernels as a whole.
    The result takes any batch and image size that the model takes.
    On a CUDA device 2:4 layers in float16 or bfloat16 go to the sparse tensor cores.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> fast = optimize(network, torch.zeros(1, 3, 8, 8))
    >>> fast.plan.folded
    ('1',)

    Args:
        model: any network; it is not changed.
        example_inputs: tensor `(B, ...)`, or several, of the size to be fast at.
        precision: of packed weights on a CPU: "float32", "bfloat16" or "int8". Sums are float32.
        choose: "time", or "packed" and "dense" to decide without timing.

    Returns:
        The module, with `plan` saying what was done. In float32 its outputs are within 1e-5 of the
        model's on the example, relative to the largest. Generators, whose norms magnify rounding,
        may be further away, within 1e-4, where the model in double precision shows that the
        model's own rounding is as large.

    Raises:
        UserError: the model can't be copied, fails on the inputs or is optimized already, or an
            argument that makes no sense.
    """
    inputs = as_inputs(example_inputs)
    _check(model, precision, choose)
    given = eval_copy(model).requires_grad_(False)
    expected = run_once(given, inputs, "the model")
    target = Target(precision, inputs[0].device)
    exact = precision == "float32" and expected[0].dtype in (torch.float32, torch.float64)
    checks = _Checks(given, inputs, expected, TOLERANCE if exact else None)
    notes: list[str] = []
    generators = pack_generators(given, inputs, target, choose)
    generators = _checked(generators, given, inputs, checks, notes)
    base = generators.network
    folded = fold_batch_norm(base, inputs)
    folded.model.requires_grad_(False)
    layers = find_layers(folded.model, inputs)
    choices = choose_layers(layers, target, choose)

    if folded.reason:
        notes.append(f"BatchNorm is not folded: {folded.reason}")
    if choose == "time" and target.missing and any(layer.reason is None for layer in layers):
        notes.append(f"nothing is packed: {target.missing}")
    form = checks.first(_forms(base, folded, choices, inputs, choose, notes), notes)
    if generators.packed and form.name == "as given":  # but for its generators
        form = replace(form, difference=checks.difference(base))
    memory_format, at_once, network_ms = "contiguous", None, dict(generators.network_ms)
    if choose == "time":
        dense = _Form("dense", folded.model, folded=tuple(folded.folded))
        form, memory_format, times = _fastest(form, dense, inputs, checks, notes)
        network_ms |= {} if generators.packed == ("",) else times
        form, at_once, in_parts_ms = _in_parts(form, inputs, checks)
        network_ms |= in_parts_ms
    plan = OptimizePlan(
        layers=(*generators.rows, *(_final(row, form) for row in choices.rows)),
        precision=precision,
        instruction_set=target.instruction_set,
        memory_format=memory_format,
        inputs=len(inputs),
        at_once=at_once,
        folded=form.folded,
        replaced=dict(Counter(form.replaced.values())),
        network_ms=network_ms,
        difference=form.difference,
        reason="; ".join(notes) or None,
    )
    edits = describe_edits(given, form.network, form.folded, form.epilogues, form.replaced)
    return OptimizedModel(form.network, plan, edits)


def _checked(
    generators: Generators,
    given: nn.Module,
    inputs: tuple[Tensor, ...],
    checks: _Checks,
    notes: list[str],
) -> Generators:
    """Return the network with packed generators if it is right, else as it was given."""
    if not generators.packed:
        return generators
    try:
        difference = checks.difference(generators.network)
        right = checks.right(difference)
        if (
            not right
            and difference <= ROUNDING
            and _rounds_alike(generators.network, given, inputs)
        ):
            # Of what is done to the network besides, no more is asked.
            checks.tolerance, right = ROUNDING, True
    except UserError as error:
        why = str(error)
    else:
        if right:
            return generators
        why = f"the outputs differ by {difference:.1e} relative"
    notes.append(f"given up, packed generators: {why}")
    return generators.without(given, why)


def _rounds_alike(network: nn.Module, given: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Tell whether a network is as close to the given one in double precision as that one is."""
    double = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = run_once(copy.deepcopy(given).double(), double, "the model in double precision")
    own, others = (
        largest_difference(run_once(each, inputs, "it"), exact) for each in (given, network)
    )
    return others <= ROUNDING_ALIKE * own


@dataclass(frozen=True)
class _Form:
    """One way to run the network, with what was done to it."""

    name: str
    network: nn.Module
    packed: frozenset[str] = frozenset()
    epilogues: Mapping[str, Epilogue] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    difference: float | None = None
    tiles: str | None = None  # the largest one of a 3-D convolution


def _forms(
    given: nn.Module,
    folded: Folded,
    choices: Choices,
    inputs: tuple[Tensor, ...],
    choose: str,
    notes: list[str],
) -> Iterator[_Form]:
    """Yield the forms of a network, the best first; the last one is the network as given."""
    norms = tuple(folded.folded)
    network, names, fusible = folded.model, frozenset[str](), False
    graph_reason: str | None = None
    for level in choices.levels:
        chosen = choices.options(level)
        packed = choices.modules(chosen)
        if not packed:
            break
        network, names = _with_layers(folded.model, packed), frozenset(packed)
        fusible = any(isinstance(module, KernelLayer) for module in packed.values())
        fusible = fusible and "" not in packed and graph_reason is None
        if fusible:
            try:
                graph, epilogues = fuse(network, inputs)
            except Exception as error:
                fusible, graph_reason = False, reason(error)
                notes.append(f"layers are packed, but nothing is fused: no graph: {graph_reason}")
            else:
                replaced = replace_dense(graph, inputs, choose)
                tiles = _roughest(chosen)
                yield _Form("packed", graph, names, epilogues, replaced, norms, tiles=tiles)
            unfuse(network)
        if not fusible:
            yield from _unfused(network, names, norms, _roughest(chosen))
    if names and fusible:
        yield from _unfused(network, names, norms, None)
    yield _Form("dense", folded.model, folded=norms)
    yield _Form("as given", given)


def _unfused(
    network: nn.Module, names: frozenset[str], norms: tuple[str, ...], tiles: str | None
) -> Iterator[_Form]:
    """Yield a network with packed layers that are called by its own code."""
    yield _Form("packed", network, names, folded=norms, tiles=tiles)
    if any(isinstance(module, PackedWinogradConv3d) for module in network.modules()):
        # Code of the network may count on contiguous results.
        yield _Form("packed", hand_on_channels_last(network, False), names, folded=norms)


def _roughest(chosen: Mapping[str, Option]) -> str | None:
    """Return the largest tile of the 3-D convolutions."""
    roughest = max(chosen.values(), key=lambda option: option.level, default=None)
    return "x".join(map(str, roughest.tile)) if roughest else None


def _with_layers(model: nn.Module, packed: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy with packed layers in the place of others, which aren't copied."""
    names = dict(model.named_modules())
    kept = {id(names[name]): names[name] for name in packed if name}
    fresh = {name: copy.deepcopy(module) for name, module in packed.items()}
    network = replace_layers(copy.deepcopy(model, dict(kept)), fresh)
    return hand_on_channels_last(network, True)


class _Checks:
    """Inputs at two batch sizes with the outputs that are expected of them."""

    def __init__(
        self,
        given: nn.Module,
        inputs: tuple[Tensor, ...],
        expected: tuple[Tensor, ...],
        tolerance: float | None,
    ) -> None:
        self.tolerance = tolerance
        self._example = (inputs, expected)
        self._other: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        # A model may take one batch size only.
        with contextlib.suppress(UserError):
            other = random_like(inputs, len(inputs[0]) + 1, seed=0)
            self._other = other, run_once(given, other, "the model")

    def difference(self, network: Callable[..., object]) -> float:
        """Return the largest relative difference on the example; infinite at wrong shapes.

        Raises:
            UserError: the network can't be run.
        """
        if self._other is not None:
            inputs, expected = self._other
            found = largest_difference(run_once(network, inputs, "it"), expected)
            # Random numbers may be no sensible input; they show what depends on the batch.
            if math.isinf(found) or (self.tolerance and found > 100 * self.tolerance):
                return found
        inputs, expected = self._example
        return largest_difference(run_once(network, inputs, "it"), expected)

    def first(self, forms: Iterator[_Form], notes: list[str]) -> _Form:
        """Return the first form that is right; the network as given is right by definition."""
        for form in forms:
            if form.name == "as given":
                return replace(form, difference=0.0)
            fused = f"{form.name} and fused" if form.epilogues else form.name
            fused += f" in tiles of {form.tiles}" if form.tiles else ""
            try:
                difference = self.difference(form.network)
            except UserError as error:
                notes.append(f"given up, {fused}: {error}")
                continue
            if self.right(difference):
                return replace(form, difference=difference)
            notes.append(f"given up, {fused}: the outputs differ by {difference:.1e} relative")
        raise AssertionError("forms end with the network as given")

    def right(self, difference: float) -> bool:
        """Tell whether outputs that differ so much are the model's."""
        return difference <= (math.inf if self.tolerance is None else self.tolerance) and not (
            math.isinf(difference)
        )


def _fastest(
    form: _Form, dense: _Form, inputs: tuple[Tensor, ...], checks: _Checks, notes: list[str]
) -> tuple[_Form, str, dict[str, float]]:
    """Time the whole network: packed or dense, and in which memory format of dense layers."""
    tried: dict[str, tuple[_Form, str]] = {}
    for candidate in (form, dense) if form.packed else (form,):
        tried[candidate.name] = candidate, "contiguous"
        modules = list(candidate.network.modules())
        convolutions = any(isinstance(module, nn.Conv2d | nn.Conv3d) for module in modules)
        if convolutions and inputs[0].device.type == "cpu":
            reordered = in_memory_format(copy.deepcopy(candidate.network), "channels_last")
            again = replace(candidate, network=reordered)
            tried[f"{candidate.name}, channels_last"] = again, "channels_last"
    if len(tried) == 1:
        return form, "contiguous", {}
    times = time_networks({name: each.network for name, (each, _) in tried.items()}, inputs)
    best = form.name
    for name in tried:
        if times[name] < CLEARLY * times[best]:
            best = name
    chosen, memory_format = tried[best]
    if best == form.name:
        return form, "contiguous", times
    difference = checks.difference(chosen.network)
    if not checks.right(difference):
        notes.append(f"{best} is faster, but its outputs differ by {difference:.1e} relative")
        return form, "contiguous", times
    if form.packed and not chosen.packed:
        notes.append("nothing is packed: the whole network is faster dense")
    return replace(chosen, difference=difference), memory_format, times


def _in_parts(
    form: _Form, inputs: tuple[Tensor, ...], checks: _Checks
) -> tuple[_Form, int | None, dict[str, float]]:
    """Time the network on parts of the batch: say how many samples at once are the fastest."""
    samples = min(len(x) if x.dim() else 0 for x in inputs)
    counts = [count for count in AT_ONCE if count < samples]
    if not counts or not form.packed or inputs[0].device.type != "cpu":
        return form, None, {}
    differences = {}
    for count in counts:
        parts = functools.partial(_run_parts, form.network, count)
        with contextlib.suppress(UserError, RuntimeError):  # the samples aren't the first axis
            difference = checks.difference(parts)
            if checks.right(difference):
                differences[count] = difference
    calls: dict[str, Callable[..., object]] = {
        f"{form.name}, {count} at once": functools.partial(_run_parts, form.network, count)
        for count in differences
    }
    if not calls:
        return form, None, {}
    times = time_networks({"all": form.network, **calls}, inputs)
    together = times.pop("all")
    best = min(differences, key=lambda count: times[f"{form.name}, {count} at once"])
    if times[f"{form.name}, {best} at once"] >= CLEARLY * together:
        return form, None, times
    return replace(form, difference=differences[best]), best, times


def _run_parts(network: nn.Module, count: int, *inputs: Tensor) -> object:
    return in_parts(network, inputs, count)


def _final(row: LayerChoice, form: _Form) -> LayerChoice:
    if row.layer not in form.packed:
        return row
    epilogue = form.epilogues.get(row.layer)
    row = replace(row, chosen="packed", fused=str(epilogue) if epilogue else None)
    module = form.network.get_submodule(row.layer)
    if not isinstance(module, PackedWinogradConv3d):
        return row
    most = math.prod(coordinates(module.tile, module.short))
    return replace(row, tile=module.tile, columns=(len(module.columns), most))


def _check(model: nn.Module, precision: str, choose: str) -> None:
    if isinstance(model, OptimizedModel) or (
        isinstance(model, nn.Module) and any(isinstance(m, KernelLayer) for m in model.modules())
    ):
        raise UserError(
            "the model is optimized already: give the model that it was made from, since packed "
            "weights can't be folded or timed against dense ones"
        )
    if precision not in PRECISIONS:
        raise unknown_name("precision", str(precision), PRECISIONS)
    if choose not in CHOICES:
        raise unknown_name("choose", str(choose), CHOICES)
