"""Teachers that are trained while a student imitates them: pix2pix for pairs, CycleGAN otherwise.

Both are modules with a `step`, which takes optimizers and a way to call backward: the same code
serves the engine, benchmarks and loops of one's own. A student's step touches neither of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.nn.adversarial import discriminator_loss, generator_loss, judging
from tenfold.nn.taps import forward_with_taps
from tenfold.tasks.image_pool import ImagePool

__all__ = ["CycleTeacher", "Made", "PairedTeacher", "Stepper", "check_losses"]

Backward = Callable[[Tensor], None]


class Stepper(Protocol):
    """What is needed of an optimizer."""

    def step(self) -> object:
        """Update the weights."""
        ...

    def zero_grad(self) -> object:
        """Forget the gradients."""
        ...


@dataclass(frozen=True)
class Made:
    """What a teacher made of source images, without graphs.

    Attributes:
        image: `(B, C, H, W)` in [-1, 1].
        maps: at the taps, by name.
        losses: of the teacher's own step, by name.
    """

    image: Tensor
    maps: dict[str, Tensor]
    losses: dict[str, Tensor]


class PairedTeacher(nn.Module):
    """A generator that learns from pairs, and its conditional discriminator (pix2pix).

    Args:
        generator: of any kind.
        discriminator: reads source and image, one after the other.
        loss: hinge or lsgan.
        reconstruction: weight of the L1 distance to the target.
    """

    paired = True

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: str = "hinge",
        reconstruction: float = 100.0,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.loss = loss
        self.reconstruction = reconstruction

    @property
    def source(self) -> nn.Module:
        """The network that a student imitates."""
        return self.generator

    def parameters_of_generators(self) -> list[nn.Parameter]:
        """Return what the generator's optimizer trains."""
        return list(self.generator.parameters())

    def parameters_of_discriminators(self) -> list[nn.Parameter]:
        """Return what the discriminator's optimizer trains."""
        return list(self.discriminator.parameters())

    def step(
        self,
        source: Tensor,
        target: Tensor,
        optimizers: tuple[Stepper, Stepper],
        taps: Sequence[str] = (),
        backward: Backward = Tensor.backward,
        learns: bool = True,
    ) -> Made:
        """Make images, and let discriminator and generator learn from them.

        The generator's gradient comes from the discriminator's weights ahead of its own step; then
        both step.

        Args:
            source: `(B, C, H, W)` in [-1, 1].
            target: what is wanted.
            optimizers: of the generator and of the discriminator.
            taps: names of the maps that a student needs.
            backward: called with a loss.
            learns: False: only make images.
        """
        with torch.set_grad_enabled(learns):
            image, maps = forward_with_taps(self.generator, source, taps)
        losses: dict[str, Tensor] = {}
        if learns:
            real = self.discriminator(torch.cat([source, target], 1))
            made = self.discriminator(torch.cat([source, image.detach()], 1))
            losses["discriminator"] = discriminator_loss(self.loss, real, made)
            with judging(self.discriminator):
                seen = self.discriminator(torch.cat([source, image], 1))
            losses["teacher_adversarial"] = generator_loss(self.loss, seen)
            distance = (image - target).abs().mean()
            losses["teacher_reconstruction"] = self.reconstruction * distance
            check_losses(losses)
            _learn(losses, optimizers, backward)
        kept = {name: each.detach() for name, each in losses.items()}
        return Made(image.detach(), {name: each.detach() for name, each in maps.items()}, kept)

    def judge(self, source: Tensor, image: Tensor) -> Tensor:
        """Return the student's adversarial loss for images that it made of `source`."""
        with judging(self.discriminator):
            return generator_loss(self.loss, self.discriminator(torch.cat([source, image], 1)))


