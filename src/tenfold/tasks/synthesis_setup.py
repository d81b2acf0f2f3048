"""From a recipe to the objects of a run that learns to paint shadows, and the plan of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data.region_pairs import RegionPairs
from tenfold.data.registry import create_shadows
from tenfold.data.shadows import ShadowData
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.methods.hqss import HQSS, HQSSTraining
from tenfold.methods.schedule import Schedule
from tenfold.nn import models
from tenfold.nn.models import Network
from tenfold.tasks.optimization import make_optimizer
from tenfold.tasks.recipe import Recipe, load_recipe
from tenfold.tasks.setup import Plan, layer_rows, planned
from tenfold.tasks.starting_point import initialize

__all__ = ["SynthesisExperiment", "plan_synthesis", "set_up_synthesis", "synthesis_example"]

TASK = "shadow_synthesis"


@dataclass
class SynthesisExperiment:
    """What a recipe of the task shadow_synthesis names, made.

    Attributes:
        recipe: checked.
        data: photos with shadows; their targets aren't read.
        pairs: shadows and lit regions of the training photos.
        model: encoder, generator and discriminators.
        network: how the finished one, without discriminators, is built again.
        training: the losses.
        fresh: parameters that `init` had nothing for.
    """

    recipe: Recipe
    data: ShadowData
    pairs: RegionPairs
    model: HQSS
    network: Network
    training: HQSSTraining
    fresh: list[str] = field(default_factory=list)

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        """A shadow and a lit region, each `(1, 3, H, W)`."""
        return synthesis_example(self.data.size)

    @property
    def steps(self) -> list[int]:
        """Batches of every epoch."""
        count = -(-self.data.train_size // self.recipe.train.batch_size)
        return [count] * self.recipe.train.epochs


def synthesis_example(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a shadow and a lit region of zeros, signed codes `(1, 3, H, W)`."""
    region = torch.zeros(1, 3, *size)
    return region, region.clone()


def set_up_synthesis(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: Any = None,
    overrides: Mapping[str, Any] | None = None,
) -> SynthesisExperiment:
    """Make what a recipe names, and refuse what can't work before anything starts.

    Args:
        recipe: a shipped name, a YAML file, a mapping or a recipe.
        model: an HQSS instead of the one that the recipe names.
        data: photos instead of what the recipe names.
        overrides: values by dotted key.

    Raises:
        UserError: see `load_recipe`, the data, the network and the method.
    """
    values: Any = recipe
    if isinstance(recipe, Mapping):  # objects stand in for names
        values = dict(recipe)
        if model is not None:
            values.setdefault("model", "hqss")
        if data is not None:
            values.setdefault("data", data.name)
    checked = load_recipe(values, overrides)
    if checked.init == "pretrained":
        raise UserError("init: pretrained is for classifiers: give a run, an artifact or a file")
    methods = checked.make_methods()
    training = next((m for m in methods if isinstance(m, HQSSTraining)), None)
    if training is None:
        raise UserError(
            "methods lacks hqss, by which the task shadow_synthesis learns: write methods: "
            "{hqss: {}}"
        )
    others = [method.key() for method in methods if method is not training]
    if others:
        raise UserError(
            f"methods.{others[0]}: in the task shadow_synthesis hqss stands alone, as its networks "
            "are used to make data only; use the method on the remover that learns from it"
        )
    if training.synthesizer is not None:
        raise UserError(
            f"methods.hqss.synthesizer {training.synthesizer} is for the task shadow_removal, "
            "which learns from what a synthesizer paints: leave it out here"
        )
    if data is None:
        data = create_shadows(checked.data)
    elif not isinstance(data, ShadowData):
        raise UserError(
            f"data is {type(data).__name__}: expected tenfold.data.ShadowData, or leave it to the "
            "recipe"
        )
    network = Network(None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checked.seed)
        if model is None:
            model, network = models.build(
                checked.model_name, task=TASK, options=checked.model_options
            )
    if not isinstance(model, HQSS):
        raise UserError(
            f"model {checked.model_name} is {type(model).__name__}: expected an HQSS for the task "
            "shadow_synthesis"
        )
    if network.name is not None:
        network = Network(network.name, {**network.arguments, "discriminators": False})
    fresh = initialize(model, network, checked.init) if checked.init else []
    _try_forward(model, data)
    experiment = SynthesisExperiment(
        checked, data, RegionPairs(data), model, network, training, fresh
    )
    training.check_schedule(Schedule(sum(experiment.steps), experiment.steps))
    train = checked.train
    make_optimizer(
        train.optimizer, model.parameters(), lr=train.lr, weight_decay=train.weight_decay
    )
    experiment.pairs.train_loader(
        batch_size=train.batch_size, seed=checked.seed, augment=train.augment, workers=0
    )
    return experiment


def plan_synthesis(experiment: SynthesisExperiment) -> Plan:
    """Say what encoder and generator cost, what trains them, and on what."""
    model, data, training = experiment.model, experiment.data, experiment.training
    # Discriminators are no part of the pass, and their parameters none of the finished network.
    judges = (model.shadow_discriminator, model.lit_discriminator)
    model.shadow_discriminator = model.lit_discriminator = None
    try:
        cost = count_cost(model, experiment.example)
    finally:
        model.shadow_discriminator, model.lit_discriminator = judges
    judging = sum(p.numel() for judge in judges if judge for p in judge.parameters())
    height, width = data.size
    weights = {
        name: getattr(training, name)
        for name in ("self_reconstruction", "adversarial", "colour", "cycle", "feature_cycle")
    }
    notes = [
        "",
        f"crops       {height}x{width} of {data.train_size:,} training photos and their masks; no "
        "photo without shadow is read",
        f"judges      two discriminators of {judging // 2:,} parameters each, in training alone",
        "losses      " + ", ".join(f"{name} x {weight:g}" for name, weight in weights.items()),
    ]
    if experiment.fresh:
        shown = ", ".join(experiment.fresh[:4])
        notes.append(f"init        {shown} start fresh: the given weights don't have them")
    notes += [f"data        left out: {skipped}" for skipped in data.skipped[:3]]
    return planned(cost, layer_rows(cost, {}), notes)


def _try_forward(model: HQSS, data: ShadowData) -> None:
    """Run zeros through all networks, so that sides that don't fit stop the run now."""
    shadow, lit = synthesis_example(data.size)
    try:
        with torch.no_grad():
            painted = model(shadow, lit)
            for judge in (model.shadow_discriminator, model.lit_discriminator):
                if judge is not None:
                    judge(painted)
    except UserError as error:
        raise UserError(f"crops of {data.name}: {error}") from error
    except RuntimeError as error:
        raise UserError(
            f"crops of {data.size[0]}x{data.size[1]} are too small for the discriminators "
            f"({str(error).splitlines()[0]}): give a larger data.size, or fewer "
            "discriminator_layers"
        ) from error
