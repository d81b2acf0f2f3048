"""The part `dcd` of `gan_step.py`: multiplications and time of one student's step of DCD."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import textbook_dcd
from common import interleave, paired_ratio, summary
from tenfold.data import TranslationData
from tenfold.data.base import ArraySet
from tenfold.methods.dcd import DCD
from tenfold.methods.translation import StudentStep
from tenfold.nn.taps import forward_with_taps
from tenfold.tasks.gan_teachers import CycleTeacher
from tenfold.tasks.translation import student_losses
from tenfold.tasks.translation_setup import TranslationExperiment, set_up_translation

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512))
RECIPE: dict[str, Any] = {
    "task": "translation",
    "model": {"name": "mobile_resnet_generator", "ngf": 16},
    "methods": {"dcd": {}},
    "train": {"epochs": 1, "batch_size": 1},
}


def random_vgg(target: Path) -> Path:
    """Write weights of VGG16's first stages, drawn at random: what a step costs is the same."""
    random, state = torch.Generator().manual_seed(0), {}
    index, inputs = 0, 3
    for number, widths in enumerate(STAGES):
        index += number > 0  # the pooling
        for outputs in widths:
            weight = torch.randn(outputs, inputs, 3, 3, generator=random)
            state[f"features.{index}.weight"] = weight * (2 / (9 * inputs)) ** 0.5
            state[f"features.{index}.bias"] = torch.zeros(outputs)
            index, inputs = index + 2, outputs
    torch.save(state, target)
    return target


def open_experiment(side: int, teacher: int, ndf: int) -> TranslationExperiment:
    """Set up a run of DCD as the recipe horse2zebra has it, on made-up images."""
    pictures = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    one = ArraySet(pictures, [0], "blank")
    data = TranslationData(name="blank", train=[one, one], test=[one, one], size=(side, side))
    with tempfile.TemporaryDirectory() as folder:
        weights = random_vgg(Path(folder) / "vgg16.pth")
        gan = {"teacher": {"ngf": teacher}, "ndf": ndf, "perceptual": str(weights)}
        experiment = set_up_translation({**RECIPE, "gan": gan}, data=data)
    for method in experiment.methods:
        method.driven_by_engine = True
        experiment.student = method.attach(experiment.student, total_steps=10_000)
    for network in (experiment.student, experiment.teacher, experiment.perceptual):
        assert network is not None
        network.to(memory_format=torch.channels_last)
        network.train()
    return experiment


def our_step(experiment: TranslationExperiment, source: Tensor) -> dict[str, Tensor]:
    """Run a student's step as the engine does, without the optimizer."""
    teacher = experiment.teacher
    assert isinstance(teacher, CycleTeacher)
    made = teacher.make(source, experiment.taps)
    image, maps = forward_with_taps(experiment.student, source, experiment.taps)
    step = StudentStep(
        source=source,
        student=image,
        teacher=made.image,
        student_maps=maps,
        teacher_maps=made.maps,
        discriminator=teacher.discriminator,
        paired=False,
    )
    losses = student_losses(experiment, step, experiment.distilling)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {name: loss.detach() for name, loss in losses.items()}


def direct_step(experiment: TranslationExperiment, source: Tensor) -> dict[str, Tensor]:
    """Run the same step as `textbook_dcd` does, with the same networks and connectors."""
    teacher, (dcd,) = experiment.teacher, experiment.methods
    assert isinstance(teacher, CycleTeacher)
    assert isinstance(dcd, DCD)
    assert experiment.perceptual is not None
    teacher.snapshot.requires_grad_(True)
    connectors = {"student": dcd._student_connectors, "teacher": dcd._teacher_connectors}
    for connector in connectors["teacher"].values():
        connector.requires_grad_(True)
    try:
        return textbook_dcd.student_step(
            source,
            experiment.student,
            teacher.snapshot,
            teacher.discriminator,
            connectors["student"],
            connectors["teacher"],
            experiment.perceptual,
            f"model.{len(teacher.discriminator.model) - 2}",  # type: ignore[arg-type]
        )
    finally:
        teacher.snapshot.requires_grad_(False)
        for connector in connectors["teacher"].values():
            connector.requires_grad_(False)


def backward_flops(
    gradient: list[int],
    images: list[int],
    weight: list[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    needed: list[bool],
    out_shape: object = None,
) -> int:
    """Count a convolution's backward pass: as much as its forward pass for each gradient needed.

    PyTorch's own formula takes the weight's gradient of a depthwise convolution for that of a
    dense one, which is as many times too much as there are channels.
    """
    once = conv_flop_count(images, weight, gradient, transposed=transposed)
    return once * (needed[0] + needed[1])


def multiplications(call: Callable[[], object]) -> dict[str, float]:
    """Return the multiplications of a call in 10^9, of convolutions and of matrix products."""
    formulas = {torch.ops.aten.convolution_backward: backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    gmac = {str(operator): count / 2e9 for operator, count in counts.items()}
    convolutions = sum(count for name, count in gmac.items() if "convolution" in name)
    return {
        "convolutions": round(convolutions, 3),
        "matrix_products": round(sum(gmac.values()) - convolutions, 3),
    }


def forget_gradients(experiment: TranslationExperiment) -> None:
    networks: tuple[nn.Module, ...] = (experiment.student, experiment.teacher)
    for network in networks:
        network.zero_grad()


def dcd_step(
    batch: int, side: int, rounds: int, teacher: int = 64, ndf: int = 64
) -> dict[str, Any]:
    """Count and time a student's step of DCD, ours and the direct one."""
    experiment = open_experiment(side, teacher, ndf)
    random = torch.Generator().manual_seed(0)
    source = torch.rand(batch, 3, side, side, generator=random) * 2 - 1
    source = source.contiguous(memory_format=torch.channels_last)
    steps = {"direct": direct_step, "ours": our_step}
    values, gradients = {}, {}
    for name, step in steps.items():
        forget_gradients(experiment)
        values[name] = {loss: float(value) for loss, value in step(experiment, source).items()}
        gradients[name] = [p.grad is not None for p in experiment.teacher.parameters()]
    found: dict[str, Any] = {
        "batch": batch,
        "side": side,
        "teacher_ngf": teacher,
        "student_ngf": RECIPE["model"]["ngf"],
        "ndf": ndf,
        "values": values,
        "teacher_gradients": {name: sum(there) for name, there in gradients.items()},
        "gmac": {
            name: multiplications(functools.partial(step, experiment, source))
            for name, step in steps.items()
        },
    }
    print(found, flush=True)
    calls = {name: functools.partial(step, experiment, source) for name, step in steps.items()}
    times = interleave(calls, rounds, warm_up=1)
    found |= {name: summary(times[name]) for name in steps}
    found["speedup"] = paired_ratio(times["direct"], times["ours"])
    print(found["direct"], found["ours"], found["speedup"], flush=True)
    return found
