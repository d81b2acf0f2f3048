"""The networks of HQSS: they paint shadows onto lit regions, and take shadows out again.

Source: "Shadow Removal by High-Quality Shadow Synthesis" (arXiv 2212.04108) and its released code.
Stage 1 is an encoder E of shadow features, a generator G(feature, region) and two discriminators;
stage 2 a removal network R and a refinement network F. Images are signed codes (see
`tenfold.nn.shadow_regions`), `(B, 3, H, W)`, regions have all else black:

    E(x)      features (B, 16, H, W) of a region; the norm makes it blind to one gain and offset
    G(f, x)   tanh(layers([f, x]) + x), sides halved twice and doubled again
    D(x)      a PatchGAN whose judgements are averaged to one number an image
    R(x)      tanh(layers(x) + x)
    F(x, m)   tanh(layers([x, 2 m - 1]) + x)

Convolutions have biases, instance norms neither weights nor statistics: training and evaluation are
the same. Weights are drawn from N(0, 0.02), biases as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.nn.discriminators import PatchDiscriminator
from tenfold.nn.generators import ResidualBlock
from tenfold.nn.instance_norm import InstanceNorm2d
from tenfold.nn.shadow_regions import codes_of, masked, signed_codes

__all__ = [
    "HQSS",
    "LEAST_SIDE",
    "HQSSRemover",
    "RefinementNetwork",
    "RemovalNetwork",
    "ShadowDiscriminator",
    "ShadowEncoder",
    "ShadowGenerator",
]

LEAST_SIDE = 32
MULTIPLE = 4  # of sides: they are halved twice

Compose = Literal["mask", "add"]


class _InOrder(nn.Module):
    """A network that takes the released weights, whose tensors come in the order of its own."""

    def adapt_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring a checkpoint of the released code to our names, by the order of its tensors.

        Ours stays as it is. A prefix of a wrapped network goes.

        Raises:
            UserError: tensors that aren't those of this network.
        """
        found = {key.removeprefix("module."): value for key, value in state_dict.items()}
        own, kind = self.state_dict(), type(self).__name__
        if set(found) == set(own):
            return found
        if len(found) != len(own):
            raise UserError(
                f"the checkpoint has {len(found)} tensors: expected the {len(own)} of {kind}"
            )
        for (name, ours), (key, value) in zip(own.items(), found.items(), strict=True):
            if ours.shape != value.shape:
                raise UserError(
                    f"the checkpoint's {key} has shape {tuple(value.shape)}, where {name} of "
                    f"{kind} has {tuple(ours.shape)}: give the widths that it was trained with"
                )
        return dict(zip(own, found.values(), strict=True))


class ShadowEncoder(_InOrder):
    """Features of a shadow: E.

    Args:
        width: channels of the features.
        blocks: residual blocks.
    """

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        _check_widths(feature_width=width, feature_blocks=blocks)
        self.model = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), InstanceNorm2d(width), nn.ReLU(True),
            *(ResidualBlock(width, "instance", False) for _ in range(blocks)),
        )  # fmt: skip
        draw_weights(self)

    def forward(self, region: Tensor) -> Tensor:
        """Return features `(B, width, H, W)` of regions `(B, 3, H, W)`, all else black."""
        features: Tensor = self.model(region)
        return features


class _Translator(_InOrder):
    """Convolutions to a quarter of the side and back, whose output is added to an image.

    Args:
        channels: of the input.
        widths: of the three maps on the way down, the one between and the last on the way up.
        blocks: residual blocks at the bottom.
    """

    def __init__(self, channels: int, widths: tuple[int, int, int, int, int], blocks: int) -> None:
        super().__init__()
        first, second, bottom, middle, last = widths
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3), nn.Conv2d(channels, first, 7), *_normed(first),
            nn.Conv2d(first, second, 3, 2, 1), *_normed(second),
            nn.Conv2d(second, bottom, 3, 2, 1), *_normed(bottom),
            *(ResidualBlock(bottom, "instance", False) for _ in range(blocks)),
            nn.ConvTranspose2d(bottom, middle, 3, 2, 1, 1), *_normed(middle),
            nn.ConvTranspose2d(middle, last, 3, 2, 1, 1), *_normed(last),
            nn.ReflectionPad2d(3), nn.Conv2d(last, 3, 7),
        ]  # fmt: skip
        self.model = nn.Sequential(*layers)
        draw_weights(self)

    def changed(self, inputs: Tensor, image: Tensor) -> Tensor:
        """Return tanh(layers(inputs) + image)."""
        change: Tensor = self.model(inputs)
        return (change + image).tanh()


