"""SMMix: self-motivated image mixing for vision transformers.

Chen, Lin, Lin, Zhang, Chao, Ji: "SMMix: Self-Motivated Image Mixing for Vision Transformers",
ICCV 2023. It stands in the place of CutMix while a ViT is trained; inference is unchanged.

In half of the steps a batch goes through plain Mixup. In the others the network itself says, ahead
of its training pass and without gradients, which square of each image its last block attends to
most and which least; the most attended square of one image is pasted over the least attended one of
another. With S x S image tokens, squares of r x r of them, N = S * S, image b paired with B-1-b,
scores a = attention that a token receives from the image tokens of the last block:

    target window of b   argmin over (i, j) of the sum of a[b] over the r x r window at (i, j)
    source window of b'  argmax of the same for b'
    lam = (N - r * r) / N                       share of the target; the paper's is 1 - lam
    y_mix = lam * y[b] + (1 - lam) * y[b']
    L_cls  = CE(o, y_mix)                       o: logits of the mixed image
    L_fine = 1/2 * (CE(o_t, y[b]) + CE(o_s, y[b']))     logits of the two regions' mean tokens
    L_con  = KL(softmax(m) || softmax(o)),  m = lam * z[b] + (1 - lam) * z[b']
    L = L_cls + L_fine + L_con                  z: logits of the unmixed images, constants

What differs from the authors' code, and why:

- all processes draw the same coin and side: with coins of their own some process nearly always
  takes the longer step, and all wait for it;
- no map of attention but one, of the last block in the pass without gradients, and there the class
  token alone goes through the rest of the block: nothing else is needed for the logits;
- windows by average pooling, and only the pasted pixels are copied;
- regions go through the network's own classifier by default (`token_head: shared`); the authors
  found no difference to a second layer, which `own` trains beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.methods.attention_scores import TokenNetwork, find_tokens
from tenfold.methods.base import Kind, Method, Stage
from tenfold.methods.hooks import mark_as_owned
from tenfold.methods.mixed_pictures import mixed_pictures
from tenfold.methods.region_mixing import (
    Windows,
    cross_entropy,
    extreme_windows,
    paste_windows,
    region_means,
    smmix_loss,
    smooth_labels,
    window_mask,
)
from tenfold.methods.training_set import TrainingSet

__all__ = [
    "SMMix",
    "Windows",
    "extreme_windows",
    "paste_windows",
    "region_means",
    "smmix_loss",
    "smooth_labels",
    "window_mask",
]

SHOWN = 4  # mixed images of a run that its report shows


@dataclass(kw_only=True, eq=False)
class SMMix(Method):
    """Mix images by the attention of the vision transformer under training; supervise both parts.

    Takes timm's `vit_*`, `deit_*`, `cait_*` and `pvt_v2_*`, and tenfold's `pvt_*`.

    Args:
        switch_prob: share of the steps that mix by attention; the others are Mixup.
        mixup_alpha: of Mixup's Beta distribution.
        least_side: smallest side of a pasted square, as a share of the image's.
        largest_side: largest side.
        label_smoothing: share of a target that is spread over all classes; a recipe's own
            `train.label_smoothing` has to be 0.
        score: image: attention that a token receives from all image tokens; class: from the class
            token alone.
        token_head: shared: regions go through the classifier; own: through a second layer, trained
            by AdamW beside it and gone in the end.
        seed: of the coin, the sides and Mixup's shares; the same on all processes.

    Example:
        ```python
        mixer = SMMix()
        model = mixer.attach(model, total_steps=epochs * len(loader))
        for images, labels in loader_of_all_epochs:
            loss = mixer.loss(model, images, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mixer.step()
        model = mixer.finalize(model)
        ```
    """

    kind: ClassVar[Kind] = Kind.LOSS
    stage: ClassVar[Stage] = Stage.LOSS
    conflicts: ClassVar[frozenset[str]] = frozenset({"winograd3d"})  # ViTs have no 3-D convolutions
    replaces_loss: ClassVar[bool] = True
    makes_targets: ClassVar[bool] = True

    switch_prob: float = 0.5
    mixup_alpha: float = 0.8
    least_side: float = 0.25
    largest_side: float = 0.75
    label_smoothing: float = 0.1
    score: Literal["image", "class"] = "image"
    token_head: Literal["shared", "own"] = "shared"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tokens: TokenNetwork | None = None
        self._head: nn.Linear | None = None
        self._head_optimizer: torch.optim.AdamW | None = None
        self._head_state: dict[str, Any] | None = None  # of a checkpoint, until there is a step
        self._draws = 0
        self._mixed = 0
        self._data: TrainingSet | None = None
        self._pictures: Tensor | None = None
        self._pictured_epoch: int | None = None

    def validate(self) -> None:
        """Check the fields."""
        if not 0 <= self.switch_prob <= 1:
            raise UserError(f"switch_prob={self.switch_prob}: expected a share in [0, 1]")
        if not (math.isfinite(self.mixup_alpha) and self.mixup_alpha > 0):
            raise UserError(f"mixup_alpha={self.mixup_alpha}: expected more than 0")
        if not 0 < self.least_side <= self.largest_side < 1:
            raise UserError(
                f"least_side={self.least_side}, largest_side={self.largest_side}: expected "
                "0 < least_side <= largest_side < 1"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing}: expected a share in [0, 1)")
        if self.score not in ("image", "class"):
            raise UserError(f"score={self.score!r}: expected image or class")
        if self.token_head not in ("shared", "own"):
            raise UserError(f"token_head={self.token_head!r}: expected shared or own")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: expected at least 0")

    # -- the contract ---------------------------------------------------------------------------

    def prepare(self, model: nn.Module, data: TrainingSet, epochs: int) -> None:
        """See whether the network says what it attends to.

        Raises:
            UserError: it doesn't, or its squares of tokens are too few.
        """
        tokens = find_tokens(model, self.score)
        height, width = data.example.shape[-2:]
        if height != width:
            raise UserError(f"{data.name} has images of {height}x{width}: SMMix needs square ones")
        _, scores = tokens.probe(data.example)
        self.sides(_side_of(scores, height))
        self._data = data

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Watch the network's last tokens."""
        self._tokens = find_tokens(model, self.score)
        self._tokens.watch()
        if self.token_head == "own":
            head = self._tokens.head
            self._head = nn.Linear(head.in_features, head.out_features)
            nn.init.trunc_normal_(self._head.weight, std=0.02)
            nn.init.zeros_(self._head.bias)
            self._head.to(head.weight.device, head.weight.dtype)
            self.own(self._head)
        return model

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Take the hook away; the network itself was never changed."""
        self._found().remove()
        return model

    def sides(self, tokens: int) -> range:
        """Return the sides that squares may have, in tokens, where the image has `tokens` a side.

        Raises:
            UserError: none is left between nothing and everything.
        """
        least, largest = int(tokens * self.least_side), int(tokens * self.largest_side)
        if not 1 <= least <= largest <= tokens - 1:
            raise UserError(
                f"least_side={self.least_side}, largest_side={self.largest_side} make squares of "
                f"{least} to {largest} of {tokens} tokens a side: expected 1 to {tokens - 1}; "
                "give larger images, smaller patches, or other sides"
            )
        return range(least, largest + 1)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mix a batch, run the network on it, and return the loss.

        Args:
            model: the network that was attached, or what wraps it (DDP, torch.compile).
            images: normalised, `(B, C, H, H)`, B even.
            labels: class ids, `(B,)`.

        Raises:
            StateError: not attached.
            UserError: a batch that can't be mixed, labels that aren't class ids, or scores that
                are not finite.
        """
        self._attached_model()
        tokens = self._found()
        classes = tokens.head.out_features
        _check_batch(images, labels)
        random = np.random.default_rng((self.seed, self._draws))
        self._draws += 1
        targets = smooth_labels(labels, classes, self.label_smoothing)
        if random.random() >= self.switch_prob:
            _check_labels(labels, classes)
            return self._mixup(
                model, images, targets, random.beta(self.mixup_alpha, self.mixup_alpha)
            )

        logits, scores = tokens.probe(images)
        _check_labels(labels, classes, scores)
        side = _side_of(scores, images.shape[-1])
        square = int(random.choice(self.sides(side)))
        grid = scores.reshape(-1, side, side)
        target, source = extreme_windows(grid, square)
        mixed = paste_windows(images, target, source, square, images.shape[-1] // side)
        mask = window_mask(target, square, side)
        lam = (side * side - square * square) / (side * side)

        self._picture(images, grid, target, source, square, mixed)
        self._mixed += 1
        output = model(mixed)
        regions = tokens.pooled(region_means(tokens.take(), mask))
        o_target, o_source = self._region_logits(regions).unbind(1)
        return smmix_loss(output, o_target, o_source, targets, logits, lam)

    def _mixup(self, model: nn.Module, images: Tensor, targets: Tensor, share: float) -> Tensor:
        output = model(share * images + (1 - share) * images.flip(0))
        tokens = self._found().take()
        loss = cross_entropy(output, share * targets + (1 - share) * targets.flip(0))
        return self._with_idle_head(loss, tokens)

    def _with_idle_head(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """Give the second head a gradient of zero: DDP waits for that of every parameter."""
        if self._head is None:
            return loss
        idle: Tensor = self._head(torch.zeros_like(tokens[:, 0]))
        return loss + 0.0 * idle.sum()

    def _region_logits(self, regions: Tensor) -> Tensor:
        found: Tensor = (self._found().head if self._head is None else self._head)(regions)
        return found

    def training_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        criterion: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the batch's loss; see the contract. Of an odd batch, the last image sits out."""
        images, labels = batch["image"], batch["label"]
        even = len(images) // 2 * 2
        if even:
            return self.loss(model, images[:even], labels[:even])
        output = model(images)  # one image alone: there is nothing to mix it with
        loss = cross_entropy(output, smooth_labels(labels, output.shape[1], self.label_smoothing))
        return self._with_idle_head(loss, self._found().take())

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Step the second head like the classifier: with its rates, by AdamW."""
        if self._head is None:
            return
        weight = self._found().head.weight
        groups = optimizer.param_groups
        group = next((g for g in groups if any(p is weight for p in g["params"])), groups[0])
        if "betas" not in group:
            raise UserError(
                f"token_head='own' is trained by AdamW with the rates of the classifier, and "
                f"{type(optimizer).__name__} has other ones: use an optimizer of Adam's kind, or "
                "token_head='shared'"
            )
        if self._head_optimizer is None:
            self._head_optimizer = torch.optim.AdamW(self._head.parameters())
            mark_as_owned(self._head_optimizer)
            if self._head_state is not None:
                self._head_optimizer.load_state_dict(self._head_state)
        for own in self._head_optimizer.param_groups:
            own |= {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        gradients = [p.grad for p in self._head.parameters() if p.grad is not None]
        # After an overflow there is nothing to learn from.
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self._head_optimizer.step()

    def on_step(self) -> None:
        """Forget the second head's gradients, also where a loss scaler has skipped the step."""
        if self._head is not None:
            self._head.zero_grad()

    # -- checkpoints and records ----------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return how often was drawn, the second head's optimizer and the latest pictures."""
        head = self._head_state if self._head_optimizer is None else self._head_optimizer
        return {
            "draws": self._draws,
            "mixed": self._mixed,
            "head": head.state_dict() if isinstance(head, Optimizer) else head,
            "pictures": self._pictures,
            "pictured_epoch": self._pictured_epoch,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._draws, self._mixed = int(state["draws"]), int(state["mixed"])
        self._head_optimizer, self._head_state = None, state["head"]
        self._pictures, self._pictured_epoch = state["pictures"], state["pictured_epoch"]

    def record(self) -> dict[str, Any]:
        """Return how many batches were mixed by attention, and the last ones as pictures."""
        facts = [
            ("batches mixed by attention", f"{self._mixed:,} of {self._draws:,}"),
            ("regions supervised by", f"{self.token_head} head"),
        ]
        if self._pictures is None:
            return {"facts": facts}
        title = (
            "Mixed images: the target with its attention and its least attended square, the "
            "source with its most attended one, and what was trained on"
        )
        note = f"epoch {(self._pictured_epoch or 0) + 1}"
        pictures = list(self._pictures)
        notes = [note] * len(pictures)
        return {
            "facts": facts,
            "images": [{"title": title, "pictures": pictures, "notes": notes}],
        }

    def _picture(
        self,
        images: Tensor,
        scores: Tensor,
        target: Windows,
        source: Windows,
        square: int,
        mixed: Tensor,
    ) -> None:
        """Keep the first images of an epoch that are mixed by attention, for the report."""
        if self._pictured_epoch == self.epoch:
            return
        self._pictured_epoch = self.epoch
        scale = None if self._data is None else self._data.scale
        self._pictures = mixed_pictures(images, scores, target, source, square, mixed, SHOWN, scale)

    def _found(self) -> TokenNetwork:
        self._attached_model()
        assert self._tokens is not None
        return self._tokens


# -- what is refused -------------------------------------------------------------------------------


def _side_of(scores: Tensor, pixels: int) -> int:
    """Return the tokens of an image's side, which its pixels have to be a multiple of."""
    side = math.isqrt(scores.shape[1])
    if side * side != scores.shape[1] or pixels % side:
        raise UserError(
            f"the network has {scores.shape[1]} tokens for images of {pixels} pixels: expected a "
            "square number of tokens whose side divides the image's"
        )
    return side


def _check_batch(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise UserError(
            f"images of shape {tuple(images.shape)}: expected square ones, (B, C, H, H)"
        )
    if not images.is_floating_point():
        raise UserError(f"images of {images.dtype}: expected normalised floats; convert them first")
    if len(images) == 0 or len(images) % 2:
        raise UserError(
            f"a batch of {len(images)} images can't be paired: expected an even number; let the "
            "loader drop the uneven last batch, DataLoader(…, drop_last=True)"
        )
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(
            f"labels of shape {tuple(labels.shape)} and {labels.dtype}: expected class ids "
            f"({len(images)},); SMMix mixes and smooths them itself"
        )


def _check_labels(labels: Tensor, classes: int, scores: Tensor | None = None) -> None:
    """Refuse labels outside the classes and scores that are not finite; looks at a device once."""
    wrong = (labels < 0).any() | (labels >= classes).any()
    broken = torch.zeros_like(wrong) if scores is None else ~scores.isfinite().all()
    if not bool(wrong | broken):
        return
    if bool(wrong):
        raise UserError(
            f"labels from {int(labels.min())} to {int(labels.max())}, and the network has "
            f"{classes} classes: expected 0 to {classes - 1}"
        )
    raise UserError(
        "the attention of the last block is not finite: the network has diverged; start again with "
        "a lower learning rate, or clip gradients"
    )
