"""Generators that turn one image into another: ResNet, mobile ResNet and U-Net.

Sources: "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks" (ICCV
2017, ResNet), "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017,
U-Net), "GAN Compression" (CVPR 2020, the separable residual blocks of the mobile ResNet). Names in
the state dicts are those of the authors' code, so that their checkpoints load.

Images are `(B, C, H, W)` in [-1, 1], with sides that are multiples of `generator.multiple`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.nn.checkpoint_names import adapted, refuse_misfit
from tenfold.nn.instance_norm import InstanceNorm2d
from tenfold.nn.taps import hooked

__all__ = [
    "NORMS",
    "Generator",
    "MobileResNetGenerator",
    "ResNetGenerator",
    "UNetGenerator",
    "adapted",
]

NORMS = ("instance", "batch")
BLOCKS_BEGIN = 10  # index of the first residual block


class Generator(nn.Module):
    """Base of the generators: checks of the input, and the maps at named places.

    Attributes:
        model: the layers.
        multiple: what both sides of an image must be a multiple of.
        taps: names of the modules whose outputs are distilled by default.
        ngf: filters of the first convolution.
        channels: of the input.
        norm: instance or batch.
    """

    model: nn.Module
    multiple: int
    taps: tuple[str, ...]

    def __init__(self, ngf: int, channels: int, outputs: int, norm: str) -> None:
        super().__init__()
        for name, value in (("ngf", ngf), ("channels", channels), ("outputs", outputs)):
            if value < 1:
                raise UserError(f"{name} {value}: expected at least 1")
        if norm not in NORMS:
            raise unknown_name("norm", norm, NORMS)
        self.ngf = ngf
        self.channels = channels
        self.outputs = outputs
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to images of the same size, in [-1, 1].

        Raises:
            UserError: sides or channels that don't fit.
        """
        self.check(x)
        image: Tensor = self.model(x)
        return image

    def forward_with_taps(
        self, x: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images, and the outputs of some modules by name.

        Args:
            x: images `(B, C, H, W)`.
            names: of modules, such as `model.9`.

        Raises:
            UserError: a name that the network doesn't have.
        """
        return hooked(self, x, names)

    def check(self, x: Tensor) -> None:
        """Refuse images that the network can't take.

        Raises:
            UserError: another number of channels, or a side that is no multiple.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise UserError(
                f"{type(self).__name__} got images of shape {tuple(x.shape)}: expected "
                f"(B, {self.channels}, H, W)"
            )
        # Exported graphs take any size, and there is nobody to tell.
        if not torch.compiler.is_exporting() and (
            x.shape[2] % self.multiple or x.shape[3] % self.multiple
        ):
            raise UserError(
                f"{type(self).__name__} got images of {x.shape[2]}x{x.shape[3]}: expected sides "
                f"that are multiples of {self.multiple}; pad the images, or resize them"
            )

    def adapt_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring a checkpoint of the authors' code to our names; ours stays as it is."""
        return adapted(state_dict, self)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> object:
        """Load weights, ours or those of the authors' code, old checkpoints included.

        Raises:
            UserError: a checkpoint of another network, with the names that don't fit.
        """
        state = adapted(state_dict, self)
        refuse_misfit(state, self, strict)
        return super().load_state_dict(state, strict, assign)


class ResNetGenerator(Generator):
    """Image-to-image ResNet of nine residual blocks, as CycleGAN and pix2pix have it.

    Args:
        ngf: filters of the first convolution.
        channels: of the input.
        outputs: channels of the output.
        norm: instance or batch.
        blocks: residual blocks.
    """

    separable = False
    clamps = True

    def __init__(
        self,
        ngf: int = 64,
        channels: int = 3,
        outputs: int = 3,
        norm: str = "instance",
        blocks: int = 9,
    ) -> None:
        super().__init__(ngf, channels, outputs, norm)
        if blocks < 1:
            raise UserError(f"blocks {blocks}: expected at least 1")
        self.multiple = 4
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3), *_conv(channels, ngf, 7, norm), nn.ReLU(True),
            *_conv(ngf, 2 * ngf, 3, norm, stride=2, padding=1), nn.ReLU(True),
            *_conv(2 * ngf, 4 * ngf, 3, norm, stride=2, padding=1), nn.ReLU(True),
        ]  # fmt: skip
        layers += [ResidualBlock(4 * ngf, norm, self.separable) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):
            up = nn.ConvTranspose2d(
                width, width // 2, 3, stride=2, padding=1, output_padding=1, bias=norm == "instance"
            )
            layers += [up, _norm(width // 2, norm), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, outputs, 7), nn.Tanh()]
        self.model: nn.Sequential = nn.Sequential(*layers)
        thirds = sorted({-(-blocks * third // 3) for third in (1, 2, 3)})
        places = [BLOCKS_BEGIN - 1, *(BLOCKS_BEGIN - 1 + after for after in thirds)]
        self.taps = tuple(f"model.{place}" for place in places)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to images of the same size, in [-1, 1]."""
        return super().forward(x.clamp(-1, 1) if self.clamps else x)

    def forward_with_taps(  # noqa: D102
        self, x: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        known = [f"model.{place}" for place in range(len(self.model))]
        if not set(names) <= set(known):  # somewhere inside a block
            return hooked(self, x, names)
        self.check(x)
        x = x.clamp(-1, 1) if self.clamps else x
        maps = {}
        for place, (name, layer) in enumerate(zip(known, self.model, strict=True)):
            x = layer(x)
            if name in names:
                followed = place + 1 < len(known) and isinstance(self.model[place + 1], nn.ReLU)
                maps[name] = x.clone() if followed else x  # the ReLU works in place
        return x, {name: maps[name] for name in names}


class MobileResNetGenerator(ResNetGenerator):
    """Image-to-image ResNet whose residual blocks have separable convolutions (GAN Compression).

    Teacher (ngf 64) and student (ngf 16) of DCD and CRD are both of this kind.
    """

    separable = True
    clamps = False


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity, with reflected borders and no ReLU after the sum."""

    def __init__(self, width: int, norm: str, separable: bool) -> None:
        super().__init__()

        def convolution() -> nn.Module:
            return Separable(width, norm) if separable else _conv(width, width, 3, norm)[0]

        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), convolution(), _norm(width, norm), nn.ReLU(True),
            nn.Dropout(0.0),  # of the authors' code; it keeps the names
            nn.ReflectionPad2d(1), convolution(), _norm(width, norm),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        out: Tensor = x + self.conv_block(x)
        return out


class Separable(nn.Module):
    """Depthwise 3x3 convolution, instance norm, pointwise convolution; all have biases."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        # The norm inside is an instance norm whatever the network's own is.
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, groups=width), InstanceNorm2d(width),
            nn.Conv2d(width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H - 2, W - 2)`."""
        out: Tensor = self.conv(x)
        return out


class UNetGenerator(Generator):
    """Image-to-image U-Net of pix2pix: halving to the bottleneck and back, with skip connections.

    Args:
        ngf: filters of the first convolution; the eight levels have 1, 2, 4, 8, 8, 8, 8, 8 times
            as many.
        channels: of the input.
        outputs: channels of the output.
        norm: batch or instance; with batch norm a bottleneck of one pixel needs more than one image
            in training.
        levels: halvings; sides are multiples of 2**levels.
    """

    def __init__(
        self,
        ngf: int = 64,
        channels: int = 3,
        outputs: int = 3,
        norm: str = "batch",
        levels: int = 8,
    ) -> None:
        super().__init__(ngf, channels, outputs, norm)
        if levels < 5:
            raise UserError(f"levels {levels}: expected at least 5")
        self.levels = levels
        self.multiple = 2**levels
        widths = [ngf * min(2**level, 8) for level in range(levels)]
        inner: Level | None = None
        for level in reversed(range(levels)):
            outer = outputs if level == 0 else widths[level - 1]
            source = channels if level == 0 else outer
            inner = Level(source, outer, widths[level], inner, level == 0, norm)
        assert inner is not None
        self.model: Level = inner
        # Maps of 2, 8, 16 and 4 times ngf: those into levels 2 and 4, and those that the upward
        # halves of levels 3 and 1 get.
        names = _level_names(levels)
        self.taps = (
            f"{names[1]}.model.2", f"{names[3]}.model.2",
            f"{names[3]}.model.3", f"{names[1]}.model.3",
        )  # fmt: skip
        initialize(self)

    def forward_with_taps(  # noqa: D102
        self, x: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not set(names) <= set(self.model.places("model")):
            return hooked(self, x, names)
        self.check(x)
        maps: dict[str, Tensor] = {}
        image = self.model.tapped(x, "model", names, maps)
        return image, {name: maps[name] for name in names}


class Level(nn.Module):
    """One level of the U-Net: down, what lies below, and up again, beside the skip connection."""

    def __init__(
        self,
        source: int,
        outer: int,
        width: int,
        inner: Level | None,
        outermost: bool,
        norm: str,
    ) -> None:
        super().__init__()
        self.outermost = outermost
        bias = norm == "instance"
        down = nn.Conv2d(source, width, 4, stride=2, padding=1, bias=bias)
        up = nn.ConvTranspose2d(
            width if inner is None else 2 * width, outer, 4, stride=2, padding=1,
            bias=bias or outermost,
        )  # fmt: skip
        layers: list[nn.Module]
        if outermost:
            assert inner is not None
            layers = [down, inner, nn.ReLU(True), up, nn.Tanh()]
        elif inner is None:
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, _norm(outer, norm)]
        else:
            layers = [
                nn.LeakyReLU(0.2, True), down, _norm(width, norm), inner,
                nn.ReLU(True), up, _norm(outer, norm), nn.Dropout(0.0),
            ]  # fmt: skip
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same size; all but the outermost also hand on their input."""
        return self.joined(x, self.model(x))

    def joined(self, x: Tensor, out: Tensor) -> Tensor:
        """Put the level's input beside its output, unless it is the outermost."""
        # What is handed on has passed the activation of this level, which works in place.
        return out if self.outermost else torch.cat([x, out], 1)

    def tapped(
        self, x: Tensor, prefix: str, names: Sequence[str], maps: dict[str, Tensor]
    ) -> Tensor:
        """Do what `forward` does, and put the outputs of the modules named into `maps`."""
        out = x
        for place, layer in enumerate(self.model):
            name = f"{prefix}.model.{place}"
            if isinstance(layer, Level):  # noqa: SIM108 - one line would be too long
                out = layer.tapped(out, name, names, maps)
            else:
                out = layer(out)
            if name in names:
                maps[name] = out.clone()  # the activations that follow work in place
        return self.joined(x, out)

    def places(self, prefix: str) -> list[str]:
        """Return the names of the modules whose outputs `tapped` can give."""
        found = []
        for place, layer in enumerate(self.model):
            found.append(f"{prefix}.model.{place}")
            if isinstance(layer, Level):
                found += layer.places(found[-1])
        return found


def initialize(network: nn.Module) -> None:
    """Draw weights as the authors' code does: N(0, 0.02); those of batch norms N(1, 0.02)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


def _norm(width: int, norm: str) -> nn.Module:
    return InstanceNorm2d(width) if norm == "instance" else nn.BatchNorm2d(width)


def _conv(
    source: int, width: int, kernel: int, norm: str, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    """Return a convolution and its norm; a batch norm makes the bias needless."""
    bias = norm == "instance"
    return [nn.Conv2d(source, width, kernel, stride, padding, bias=bias), _norm(width, norm)]


def _level_names(levels: int) -> list[str]:
    """Return the name of each level's module, from the outermost."""
    names = ["model"]
    for level in range(1, levels):
        names.append(f"{names[-1]}.model.{1 if level == 1 else 3}")
    return names
