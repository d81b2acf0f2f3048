"""The grid of a SuperViT: which networks, sizes, rates and blocks make one; what stays; boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.imports import is_object_name
from tenfold.nn.lvvit import LVViT

__all__ = [
    "DEFAULT_DROP_BLOCKS",
    "DEFAULT_KEEP_RATES",
    "DEFAULT_SIZES",
    "Box",
    "Cell",
    "built",
    "check_grid",
    "check_network",
    "check_rate",
    "kept_patches",
    "patch_size_of",
]

Cell = tuple[int, float]
DEFAULT_SIZES = (128, 160, 192, 224)
DEFAULT_KEEP_RATES = (0.5, 0.7, 1.0)
DEFAULT_DROP_BLOCKS = (3, 6, 9)


@dataclass(frozen=True)
class Box:
    """Tokens that a batch swaps with the reversed batch (LV-ViT's MixToken): rows, columns.

    Ends are exclusive, in tokens of a grid of `grid` x `grid`.
    """

    top: int
    left: int
    bottom: int
    right: int
    grid: int

    def at(self, grid: int) -> Box:
        """Return the box on another grid: v * g // own grid, which keeps full boxes full."""
        top, left, bottom, right = (
            value * grid // self.grid for value in (self.top, self.left, self.bottom, self.right)
        )
        return Box(top, left, bottom, right, grid)

    def mask(self, device: torch.device) -> Tensor:
        """Return which tokens lie inside, `(grid * grid, 1)`, bool."""
        span = torch.arange(self.grid, device=device)
        rows = (span >= self.top) & (span < self.bottom)
        columns = (span >= self.left) & (span < self.right)
        return (rows[:, None] & columns[None, :]).reshape(-1, 1)

    @property
    def share(self) -> float:
        """Return the share of all tokens that lie inside."""
        return (self.bottom - self.top) * (self.right - self.left) / self.grid**2


def kept_patches(tokens: int, keep_rate: float) -> int:
    """Return how many patches stay of `tokens` tokens, the class token counted: ceil(eta * N)."""
    return min(math.ceil(keep_rate * tokens), tokens - 1)


def patch_size_of(base: Any) -> int:
    """Return the side of a network's patches in pixels.

    Raises:
        UserError: they aren't square, or overlap.
    """
    if isinstance(base, LVViT):
        return 16
    sides = base.patch_embed.proj.kernel_size
    if sides[0] != sides[1] or tuple(base.patch_embed.proj.stride) != tuple(sides):
        raise UserError(f"{type(base).__name__} has patches of {sides}: expected square ones")
    return int(sides[0])


def built(name: str, size: int, num_classes: int, channels: int, options: Mapping[str, Any]) -> Any:
    """Build a network by name: timm's with or without the library, or one of tenfold's."""
    from tenfold.nn import models

    if is_object_name(name):  # an artifact that says so must not run code
        raise UserError(f"model={name!r} names code of your own: give SuperViT the network itself")

    known = name in models.names() or "/" in name or ":" in name
    return models.build(
        name if known else f"timm/{name}",
        num_classes=num_classes,
        channels=channels,
        size=(size, size),
        options=options,
    )[0]


def check_grid(
    sizes: Sequence[int], keep_rates: Sequence[float], drop_blocks: Sequence[int]
) -> None:
    """Refuse what makes no grid, whatever the network."""
    if not sizes or any(isinstance(s, bool) or int(s) != s or s < 1 for s in sizes):
        raise UserError(f"sizes={list(sizes)}: expected pixels, such as [128, 160, 192, 224]")
    for name, values in (("sizes", sizes), ("keep_rates", keep_rates)):
        if len({*values}) != len(values):
            raise UserError(f"{name}={list(values)}: one is given twice")
    for rate in keep_rates:
        check_rate(rate)
    if 1 not in keep_rates:
        raise UserError(
            f"keep_rates={list(keep_rates)}: expected 1 among them, which teaches the others"
        )
    if not drop_blocks or list(drop_blocks) != sorted({*drop_blocks}) or drop_blocks[0] < 0:
        raise UserError(
            f"drop_blocks={list(drop_blocks)}: expected numbers of blocks from 0, ascending"
        )


def check_rate(rate: float) -> None:
    """Refuse what is no share in (0, 1]."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise UserError(f"keep_rate={rate!r}: expected a share in (0, 1]")


def check_network(base: Any, drop_blocks: Sequence[int]) -> None:
    """Refuse what has no single class token that attends to patches."""
    from timm.layers import Attention, Mlp, PatchEmbed  # type: ignore[attr-defined]
    from timm.models.vision_transformer import Block, VisionTransformer

    name = type(base).__name__
    why = None
    if isinstance(base, LVViT):
        pass
    elif not isinstance(base, VisionTransformer):
        why = "is no VisionTransformer of timm and no LVViT"
    elif base.num_prefix_tokens != 1 or not base.has_class_token:
        why = f"has {base.num_prefix_tokens} prefix tokens, not one class token"
    elif base.pos_embed is None or base.no_embed_class:
        why = "has no position for its class token"
    elif base.global_pool != "token":
        why = f"pools by {base.global_pool!r}, so that no class token says what matters"
    elif not all(
        isinstance(part, nn.Identity) for part in (base.norm_pre, base.patch_drop, base.fc_norm)
    ):
        why = "has a norm ahead of its blocks or its classifier, or drops patches at random"
    elif type(base.patch_embed) is not PatchEmbed or len({*base.patch_embed.grid_size}) != 1:
        why = "cuts no square image into patches by one convolution"
    if why is None and not isinstance(base.head, nn.Linear):
        why = "has no linear classifier"
    if why is not None:
        raise UserError(
            f"SuperViT can't be made of {name}: it {why}; expected timm's deit_* or vit_* with one "
            "class token, or tenfold's lvvit_small"
        )
    for index, block in enumerate(base.blocks):
        if (
            type(block) is not Block
            or type(block.attn) is not Attention
            or type(block.mlp) is not Mlp
            or block.attn.gate is not None
        ):
            raise UserError(
                f"SuperViT can't be made of {name}: blocks.{index} is {type(block).__name__}, "
                "with an attention or an MLP that it doesn't know; choose a plain ViT"
            )
    if drop_blocks[-1] >= len(base.blocks):
        raise UserError(
            f"drop_blocks={list(drop_blocks)} for {len(base.blocks)} blocks: expected numbers "
            f"below {len(base.blocks)}"
        )
