"""What a vision transformer attends to: how each kind of network says it, without being edited.

A network is read at two places. The output of one module holds the last tokens, in training; and a
pass without gradients gives logits and, for every image token, the attention that it receives in
the last block. Of all attention, that one map alone is ever materialised.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from tenfold.errors import StateError, UserError
from tenfold.nn.pvt import PyramidVisionTransformer

__all__ = ["TokenNetwork", "attention_received", "find_tokens"]

# Of the one map of attention; larger batches are taken in parts.
MAP_BYTES = 2**27


class TokenNetwork(ABC):
    """A classifier whose image tokens and their attention can be read.

    Args:
        model: the network itself, without wrappers.
        score: `image` or `class`: whose attention counts.
    """

    def __init__(self, model: Any, score: str):
        self.model = model
        self.score = score
        self._kept: Tensor | None = None
        self._handle: RemovableHandle | None = None
        head = model.head
        if not isinstance(head, nn.Linear):
            raise _refusal(model, f"its classifier is {type(head).__name__}, not a linear layer")
        self.head = head

    # -- the training pass ----------------------------------------------------------------------

    @property
    @abstractmethod
    def last(self) -> nn.Module:
        """The module that returns the last tokens."""

    @abstractmethod
    def image_tokens(self, output: Tensor) -> Tensor:
        """Return the image tokens `(B, N, C)` of what `last` has returned."""

    def pooled(self, vectors: Tensor) -> Tensor:
        """Do to averages of tokens `(…, C)` what the network does ahead of its classifier."""
        return vectors

    def watch(self) -> None:
        """Keep the last tokens of every training pass from now on."""

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            if torch.is_grad_enabled() and self.model.training:
                self._kept = output

        self._handle = self.last.register_forward_hook(keep)

    def take(self) -> Tensor:
        """Return the image tokens `(B, N, C)` of the latest training pass, and forget them.

        Raises:
            StateError: there was none.
        """
        if self._kept is None:
            raise StateError(
                "the network that was attached did not run in training mode: pass the model that "
                "attach returned (or what wraps it), after model.train()"
            )
        kept, self._kept = self._kept, None
        return self.image_tokens(kept)

    def remove(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._kept = None, None

    # -- the pass without gradients ---------------------------------------------------------------

    def probe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(B, K)` and the attention that each image token receives, `(B, N)`.

        In evaluation mode and without gradients; the modes are put back. Runs in the precision of
        the autocast around it.
        """
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            # Not inference mode: the logits are a constant of a loss that goes backward.
            with torch.no_grad():
                return self._probe(images)
        finally:
            for module in training:
                module.training = True

    @abstractmethod
    def _probe(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def _run_watching(self, module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network; return its logits and the first input of one of its modules."""
        with _input_of(module) as seen:
            logits: Tensor = self.model(images)
        return logits, seen[0]


class _ViT(TokenNetwork):
    """timm's VisionTransformer: vit_*, deit_*, deit3_*."""

    def __init__(self, model: Any, score: str):
        super().__init__(model, score)
        from timm.layers import Attention  # type: ignore[attr-defined]
        from timm.models.vision_transformer import Block

        if model.global_pool not in ("token", "avg"):
            raise _refusal(model, f"it pools its tokens by {model.global_pool!r}, not token or avg")
        if score == "class" and not model.has_class_token:
            raise _refusal(model, "it has no class token, which score='class' asks for")
        if not isinstance(model.patch_drop, nn.Identity):
            raise _refusal(model, "it drops patches at random (patch_drop_rate)")
        last = model.blocks[-1]
        if type(last) is not Block or type(last.attn) is not Attention:
            raise _refusal(
                model,
                f"the attention of its last block blocks.{len(model.blocks) - 1} can't be read "
                f"({type(last).__name__} with {type(getattr(last, 'attn', None)).__name__})",
            )
        self.prefix = int(model.num_prefix_tokens)

    @property
    def last(self) -> nn.Module:
        norm: nn.Module = self.model.norm
        return norm

    def image_tokens(self, output: Tensor) -> Tensor:
        return output[:, self.prefix :]

    def pooled(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.model.fc_norm(vectors)
        return found

    def _probe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model, block = self.model, self.model.blocks[-1]
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for earlier in model.blocks[:-1]:
            x = earlier(x)
        attn, u = block.attn, block.norm1(x)
        q, k, v = attn.qkv(u).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        scores = attention_received(q, k, attn.scale, self.prefix, self.score)
        if model.global_pool != "token":
            return model.forward_head(model.norm(block(x))), scores
        # The classifier sees the class token alone, and so does the rest of the block.
        y = functional.scaled_dot_product_attention(q[:, :, :1], k, v, scale=attn.scale)
        y = attn.norm(y.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            y = y * attn.gate(u[:, :1]).sigmoid()
        x = x[:, :1] + block.ls1(attn.proj(y))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x)), scores


class _CaiT(TokenNetwork):
    """timm's Cait: its last self-attention block, whose heads talk after the softmax."""

    @property
    def last(self) -> nn.Module:
        norm: nn.Module = self.model.norm
        return norm

    def image_tokens(self, output: Tensor) -> Tensor:
        return output[:, 1:]

    def _probe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.score == "image":
            # The softmaxed map with the heads last, ahead of the heads' talk about it.
            talk = self.model.blocks[-1].attn.proj_w
            logits, attention = self._run_watching(talk, images)
            return logits, attention.float().mean(dim=(1, 3))
        attn = self.model.blocks_token_only[-1].attn
        logits, u = self._run_watching(attn, images)
        q, k = (
            layer(tokens).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((attn.q, u[:, :1]), (attn.k, u))
        )
        return logits, attention_received(q, k, attn.scale, 1, "class")


class _Pyramid(TokenNetwork):
    """PVT v1 (tenfold's) and v2 (timm's): the last block of the last stage."""

    def __init__(self, model: Any, score: str):
        super().__init__(model, score)
        self.first = isinstance(model, PyramidVisionTransformer)
        self.prefix = 1 if self.first else 0
        if score == "class" and not self.first:
            raise _refusal(model, "it has no class token, which score='class' asks for")
        self.attn = model.block4[-1].attn if self.first else model.stages[-1].blocks[-1].attn
        pooled = getattr(self.attn, "pool", None)
        if pooled is not None or getattr(self.attn, "sr", None) is not None:
            raise _refusal(model, "its last block attends to pooled tokens, not to the tokens")

    @property
    def last(self) -> nn.Module:
        found: nn.Module = self.model.norm if self.first else self.model.stages[-1]
        return found

    def image_tokens(self, output: Tensor) -> Tensor:
        return output[:, 1:] if self.first else output.flatten(2).transpose(1, 2)

    def _probe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        attn = self.attn
        logits, u = self._run_watching(attn, images)
        q = attn.q(u).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        k = attn.kv(u).unflatten(2, (2, attn.num_heads, -1))[:, :, 0].transpose(1, 2)
        return logits, attention_received(q, k, attn.scale, self.prefix, self.score)


def attention_received(
    q: Tensor, k: Tensor, scale: float, prefix: int = 1, score: str = "image"
) -> Tensor:
    """Return the attention that every image token receives, averaged over heads and queries.

    Rows and columns of prefix tokens (the class token) are cut off after the softmax, without
    normalising again.

    Args:
        q: queries `(B, heads, N, D)`; of the class token alone where `score` is `class`.
        k: keys `(B, heads, N, D)`.
        scale: of the products.
        prefix: tokens in front that are no image tokens.
        score: `image`: queries are the image tokens; `class`: the first token.

    Returns:
        `(B, N - prefix)`, float32.
    """
    queries = q[:, :, :1] if score == "class" else q[:, :, prefix:]
    batch, heads, rows, _ = queries.shape
    part = max(1, MAP_BYTES // (4 * heads * rows * k.shape[2]))
    found = []
    for start in range(0, batch, part):
        keys = k[start : start + part].transpose(-2, -1)
        attention = ((queries[start : start + part] * scale) @ keys).float().softmax(dim=-1)
        found.append(attention.mean(dim=(1, 2))[:, prefix:])
    return torch.cat(found)


def find_tokens(model: nn.Module, score: str = "image") -> TokenNetwork:
    """Say how a network's tokens and their attention are read.

    Raises:
        UserError: they can't be; the network and the reason are named.
    """
    from timm.models.cait import Cait
    from timm.models.pvt_v2 import PyramidVisionTransformerV2
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError("attach SMMix to the network itself, before DDP wraps it")
    if hasattr(model, "_orig_mod"):
        raise UserError("attach SMMix to the network itself, before torch.compile wraps it")
    if getattr(model, "head_dist", None) is not None:
        raise _refusal(model, "it is distilled: it has a second token and a second classifier")
    if isinstance(model, VisionTransformer):
        return _ViT(model, score)
    if isinstance(model, Cait):
        return _CaiT(model, score)
    if isinstance(model, PyramidVisionTransformer | PyramidVisionTransformerV2):
        return _Pyramid(model, score)
    raise _refusal(model, "it has no tokens that attend to each other, or none known here")


def _refusal(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"SMMix can't read the attention of {type(model).__name__}: {why}; expected timm's vit_*, "
        "deit_*, cait_* or pvt_v2_* (not _li), or tenfold's pvt_*"
    )


@contextlib.contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the first input that a module gets, while in the context."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = module.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
