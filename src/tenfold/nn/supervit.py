"""SuperViT: one vision transformer that runs at any of many budgets, chosen call by call.

Lin, Chen, Zhang, Shen, Ji, Cao: "Super Vision Transformer", IJCV 2023. The network; how it is
trained stands in `tenfold.methods.supervit`. A cell of its grid is a size and a keep rate:

- size s: the image is resized to s x s (bilinear, corners aligned) and cut into (s / p)**2 patches.
  All weights are shared by all sizes but the position table, of which each size has its own.
- keep rate eta: in the drop blocks, between attention and MLP, only the class token and the
  k = ceil(eta * N) patches stay that the class token attends to most, on average over heads; N is
  the number of tokens that are alive, the class token among them. They are taken out for good.

What differs from the authors' code, and why: attention is fused, and the class token's row of it is
computed by itself, so that no N x N map exists; nothing is sorted; cells of one size share their
way up to the first drop; rate 1 runs no scoring at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.kernels.attention import attention
from tenfold.nn.budget import CellTable
from tenfold.nn.supervit_grid import (
    DEFAULT_DROP_BLOCKS,
    DEFAULT_KEEP_RATES,
    DEFAULT_SIZES,
    Box,
    Cell,
    built,
    check_grid,
    check_network,
    check_rate,
    kept_patches,
    patch_size_of,
)

__all__ = ["SuperViT", "SuperViTCell"]

# Called as a whole when the network is traced: they look at shapes.
fx.wrap("_checked")
fx.wrap("_finite")
fx.wrap("_resized")


class SuperViT(nn.Module):
    """One ViT for many budgets: `model(images, size=160, keep_rate=0.7)`.

    Takes the layers of a vision transformer of timm (DeiT, ViT with a class token) or of LV-ViT as
    they are; their names are those of the authors' checkpoints. Without `size` and `keep_rate` it
    runs the largest size with all tokens.

    Args:
        model: a network, whose weights are kept and whose position table is resampled; or a name:
            timm's, or one of tenfold's, with fresh weights.
        sizes: sides of the image in pixels, the network's own among them, which is the largest.
        keep_rates: shares of the tokens that stay, in (0, 1]; 1 among them.
        drop_blocks: blocks in which tokens leave, from 0, ascending.
        tables: `resampled` from the network's own position table or `fresh`; by default resampled
            for a network and fresh for a name.
        decay_pos_embed: whether weight decay takes in the position tables, as the authors' does.
        num_classes: of a network by name.
        channels: of a network by name.
        options: further arguments of a network by name.

    Raises:
        UserError: a network without exactly one class token, whose blocks are of another kind, or
            sizes, rates or blocks that can't be.

    >>> small = SuperViT("vit_tiny_patch16_224", sizes=(32, 48), num_classes=5)
    >>> small(torch.zeros(2, 3, 48, 48), size=32, keep_rate=0.5).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        model: nn.Module | str,
        sizes: Sequence[int] = DEFAULT_SIZES,
        keep_rates: Sequence[float] = DEFAULT_KEEP_RATES,
        drop_blocks: Sequence[int] = DEFAULT_DROP_BLOCKS,
        *,
        tables: Literal["resampled", "fresh"] | None = None,
        decay_pos_embed: bool = True,
        num_classes: int = 1000,
        channels: int = 3,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_grid(sizes, keep_rates, drop_blocks)
        base: Any = model
        if isinstance(model, str):
            base = built(model, max(sizes), num_classes, channels, options or {})
            tables = tables or "fresh"
        check_network(base, drop_blocks)
        self.sizes = tuple(int(size) for size in sorted(sizes))
        self.keep_rates = tuple(float(rate) for rate in sorted(keep_rates))
        self.drop_blocks = tuple(drop_blocks)
        self.decay_pos_embed = decay_pos_embed
        self.num_classes = int(base.head.out_features)
        self.hidden = int(base.blocks[0].mlp.fc1.out_features)
        self.patch_size = patch_size_of(base)
        self._check_sizes(base)

        # The network's own children under their own names; its position table alone is replaced.
        self.patch_embed = base.patch_embed
        self.cls_token = base.cls_token
        self.pos_drop = getattr(base, "pos_drop", nn.Identity())
        self.blocks = base.blocks
        self.norm = base.norm
        self.head_drop = getattr(base, "head_drop", nn.Identity())
        self.head = base.head
        self.aux_head = getattr(base, "aux_head", None)  # LV-ViT's, for its patches
        self.aux_weight = getattr(base, "aux_weight", 0.0)
        self.pos_embed_list = nn.ParameterList(
            nn.Parameter(table)
            for table in self._tables(base.pos_embed.detach(), tables or "resampled")
        )
        if isinstance(model, str):  # timm's class token starts at almost nothing
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.table = CellTable(self.cells_with_macs())

    # -- running --------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        size: int | None = None,
        keep_rate: float | None = None,
        *,
        cells: Sequence[Cell] | None = None,
        box: Box | None = None,
        aux: bool = False,
    ) -> Any:
        """Classify images in one cell of the grid, or in several.

        Args:
            images: normalised, square, of any side, `(B, C, H, H)`.
            size: one of `sizes`; the largest by default.
            keep_rate: in (0, 1]; 1 by default.
            cells: several (size, keep rate) in one call, for training and evaluation; neighbours of
                one size share their way up to the first drop.
            box: tokens that the batch swaps with the reversed batch; LV-ViT's training.
            aux: with `cells`, add LV-ViT's logits of the first cell's patches, `(B, P, K)`, those
                inside the box swapped back.

        Returns:
            Logits `(B, K)`; with `cells` a list of them.

        Raises:
            UserError: another size or rate, or images that aren't square floats.
        """
        images = _checked(images)
        if cells is not None:
            if size is not None or keep_rate is not None:
                raise UserError("cells name sizes and keep rates: leave size and keep_rate out")
            tokens = self.forward_cells(images, cells, box)
            found = [self._logits(each) for each in tokens]
            return [*found, self._aux_logits(tokens[0], cells[0][0], box)] if aux else found
        chosen = (self.sizes[-1] if size is None else size, 1.0 if keep_rate is None else keep_rate)
        return self._logits(self.forward_cells(images, [chosen], box)[0])

    def forward_cells(
        self, images: Tensor, cells: Sequence[Cell], box: Box | None = None
    ) -> list[Tensor]:
        """Return the tokens `(B, n, D)` ahead of the last norm, for each of several cells.

        Args:
            images: `(B, C, H, H)`.
            cells: sizes and keep rates; neighbours of one size share their way up to the first
                drop block's attention.
            box: see `forward`.
        """
        found: list[Tensor] = []
        done = 0
        while done < len(cells):
            size = cells[done][0]
            rates = []
            for other, rate in cells[done:]:
                if other != size:
                    break
                rates.append(rate)
            found += self._size(images, size, rates, box)
            done += len(rates)
        return found

    def _size(
        self, images: Tensor, size: int, rates: Sequence[float], box: Box | None
    ) -> list[Tensor]:
        counts = [self.token_counts(size, rate) for rate in rates]  # checks size and rates
        x = self._embed(images, size, box)
        first = self.drop_blocks[0]
        for index in range(first):
            x = self._feed(index, self._mix(index, x)[0])
        if all(rate == 1 for rate in rates):
            x = self._rest(x, first, counts[0])
            return [x for _ in rates]
        x, scores = self._attend(first, x)
        found = []
        for tokens in counts:
            y = self._feed(first, _keep(x, scores, *tokens[first]))
            found.append(self._rest(y, first + 1, tokens))
        return found

    def _rest(self, x: Tensor, start: int, counts: Sequence[tuple[int, int]]) -> Tensor:
        for index in range(start, len(self.blocks)):
            before, after = counts[index]
            if before == after:
                x = self._mix(index, x)[0]
            else:
                x, scores = self._attend(index, x)
                x = _keep(x, scores, before, after)
            x = self._feed(index, x)
        return x

    def _embed(self, images: Tensor, size: int, box: Box | None) -> Tensor:
        images = _resized(images, size)
        stem: Any = self.patch_embed
        if self.aux_head is not None:
            x = stem(images)
        else:  # timm's own forward takes one size
            x = stem.norm(stem.proj(images).flatten(2).transpose(1, 2))
        if box is not None:
            x = torch.where(box.at(size // self.patch_size).mask(x.device), x.flip(0), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        dropped: Tensor = self.pos_drop(x + self.pos_embed_list[self.sizes.index(size)])
        return dropped

    def _attend(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run a block's attention; return the tokens, and each patch's score `(B, N - 1)`."""
        x, q, k = self._mix(index, x)
        block: Any = self.blocks[index]
        # Of the map of attention one row is needed; what is kept is chosen, not learned.
        row = (q[:, :, :1].detach() * block.attn.scale) @ k.detach().transpose(-2, -1)
        return x, _finite(row.float().softmax(dim=-1).mean(dim=(1, 2))[:, 1:], index)

    def _mix(self, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run a block's attention; return the tokens, queries and keys."""
        block: Any = self.blocks[index]
        attn, u = block.attn, block.norm1(x)
        q, k, v = attn.qkv(u).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        dropout = attn.attn_drop.p if self.training else 0.0
        if dropout or isinstance(q, fx.Proxy) or torch.compiler.is_compiling():
            y = functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=attn.scale
            )
        else:  # a kernel of ours where there is one and no gradient is wanted, else the same
            y = attention(q, k, v, attn.scale)
        y = attn.proj_drop(attn.proj(attn.norm(y.transpose(1, 2).flatten(2))))
        return x + block.drop_path1(block.ls1(y)), q, k

    def _feed(self, index: int, x: Tensor) -> Tensor:
        """Run a block's MLP."""
        block: Any = self.blocks[index]
        found: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return found

    def _logits(self, x: Tensor) -> Tensor:
        if self.aux_head is None or self.training:
            return self.class_logits(self.norm(x[:, :1]))
        x = self.norm(x)
        patches: Tensor = self.aux_head(x[:, 1:]).amax(dim=1)
        return self.class_logits(x) + self.aux_weight * patches

    def _aux_logits(self, x: Tensor, size: int, box: Box | None) -> Tensor:
        if self.aux_head is None:
            raise UserError("this network has no second classifier for its patches: leave aux out")
        patches: Tensor = self.aux_head(self.norm(x)[:, 1:])
        if box is None:
            return patches
        mask = box.at(size // self.patch_size).mask(x.device)
        return torch.where(mask, patches.flip(0), patches)

    def class_logits(self, tokens: Tensor) -> Tensor:
        """Return the classifier's output for normed tokens `(B, n, D)`: of the class token."""
        logits: Tensor = self.head(self.head_drop(tokens[:, 0]))
        return logits

    # -- cells ----------------------------------------------------------------------------------

    @property
    def cells(self) -> list[Cell]:
        """Every (size, keep rate) of the grid, by size."""
        return [(size, rate) for size in self.sizes for rate in self.keep_rates]

    def cell(self, size: int | None = None, keep_rate: float | None = None) -> SuperViTCell:
        """Return one cell as a network of its own that shares the weights: to export, to time."""
        size = self.sizes[-1] if size is None else size
        keep_rate = 1.0 if keep_rate is None else keep_rate
        self.token_counts(size, keep_rate)
        return SuperViTCell(self, size, float(keep_rate))

    def at_budget(
        self,
        *,
        macs: float | None = None,
        latency_ms: float | None = None,
        images_per_second: float | None = None,
    ) -> SuperViTCell:
        """Return the most accurate cell that a budget allows, by the table of `tenfold bench`.

        Args:
            macs: most multiply-adds an image.
            latency_ms: most milliseconds for one image, as measured on this machine.
            images_per_second: least throughput, as measured on this machine.

        Raises:
            UserError: not exactly one budget, none measured yet, or one below the cheapest cell.
        """
        row = self.table.choose(
            macs=macs, latency_ms=latency_ms, images_per_second=images_per_second
        )
        return self.cell(row.size, row.keep_rate)

    def token_counts(self, size: int, keep_rate: float) -> list[tuple[int, int]]:
        """Return, block by block, how many tokens enter its attention and how many its MLP.

        Raises:
            UserError: a size that isn't one of `sizes`, or a rate outside (0, 1].
        """
        if size not in self.sizes:
            known = ", ".join(str(known) for known in self.sizes)
            raise UserError(f"size={size}: this SuperViT was made for {known}; give one of them")
        check_rate(keep_rate)
        tokens = (size // self.patch_size) ** 2 + 1
        found = []
        for index in range(len(self.blocks)):
            after = tokens
            if index in self.drop_blocks and keep_rate != 1:
                after = kept_patches(tokens, keep_rate) + 1
            found.append((tokens, after))
            tokens = after
        return found

    def macs(self, size: int, keep_rate: float) -> int:
        """Return the multiply-adds of one image in a cell; norms, softmax and resize not counted.

        P * stem + sum over blocks of (4 N D**2 + 2 N**2 D + 2 m M D**2) + D K, where N tokens enter
        the attention and M the MLP, m is its ratio, D the width and K the number of classes.
        """
        counts = self.token_counts(size, keep_rate)
        width, hidden = int(self.cls_token.shape[-1]), self.hidden
        total = self._stem_macs(size)
        for before, after in counts:
            total += 4 * before * width**2 + 2 * before**2 * width + 2 * hidden * after * width
        total += width * self.num_classes
        if self.aux_head is not None:
            total += (counts[-1][1] - 1) * width * self.num_classes
        return total

    def _stem_macs(self, size: int) -> int:
        total = 0
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d):
                size = (size + 2 * int(module.padding[0]) - module.kernel_size[0]) // module.stride[
                    0
                ] + 1
                total += size * size * module.weight.numel()
        return total

    def cells_with_macs(self) -> dict[Cell, int]:
        """Return the multiply-adds of every cell."""
        return {(size, rate): self.macs(size, rate) for size, rate in self.cells}

    # -- weights --------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """Return the classifier, as timm's networks do."""
        head: nn.Module = self.head
        return head

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that weight decay leaves alone, as timm's networks do."""
        tables = {f"pos_embed_list.{index}" for index in range(len(self.sizes))}
        return {"cls_token"} if self.decay_pos_embed else {"cls_token", *tables}

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring the weights of a plain ViT into the form of this network: tables are resampled.

        Raises:
            UserError: position tables of other sizes.
        """
        adapted = dict(state)
        plain = adapted.pop("pos_embed", None)
        names = [name for name in adapted if name.startswith("pos_embed_list.")]
        if plain is not None and not names:
            if plain.ndim != 3 or math.isqrt(plain.shape[1] - 1) ** 2 != plain.shape[1] - 1:
                raise UserError(
                    f"the checkpoint has a position table of {_lengths([tuple(plain.shape)])} "
                    "tokens: expected one class token and a square of patches"
                )
            for index, table in enumerate(self._tables(plain, "resampled")):
                adapted[f"pos_embed_list.{index}"] = table
            return adapted
        expected = [tuple(table.shape) for table in self.pos_embed_list]
        names.sort(key=lambda name: (len(name), name))  # by number: 2 ahead of 10
        given = [tuple(adapted[name].shape) for name in names]
        if given != expected:
            raise UserError(
                f"the checkpoint has position tables of {_lengths(given)} tokens, and the sizes "
                f"{', '.join(map(str, self.sizes))} need {_lengths(expected)}: give the sizes that "
                "it was trained with"
            )
        return adapted

    def _tables(self, table: Tensor, how: str) -> list[Tensor]:
        if how not in ("resampled", "fresh"):
            raise UserError(f"tables={how!r}: expected resampled or fresh")
        width = self.cls_token.shape[-1]
        grids = [size // self.patch_size for size in self.sizes]
        if how == "fresh":
            fresh = [torch.empty(1, grid * grid + 1, width) for grid in grids]
            return [nn.init.trunc_normal_(each, std=0.02).to(table) for each in fresh]
        from timm.layers import resample_abs_pos_embed  # type: ignore[attr-defined]

        return [
            resample_abs_pos_embed(table, [grid, grid], num_prefix_tokens=1).clone()
            for grid in grids
        ]

    def _check_sizes(self, base: Any) -> None:
        wrong = [size for size in self.sizes if size % self.patch_size]
        if wrong:
            raise UserError(
                f"sizes {', '.join(map(str, wrong))} are no multiples of the patch's "
                f"{self.patch_size} pixels: give others"
            )
        own = math.isqrt(base.pos_embed.shape[1] - 1) * self.patch_size
        if self.sizes[-1] != own:
            raise UserError(
                f"sizes={list(self.sizes)} for a network of {own} pixels: expected {own} among "
                f"them, as the largest (build the network for another size, or give {own})"
            )

    def extra_repr(self) -> str:
        """Return sizes, rates and blocks."""
        return f"sizes={self.sizes}, keep_rates={self.keep_rates}, drop_blocks={self.drop_blocks}"


class SuperViTCell(nn.Module):
    """One cell of a SuperViT, with its weights: any verb for a network works on it.

    Args:
        supervit: the network.
        size: one of its sizes.
        keep_rate: in (0, 1].
    """

    def __init__(self, supervit: SuperViT, size: int, keep_rate: float):
        super().__init__()
        self.supervit = supervit
        self.size = size
        self.keep_rate = keep_rate
        self.train(supervit.training)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.supervit.macs(self.size, self.keep_rate)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, K)` of normalised images `(B, C, H, H)`."""
        logits: Tensor = self.supervit(images, self.size, self.keep_rate)
        return logits

    def extra_repr(self) -> str:
        """Return the cell."""
        return f"size={self.size}, keep_rate={self.keep_rate:g}"


def _keep(x: Tensor, scores: Tensor, before: int, after: int) -> Tensor:
    """Take the class token and the patches with the highest scores, `after` of `before` tokens."""
    if after == before:
        return x
    chosen = scores.topk(after - 1, dim=1, sorted=False).indices + 1
    chosen = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)
    # Whole rows of one long list: gather would look an index up for every feature.
    starts = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * before
    kept: Tensor = x.flatten(0, 1).index_select(0, (chosen + starts).flatten())
    return kept.reshape(-1, after, x.shape[2])


def _finite(scores: Tensor, index: int) -> Tensor:
    """Refuse scores that would choose at random; where looking at them costs no waiting."""
    if scores.device.type != "cpu" or torch.compiler.is_compiling():
        return scores
    if not bool(scores.isfinite().all()):
        raise UserError(
            f"blocks.{index}: the class token's attention is not finite, so that no tokens can be "
            "chosen: the weights or the images have NaN; start again with a lower learning rate"
        )
    return scores


def _resized(images: Tensor, size: int) -> Tensor:
    """Resize as the weights have learned it: an antialiased one would lower the accuracy."""
    if images.shape[-1] == size:
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", align_corners=True)


def _checked(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise UserError(f"images of {images.dtype}: expected normalised floats; convert them first")
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise UserError(
            f"images of shape {tuple(images.shape)}: expected square ones, (B, C, H, H)"
        )
    return images


def _lengths(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(shape[1]) if len(shape) > 1 else "?" for shape in shapes) or "no"
