"""LAB-Net: a small network of two branches that removes shadows in LAB.

Source: "LAB-Net: LAB Color-Space Oriented Lightweight Network for Shadow Removal" (arXiv
2208.13039) and its released code. Images are LAB codes, `(B, 3, H, W)`:
L / 100, (a + 128) / 255 and (b + 128) / 255. With F convolutions of 1x1 over both branches:

    e = first(image)
    b1 = block1([e, mask])    b2 = block2([e, mask])
    b3 = block3(F([b1, b2]))  b4 = block4(F([b1, b2]))
    b5 = block5(attention1(F([b3, b4])))  b6 = block6(attention2(F([b3, b4])))
    b7 = block7(attention3(F([b5, b6])))  b8 = block8(attention4(F([b5, b6])))
    out = last([b7, b8] + image)                           b7 has one channel, L; b8 has a and b

It is light in parameters and not in compute: 0.93 million, and 59.6 G multiply-adds for an image of
256 x 256. Statistics and attention are of the whole image, so tiles of an image give another result
than the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.nn.labnet_blocks import REDUCTION, STAGES, BasicBlock, Conv, HighPass
from tenfold.nn.ring_attention import RingAttention, attention_macs, resized, ring_of

__all__ = ["LEAST_SIDE", "LABNet"]

LEAST_SIDE = max(max(stage) for stage in STAGES) + 1  # a border reflects at most side - 1 pixels
_OUTSIDE = 0.5  # how far beyond 0 and 1 a code may lie before it is no code


class LABNet(nn.Module):
    """Shadow remover in LAB, guided by a mask.

    Keep its input channels-last: convolutions take about a third of the time then, on a CPU.

    Args:
        width: channels inside, C, even and at least 4: 933,355 parameters at 32, with trained
            high-pass kernels; 238,411 at 16; 62,203 at 8.
        attention_size: side, or height and width, at which the ring attention works.
        highpass: `fixed` is a Laplacian; `trainable` starts at random, as the released code does by
            accident. Its checkpoints load into either.

    Raises:
        UserError: another width, size or high-pass.
    """

    def __init__(
        self,
        width: int = 32,
        attention_size: int | tuple[int, int] = 256,
        highpass: HighPass = "fixed",
    ) -> None:
        super().__init__()
        if width % 2 or 3 * width < REDUCTION:
            raise UserError(
                f"width {width}: expected an even number of at least 4, such as 8, 16 or 32"
            )
        if highpass not in ("fixed", "trainable"):
            raise unknown_name("highpass", highpass, ("fixed", "trainable"))
        size = (attention_size,) * 2 if isinstance(attention_size, int) else tuple(attention_size)
        if len(size) != 2 or min(size) < 2:
            raise UserError(
                f"attention_size {attention_size}: expected a side, or height and width, "
                "of at least 2"
            )
        self.width = width
        self.attention_size = size
        self.highpass = highpass

        # This order is that of the released code's parameters.
        self.first = Conv(3, 3, 3)
        self.block1 = BasicBlock(4, width, width, highpass)
        self.block2 = BasicBlock(4, width, width, highpass)
        self.fuse12_l = Conv(2 * width, width, 1)
        self.block3 = BasicBlock(width, width, width, highpass)
        self.fuse12_ab = Conv(2 * width, width, 1)
        self.block4 = BasicBlock(width, width, width, highpass)
        self.fuse34_l = Conv(2 * width, width, 1)
        self.attention1 = RingAttention(width, size)
        self.block5 = BasicBlock(width, width, width, highpass)
        self.fuse34_ab = Conv(2 * width, width, 1)
        self.attention2 = RingAttention(width, size)
        self.block6 = BasicBlock(width, width, width, highpass)
        self.fuse56_l = Conv(2 * width, width, 1)
        self.attention3 = RingAttention(width, size)
        self.block7 = BasicBlock(width, 1, width, highpass)
        self.fuse56_ab = Conv(2 * width, width, 1)
        self.attention4 = RingAttention(width, size)
        self.block8 = BasicBlock(width, 2, width, highpass)
        self.last = Conv(3, 3, 3)
        self.initialize()

    def forward(self, lab_codes: Tensor, mask: Tensor, ring: Tensor | None = None) -> Tensor:
        """Map codes of images in shadow to codes without, of the same shape and not clamped.

        Args:
            lab_codes: `(B, 3, H, W)` in [0, 1], with sides of at least 65.
            mask: `(B, 1, H, W)` of zeros and ones, 1 in shadow.
            ring: likewise, 1 where the shadow may look for its colours; without one, five pixels
                around the mask.

        Raises:
            UserError: other shapes or values.
        """
        self.check(lab_codes, mask, ring)
        ring = ring_of(mask) if ring is None else ring
        start = torch.cat([self.first(lab_codes), mask], 1)
        both = torch.cat([self.block1(start), self.block2(start)], 1)
        both = torch.cat([self.block3(self.fuse12_l(both)), self.block4(self.fuse12_ab(both))], 1)
        light = self.attention1(self.fuse34_l(both), mask, ring)
        colour = self.attention2(self.fuse34_ab(both), mask, ring)
        both = torch.cat([self.block5(light), self.block6(colour)], 1)
        light = self.attention3(self.fuse56_l(both), mask, ring)
        colour = self.attention4(self.fuse56_ab(both), mask, ring)
        change = torch.cat([self.block7(light), self.block8(colour)], 1)
        out: Tensor = self.last(change + lab_codes)
        return out

    def initialize(self) -> None:
        """Draw all weights by Kaiming's normal of the fan-in, biases zero, as the release does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=0.0, mode="fan_in")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def identity_start(self) -> None:
        """Make the network give its input back: short runs start from there.

        A plain start is far off: it would spend a short run on finding the image again. The last
        convolutions of the branches start at zero and learn first, the others behind them.
        """
        nn.init.dirac_(self.last.conv.weight)
        for block in (self.block7, self.block8):
            for parameter in block.out.conv.parameters():
                parameter.zero_()
        for bias in (parameter for parameter in self.last.parameters() if parameter.ndim == 1):
            bias.zero_()

    def export_attention(self, form: Literal["masked", "gathered"]) -> None:
        """Choose the form of the ring attention in exported graphs; the results are the same.

        Args:
            form: `masked` has fixed shapes, lets the batch be free, and suits an attention of up to
                64 x 64; `gathered` needs a batch of fixed size, and is the one for larger sizes.

        Raises:
            UserError: another form.
        """
        if form not in ("masked", "gathered"):
            raise unknown_name("form of the attention", form, ("masked", "gathered"))
        for module in self.modules():
            if isinstance(module, RingAttention):
                module.exported = form

    def attention_macs(self, mask: Tensor, ring: Tensor | None = None) -> int:
        """Return the multiply-adds of the four ring attentions, which depend on the mask.

        They come on top of those of the convolutions, which a counter of layers finds.

        Args:
            mask: `(B, 1, H, W)`, as in `forward`.
            ring: as in `forward`.
        """
        ring = ring_of(mask) if ring is None else ring
        shadow, around = (resized(each, self.attention_size) for each in (mask, ring))
        return 4 * attention_macs(shadow, around, 3 * self.width // 2)

    def adapt_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring a checkpoint of the released code to our names, by the order of its tensors.

        Ours stays as it is. A prefix of a wrapped network goes.

        Raises:
            UserError: tensors that aren't those of a LAB-Net of this width.
        """
        found = {key.removeprefix("module."): value for key, value in state_dict.items()}
        own = self.state_dict()
        if set(found) == set(own):
            return found
        if len(found) != len(own):
            raise UserError(
                f"the checkpoint has {len(found)} tensors: expected the {len(own)} of a LAB-Net"
            )
        for (name, ours), (key, value) in zip(own.items(), found.items(), strict=True):
            if ours.shape != value.shape:
                raise UserError(
                    f"the checkpoint's {key} has shape {tuple(value.shape)}, where {name} of a "
                    f"LAB-Net of width {self.width} has {tuple(ours.shape)}; give the checkpoint's "
                    "width"
                )
        return dict(zip(own, found.values(), strict=True))

    @staticmethod
    def check(lab_codes: Tensor, mask: Tensor, ring: Tensor | None = None) -> None:
        """Refuse input that the network can't take. Shapes are told in traced graphs, too.

        Raises:
            UserError: other shapes, sides under 65, codes that are no codes, masks with other
                values than 0 and 1.
        """
        if lab_codes.ndim != 4 or lab_codes.shape[1] != 3:
            raise UserError(
                f"LABNet got images of shape {tuple(lab_codes.shape)}: expected LAB codes "
                "(B, 3, H, W)"
            )
        if torch.compiler.is_exporting():  # its sizes may be symbols, and nobody listens
            return
        size = tuple(lab_codes.shape[2:])
        if min(size) < LEAST_SIDE:
            raise UserError(
                f"LABNet got images of {size[0]}x{size[1]}: expected sides of at least "
                f"{LEAST_SIDE}, as borders of {LEAST_SIDE - 1} pixels are reflected; pad the "
                "images, or enlarge them"
            )
        masks = {"mask": mask} if ring is None else {"mask": mask, "ring": ring}
        for name, each in masks.items():
            if tuple(each.shape) != (lab_codes.shape[0], 1, *size):
                raise UserError(
                    f"LABNet got a {name} of shape {tuple(each.shape)}: expected "
                    f"{(lab_codes.shape[0], 1, *size)}, one channel of the images' size"
                )
        if torch.compiler.is_compiling() or lab_codes.is_meta:
            return
        low, high = (value.item() for value in lab_codes.detach().aminmax())
        if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):  # also when one is NaN
            raise UserError(
                f"LABNet got values from {low:.3g} to {high:.3g}: expected finite LAB codes in "
                "[0, 1], which are L / 100, (a + 128) / 255 and (b + 128) / 255"
            )
        for name, each in masks.items():
            if bool(((each != 0) & (each != 1)).any()):
                raise UserError(
                    f"LABNet got a {name} with other values than 0 and 1: compare it with a "
                    "threshold first, as in (mask > 0.5).float()"
                )
