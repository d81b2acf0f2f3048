"""From a recipe to the objects of a run that learns to remove shadows, and the plan of the run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data.region_pairs import RegionPairs
from tenfold.data.registry import create_shadows
from tenfold.data.shadows import ShadowData
from tenfold.errors import UserError
from tenfold.measure import Cost, count_cost
from tenfold.methods import LayerPlan, Method
from tenfold.methods.hqss import HQSSTraining
from tenfold.methods.labnet import LABNetTraining
from tenfold.methods.schedule import Schedule
from tenfold.nn import models
from tenfold.nn.hqss_networks import HQSSRemover
from tenfold.nn.labnet_blocks import FixedHighPass
from tenfold.nn.models import Network
from tenfold.tasks.loading import open_artifact, wrapped
from tenfold.tasks.optimization import epoch_sizes, make_optimizer
from tenfold.tasks.other_networks import OtherNetwork, frozen
from tenfold.tasks.recipe import Recipe, load_recipe
from tenfold.tasks.setup import Plan, join_plans, layer_rows, planned
from tenfold.tasks.starting_point import initialize

__all__ = ["RemovalExperiment", "plan_removal", "removal_example", "removal_rows", "set_up_removal"]

TASK = "shadow_removal"


@dataclass
class RemovalExperiment:
    """What a recipe of the task shadow_removal names, made.

    Attributes:
        recipe: checked.
        data: photos with shadows.
        model: the network that is trained.
        network: how it was built.
        methods: in the order of their stages.
        training: the losses, the guess and the teacher: the recipe's `labnet`, or its defaults.
        synthesis: makes the pairs, where the recipe has `hqss`; else None.
        fresh: parameters that `init` had nothing for.
        others: networks that methods asked for.
        plans: what methods do to the layers, by name.
    """

    recipe: Recipe
    data: ShadowData
    model: nn.Module
    network: Network
    methods: list[Method]
    training: LABNetTraining
    synthesis: HQSSTraining | None
    fresh: list[str] = field(default_factory=list)
    others: list[OtherNetwork] = field(default_factory=list)
    plans: dict[str, LayerPlan] = field(default_factory=dict)

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        """Codes and a mask, `(1, 3, H, W)` and `(1, 1, H, W)`, of the size that is trained on."""
        return removal_example(self.data.size)

    @property
    def label(self) -> str:
        """What the model is called in tables."""
        return "+".join(method.key() for method in self.methods) or self.recipe.model_name

    @property
    def own_losses(self) -> bool:
        """Whether HQSS's own remover learns from its pairs, by its own losses."""
        return self.synthesis is not None and isinstance(self.model, HQSSRemover)

    @cached_property
    def pairs(self) -> Any:
        """What makes the loader of training batches with lit regions; None: the data's own does."""
        if self.synthesis is None:
            return None
        return partial(RegionPairs(self.data).train_loader, augment=self.recipe.train.augment)


