"""The two losses of adversarial training that CycleGAN (least squares) and pix2pix (hinge) use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tenfold.errors import unknown_name

__all__ = ["MODES", "discriminator_loss", "generator_loss", "judging"]

MODES = ("lsgan", "hinge")


def discriminator_loss(mode: str, real: Tensor, made: Tensor) -> Tensor:
    """Return the discriminator's loss of its logits for real and made images; half of the sum.

    Args:
        mode: `lsgan`, (D(r) - 1)^2 and D(f)^2; or `hinge`, max(0, 1 - D(r)) and max(0, 1 + D(f)).
        real: logits of any shape.
        made: likewise.
    """
    _check(mode)
    if mode == "lsgan":
        return 0.5 * ((real - 1).square().mean() + made.square().mean())
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + made).mean())


def generator_loss(mode: str, made: Tensor) -> Tensor:
    """Return the generator's loss of the discriminator's logits for what it made.

    Args:
        mode: `lsgan`, (D(f) - 1)^2; or `hinge`, -D(f).
        made: logits of any shape.
    """
    _check(mode)
    return (made - 1).square().mean() if mode == "lsgan" else -made.mean()


@contextlib.contextmanager
def judging(*networks: nn.Module) -> Iterator[None]:
    """Let gradients pass through networks without reaching their weights or statistics.

    Batch norms keep their mode, and leave their running statistics as they are.
    """
    parameters = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    norms = [
        (module, module.track_running_stats)
        for network in networks
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for norm, _ in norms:
            norm.track_running_stats = False
        yield
    finally:
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)
        for norm, tracked in norms:
            norm.track_running_stats = tracked


def _check(mode: str) -> None:
    if mode not in MODES:
        raise unknown_name("GAN loss", mode, MODES)
