"""From a recipe to the objects of a run (data, network, methods), and the plan of the run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenfold.data import ImageData, LabelledData, TranslationData, create
from tenfold.errors import UserError
from tenfold.measure import Cost, count_cost
from tenfold.measure.cells import cell_lines
from tenfold.methods import LayerPlan, Method, TrainingSet
from tenfold.methods.schedule import Schedule
from tenfold.nn import models
from tenfold.nn.models import Network
from tenfold.nn.supervit import SuperViT
from tenfold.tasks.classification import mixing_of
from tenfold.tasks.loading import wrapped
from tenfold.tasks.optimization import epoch_sizes, make_optimizer
from tenfold.tasks.other_networks import OtherNetwork, open_network
from tenfold.tasks.recipe import Recipe, load_recipe, task_of
from tenfold.tasks.starting_point import initialize

if TYPE_CHECKING:
    from tenfold.data.shadows import ShadowData

__all__ = ["Experiment", "Plan", "plan", "set_up", "training_set"]


@dataclass
class Experiment:
    """What a recipe names, made."""

    recipe: Recipe
    data: LabelledData
    model: nn.Module
    network: Network
    methods: list[Method]
    fresh: list[str]  # parameters that `init` had nothing for
    plans: dict[str, LayerPlan] | None = None  # of the layers, as they were ahead of training
    others: list[OtherNetwork] = field(default_factory=list)  # that methods asked for

    @property
    def example(self) -> Tensor:
        """One image of zeros, `(1, C, H, W)`, or one clip, `(1, C, T, H, W)`."""
        return torch.zeros(1, *self.data.shape)

    @property
    def label(self) -> str:
        """What the model is called beside `dense` in tables."""
        return "+".join(method.key() for method in self.methods) or "dense"


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to every layer, and what that costs and saves.

    Attributes:
        layers: one row a layer: name, type, shape, parameters, macs, kept, effective_macs,
            treatment, reason.
        macs: multiply-adds of the dense network for one image or clip.
        effective_macs: the same when zero weights are skipped; not a time.
        parameters: of the dense network.
        nonzero_parameters: those that will be left.
        notes: further lines for the reader.
    """

    layers: list[dict[str, Any]]
    macs: int
    effective_macs: int
    parameters: int
    nonzero_parameters: int
    notes: list[str]

    def __str__(self) -> str:
        """Write the plan as a table for a terminal."""
        rows = [("layer", "type", "weight", "MACs", "treatment")]
        for layer in self.layers:
            rows.append(
                (
                    layer["name"],
                    layer["type"],
                    "x".join(str(length) for length in layer["shape"]),
                    f"{layer['macs'] / 1e6:.2f} M",
                    layer["treatment"]
                    or (f"dense: {layer['reason']}" if layer["reason"] else "dense"),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  "
            f"{row[3]:>{widths[3]}}  {row[4]}"
            for row in rows
        ]
        lines.append("")
        lines.append(
            f"parameters  {self.parameters:,} → {self.nonzero_parameters:,} non-zero "
            f"({self.nonzero_parameters / max(1, self.parameters):.0%})"
        )
        lines.append(
            f"MACs        {self.macs / 1e6:,.2f} M → {self.effective_macs / 1e6:,.2f} M effective "
            f"({self.effective_macs / max(1, self.macs):.0%}; dense x kept share per layer, "
            "not a time)"
        )
        return "\n".join([*lines, *self.notes])


def set_up(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: LabelledData | TranslationData | ShadowData | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Experiment:
    """Make what a recipe names, and refuse what can't work before anything starts.

    Args:
        recipe: a shipped name, a YAML file, a mapping or a recipe.
        model: a network to train instead of the one that the recipe names.
        data: data instead of what the recipe names.
        overrides: values by dotted key.

    Raises:
        UserError: see `load_recipe`, the data, the network and the methods' plans.
    """
    values: Any = recipe
    if isinstance(recipe, Mapping):  # objects stand in for names
        values = dict(recipe)
        if model is not None:
            values.setdefault("model", type(model).__name__)
        if data is not None:
            values.setdefault("data", data.name)
    checked = load_recipe(values, overrides)
    methods = checked.make_methods()
    if data is None:
        data = create(checked.data)
    elif not isinstance(data, LabelledData):
        raise UserError(
            f"data is {type(data).__name__}: expected tenfold.data.ImageData or ClipData, or leave "
            "it to the recipe; with loaders of your own use the three lines of a method, or "
            "MethodCallback"
        )
    network = Network(None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checked.seed)
        if model is None:
            model, network = models.build(
                checked.model_name,
                num_classes=data.num_classes,
                channels=data.channels,
                size=data.size,
                frames=data.frames,
                options=checked.model_options,
            )
    # A library's weights are those of the plain network; others may be of what is made of it.
    pretrained = checked.init == "pretrained"
    fresh = initialize(model, network, "pretrained") if pretrained else []
    model, network = wrapped(model, network, methods, checked, fresh=not pretrained)
    if checked.init and not pretrained:
        fresh = initialize(model, network, checked.init)
    experiment = Experiment(checked, data, model, network, methods, fresh)
    _try_forward(experiment)
    _prepare(experiment)
    _try_the_rest(experiment)
    return experiment


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: LabelledData | TranslationData | ShadowData | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """Say what a recipe will do to every layer, without training.

    Args:
        recipe: a shipped name, a YAML file, a mapping or a recipe.
        model: a network instead of the one that the recipe names.
        data: data instead of what the recipe names.
        overrides: values by dotted key.

    Raises:
        UserError: whatever would stop the run.
    """
    task = task_of(recipe, overrides)
    if task == "translation":
        from tenfold.tasks.translation_setup import plan_translation, set_up_translation

        return plan_translation(
            set_up_translation(recipe, model, data, overrides)  # type: ignore[arg-type]
        )
    if task == "shadow_removal":
        from tenfold.tasks.removal_setup import plan_removal, set_up_removal

        return plan_removal(set_up_removal(recipe, model, data, overrides))
    if task == "shadow_synthesis":
        from tenfold.tasks.synthesis_setup import plan_synthesis, set_up_synthesis

        return plan_synthesis(set_up_synthesis(recipe, model, data, overrides))
    return make_plan(set_up(recipe, model, data, overrides))


def make_plan(experiment: Experiment) -> Plan:
    """Join the methods' plans with the cost of every layer."""
    cost = count_cost(experiment.model, experiment.example)
    rows = layer_rows(cost, layer_plans(experiment))
    notes = []
    if experiment.fresh:
        shown = ", ".join(experiment.fresh[:4])
        notes.append(f"init        {shown} start fresh: the given weights don't have them")
    for skipped in experiment.data.skipped[:3]:
        notes.append(f"data        left out: {skipped}")
    notes += [f"{other.key:<12}{other.role}: {other.origin}" for other in experiment.others]
    if isinstance(experiment.model, SuperViT):
        notes += ["", "one network, many budgets:", *cell_lines(experiment.model.table.rows)]
    if not experiment.methods:
        notes.append("methods     none: the network stays dense")
    return planned(cost, rows, notes)


def planned(cost: Cost, rows: list[dict[str, Any]], notes: list[str]) -> Plan:
    """Return a plan of `layer_rows`, with what they save in total."""
    saved = sum(row["macs"] - row["effective_macs"] for row in rows)
    gone = sum(round(_numel(row["shape"]) * (1 - row["kept"])) for row in rows)
    return Plan(rows, cost.macs, cost.macs - saved, cost.parameters, cost.parameters - gone, notes)


def layer_plans(experiment: Experiment) -> dict[str, LayerPlan]:
    """Return every layer's treatment; where several methods treat one, they are joined."""
    if experiment.plans is None:  # later, training may have put other layers in their place
        experiment.plans = join_plans(experiment.methods, experiment.model)
    return experiment.plans


def join_plans(methods: Sequence[Method], model: nn.Module) -> dict[str, LayerPlan]:
    """Return what methods will do to each layer of a network, by the layer's name."""
    plans: dict[str, LayerPlan] = {}
    for method in methods:
        for layer in method.plan(model):
            before = plans.get(layer.name)
            if before is None or not before.treatment:
                plans[layer.name] = layer
            elif layer.treatment:
                plans[layer.name] = LayerPlan(
                    name=layer.name,
                    type=layer.type,
                    shape=layer.shape,
                    treatment=f"{before.treatment}, {layer.treatment}",
                    kept=before.kept * layer.kept,
                )
    return plans


def layer_rows(
    cost: Cost, plans: Mapping[str, LayerPlan], measured: bool = False
) -> list[dict[str, Any]]:
    """Join costs and plans, one row a layer.

    Args:
        cost: of the network.
        plans: by layer.
        measured: take the kept share from the weights as they are, not from the plan.
    """
    rows: list[dict[str, Any]] = []
    for layer in cost.layers:
        planned = plans.get(layer.name)
        kept = layer.kept if measured or planned is None else planned.kept
        rows.append(
            {
                "name": layer.name,
                "type": planned.type if planned else layer.type,
                "shape": list(layer.shape),
                "parameters": layer.parameters,
                "macs": layer.macs,
                "kept": kept,
                "effective_macs": round(layer.macs * kept),
                "treatment": planned.treatment if planned else None,
                "reason": planned.reason if planned else None,
            }
        )
    return rows


def _prepare(experiment: Experiment) -> None:
    """Give methods the networks that they ask for, and have them look at network and data."""
    recipe, data = experiment.recipe, experiment.data
    for method in experiment.methods:
        images = None
        if type(method).prepare is not Method.prepare:
            with _asked_by(method):
                images = training_set(data, recipe.train.augment)
        for role, given in method.networks().items():
            other = open_network(method.key(), role, given, recipe, data)
            method.use_network(role, other.network)
            experiment.others.append(other)
        if images is not None:
            with _asked_by(method):
                method.prepare(experiment.model, images, recipe.train.epochs)
    limit = recipe.trainer.get("limit_train_batches")
    seeing_all = next((m.key() for m in experiment.methods if m.needs_every_sample), None)
    if seeing_all is not None and limit not in (None, 1.0):
        raise UserError(
            f"trainer.limit_train_batches {limit} leaves images that are never seen, and "
            f"{seeing_all} ranks them all: use data.limit"
        )


@contextlib.contextmanager
def _asked_by(method: Method) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"methods.{method.key()}: {error}") from error


def training_set(data: LabelledData, augment: str = "auto") -> TrainingSet:
    """Describe training images for methods.

    Raises:
        UserError: they are a stream, or clips.
    """
    if not isinstance(data, ImageData):
        raise UserError(
            f"it looks at training images, and {data.name} gives {data.key}s: expected data of "
            "images; leave the method out, or choose other data"
        )
    return TrainingSet(
        name=data.name,
        size=len(data.train),
        ids=data.train_ids,
        labels=data.train.labels,
        example=torch.zeros(1, data.channels, *data.size),
        num_classes=data.num_classes,
        stored=None if data.crops_stored_images(augment) else data.train_images,
        views=data.train_views(augment),
        augment=augment,
        scale=(data.mean, data.std),
    )


def _try_the_rest(experiment: Experiment) -> None:
    """Raise now what would otherwise be raised after an hour, or after an old run is gone."""
    train, methods = experiment.recipe.train, experiment.methods
    layer_plans(experiment)
    for method in methods:
        if method.wants_trained_start and not experiment.recipe.init:
            warnings.warn(
                f"{method.key()} is made for a trained network, and this recipe starts from fresh "
                "weights: give init, such as a run or pretrained",
                stacklevel=2,
            )
    for method in methods:
        if method.replaces_loss and not method.takes_mixed_labels and (train.mixup or train.cutmix):
            raise UserError(
                f"{method.key()} replaces the batch's loss: set train.mixup and cutmix to 0"
            )
        if method.makes_targets and train.label_smoothing:
            raise UserError(
                f"{method.key()} smooths labels itself: leave train.label_smoothing out, and set "
                f"methods.{method.key()}.label_smoothing"
            )
    make_optimizer(
        train.optimizer, experiment.model.parameters(), lr=train.lr, weight_decay=train.weight_decay
    )
    experiment.data.train_loader(
        batch_size=train.batch_size,
        seed=experiment.recipe.seed,
        augment=train.augment,
        workers=0,
        mixing=mixing_of(methods),
        views=any(method.wants_views() for method in methods),
    )
    sizes = epoch_sizes(experiment.data.train_size, train, methods)
    for method in methods:
        method.check_schedule(Schedule(sum(sizes), sizes))


def _try_forward(experiment: Experiment) -> None:
    """Run one image or clip through the network, so that a wrong shape stops the run now."""
    model, data = experiment.model, experiment.data
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.no_grad():  # not inference mode: what a network caches is trained with later
            logits = model(experiment.example.to(device))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model {experiment.recipe.model_name} doesn't take {data.described} ({data.name}): "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(logits, Tensor) or logits.shape != (1, data.num_classes):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"model {experiment.recipe.model_name} returns {given} for one {data.key}: expected "
            f"logits of shape (1, {data.num_classes}), one per class of {data.name}"
        )


def _numel(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
