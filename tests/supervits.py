"""Small SuperViTs, and what they compute written out step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.nn.lvvit import LVViT
from tenfold.nn.supervit import SuperViT

SIZES, RATES, BLOCKS = (32, 48, 64), (0.5, 0.7, 1.0), (1, 2)


def plain(**changes: Any) -> nn.Module:
    """A vision transformer of timm for 64 x 64: four blocks of 64 features, patches of 8."""
    import timm

    torch.manual_seed(0)
    given = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **{**given, **changes})
    return spread(model)


def plain_lvvit(**changes: Any) -> LVViT:
    """LV-ViT for 64 x 64: four blocks of 32 features, patches of 16."""
    torch.manual_seed(0)
    given = {"num_classes": 7, "size": (64, 64), "depth": 4, "dim": 32, "heads": 2}
    model: LVViT = spread(LVViT(**{**given, "drop_path_rate": 0.0, **changes}))
    return model


def spread(model: Any) -> Any:
    """Move all weights off their neutral values, so that every part of the network counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def supervit(base: nn.Module | None = None, **changes: Any) -> SuperViT:
    """A SuperViT of nine cells, in evaluation mode."""
    given: dict[str, Any] = {"sizes": SIZES, "keep_rates": RATES, "drop_blocks": BLOCKS}
    return SuperViT(plain() if base is None else base, **{**given, **changes}).eval()


def pictures(count: int = 3, side: int = 64, seed: int = 0) -> Tensor:
    """Noise in colour."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator)


def resized(images: Tensor, size: int) -> Tensor:
    """Interpolate between the four nearest pixels, the corners on the corners; by loops."""
    side = images.shape[-1]
    if side == size:
        return images
    step = (side - 1) / (size - 1)
    rows = []
    for row in range(size):
        y = min(int(row * step), side - 2)
        line = []
        for column in range(size):
            x = min(int(column * step), side - 2)
            down, right = row * step - y, column * step - x
            top = (1 - right) * images[:, :, y, x] + right * images[:, :, y, x + 1]
            low = (1 - right) * images[:, :, y + 1, x] + right * images[:, :, y + 1, x + 1]
            line.append((1 - down) * top + down * low)
        rows.append(torch.stack(line, dim=-1))
    return torch.stack(rows, dim=-2)


def naive(
    model: Any, images: Tensor, size: int, rate: float, order: Tensor | None = None
) -> Tensor:
    """Return logits as the paper's network computes them: maps of attention, sorting, loops.

    Args:
        model: the SuperViT, in evaluation mode.
        images: `(B, C, H, H)`.
        size: of the cell.
        rate: of the cell.
        order: of the patch tokens behind their positions; as they are by default.
    """
    x = resized(images, size)
    if model.aux_head is None:
        x = model.patch_embed.proj(x)
        x = x.flatten(2).transpose(1, 2)
    else:
        x = model.patch_embed(x)
    x = torch.cat([model.cls_token.repeat(len(x), 1, 1), x], dim=1)
    x = x + model.pos_embed_list[model.sizes.index(size)]
    if order is not None:
        x = torch.cat([x[:, :1], x[:, 1:][:, order]], dim=1)
    for index, block in enumerate(model.blocks):
        u, attn = block.norm1(x), block.attn
        batch, tokens, width = u.shape
        heads = attn.num_heads
        q, k, v = (
            attn.qkv(u)[..., part * width : (part + 1) * width]
            .reshape(batch, tokens, heads, width // heads)
            .transpose(1, 2)
            for part in range(3)
        )
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(dim=-1)
        y = attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        x = x + block.ls1(y)
        if index in model.drop_blocks and rate != 1:
            score = weights.mean(dim=1)[:, 0, 1:]
            kept = min(math.ceil(rate * tokens), tokens - 1)
            best = score.argsort(dim=1, descending=True)[:, :kept]
            x = torch.stack(
                [
                    torch.stack([x[b, 0], *(x[b, 1 + int(patch)] for patch in best[b])])
                    for b in range(batch)
                ]
            )
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    logits: Tensor = model.head(x[:, 0])
    if model.aux_head is not None:
        patches = torch.stack([model.aux_head(x[:, i]) for i in range(1, x.shape[1])])
        logits = logits + model.aux_weight * patches.max(dim=0).values
    return logits


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student), averaged over the batch, in double precision."""
    p = teacher.detach().double().softmax(dim=1)
    q = functional.log_softmax(student.double(), dim=1)
    return (p * (p.log() - q)).sum(dim=1).mean()
