"""Pyramid Vision Transformer, version 1 (Wang et al., ICCV 2021).

The network of "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
Convolutions", table 1: four stages at 1/4, 1/8, 1/16 and 1/32 of the image's side. Each embeds
patches of the map before it and adds a learned table of positions; the queries of its blocks are
all tokens, the keys and values those of a map that a strided convolution has made smaller. The
class token joins in the last stage, which reduces nothing.

The parameters are named as in the authors' code (whai362/PVT), so that its checkpoints load. The
tables belong to one image size, and no other is taken here; theirs are interpolated at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tenfold.errors import UserError

__all__ = [
    "DEPTHS",
    "PyramidVisionTransformer",
    "drop_path_rates",
    "initialize",
    "of_side",
    "square_side",
]

# Blocks of the four stages, by the network's size.
DEPTHS = {
    "tiny": (2, 2, 2, 2),
    "small": (3, 4, 6, 3),
    "medium": (3, 4, 18, 3),
    "large": (3, 8, 27, 3),
}


class PyramidVisionTransformer(nn.Module):
    """Pyramid Vision Transformer for images of one size; the defaults are those of PVT-Tiny.

    Args:
        num_classes: outputs.
        channels: input channels.
        size: (H, W) of the images: square, a multiple of 32.
        depths: blocks of each of the four stages.
        dims: features of a token.
        heads: attention heads, which divide the `dims`.
        sr_ratios: by how much a side shrinks for keys and values; 1 in the last stage.
        mlp_ratios: hidden features of an MLP, in units of `dims`.
        drop_path_rate: of the last block; from 0 at the first it grows linearly.

    Raises:
        UserError: values that the stages can't have; while running, images of another size.

    >>> dims, heads = (4, 4, 8, 8), (1, 1, 2, 2)
    >>> model = PyramidVisionTransformer(10, size=(32, 32), dims=dims, heads=heads)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    num_prefix_tokens = 1
    block4: nn.ModuleList

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 3,
        size: tuple[int, int] = (224, 224),
        depths: Sequence[int] = DEPTHS["tiny"],
        dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        self.side = square_side(size, 32)
        self.grids = [self.side // patch for patch in (4, 8, 16, 32)]
        _check_stages(self.grids, depths, dims, heads, sr_ratios, mlp_ratios)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for index, (grid, dim) in enumerate(zip(self.grids, dims, strict=True)):
            positions = grid**2 + (self.num_prefix_tokens if index == 3 else 0)
            blocks = [
                _Block(dim, heads[index], mlp_ratios[index], sr_ratios[index], grid, next(rates))
                for _ in range(depths[index])
            ]
            stage = index + 1
            setattr(self, f"patch_embed{stage}", _PatchEmbed(channels, dim, 2 if index else 4))
            setattr(self, f"pos_embed{stage}", nn.Parameter(torch.empty(1, positions, dim)))
            setattr(self, f"block{stage}", nn.ModuleList(blocks))
            channels = dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to normalized tokens `(B, 1 + N, D)`, the class token first."""
        tokens: Tensor = self.norm(self.block4[-1](self.forward_before_last_block(images)))
        return tokens

    def forward_before_last_block(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to what `block4[-1]` is given, `(B, 1 + N, D)`.

        For callers that run the last block by hand, because they need its attention.
        """
        features = of_side(images, self.side)
        for stage, grid in enumerate(self.grids, start=1):
            tokens: Tensor = getattr(self, f"patch_embed{stage}")(features)
            blocks = list(getattr(self, f"block{stage}"))
            if stage == 4:
                tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
                blocks.pop()
            tokens = tokens + getattr(self, f"pos_embed{stage}")
            for block in blocks:
                tokens = block(tokens)
            if stage < 4:
                features = _as_map(tokens, grid)
        return tokens

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Map what `forward_features` returns to logits `(B, num_classes)`."""
        logits: Tensor = self.head(tokens[:, 0])
        return logits

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, as timm asks; the tables have some."""
        return {"cls_token"}


class _PatchEmbed(nn.Module):
    """A token for each patch of a map: `(B, C, H, W)` to `(B, N, D)`."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(features).flatten(2).transpose(1, 2))
        return tokens


class _Attention(nn.Module):
    """Attention of all tokens to those of a map `sr_ratio` times smaller on each side."""

    def __init__(self, dim: int, heads: int, sr_ratio: int, grid: int):
        super().__init__()
        self.num_heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.sr_ratio = sr_ratio
        self.grid = grid
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = tokens
        if self.sr_ratio > 1:
            seen = self.sr(_as_map(tokens, self.grid)).flatten(2).transpose(1, 2)
            seen = self.norm(seen)
        query = self.q(tokens).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        pair = self.kv(seen).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class _Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut: `(B, N, D)` to the same."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, sr_ratio: int, grid: int, drop_path: float
    ):
        super().__init__()
        from timm.layers import DropPath  # type: ignore[attr-defined]

        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads, sr_ratio, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


def _as_map(tokens: Tensor, grid: int) -> Tensor:
    """Return tokens `(B, grid * grid, D)` as a map `(B, D, grid, grid)`."""
    features: Tensor = tokens.transpose(1, 2).unflatten(2, (grid, grid))  # type: ignore[no-untyped-call]
    return features


def _check_stages(
    grids: Sequence[int],
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    sr_ratios: Sequence[int],
    mlp_ratios: Sequence[float],
) -> None:
    given = {
        "depths": depths, "dims": dims, "heads": heads,
        "sr_ratios": sr_ratios, "mlp_ratios": mlp_ratios,
    }  # fmt: skip
    for name, values in given.items():
        if len(values) != 4 or min(values) <= 0:
            raise UserError(f"{name}={values}: expected four numbers above 0, one for each stage")
    if any(dim % head for dim, head in zip(dims, heads, strict=True)):
        raise UserError(f"dims={dims}: expected multiples of heads={heads}, stage by stage")
    if sr_ratios[3] != 1:
        raise UserError(f"sr_ratios={sr_ratios}: expected 1 in the last stage, for its class token")
    if any(grid % ratio for grid, ratio in zip(grids, sr_ratios, strict=True)):
        raise UserError(f"sr_ratios={sr_ratios}: expected divisors of the stages' sides, {grids}")


def square_side(size: Sequence[int], multiple: int) -> int:
    """Return the side of square images.

    Raises:
        UserError: `size` isn't square, or no multiple of `multiple`.
    """
    if len(size) != 2 or size[0] != size[1] or size[0] < multiple or size[0] % multiple:
        raise UserError(
            f"size={tuple(size)}: expected square images, of a side that is a multiple of "
            f"{multiple}; crop or resize them"
        )
    return int(size[0])


# Wrapped, so that tracing records the call instead of stumbling over the comparison.
@fx.wrap
def of_side(images: Tensor, side: int) -> Tensor:
    """Return images `(B, C, side, side)` as they are.

    Raises:
        UserError: they have another shape.
    """
    if images.ndim != 4 or tuple(images.shape[2:]) != (side, side):
        raise UserError(
            f"the images are {tuple(images.shape)}: expected (B, C, {side}, {side}), which the "
            "network was built for; resize them, or build it with their size"
        )
    return images


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return a rate for each of `depth` blocks, rising linearly from 0 to `last`.

    Raises:
        UserError: a rate outside 0..1.

    >>> drop_path_rates(0.5, 3)
    [0.0, 0.25, 0.5]
    """
    if not 0 <= last < 1:
        raise UserError(f"drop_path_rate={last}: expected 0 or more, and less than 1")
    return [last * block / max(1, depth - 1) for block in range(depth)]


def initialize(network: nn.Module) -> None:
    """Draw linear weights, tables and tokens from a normal of 0.02, cut at 2; zero the biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters(recurse=False):
        if name == "cls_token" or name.startswith("pos_embed"):
            nn.init.trunc_normal_(parameter, std=0.02)
