"""DCD's student step as a textbook would write it, with what the authors' released code wastes.

The rival of `gan_step.py`. It gives the same gradient to the student as the paper's step does, but
for the adversarial loss, which the released code takes of the teacher's image, where it teaches the
student nothing:

- the teacher runs with its graph, and the adversarial loss goes back through all of it;
- the discriminator isn't frozen: each loss that passes through it makes gradients of its weights;
- connectors and discriminator run tap by tap, those of the teacher with gradients too, and the
  discriminator to its last layer, whose fourth block is caught by a hook;
- maps are caught by hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tenfold.methods.perceptual import Perceptual

__all__ = ["student_step"]


def caught(
    network: nn.Module, names: Sequence[str], images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a network's output, and those of the modules named, caught by hooks."""
    modules, maps = dict(network.named_modules()), dict[str, Tensor]()
    handles = [
        modules[name].register_forward_hook(
            lambda module, inputs, output, name=name: maps.__setitem__(name, output.clone())
        )
        for name in names
    ]
    try:
        return network(images), maps
    finally:
        for handle in handles:
            handle.remove()


def student_step(
    source: Tensor,
    student: nn.Module,
    teacher: nn.Module,
    discriminator: nn.Module,
    student_connectors: Mapping[str, nn.Module],
    teacher_connectors: Mapping[str, nn.Module],
    perceptual: Perceptual,
    block: str,
) -> dict[str, Tensor]:
    """Run the step forward and backward, and return its losses.

    Args:
        source: images `(B, C, H, W)`.
        student: gets gradients; so do, for nothing, teacher and discriminator.
        teacher: of the same taps.
        discriminator: reads images alone, as CycleGAN's does.
        student_connectors: by tap.
        teacher_connectors: by tap.
        perceptual: style and feature losses.
        block: the discriminator's module whose output is compared.
    """
    names = list(student_connectors)
    wanted, teacher_maps = caught(teacher, names, source)
    image, student_maps = caught(student, names, source)
    losses = dict(perceptual(image, wanted.detach()))
    losses["adversarial"] = (discriminator(wanted) - 1).square().mean()
    distances = []
    for name in names:
        seen = [
            caught(discriminator, [block], connectors[name](maps[name]))[1][block]
            for connectors, maps in (
                (student_connectors, student_maps),
                (teacher_connectors, {key: one.detach() for key, one in teacher_maps.items()}),
            )
        ]
        distances.append((seen[0] - seen[1]).abs().mean())
    losses["dcd"] = torch.stack(distances).sum()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {name: loss.detach() for name, loss in losses.items()}
