"""DCD: distil feature maps of a generator through the teacher's discriminator.

Paper: "Discriminator-Cooperated Feature Map Distillation for GAN Compression" (CVPR 2023, arXiv
2212.14169).

A student generator imitates a teacher that is trained at the same time. Comparing their feature
maps pixel by pixel would ask for more than matters. So connectors (1x1 convolution, batch norm,
ReLU) turn a map into a small "image" of as many channels as the discriminator D reads, and the two
are compared as D sees them:

    L_DCD = sum over taps l of  mean | D4(g_S^l(F_S^l)) - D4(g_T^l(F_T^l)) |

with D4 the activations after D's fourth block. The gradient reaches the student and its connectors
g_S alone: D judges with fixed weights, and the teacher's side has none.

What differs from the authors' released code, and why:

- Connectors and maps are paired by the tap's name; there the order was that of sorted strings.
- D has fixed weights in the student's step; there its gradients gathered, and were thrown away.
- g_T stays as it was drawn, for every task; where it learns too (`train_teacher_connectors`) the
  target can collapse.
- The adversarial loss of the student looks at the student's own image (the paper's): that is the
  task's part, not in this file.
- The conditional D of pix2pix gets maps of as many channels as it reads; its fourth block is hooked
  whatever the layer is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.methods.translation import OwnAdam, StudentStep, TranslationMethod, needed
from tenfold.nn.adversarial import judging
from tenfold.nn.taps import forward_with_taps, maps_at, taps_of

__all__ = ["DCD"]

# Below it the fourth block's map is one pixel, which an instance norm can't take.
LEAST_SIDE = 24


@dataclass(kw_only=True, eq=False)
class DCD(TranslationMethod):
    """Discriminator-cooperated feature-map distillation of image-to-image generators (DCD).

    Args:
        weight: of the loss; the authors' CycleGAN runs had 0.1 in places.
        taps: names of the modules, in teacher and student alike, whose outputs are compared; by
            default the four of `tenfold.nn`'s generators.
        train_teacher_connectors: whether the teacher's connectors learn too.

    Example:
        ```python
        dcd = DCD()
        dcd.use_network("teacher", teacher)
        dcd.use_network("discriminator", discriminator)
        student = dcd.attach(student, total_steps=len(loader))
        optimizer = torch.optim.Adam(dcd.parameters_for(student), lr=2e-4, betas=(0.5, 0.999))
        for photo in loader:
            ...                                   # teacher and discriminator take their own steps
            image, loss = dcd.loss(photo)         # the student's image, and its loss
            (loss + adversarial(image)).backward(); optimizer.step(); dcd.step()
        student = dcd.finalize(student)
        ```
    """

    weight: float = 1.0
    taps: list[str] | None = None
    train_teacher_connectors: bool = False

    def validate(self) -> None:  # noqa: D102
        if not self.weight > 0:
            raise UserError(f"weight={self.weight}: expected more than 0; or leave DCD out")
        if self.taps is not None and not self.taps:
            raise UserError("taps is empty: name modules, or leave it out")
        for name in self.taps or ():
            if self.taps and self.taps.count(name) > 1:
                raise UserError(f"taps names {name} twice: expected each module once")

    def __post_init__(self) -> None:
        self._teacher: nn.Module | None = None
        self._discriminator: nn.Module | None = None
        self._size: tuple[int, int] | None = None
        self._names: tuple[str, ...] = ()
        self._student_connectors: dict[str, Connector] = {}
        self._teacher_connectors: dict[str, Connector] = {}
        self._adam: OwnAdam | None = None
        super().__post_init__()

    # -- before training --------------------------------------------------------------------------

    def tap_names(self) -> Sequence[str] | None:
        """Return the modules whose maps are compared."""
        return self.taps

    def use_network(self, role: str, network: nn.Module) -> None:
        """Take the `teacher` or the `discriminator`; both are needed ahead of `attach`."""
        if role == "teacher":
            self._teacher = network
        elif role == "discriminator":
            self._discriminator = network

    def use_setting(self, paired: bool, size: tuple[int, int]) -> None:  # noqa: D102
        # The default taps of the ResNets lie at a quarter of the image's side.
        if min(size) < 4 * LEAST_SIDE and self.taps is None:
            raise UserError(
                f"images of {size[0]}x{size[1]} are too small: the discriminator reads maps of a "
                f"quarter of the side, and needs {LEAST_SIDE} pixels of them; choose data.size of "
                f"at least {4 * LEAST_SIDE}"
            )
        self._size = size

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Build the connectors, and register the student's as the method's own.

        Raises:
            StateError: teacher or discriminator is missing.
            UserError: an unknown tap, or maps of different sizes, or too small ones.
        """
        teacher = needed(self._teacher, "DCD", "teacher")
        discriminator = needed(self._discriminator, "DCD", "discriminator")
        self._names = taps_of(model, self.taps)
        given = maps_at(model, self._names, self._size)
        wanted = maps_at(teacher, self._names, self._size)
        read = channels_of(discriminator)
        for name in self._names:
            sizes = [maps[name].shape for maps in (given, wanted)]
            if sizes[0][2:] != sizes[1][2:]:
                raise UserError(
                    f"tap {name}: student and teacher have maps of {tuple(sizes[0][2:])} and "
                    f"{tuple(sizes[1][2:])} pixels: choose taps of equal size"
                )
            if self._size is not None:  # else the first step says it
                _check_side(name, given[name], discriminator, batch=2)
            self._student_connectors[name] = Connector(sizes[0][1], read)
            self._teacher_connectors[name] = Connector(sizes[1][1], read)
        device = next(model.parameters()).device
        # A module list, because names of taps have dots in them.
        mine = nn.ModuleList(self._student_connectors.values()).to(device)
        theirs = nn.ModuleList(self._teacher_connectors.values()).to(device)
        learning = nn.ModuleList([mine, theirs] if self.train_teacher_connectors else [mine])
        self._adam = OwnAdam(learning)
        self.own(mine, self._adam.optimizer)
        theirs.train(self.train_teacher_connectors)
        theirs.requires_grad_(self.train_teacher_connectors)
        self.own(Constant(theirs, self.train_teacher_connectors))
        return model

    # -- in training ------------------------------------------------------------------------------

    def loss(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Run student and teacher, and return the student's image and its loss.

        For a loop of one's own; a loop that has the maps already calls `map_loss`.

        Args:
            source: images `(B, C, H, W)` in [-1, 1].
        """
        teacher = needed(self._teacher, "DCD", "teacher")
        image, maps = forward_with_taps(self._attached_model(), source, self._names)
        with torch.no_grad(), judging(teacher):
            wanted = forward_with_taps(teacher, source, self._names)[1]
        return image, self.weight * self.map_loss(maps, wanted)

    def map_loss(
        self,
        student_maps: Mapping[str, Tensor],
        teacher_maps: Mapping[str, Tensor],
        discriminator: nn.Module | None = None,
    ) -> Tensor:
        """Return L_DCD, without its weight.

        Args:
            student_maps: `(B, C, h, w)` by tap.
            teacher_maps: likewise, of equal h and w.
            discriminator: in place of the one that the method knows.

        Raises:
            UserError: a tap is missing, or a map is too small for the discriminator.
        """
        self._attached_model()  # or say that there is none
        judge = discriminator or needed(self._discriminator, "DCD", "discriminator")
        for name in self._names:
            if name not in student_maps or name not in teacher_maps:
                raise UserError(f"there is no map of tap {name}: expected {', '.join(self._names)}")
            _check_side(name, student_maps[name], judge, len(student_maps[name]))
        # Distances of activations are small beside them: float32, whatever the networks run in.
        with torch.autocast(next(iter(student_maps.values())).device.type, enabled=False):
            given = [self._student_connectors[n](student_maps[n].float()) for n in self._names]
            with torch.set_grad_enabled(self.train_teacher_connectors and torch.is_grad_enabled()):
                wanted = [
                    self._teacher_connectors[n](teacher_maps[n].detach().float())
                    for n in self._names
                ]
                targets = judged(judge, wanted)
            pairs = zip(judged(judge, given), targets, strict=True)
            return torch.stack([(mine - theirs).abs().mean() for mine, theirs in pairs]).sum()

    def student_losses(self, step: StudentStep) -> dict[str, Tensor]:
        """Return the loss of a step under the engine; see `TranslationMethod`."""
        found = self.map_loss(step.student_maps, step.teacher_maps, step.discriminator)
        return {"dcd": self.weight * found}

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Move the connectors, from the gradients of the same backward pass."""
        if self._adam is not None:
            self._adam.follow(optimizer)


class Connector(nn.Sequential):
    """Turn a map into as many channels as a discriminator reads."""

    def __init__(self, channels: int, read: int) -> None:
        super().__init__(nn.Conv2d(channels, read, 1, bias=False), nn.BatchNorm2d(read), nn.ReLU())
        nn.init.normal_(self[0].weight, 0.0, 0.02)  # type: ignore[arg-type]
        nn.init.normal_(self[1].weight, 1.0, 0.02)  # type: ignore[arg-type]


class Constant(nn.Module):
    """Hold connectors that stay in evaluation mode whatever the student's mode is."""

    def __init__(self, connectors: nn.ModuleList, learning: bool) -> None:
        super().__init__()
        self.connectors = connectors
        self.learning = learning

    def train(self, mode: bool = True) -> Constant:
        """Follow the student's mode only where they learn."""
        return super().train(mode and self.learning)


def judged(discriminator: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """Return D4 of images `(B, C, h, w)`: the activations ahead of the last convolution.

    Images of one size go through an instance-norm discriminator together, which treats each by
    itself; with a batch norm they would mix, and go one after the other.
    """
    features = getattr(discriminator, "features", None)
    if features is None:  # of the authors' code: a Sequential under `model`
        layers = getattr(discriminator, "model", None)
        if not isinstance(layers, nn.Sequential):
            raise UserError(
                f"{type(discriminator).__name__} has neither features(x) nor a Sequential named "
                "model: expected a PatchGAN, such as tenfold.nn.discriminators.PatchDiscriminator"
            )
        features = layers[:-1]
    with judging(discriminator):
        if not has_batch_norm(discriminator) and len({image.shape for image in images}) == 1:
            return list(features(torch.cat(list(images))).split(len(images[0])))
        return [features(image) for image in images]


def has_batch_norm(network: nn.Module) -> bool:
    """Tell whether the images of a batch bear on each other in a network."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


def channels_of(discriminator: nn.Module) -> int:
    """Return how many channels a discriminator reads."""
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise UserError(f"{type(discriminator).__name__} has no convolution: expected a PatchGAN")


def _check_side(name: str, image: Tensor, discriminator: nn.Module, batch: int) -> None:
    least = 16 if has_batch_norm(discriminator) and batch > 1 else LEAST_SIDE
    if min(image.shape[2:]) < least:
        raise UserError(
            f"tap {name} has maps of {tuple(image.shape[2:])} pixels: the discriminator needs "
            f"{least} or more; train on larger images, or choose other taps"
        )
