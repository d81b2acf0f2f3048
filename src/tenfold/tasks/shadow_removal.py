"""The task that learns to remove shadows, for Lightning: a module and its data.

One network, one optimizer, one loss: Lightning's own loop. The network is called with codes and a
mask, the loss is LAB-Net's (`LABNetTraining`), and other methods (LBC, LTS) are driven by the same
callback as for classifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from tenfold.data.randomness import mix_one
from tenfold.data.shadows import ShadowData
from tenfold.errors import UserError
from tenfold.measure.shadow_baselines import untouched
from tenfold.measure.shadow_errors import ShadowErrors
from tenfold.methods import Method
from tenfold.methods.hqss import HQSSTraining
from tenfold.methods.labnet import LABNetTraining
from tenfold.nn.hqss_networks import HQSSRemover
from tenfold.tasks.callback import begin_epoch
from tenfold.tasks.optimization import make_optimizer, make_schedule, spared_of
from tenfold.tasks.recipe import Train
from tenfold.tasks.removal_evaluation import (
    RemovalEvaluation,
    errors_of_batch,
    floats,
    summarised,
)
from tenfold.tasks.removal_recipe import linear_rate, rate_by_step

__all__ = ["ShadowDataModule", "ShadowRemoval"]

Batch = dict[str, Tensor]


class ShadowRemoval(pl.LightningModule):
    """Train and validate a remover of shadows.

    A batch is a dict of `image`, `mask` and `target`, uint8, as `ShadowData` gives it; without
    `target` where pseudo pairs are made.

    Args:
        model: the network; maps codes `(B, 3, H, W)` and masks `(B, 1, H, W)` to codes.
        train: the recipe's section.
        training: the losses, the guess and the teacher.
        data: names and sizes for the figures; its loaders are the data module's.
        sizes: optimizer steps of each epoch.
        methods: in the order of their stages; the callback attaches and drives them.
        synthesis: makes pairs of photos whose lit parts get a shadow; None: the data has pairs.
        seed: of everything random in a step.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        training: LABNetTraining,
        data: ShadowData,
        *,
        sizes: Sequence[int],
        methods: Sequence[Method] = (),
        synthesis: HQSSTraining | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.recipe = train
        self.sizes = list(sizes)
        self.shared = _Shared(training, data, list(methods), synthesis)
        self.seed = seed
        self.train_loss = MeanMetric()
        self.has_trained = False
        self.evaluated: RemovalEvaluation | None = None
        self._found: list[ShadowErrors] = []
        self._untouched: list[ShadowErrors] = []

    def forward(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Map codes and masks to codes without shadow."""
        made: Tensor = self.model(codes, mask)
        return made

    def on_train_epoch_start(self) -> None:
        """Draw what is random in steps from seed, epoch and rank alone."""
        self.has_trained = True
        torch.manual_seed(mix_one(self.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's loss.

        Raises:
            UserError: a loss that is not finite.
        """
        images, mask, targets = self._pairs(batch)
        total, parts = self._losses(images, mask, targets)
        if not bool(torch.isfinite(total)):
            self._stop(total, batch, batch_idx)
        count = len(images)
        self.train_loss.update(total.detach(), weight=count)
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        for name, value in parts.items():
            self.log(
                f"loss_{name}",
                value.detach(),
                on_step=False,
                on_epoch=True,
                batch_size=count,
                sync_dist=True,
            )
        return total

    def _losses(
        self, images: Tensor, mask: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise, and its parts by name."""
        training, synthesis = self.shared.training, self.shared.synthesis
        if synthesis is None or not isinstance(self.model, HQSSRemover):
            losses = training.losses(self.model, images, mask, targets)
            return losses.total, losses.parts()
        remover = training.remover(self.model)
        codes, truth = remover.inputs(images, mask), remover.codes(targets)
        parts = synthesis.removal_losses(self.model, codes, truth, mask)
        return torch.stack(list(parts.values())).sum(), parts

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return photos in shadow, masks and photos without, which HQSS makes where it is asked."""
        synthesis = self.shared.synthesis
        if synthesis is None:
            return floats(batch, self.device)
        images, mask, lit = (batch[name].float() for name in ("image", "mask", "lit"))
        with torch.no_grad():
            pseudo, targets = synthesis.pseudo_pairs(images.div(255), mask, lit)
        return pseudo, lit, targets

    def on_train_epoch_end(self) -> None:
        """Refuse to write a checkpoint of weights that are not finite.

        Raises:
            UserError: the epoch's last update was one too many.
        """
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise UserError(
                    f"{name} is not finite at the end of epoch {self.current_epoch} (step "
                    f"{self.global_step}): start again with a lower train.lr or with "
                    "train.clip_norm; the last good checkpoint is kept until then"
                )

    def _stop(self, loss: Tensor, batch: Batch, batch_idx: int) -> None:
        ids = batch["id"][:8].tolist() if "id" in batch else []
        raise UserError(
            f"the loss became {loss.item()} at step {self.global_step} (epoch "
            f"{self.current_epoch}, batch {batch_idx}{f', first ids {ids}' if ids else ''}): "
            "start again with a lower train.lr or with train.clip_norm, in another --run_dir or "
            "by --overwrite; the last good checkpoint is kept until then"
        )

    # -- held-out photos ----------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the figures of the last time."""
        self._found = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take the errors of a batch of held-out photos; of the photos themselves once."""
        remover = self.shared.training.remover(self.model)
        self._found.append(errors_of_batch(remover, batch, self.device))
        if len(self._untouched) <= batch_idx:
            self._untouched.append(errors_of_batch(untouched, batch, self.device))

    def on_validation_epoch_end(self) -> None:
        """Log the held-out figures."""
        data = self.shared.data
        self.evaluated = RemovalEvaluation(
            summarised(self._found), summarised(self._untouched), len(self._found), data.name
        )
        for name, value in self.evaluated.figures().items():
            self.log(name, value, prog_bar=name == "test_shadow_lab_mae")

    # -- optimization -------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what no method owns, and its schedule by steps."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for method in self.shared.methods:
            mine = {id(parameter) for parameter in method.parameters_for(self.model)}
            parameters = [p for p in parameters if id(p) in mine]
        recipe = self.recipe
        optimizer = make_optimizer(
            recipe.optimizer,
            parameters,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            spared=spared_of(self.model),
        )
        warmup = round(recipe.warmup_epochs * self.sizes[0])
        if recipe.schedule != "linear":
            schedule = make_schedule(recipe.schedule, optimizer, sum(self.sizes), warmup)
        else:
            pseudo = self.shared.synthesis is not None
            shape = rate_by_step(
                lambda time: linear_rate(time, recipe.epochs, pseudo), self.sizes, warmup
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class ShadowDataModule(pl.LightningDataModule):
    """Lend photos with shadows to a Trainer, each rank its own share.

    Args:
        data: the photos.
        train: the recipe's section.
        seed: of the order and the augmentation.
        methods: may look at the loader ahead of an epoch.
        pairs: makes the loader of training batches in place of the data's own, for pseudo pairs;
            called with batch_size, seed, rank and world_size.
    """

    def __init__(
        self,
        data: ShadowData,
        train: Train,
        seed: int,
        methods: Sequence[Method] = (),
        pairs: Any = None,
    ):
        super().__init__()
        self.data = data
        self.recipe = train
        self.seed = seed
        self.methods = list(methods)
        self.pairs = pairs

    def train_dataloader(self) -> Any:
        """Return shuffled, augmented batches, from the epoch on that a resumed run begins with."""
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        shared = {
            "batch_size": self.recipe.batch_size, "seed": self.seed, "rank": rank,
            "world_size": world_size,
        }  # fmt: skip
        loader = (
            self.data.train_loader(augment=self.recipe.augment, **shared)
            if self.pairs is None
            else self.pairs(**shared)
        )
        epoch = 0 if trainer is None else trainer.current_epoch
        loader.sampler.set_epoch(epoch)
        begin_epoch(self.methods, loader, epoch)
        return loader

    def val_dataloader(self) -> Any:
        """Return the held-out photos in order; none without photos free of shadow."""
        return self.data.test_loader(batch_size=1) if self.data.test_has_targets else []


class _Shared:
    """What a copy of the module (a running average of it) shares with it, and doesn't copy."""

    def __init__(
        self,
        training: LABNetTraining,
        data: ShadowData,
        methods: list[Method],
        synthesis: HQSSTraining | None,
    ) -> None:
        self.training = training
        self.data = data
        self.methods = methods
        self.synthesis = synthesis

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self
