"""PatchGAN: a discriminator that judges overlapping patches of an image.

Source: "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017). Names in the
state dict are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.nn.checkpoint_names import adapted, refuse_misfit
from tenfold.nn.generators import NORMS, initialize
from tenfold.nn.instance_norm import InstanceNorm2d

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """Judge patches of 70x70 pixels (with three layers) as real or made.

    Args:
        channels: of the image; a conditional one takes source and image, one after the other.
        ndf: filters of the first convolution.
        norm: instance or batch.
        layers: convolutions of stride 2.
    """

    def __init__(
        self, channels: int = 3, ndf: int = 64, norm: str = "instance", layers: int = 3
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("ndf", ndf), ("layers", layers)):
            if value < 1:
                raise UserError(f"{name} {value}: expected at least 1")
        if norm not in NORMS:
            raise unknown_name("norm", norm, NORMS)
        self.channels = channels
        self.ndf = ndf
        self.norm = norm
        modules: list[nn.Module] = [
            nn.Conv2d(channels, ndf, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, True),
        ]
        width = ndf
        for layer in range(1, layers + 1):
            wider = ndf * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [
                nn.Conv2d(width, wider, 4, stride, padding=1, bias=norm == "instance"),
                InstanceNorm2d(wider) if norm == "instance" else nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2, True),
            ]
            width = wider
        modules.append(nn.Conv2d(width, 1, 4, padding=1))
        self.model = nn.Sequential(*modules)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return a logit for every patch: `(B, C, H, W)` to `(B, 1, H / 8 - 2, W / 8 - 2)`."""
        logits: Tensor = self.model[-1](self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Return the activations ahead of the last convolution, `(B, 8 ndf, H / 8 - 1, W / 8 - 1)`.

        Raises:
            UserError: another number of channels, or a map too small for the norms.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise UserError(
                f"PatchDiscriminator got shape {tuple(x.shape)}: expected (B, {self.channels}, "
                "H, W)"
            )
        out: Tensor = self.model[:-1](x)
        return out

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
