"""SuperViT: train one vision transformer for many budgets.

Lin, Chen, Zhang, Shen, Ji, Cao: "Super Vision Transformer", IJCV 2023. The network is
`SuperViT` (in `tenfold.nn.supervit`): a grid of image sizes s and of shares eta of the tokens that
stay. A step runs four of its cells on one augmented and mixed batch (x, y):

    pass 0   (largest size, 1)      CE(z_0, y)
    pass 1   (largest size, eta)    KL(softmax(z_0) || softmax(z_1))
    pass 2   (s, 1)                 CE(z_2, y)
    pass 3   (s, eta')              KL(softmax(z_2) || softmax(z_3))

s is drawn from the smaller sizes, eta and eta' from the rates below 1, each by itself. Teachers get
no gradient. The four losses are added up, weight 1 each, for one step of the optimizer. LV-ViT adds
a cross-entropy over all patch tokens to pass 0, whose tokens are mixed with the reversed batch's
inside a box (MixToken); the class target is then that of the mixture in all passes.

What differs from the authors' code, and why:

- passes 0 and 1, and 2 and 3, are the same up to the attention of the first drop block: that trunk
  is computed once (18 % less work for DeiT-S). In training both then share what is random in it;
- one generator for all processes: with draws of their own, all wait for the largest size drawn;
- one backward pass, or one a pair (`backward`), in place of four;
- pass 3 always learns from pass 2; the authors' LV-ViT code, unlike their figure, leaves pass 0
  there (`teacher: largest`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer

from tenfold.errors import UserError
from tenfold.methods.base import Kind, Method, Stage
from tenfold.nn.models import Network
from tenfold.nn.supervit import SuperViT, SuperViTCell
from tenfold.nn.supervit_grid import (
    DEFAULT_DROP_BLOCKS,
    DEFAULT_KEEP_RATES,
    DEFAULT_SIZES,
    Box,
    Cell,
    kept_patches,
)

__all__ = [
    "Box",
    "SuperViT",
    "SuperViTCell",
    "SuperViTTraining",
    "distilled",
    "draw_box",
    "kept_patches",
]

Criterion = Callable[[Tensor, Tensor], Tensor]
# Built of other libraries' argument names, which SuperViT gives itself.
_GIVEN = ("num_classes", "in_chans", "channels", "img_size", "size")


@dataclass(kw_only=True, eq=False)
class SuperViTTraining(Method):
    """Train one ViT for every size and share of tokens in a grid; choose the budget per call.

    In a recipe the section `supervit` makes a `SuperViT` of the recipe's network; in a loop of your
    own you make it, and `sizes`, `keep_rates` and `drop_blocks` here are not looked at.

    Args:
        sizes: sides of the image in pixels; the largest is the data's.
        keep_rates: shares of the tokens that stay in the drop blocks; 1 among them.
        drop_blocks: blocks in which tokens leave, from 0.
        share_trunk: compute what two passes of one size have in common once.
        teacher: same_size: the smaller size's pruned pass learns from that size's full one;
            largest: from the largest size's.
        decay_pos_embed: whether weight decay takes in the position tables.
        mix_tokens: LV-ViT only: mix tokens with the reversed batch inside a box.
        same_on_ranks: all processes draw the same cells.
        seed: of the draws.

    Example:
        ```python
        model = SuperViT("deit_small_patch16_224", num_classes=100)
        training = SuperViTTraining()
        model = training.attach(model, total_steps=epochs * len(loader))
        for images, targets in loader_of_all_epochs:
            loss = training.loss(model, images, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            training.step()
        model = training.finalize(model)
        logits = model(images, size=160, keep_rate=0.7)
        ```
    """

    kind: ClassVar[Kind] = Kind.NETWORK
    stage: ClassVar[Stage] = Stage.NETWORK
    conflicts: ClassVar[frozenset[str]] = frozenset({"winograd3d"})  # ViTs have no 3-D convolutions
    replaces_loss: ClassVar[bool] = True
    takes_mixed_labels: ClassVar[bool] = True

    sizes: list[int] = field(default_factory=lambda: list(DEFAULT_SIZES))
    keep_rates: list[float] = field(default_factory=lambda: list(DEFAULT_KEEP_RATES))
    drop_blocks: list[int] = field(default_factory=lambda: list(DEFAULT_DROP_BLOCKS))
    share_trunk: bool = True
    teacher: Literal["same_size", "largest"] = "same_size"
    decay_pos_embed: bool = True
    mix_tokens: bool = True
    same_on_ranks: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._draws = 0
        self._used: set[int] = set()  # sizes since the last step

    @classmethod
    def key(cls) -> str:
        """Return the name of the recipe's section."""
        return "supervit"

    def validate(self) -> None:
        """Check the fields; the network checks its grid."""
        if self.teacher not in ("same_size", "largest"):
            raise UserError(f"teacher={self.teacher!r}: expected same_size or largest")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: expected at least 0")

    # -- the contract ---------------------------------------------------------------------------

    def wrap(self, model: nn.Module, network: Network, fresh: bool) -> tuple[nn.Module, Network]:
        """Make a SuperViT of the recipe's network.

        Raises:
            UserError: the network, or the grid, can't be.
        """
        if isinstance(model, SuperViT):
            return model, network
        grid = {
            "sizes": list(self.sizes),
            "keep_rates": list(self.keep_rates),
            "drop_blocks": list(self.drop_blocks),
            "decay_pos_embed": self.decay_pos_embed,
        }
        made = SuperViT(model, **grid, tables="fresh" if fresh else "resampled")  # type: ignore[arg-type]
        if fresh:  # timm's class token starts at almost nothing
            nn.init.trunc_normal_(made.cls_token, std=0.02)
        if network.name is None:
            return made, network
        given = dict(network.arguments)
        options = {key: value for key, value in given.items() if key not in _GIVEN}
        arguments = {
            "model": network.name,
            "num_classes": made.num_classes,
            "channels": given.get("in_chans", given.get("channels", 3)),
            **grid,
            **({"options": options} if options else {}),
        }
        return made, Network("tenfold/supervit", arguments)

    def on_attach(self, model: nn.Module) -> nn.Module:
        """See that it is one.

        Raises:
            UserError: it isn't.
        """
        if not isinstance(model, SuperViT):
            raise UserError(
                f"SuperViTTraining trains a SuperViT, and this is {type(model).__name__}: make it "
                "one first, SuperViT(model)"
            )
        return model

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        token_targets: Tensor | None = None,
        *,
        criterion: Criterion = functional.cross_entropy,
    ) -> Tensor:
        """Run the four passes of a step in one call of the network, and return their summed loss.

        Args:
            model: the SuperViT that was attached, or what wraps it (DDP, torch.compile).
            images: normalised, augmented and mixed, `(B, C, H, H)`.
            targets: class ids `(B,)`, or shares `(B, K)` as Mixup and CutMix make them.
            token_targets: LV-ViT only: shares for every patch, `(B, P, K)`; by default the image's.
            criterion: loss of logits and targets.

        Raises:
            StateError: not attached.
            UserError: targets that don't fit.
        """
        network = self._network()
        _check_targets(targets, len(images), network.num_classes)
        cells = self.draw()
        box = self._box(network)
        aux = network.aux_head is not None
        # Apart from its neighbour, a cell shares nothing with it.
        order = list(range(len(cells))) if self.share_trunk else _apart(cells)
        found = model(images, cells=[cells[index] for index in order], box=box, aux=aux)
        logits = [found[order.index(index)] for index in range(len(cells))]
        losses = self._losses(cells, logits, _mixed(targets, box, network.num_classes), criterion)
        loss = torch.stack(losses).sum()
        if aux:
            loss = loss + _token_loss(found[-1], targets, token_targets, criterion)
        return loss + self._untouched(network, cells)

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        *,
        accumulate: Literal["sum", "pair", "pass"] = "pair",
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        criterion: Criterion = functional.cross_entropy,
    ) -> Tensor:
        """Run a step's passes and their backward passes with less memory than `loss` takes.

        Gradients are the same, but for what is random in the trunk. Not under DDP, which reduces
        gradients once a backward pass, and not for LV-ViT.

        Args:
            model: the SuperViT that was attached.
            images: see `loss`.
            targets: see `loss`.
            accumulate: `sum`: one backward pass over all; `pair`: one for each size; `pass`: one
                for each pass, nothing shared.
            scale: such as a GradScaler's.
            criterion: see `loss`.

        Returns:
            The summed loss, without gradient.

        Raises:
            UserError: another way of accumulating, or a network that it isn't for.
        """
        if accumulate not in ("sum", "pair", "pass"):
            raise UserError(f"accumulate={accumulate!r}: expected sum, pair or pass")
        if accumulate == "sum":
            loss = self.loss(model, images, targets, criterion=criterion)
            scale(loss).backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        if isinstance(model, nn.parallel.DistributedDataParallel) or (
            self._network().aux_head is not None
        ):
            raise UserError(
                f"accumulate={accumulate!r} is neither for DDP nor for LV-ViT: use loss(…)"
            )
        _check_targets(targets, len(images), self._network().num_classes)
        cells, size = self.draw(), 2 if accumulate == "pair" and self.share_trunk else 1
        total = images.new_zeros(())
        known: dict[int, Tensor] = {}  # logits without gradient, for teachers
        for start in range(0, len(cells), size):
            part = range(start, min(start + size, len(cells)))
            found = dict(zip(part, model(images, cells=[cells[i] for i in part]), strict=True))
            known |= {index: logits.detach() for index, logits in found.items()}
            losses = [self._loss(i, cells, found, known, targets, criterion) for i in part]
            loss = torch.stack(losses).sum()
            scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    def draw(self) -> list[Cell]:
        """Draw the cells of the next step: largest size full and pruned, another size likewise.

        With one size, or without a rate below 1, the passes that would need others are left out.
        """
        network, rank = self._network(), self._rank()
        # A table that any process has used gets a gradient on all of them.
        draws = [self._drawn(network, each) for each in range(self._drawing())]
        self._draws += 1
        self._used |= {network.sizes.index(size) for cells in draws for size, _ in cells}
        return draws[rank]

    def training_loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], criterion: Criterion
    ) -> Tensor:
        """Return the batch's loss; see the contract."""
        return self.loss(
            model, batch["image"], batch["label"], batch.get("token_label"), criterion=criterion
        )

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Take zero gradients off position tables that no pass has used: they would still decay."""
        tables = self._network().pos_embed_list
        for index, table in enumerate(tables):
            if index not in self._used:
                table.grad = None

    def on_step(self) -> None:
        """Begin anew, also where a gradient scaler has skipped the update."""
        self._used.clear()

    # -- checkpoints ----------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return how often was drawn."""
        return {"draws": self._draws}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._draws = int(state["draws"])

    # -- inner workings -------------------------------------------------------------------------

    def _network(self) -> SuperViT:
        return cast(SuperViT, self._attached_model())

    def _rank(self) -> int:
        return torch.distributed.get_rank() if self._drawing() > 1 else 0

    def _drawing(self) -> int:
        """Return how many processes draw for themselves."""
        return 1 if self.same_on_ranks else _processes()

    def _drawn(self, network: SuperViT, rank: int) -> list[Cell]:
        random = np.random.default_rng((self.seed, self._draws, rank))
        pruned = [rate for rate in network.keep_rates if rate != 1]
        sizes = [network.sizes[-1]]
        if len(network.sizes) > 1:
            sizes.append(int(random.choice(network.sizes[:-1])))
        cells: list[Cell] = []
        for size in sizes:
            cells.append((size, 1.0))
            if pruned:
                cells.append((size, float(random.choice(pruned))))
        return cells

    def _losses(
        self, cells: list[Cell], logits: list[Tensor], targets: Tensor, criterion: Criterion
    ) -> list[Tensor]:
        found = dict(enumerate(logits))
        return [self._loss(i, cells, found, found, targets, criterion) for i in found]

    def _loss(
        self,
        index: int,
        cells: list[Cell],
        logits: Mapping[int, Tensor],
        known: Mapping[int, Tensor],
        targets: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """Return the loss of one pass; a pruned one follows the full one of its size."""
        if cells[index][1] == 1:
            return criterion(logits[index].float(), targets)
        teacher = 0 if self.teacher == "largest" else index - 1
        return distilled(logits[index], known[teacher])

    def _box(self, network: SuperViT) -> Box | None:
        if network.aux_head is None or not self.mix_tokens:
            return None
        random = np.random.default_rng((self.seed, self._draws - 1, self._rank(), 1))
        return draw_box(random, network.sizes[-1] // network.patch_size)

    def _untouched(self, network: SuperViT, cells: list[Cell]) -> Tensor | float:
        """Return nothing, by way of the tables that no pass has used.

        DDP waits for a gradient of each parameter; `on_before_step` takes it off again.
        """
        if _processes() == 1:
            return 0.0
        sizes = {size for size, _ in cells}
        unused = [
            table
            for size, table in zip(network.sizes, network.pos_embed_list, strict=True)
            if size not in sizes
        ]
        return 0.0 * torch.stack([table.sum() for table in unused]).sum() if unused else 0.0


# -- the method's mathematics, as functions --------------------------------------------------------


def distilled(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)), averaged over the batch.

    Args:
        student: logits `(B, K)`.
        teacher: logits `(B, K)`; they get no gradient.
    """
    targets = teacher.detach().float().softmax(dim=1)
    return functional.kl_div(student.float().log_softmax(dim=1), targets, reduction="batchmean")


def draw_box(random: np.random.Generator, grid: int) -> Box:
    """Draw MixToken's box: lam ~ U(0, 1), sides of int(grid * sqrt(1 - lam)), centre anywhere.

    Args:
        random: where to draw from.
        grid: tokens a side.
    """
    side = int(grid * np.sqrt(1 - random.random()))
    row, column = (int(value) for value in random.integers(0, grid, size=2))
    ends = (row - side // 2, column - side // 2, row + side // 2, column + side // 2)
    top, left, bottom, right = (min(max(end, 0), grid) for end in ends)
    return Box(top, left, bottom, right, grid)


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _check_targets(targets: Tensor, batch: int, classes: int) -> None:
    hard = targets.ndim == 1 and not targets.is_floating_point()
    if targets.shape != ((batch,) if hard else (batch, classes)) or (
        not hard and not targets.is_floating_point()
    ):
        raise UserError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype}: expected class ids "
            f"({batch},), or shares ({batch}, {classes}) in floats"
        )


def _mixed(targets: Tensor, box: Box | None, classes: int) -> Tensor:
    """Return the class targets of a batch whose tokens are swapped inside a box."""
    if box is None:
        return targets
    shares = targets if targets.ndim == 2 else functional.one_hot(targets, classes).float()
    return (1 - box.share) * shares + box.share * shares.flip(0)


def _token_loss(
    logits: Tensor, targets: Tensor, token_targets: Tensor | None, criterion: Criterion
) -> Tensor:
    """Return the loss of all patches `(B, P, K)`; without labels of their own, by the image's."""
    patches = logits.shape[1]
    if token_targets is None:
        token_targets = targets.repeat_interleave(patches, dim=0)
    elif token_targets.shape != logits.shape:
        raise UserError(
            f"token_targets of shape {tuple(token_targets.shape)}: expected {tuple(logits.shape)}"
        )
    else:
        token_targets = token_targets.flatten(0, 1)
    return criterion(logits.float().flatten(0, 1), token_targets)


def _apart(cells: list[Cell]) -> list[int]:
    """Return an order of cells in which neighbours have different sizes, where there are two."""
    return sorted(range(len(cells)), key=lambda index: (cells[index][1] != 1, index))
