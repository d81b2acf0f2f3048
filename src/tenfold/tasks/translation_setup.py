"""From a recipe to the objects of a run that translates images, and the plan of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data import LabelledData, TranslationData, create_translation
from tenfold.errors import UserError
from tenfold.measure import count_cost
from tenfold.measure.paper_macs import paper_macs
from tenfold.methods import LayerPlan, Method
from tenfold.methods.perceptual import Perceptual
from tenfold.methods.schedule import Schedule
from tenfold.methods.translation import TranslationMethod
from tenfold.nn import models
from tenfold.nn.discriminators import PatchDiscriminator
from tenfold.nn.generators import adapted
from tenfold.nn.models import Network
from tenfold.nn.taps import maps_at, taps_of
from tenfold.tasks.extractors import open_extractor, open_perceptual
from tenfold.tasks.gan_phases import Phase, phases
from tenfold.tasks.gan_teachers import CycleTeacher, PairedTeacher
from tenfold.tasks.recipe import Recipe, load_recipe
from tenfold.tasks.setup import Plan, join_plans, layer_rows, planned
from tenfold.tasks.starting_point import initialize, read_weights
from tenfold.tasks.translation_evaluation import Reference, in_evaluation

__all__ = ["TranslationExperiment", "plan_translation", "set_up_translation"]


@dataclass
class TranslationExperiment:
    """What a recipe of the task translation names, made.

    Attributes:
        recipe: checked.
        data: images of both domains.
        student: the generator that is made small.
        network: how it was built.
        teacher: generators and discriminators that are trained with it.
        teacher_network: how the teacher's generator was built.
        methods: in the order of their stages.
        weights: of the student's losses that no method owns.
        perceptual: style and feature losses; None without.
        reference: for FID and KID; None without an extractor.
        choosing: by which teacher and student are chosen, where that isn't the held-out images.
        taps: names of the maps that methods read.
        phases: the epochs.
        notes: what the reader should know of extractors.
        plans: what methods do to the student's layers, by name.
    """

    recipe: Recipe
    data: TranslationData
    student: nn.Module
    network: Network
    teacher: PairedTeacher | CycleTeacher
    teacher_network: Network
    methods: list[Method]
    weights: dict[str, float]
    perceptual: Perceptual | None
    reference: Reference | None
    choosing: tuple[TranslationData, Reference | None] | None
    taps: tuple[str, ...]
    phases: list[Phase]
    notes: list[str]
    plans: dict[str, LayerPlan]

    @property
    def example(self) -> Tensor:
        """One image of zeros, `(1, C, H, W)`."""
        return torch.zeros(1, *self.data.shape)

    @property
    def distilling(self) -> list[TranslationMethod]:
        """The methods that add losses to the student's."""
        return [method for method in self.methods if isinstance(method, TranslationMethod)]

    @property
    def label(self) -> str:
        """What the student is called in tables."""
        return "+".join(method.key() for method in self.methods) or "student"

    @property
    def student_steps(self) -> list[int]:
        """The student's optimizer steps in each epoch in which it learns."""
        steps = -(-self.data.train_size // self.recipe.train.batch_size)
        return [steps for phase in self.phases if phase.has_student]


def set_up_translation(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    data: TranslationData | LabelledData | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TranslationExperiment:
    """Make what a recipe names, and refuse what can't work before anything starts.

    Args:
        recipe: a shipped name, a YAML file, a mapping or a recipe.
        model: a student instead of the one that the recipe names.
        data: images instead of what the recipe names.
        overrides: values by dotted key.

    Raises:
        UserError: see `load_recipe`, the data, the networks, the extractors and the methods.
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
    if data is None:
        data = create_translation(checked.data)
    elif not isinstance(data, TranslationData):
        raise UserError(
            f"data is {type(data).__name__}: expected tenfold.data.TranslationData, or leave it to "
            "the recipe"
        )
    gan, methods = checked.gan, checked.make_methods()
    chooser = None
    if gan.validation:
        try:
            data, chooser = data.holding_out(gan.validation)
        except UserError as error:
            raise UserError(f"gan.validation: {error}") from error
    distilling = [method for method in methods if isinstance(method, TranslationMethod)]
    weights = gan.student_weights(bool(distilling), data.paired)
    notes: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checked.seed)
        student, network = (
            _generator(checked.model_name, checked.model_options, data)
            if model is None
            else (model, Network(None))
        )
        if checked.init:
            initialize(student, network, checked.init)
        teacher, teacher_network = _teacher(checked, data)
    for role, one in (("model", student), ("gan.teacher", teacher.generator)):
        _try_forward(role, one, data)
    for distiller in distilling:
        try:
            distiller.use_network("teacher", teacher.generator)
            distiller.use_network("discriminator", teacher.discriminator)
            distiller.use_setting(data.paired, data.size)
        except UserError as error:
            raise UserError(f"methods.{distiller.key()}: {error}") from error
    perceptual = None
    if weights["style"] or weights["feature"]:
        extractor = open_perceptual(gan.perceptual or "vgg16", data.target_channels)
        notes.append(f"perceptual  style and feature losses by {extractor}")
        perceptual = Perceptual(extractor, style=weights["style"], feature=weights["feature"])
    reference = None
    if gan.extractor is not None:
        found = open_extractor(gan.extractor, data.target_channels)
        notes.append(f"extractor   FID and KID by {found}")
        reference = Reference(found, data)
    names: list[str] = []
    for distiller in distilling:
        wanted = distiller.tap_names()
        names += taps_of(student, wanted) if wanted is None else wanted
    _check_taps(tuple(names), student, teacher.generator)
    experiment = TranslationExperiment(
        recipe=checked,
        data=data,
        student=student,
        network=network,
        teacher=teacher,
        teacher_network=teacher_network,
        methods=methods,
        weights=weights,
        perceptual=perceptual,
        reference=reference,
        choosing=None
        if chooser is None
        else (chooser, None if reference is None else Reference(reference.extractor, chooser)),
        taps=tuple(dict.fromkeys(names)),
        phases=phases(gan, checked.train.epochs, data.paired),
        notes=notes,
        plans=join_plans(methods, student),
    )
    sizes = experiment.student_steps
    for method in methods:
        method.check_schedule(Schedule(sum(sizes), sizes))
    data.train_loader(batch_size=checked.train.batch_size, seed=checked.seed,
                      augment=checked.train.augment, workers=0)  # fmt: skip
    return experiment


def plan_translation(experiment: TranslationExperiment) -> Plan:
    """Say what each network costs, and what the student is trained by."""
    cost = count_cost(experiment.student, experiment.example)
    notes = ["", "networks, for one image of the training size:"]
    networks = {
        "student": (
            experiment.network.name or type(experiment.student).__name__,
            experiment.student,
        ),
        "teacher": (experiment.teacher_network.name or "", experiment.teacher.generator),
    }
    for role, (name, network) in networks.items():
        true = count_cost(network, experiment.example)
        notes.append(
            f"{role:<12}{name.removeprefix('tenfold/')}: {true.parameters:,} parameters, "
            f"{true.macs / 1e9:.3f} GMAC ({paper_macs(network, experiment.example) / 1e9:.3f} as "
            "the papers count transposed convolutions)"
        )
    losses = [f"{name} x {weight:g}" for name, weight in experiment.weights.items() if weight]
    losses += [method.key() for method in experiment.distilling]
    notes.append(f"student     learns by {', '.join(losses)}")
    passes = [phase.learns for phase in experiment.phases]
    counted = {kind: passes.count(kind) for kind in dict.fromkeys(passes)}
    notes.append("epochs      " + ", ".join(f"{count} {kind}" for kind, count in counted.items()))
    notes += [f"data        left out: {skipped}" for skipped in experiment.data.skipped[:3]]
    rows = layer_rows(cost, experiment.plans)
    return planned(cost, rows, [*notes, *experiment.notes])


def _teacher(recipe: Recipe, data: TranslationData) -> tuple[PairedTeacher | CycleTeacher, Network]:
    gan = recipe.gan
    name, options = gan.teacher_of(recipe.model_name)
    if "norm" in recipe.model_options:
        options.setdefault("norm", recipe.model_options["norm"])
    generator, network = _generator(name, options, data)
    if gan.teacher_init is not None:
        load_whole(generator, gan.teacher_init, "gan.teacher_init")
    norm = str(getattr(generator, "norm", "instance"))
    ndf = gan.ndf or (128 if data.paired else 64)
    loss = gan.loss or ("hinge" if data.paired else "lsgan")
    sides = (data.channels, data.target_channels)
    discriminator = PatchDiscriminator(sum(sides) if data.paired else sides[1], ndf, norm)
    if gan.discriminator_init is not None:
        load_whole(discriminator, gan.discriminator_init, "gan.discriminator_init")
    if data.paired:
        return PairedTeacher(generator, discriminator, loss, gan.reconstruction), network
    back, _ = _generator(name, options, data, back=True)
    return (
        CycleTeacher(
            generator, back, discriminator, PatchDiscriminator(sides[0], ndf, norm), loss,
            gan.cycle, gan.identity, gan.pool,
        ),
        network,
    )  # fmt: skip


def load_whole(network: nn.Module, path: str, key: str) -> None:
    """Load a checkpoint that must fit a network in every weight.

    Args:
        network: filled in place; ours take the names of the authors' code.
        path: a .pth or .safetensors file, a run or an artifact.
        key: of the recipe, for messages.

    Raises:
        UserError: weights are missing, unknown or of other shapes; they are named.
    """
    state, own = adapted(read_weights(Path(path)), network), network.state_dict()
    found = [f"missing {name}" for name in own if name not in state]
    found += [f"unknown {name}" for name in state if name not in own]
    found += [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if found:
        raise UserError(
            f"{key} {path} doesn't fit {type(network).__name__}: {'; '.join(found[:5])}"
            f"{f' and {len(found) - 5} more' if len(found) > 5 else ''}; give the arguments "
            "that it was trained with, such as ngf"
        )
    network.load_state_dict(state)


def _generator(
    name: str, options: Mapping[str, Any], data: TranslationData, back: bool = False
) -> tuple[nn.Module, Network]:
    sides = (data.channels, data.target_channels)
    channels, outputs = sides[::-1] if back else sides
    return models.build(
        name, channels=channels, outputs=outputs, size=data.size, options=dict(options)
    )


def _check_taps(names: tuple[str, ...], student: nn.Module, teacher: nn.Module) -> None:
    """Refuse taps that one of the networks doesn't have, or whose maps differ in size."""
    if not names:
        return
    mine, theirs = maps_at(student, names), maps_at(teacher, names)
    for name in names:
        sizes = [tuple(maps[name].shape[2:]) for maps in (mine, theirs)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"tap {name}: student and teacher have maps of {sizes[0]} and {sizes[1]} pixels "
                "there: choose taps of equal size"
            )


def _try_forward(role: str, network: nn.Module, data: TranslationData) -> None:
    """Run one image through a network, so that a wrong shape stops the run now."""
    with in_evaluation(network), torch.no_grad():
        try:
            image = network(torch.zeros(1, *data.shape))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{role} doesn't take {data.described} ({data.name}): "
                f"{(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error
    wanted = (1, data.target_channels, *data.size)
    if not isinstance(image, Tensor) or tuple(image.shape) != wanted:
        given = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise UserError(
            f"{role} returns {given} for one image: expected an image of shape {wanted}"
        )