class ShadowGenerator(_Translator):
    """Paints a shadow of given features onto a region, or takes it off: G.

    Args:
        features: channels of the features.
        width: of all maps but the last, which has half as many.
        blocks: residual blocks.
    """

    def __init__(self, features: int = 16, width: int = 128, blocks: int = 6) -> None:
        _check_widths(width=width, blocks=blocks)
        super().__init__(features + 3, (width, width, width, width, max(1, width // 2)), blocks)

    def forward(self, features: Tensor, region: Tensor) -> Tensor:
        """Return the region `(B, 3, H, W)` under light of these features, in [-1, 1]."""
        return self.changed(torch.cat([features, region], 1), region)


class ShadowDiscriminator(PatchDiscriminator):
    """Judges whether a region is a real one, by one number an image: D.

    Args:
        width: filters of the first convolution.
        layers: convolutions of stride 2.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__(3, width, "instance", layers)
        draw_weights(self)

    def forward(self, region: Tensor) -> Tensor:
        """Return `(B, 1)` of regions `(B, 3, H, W)`."""
        return super().forward(region).mean((2, 3))


class RemovalNetwork(_Translator):
    """Takes the shadow off a region: R.

    Args:
        width: of the first map; two and four times as many at half and a quarter of the side.
        blocks: residual blocks.
    """

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        _check_widths(width=width, blocks=blocks)
        super().__init__(3, (width, 2 * width, 4 * width, 2 * width, width), blocks)

    def forward(self, region: Tensor) -> Tensor:
        """Return the region `(B, 3, H, W)` without its shadow, in [-1, 1]."""
        return self.changed(region, region)


class RefinementNetwork(_Translator):
    """Mends a photo in which a region was changed: F.

    Args:
        width: as in `RemovalNetwork`.
        blocks: residual blocks.
    """

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        _check_widths(width=width, blocks=blocks)
        super().__init__(4, (width, 2 * width, 4 * width, 2 * width, width), blocks)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return images `(B, 3, H, W)` in [-1, 1], given where they were changed `(B, 1, H, W)`."""
        return self.changed(torch.cat([image, 2 * mask - 1], 1), image)


class HQSS(nn.Module):
    """Paints real shadows onto lit regions of photos (HQSS, stage 1).

    Args:
        feature_width: channels of the shadow features.
        feature_blocks: residual blocks of the encoder.
        width: of the generator.
        blocks: its residual blocks.
        discriminator_width: filters of the discriminators' first convolution.
        discriminator_layers: their convolutions of stride 2.
        discriminators: whether there are any; what is trained has no use for them.

    Attributes:
        encoder: of shadow features.
        generator: of shadows.
        shadow_discriminator: judges shadow regions; None without.
        lit_discriminator: judges lit regions; None without.
        multiple: sides have to be multiples of it.
    """

    multiple = MULTIPLE

    def __init__(
        self,
        feature_width: int = 16,
        feature_blocks: int = 2,
        width: int = 128,
        blocks: int = 6,
        discriminator_width: int = 64,
        discriminator_layers: int = 3,
        discriminators: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = ShadowEncoder(feature_width, feature_blocks)
        self.generator = ShadowGenerator(feature_width, width, blocks)
        self.shadow_discriminator: ShadowDiscriminator | None = None
        self.lit_discriminator: ShadowDiscriminator | None = None
        if discriminators:
            judges = (discriminator_width, discriminator_layers)
            self.shadow_discriminator = ShadowDiscriminator(*judges)
            self.lit_discriminator = ShadowDiscriminator(*judges)

    def forward(self, shadow: Tensor, lit: Tensor) -> Tensor:
        """Return lit regions under the light of shadow regions: G(E(S), N), in [-1, 1].

        Args:
            shadow: a photo's shadow, all else black, signed codes `(B, 3, H, W)`.
            lit: its lit region, all else black.

        Raises:
            UserError: other shapes, sides under 32 or no multiples of 4.
        """
        check_images("HQSS", shadow)
        if lit.shape != shadow.shape:
            raise UserError(
                f"HQSS got a shadow of shape {tuple(shadow.shape)} and a lit region of "
                f"{tuple(lit.shape)}: expected two regions of one photo"
            )
        painted: Tensor = self.generator(self.encoder(shadow), lit)
        return painted


class HQSSRemover(nn.Module):
    """Takes shadows out of photos in two steps, region first (HQSS, stage 2).

    Its input is what other removers take, LAB codes and a mask. Sides are multiples of 4.

    Args:
        width: of the first maps: 22,759,494 parameters at 64 with 9 blocks.
        blocks: residual blocks, in each of the two networks.
        compose: how the region comes back into the photo: in its place (`mask`), or added to the
            photo without it (`add`), so that L is lower by 1 everywhere: the release's weights need
            that.

    Attributes:
        removal: R, for the region.
        refinement: F, for the photo.
    """

    space = "lab"
    multiple = MULTIPLE

    def __init__(self, width: int = 64, blocks: int = 9, compose: Compose = "mask") -> None:
        super().__init__()
        if compose not in ("mask", "add"):
            raise unknown_name("compose", compose, ("mask", "add"))
        self.compose = compose
        self.removal = RemovalNetwork(width, blocks)
        self.refinement = RefinementNetwork(width, blocks)

    def forward(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Map codes of photos in shadow to codes without, of the same shape, in [0, 1].

        Args:
            codes: LAB codes `(B, 3, H, W)`.
            mask: `(B, 1, H, W)` of zeros and ones, 1 in shadow.

        Raises:
            UserError: other shapes, sides under 32 or no multiples of 4.
        """
        return codes_of(self.both(codes, mask)[1])

    def both(self, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each step makes, signed: R(region), and F of the photo with that.

        Args:
            codes: as in `forward`.
            mask: likewise.
        """
        check_images("HQSSRemover", codes)
        if mask.shape != (codes.shape[0], 1, *codes.shape[2:]):
            raise UserError(
                f"HQSSRemover got a mask of shape {tuple(mask.shape)}: expected "
                f"{(codes.shape[0], 1, *codes.shape[2:])}, one channel of the images' size"
            )
        signed = signed_codes(codes)
        removed: Tensor = self.removal(masked(signed, mask))
        if self.compose == "add":
            photo = removed + masked(signed, 1 - mask)
        else:
            photo = removed * mask + signed * (1 - mask)
        return removed, self.refinement(photo, mask)


def draw_weights(network: nn.Module) -> None:
    """Draw the weights of convolutions from N(0, 0.02), and biases as PyTorch does."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.reset_parameters()
            nn.init.normal_(module.weight, 0.0, 0.02)


def check_images(name: str, images: Tensor) -> None:
    """Refuse images that the networks can't take. Sides aren't looked at in exported graphs.

    Raises:
        UserError: other shapes, sides under 32 or no multiples of 4.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"{name} got images of shape {tuple(images.shape)}: expected codes (B, 3, H, W)"
        )
    if torch.compiler.is_exporting():
        return
    height, width = images.shape[2:]
    if min(height, width) < LEAST_SIDE or height % MULTIPLE or width % MULTIPLE:
        raise UserError(
            f"{name} got images of {height}x{width}: expected sides of at least {LEAST_SIDE} that "
            f"are multiples of {MULTIPLE}; pad the images, or resize them"
        )


def _normed(width: int) -> tuple[nn.Module, nn.Module]:
    return InstanceNorm2d(width), nn.ReLU(True)


def _check_widths(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name}={value}: expected at least 1")