class CycleTeacher(nn.Module):
    """Two generators that learn from unpaired images by going there and back (CycleGAN).

    Args:
        generator: from A to B, the one that a student imitates.
        back: from B to A.
        discriminator: judges images of B.
        discriminator_back: judges images of A.
        loss: lsgan or hinge.
        cycle: weight of the way there and back.
        identity: weight of leaving a target image alone, as a share of `cycle`.
        pool: made images that each discriminator is shown again.
    """

    paired = False

    def __init__(
        self,
        generator: nn.Module,
        back: nn.Module,
        discriminator: nn.Module,
        discriminator_back: nn.Module,
        loss: str = "lsgan",
        cycle: float = 10.0,
        identity: float = 0.5,
        pool: int = 50,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.back = back
        self.discriminator = discriminator
        self.discriminator_back = discriminator_back
        self.snapshot = copy.deepcopy(generator).requires_grad_(False)
        self.loss = loss
        self.cycle = cycle
        self.identity = identity
        self.pools = (ImagePool(pool), ImagePool(pool))
        norms = nn.modules.batchnorm._BatchNorm
        # Images that go through a network together stay apart only without batch norms.
        self.together = not any(isinstance(module, norms) for module in self.modules())

    @property
    def source(self) -> nn.Module:
        """The network that a student imitates: the generator as it was best."""
        return self.snapshot

    def take_snapshot(self) -> None:
        """Let students imitate the generator as it is now."""
        self.snapshot.load_state_dict(self.generator.state_dict())

    def parameters_of_generators(self) -> list[nn.Parameter]:
        """Return what the generators' optimizer trains."""
        return [*self.generator.parameters(), *self.back.parameters()]

    def parameters_of_discriminators(self) -> list[nn.Parameter]:
        """Return what the discriminators' optimizer trains."""
        return [*self.discriminator.parameters(), *self.discriminator_back.parameters()]

    def step(
        self,
        a: Tensor,
        b: Tensor,
        optimizers: tuple[Stepper, Stepper],
        backward: Backward = Tensor.backward,
    ) -> dict[str, Tensor]:
        """Let generators, then discriminators learn from images of both domains.

        Args:
            a: images of A, `(B, C, H, W)` in [-1, 1].
            b: images of B, not those that belong to `a`.
            optimizers: of both generators, and of both discriminators.
            backward: called with a loss.

        Returns:
            The losses by name, without graphs.
        """
        made_b, same_b = self._both(self.generator, a, b)
        made_a, same_a = self._both(self.back, b, a)
        losses = {}
        with judging(self.discriminator, self.discriminator_back):
            seen = generator_loss(self.loss, self.discriminator(made_b))
            seen = seen + generator_loss(self.loss, self.discriminator_back(made_a))
        losses["teacher_adversarial"] = seen
        there_and_back = _distance(self.back(made_b), a) + _distance(self.generator(made_a), b)
        losses["teacher_cycle"] = self.cycle * there_and_back
        left_alone = _distance(same_b, b) + _distance(same_a, a)
        losses["teacher_identity"] = self.cycle * self.identity * left_alone
        check_losses(losses)
        generators, discriminators = optimizers
        generators.zero_grad()
        backward(torch.stack(list(losses.values())).sum())
        generators.step()
        judged = [
            discriminator_loss(self.loss, *self._both(network, real, pool.exchange(made)))
            for network, real, made, pool in (
                (self.discriminator, b, made_b, self.pools[0]),
                (self.discriminator_back, a, made_a, self.pools[1]),
            )
        ]
        losses["discriminator"] = judged[0] + judged[1]
        check_losses(losses)
        discriminators.zero_grad()
        backward(losses["discriminator"])
        discriminators.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def make(self, source: Tensor, taps: Sequence[str] = ()) -> Made:
        """Return what the snapshot makes of images of A; nothing learns."""
        with torch.no_grad():
            image, maps = forward_with_taps(self.snapshot, source, taps)
        return Made(image, maps, {})

    def judge(self, source: Tensor, image: Tensor) -> Tensor:
        """Return the student's adversarial loss for images that it made of `source`."""
        with judging(self.discriminator):
            return generator_loss(self.loss, self.discriminator(image))

    def _both(self, network: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if not self.together or first.shape != second.shape:
            return network(first), network(second)
        one, two = network(torch.cat([first, second])).chunk(2)
        return one, two


def _learn(
    losses: dict[str, Tensor], optimizers: tuple[Stepper, Stepper], backward: Backward
) -> None:
    """Step discriminator and generator from gradients of the same weights."""
    generator, discriminator = optimizers
    discriminator.zero_grad()
    backward(losses["discriminator"])
    generator.zero_grad()
    rest = [loss for name, loss in losses.items() if name != "discriminator"]
    backward(torch.stack(rest).sum())
    discriminator.step()
    generator.step()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean()


def check_losses(losses: dict[str, Tensor]) -> None:
    """Refuse losses that are not finite.

    Raises:
        UserError: names those that are not.
    """
    if bool(torch.isfinite(torch.stack([loss.detach() for loss in losses.values()])).all()):
        return
    shown = [f"{name} {float(loss):g}" for name, loss in losses.items() if not loss.isfinite()]
    raise UserError(
        f"losses are not finite: {', '.join(shown)}; start again with a lower train.lr or a lower "
        "weight of that loss; the last good checkpoint is kept until then"
    )
