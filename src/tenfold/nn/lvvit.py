"""LV-ViT-S (Jiang et al., NeurIPS 2021): a vision transformer with classified patches.

The network of "All Tokens Matter: Token Labeling for Training Better Vision Transformers". It
differs from ViT by a stem of four convolutions, residual branches divided by 2, and a second head
for the patch tokens, whose largest answers are added to those of the class token.

The parameters are named as in the authors' code (zihangJiang/TokenLabeling). Left out is what only
training with token labels needs: MixToken, and the patches' own logits as an output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.nn.pvt import drop_path_rates, initialize, of_side, square_side

__all__ = ["LVViT"]

_PATCH = 16
fx.wrap("of_side")  # fx looks names up in the module that calls


class LVViT(nn.Module):
    """LV-ViT-S, a vision transformer with a stem of convolutions; 26.2 M parameters.

    Args:
        num_classes: outputs.
        channels: input channels.
        size: (H, W) of the images: square, a multiple of 16.
        depth: blocks.
        dim: features of a token.
        heads: attention heads, which divide `dim`.
        mlp_ratio: hidden features of an MLP, in units of `dim`.
        skip_lam: divides what a residual branch adds.
        drop_path_rate: of the last block; from 0 at the first it grows linearly.
        aux_weight: of the patch tokens' part in the logits; 0.25 is SuperViT's.

    Raises:
        UserError: values that the blocks can't have; while running, images of another size.

    >>> LVViT(10, size=(32, 32), depth=1, dim=8, heads=2)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 3,
        size: tuple[int, int] = (224, 224),
        depth: int = 16,
        dim: int = 384,
        heads: int = 6,
        mlp_ratio: float = 3.0,
        skip_lam: float = 2.0,
        drop_path_rate: float = 0.1,
        aux_weight: float = 0.25,
    ):
        super().__init__()
        self.side = square_side(size, _PATCH)
        for name, value in (("depth", depth), ("mlp_ratio", mlp_ratio), ("skip_lam", skip_lam)):
            if value <= 0:
                raise UserError(f"{name}={value}: expected a number above 0")
        if heads < 1 or dim < 1 or dim % heads:
            raise UserError(f"dim={dim}: expected a multiple of heads={heads}")
        self.aux_weight = aux_weight
        self.patch_embed = _Stem(channels, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        positions = self.num_prefix_tokens + (self.side // _PATCH) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim))
        self.blocks = nn.ModuleList(
            _block(dim, heads, mlp_ratio, skip_lam, rate)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, num_classes)
        self.aux_head = nn.Linear(dim, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to normalized tokens `(B, 1 + N, D)`, the class token first."""
        patches = self.patch_embed(of_side(images, self.side))
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        normalized: Tensor = self.norm(tokens)
        return normalized

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Map what `forward_features` returns to logits `(B, num_classes)`.

        To the class token's logits come those of the patch that is surest of each class.
        """
        of_patches: Tensor = self.aux_head(tokens[:, self.num_prefix_tokens :])
        logits: Tensor = self.head(tokens[:, 0]) + self.aux_weight * of_patches.amax(dim=1)
        return logits

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, as timm asks."""
        return {"pos_embed", "cls_token"}


class _Stem(nn.Module):
    """Three convolutions at half the side, then one for the patches: `(B, C, H, W)` to `(B, N, D)`.

    Any sides that are multiples of 16 will do.
    """

    def __init__(self, channels: int, dim: int, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, dim, _PATCH // 2, stride=_PATCH // 2)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(self.bn3(self.conv3(x)))
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return patches


class _Divide(nn.Module):
    """Divides what a residual branch adds; stands where timm's blocks have their layer scale."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


def _block(dim: int, heads: int, mlp_ratio: float, skip_lam: float, drop_path: float) -> nn.Module:
    from functools import partial

    from timm.models.vision_transformer import Block

    norm: Any = partial(nn.LayerNorm, eps=1e-5)
    block: nn.Module = Block(
        dim, heads, mlp_ratio, qkv_bias=False, drop_path=drop_path, norm_layer=norm
    )
    block.ls1 = _Divide(skip_lam)
    block.ls2 = _Divide(skip_lam)
    return block