def removal_example(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return grey codes and a mask of a quarter of the image: what a remover is timed with.

    The attention of LAB-Net costs as much as there is shadow, and nothing without any.

    Args:
        size: height and width.
    """
    height, width = size
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    return torch.full((1, 3, height, width), 0.5), mask


def set_up_removal(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: Any = None,
    overrides: Mapping[str, Any] | None = None,
) -> RemovalExperiment:
    """Make what a recipe names, and refuse what can't work before anything starts.

    Args:
        recipe: a shipped name, a YAML file, a mapping or a recipe.
        model: a network to train instead of the one that the recipe names; maps codes and masks to
            codes.
        data: photos instead of what the recipe names.
        overrides: values by dotted key.

    Raises:
        UserError: see `load_recipe`, the data, the network, the methods and their networks.
    """
    values: Any = recipe
    if isinstance(recipe, Mapping):  # objects stand in for names
        values = dict(recipe)
        if model is not None:
            values.setdefault("model", type(model).__name__)
        if data is not None:
            values.setdefault("data", data.name)
    checked = load_recipe(values, overrides)
    if checked.init == "pretrained":
        raise UserError("init: pretrained is for classifiers: give a run, an artifact or a file")
    methods = checked.make_methods()
    if data is None:
        data = create_shadows(checked.data)
    elif not isinstance(data, ShadowData):
        raise UserError(
            f"data is {type(data).__name__}: expected tenfold.data.ShadowData, or leave it to the "
            "recipe"
        )
    given = next((each for each in methods if isinstance(each, LABNetTraining)), None)
    synthesis = next((each for each in methods if isinstance(each, HQSSTraining)), None)
    _check_pairs(data, synthesis)
    network = Network(None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checked.seed)
        if model is None:
            model, network = build_remover(checked)
    model, network = wrapped(model, network, methods, checked)
    fresh = initialize(model, network, checked.init) if checked.init else []
    experiment = RemovalExperiment(
        checked, data, model, network, methods, given or LABNetTraining(), synthesis, fresh
    )
    _try_forward(experiment)
    _open_others(experiment)
    _try_the_rest(experiment)
    return experiment


def build_remover(recipe: Recipe) -> tuple[nn.Module, Network]:
    """Build a recipe's network with fresh weights.

    Raises:
        UserError: an unknown name, or a network that takes no mask.
    """
    return models.build(recipe.model_name, task=TASK, options=recipe.model_options)


def plan_removal(experiment: RemovalExperiment) -> Plan:
    """Say what the network costs, what methods do to its layers, and what it is trained by."""
    cost = count_cost(experiment.model, experiment.example)
    height, width = experiment.data.size
    notes = [
        "",
        f"crops       {height}x{width} of {experiment.data.train_size:,} training photos; MACs are "
        "of one with a quarter in shadow",
    ]
    if experiment.synthesis is not None:
        notes.append("pairs       painted by HQSS; no photo without shadow is read")
    if experiment.own_losses:
        notes.append("losses      HQSS's own, of its remover")
    else:
        notes += experiment.training.notes()
    if experiment.fresh:
        shown = ", ".join(experiment.fresh[:4])
        notes.append(f"init        {shown} start fresh: the given weights don't have them")
    notes += [f"data        left out: {skipped}" for skipped in experiment.data.skipped[:3]]
    notes += [f"{other.key:<12}{other.role}: {other.origin}" for other in experiment.others]
    return planned(cost, removal_rows(cost, experiment.plans), notes)


def removal_rows(
    cost: Cost, plans: Mapping[str, LayerPlan], measured: bool = False
) -> list[dict[str, Any]]:
    """Return `layer_rows`, in which the fixed Laplacians count as whole: their zeros save nothing.

    Args:
        cost: of the network.
        plans: by layer.
        measured: take the kept share from the weights as they are, not from the plan.
    """
    rows = layer_rows(cost, plans, measured)
    for row in rows:
        if row["type"] == FixedHighPass.__name__:
            row |= {"kept": 1.0, "effective_macs": row["macs"], "reason": "fixed, not a weight"}
    return rows


def _check_pairs(data: ShadowData, synthesis: HQSSTraining | None) -> None:
    if synthesis is not None and synthesis.synthesizer is None:
        raise UserError(
            "methods.hqss lacks synthesizer: expected a finished run of the task shadow_synthesis, "
            "which paints the shadows that a remover learns from"
        )
    if synthesis is None and not data.has_targets:
        raise UserError(
            f"{data.name} has no photos without shadow: expected triplets of photo, mask and photo "
            "without shadow, or methods.hqss with a synthesizer, which needs none"
        )


def _open_others(experiment: RemovalExperiment) -> None:
    """Give methods the networks that they ask for."""
    training = experiment.training
    training.open_features()
    for method in experiment.methods:
        for role, name in method.networks().items():
            what = f"methods.{method.key()}.{role}"
            task = TASK if method is training else "shadow_synthesis"
            if not Path(str(name)).is_dir():
                raise UserError(
                    f"{what}: {name} does not exist: expected a finished run or an artifact of "
                    f"the task {task}"
                )
            _, found = open_artifact(str(name))
            if (found.recipe or {}).get("task") != task:
                raise UserError(
                    f"{what}: {name} is of the task {(found.recipe or {}).get('task')}: expected "
                    f"one of {task}"
                )
            if method is training:
                _check_teacher(experiment, what, str(name), found.preprocessing or {})
            network = frozen(found.model())
            try:
                method.use_network(role, network)
            except UserError as error:
                raise UserError(f"methods.{method.key()}: {error}") from error
            experiment.others.append(
                OtherNetwork(method.key(), role, network, str(name), run=Path(str(name)))
            )


def _check_teacher(
    experiment: RemovalExperiment, what: str, name: str, facts: Mapping[str, Any]
) -> None:
    ours = {
        "guess": experiment.training.guess,
        "space": str(getattr(experiment.model, "space", "lab")),
    }
    for key, own in ours.items():
        theirs = str(facts.get(key, own))
        if theirs != own:
            raise UserError(
                f"{what}: {name} was trained with {key} {theirs}, and this recipe has {own}: "
                "expected the same, as both are given the same codes"
            )


def _try_forward(experiment: RemovalExperiment) -> None:
    """Run one photo through the network, so that a wrong shape stops the run now."""
    model, recipe = experiment.model, experiment.recipe
    codes, mask = experiment.example
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            made = model(codes.to(device), mask.to(device))
    except UserError as error:
        raise UserError(f"crops of {experiment.data.name}: {error}") from error
    except Exception as error:
        raise UserError(
            f"model {recipe.model_name} doesn't take codes {tuple(codes.shape)} and masks "
            f"{tuple(mask.shape)}: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(made, Tensor) or made.shape != codes.shape:
        given = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise UserError(
            f"model {recipe.model_name} returns {given} for one photo: expected codes of shape "
            f"{tuple(codes.shape)}"
        )


def _try_the_rest(experiment: RemovalExperiment) -> None:
    """Raise now what would otherwise be raised after an hour, or after an old run is gone."""
    train, methods = experiment.recipe.train, experiment.methods
    experiment.plans = join_plans(methods, experiment.model)
    for method in methods:
        if method.wants_trained_start and not experiment.recipe.init:
            warnings.warn(
                f"{method.key()} is made for a trained network, and this recipe starts from fresh "
                "weights: give init, such as a run",
                stacklevel=2,
            )
    make_optimizer(
        train.optimizer, experiment.model.parameters(), lr=train.lr, weight_decay=train.weight_decay
    )
    shared = {"batch_size": train.batch_size, "seed": experiment.recipe.seed, "workers": 0}
    if experiment.pairs is None:
        experiment.data.train_loader(augment=train.augment, **shared)
    else:
        experiment.pairs(**shared)
    sizes = epoch_sizes(experiment.data.train_size, train, methods)
    for method in methods:
        method.check_schedule(Schedule(sum(sizes), sizes))
