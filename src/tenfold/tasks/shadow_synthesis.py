"""The task that learns to paint shadows, HQSS's stage 1, in a Lightning module.

Each batch brings a step of encoder and generator, and then one of the discriminators, by manual
optimization.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods.hqss import HQSS, regions_of
from tenfold.tasks.image_pool import ImagePool
from tenfold.tasks.optimization import make_optimizer
from tenfold.tasks.removal_recipe import linear_rate
from tenfold.tasks.synthesis_setup import SynthesisExperiment

__all__ = ["RegionDataModule", "ShadowSynthesis"]

POOLS = ("pseudo_shadow", "pseudo_lit")


class ShadowSynthesis(pl.LightningModule):
    """Train an HQSS on photos and masks.

    Args:
        experiment: the objects of the run.
    """

    def __init__(self, experiment: SynthesisExperiment) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.experiment = experiment
        self.method = experiment.training
        self.model = experiment.model
        self.pools = {name: ImagePool(self.method.pool) for name in POOLS}

    def configure_model(self) -> None:
        """Attach the method; checkpoints load after it."""
        if self.method.schedule is not None:
            return
        steps = self.experiment.steps
        self.method.driven_by_engine = True
        self.method.attach(self.model, total_steps=sum(steps), steps_per_epoch=steps)

    def finalize(self) -> HQSS:
        """Take the discriminators away, and return what paints."""
        finished = self.method.finalize(self.model)
        assert isinstance(finished, HQSS)
        return finished

    # -- optimization -----------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build one optimizer for encoder and generator, and one for the discriminators."""
        train, model = self.experiment.recipe.train, self.model
        parts: tuple[tuple[nn.Module | None, ...], ...] = (
            (model.encoder, model.generator),
            (model.shadow_discriminator, model.lit_discriminator),
        )
        return [
            make_optimizer(
                train.optimizer,
                [parameter for part in both if part for parameter in part.parameters()],
                lr=train.lr,
                weight_decay=train.weight_decay,
            )
            for both in parts
        ]

    def on_train_start(self) -> None:
        """Set the rate of the first epoch, or of that which a resumed run begins with."""
        self._set_rate(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Draw what is random in the epoch from seed and epoch alone."""
        self.method.epoch_start(self.current_epoch)
        torch.manual_seed(
            mix_one(self.experiment.recipe.seed, self.current_epoch, self.global_rank)
        )

    def on_train_epoch_end(self) -> None:
        """Set the rate of the next epoch, ahead of its start, where it is noted."""
        self._set_rate(self.current_epoch + 1)

    def _set_rate(self, epoch: int) -> None:
        recipe, share = self.experiment.recipe, 1.0
        if recipe.train.schedule == "linear":
            share = linear_rate(epoch, recipe.train.epochs, pseudo_pairs=True)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * optimizer.defaults["lr"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Let encoder and generator learn, and then the discriminators.

        Raises:
            UserError: a loss is not finite.
        """
        optimizers: Any = self.optimizers()
        painters, judges = optimizers
        regions = regions_of(batch["image"], batch["mask"], batch["lit"])
        losses, made = self.method.generator_step(regions)
        self._check(losses, batch, batch_idx)
        total = torch.stack(list(losses.values())).sum()
        painters.zero_grad()
        self.manual_backward(total)
        self.method.before_step(painters.optimizer)
        painters.step()
        shown = [self.pools[name].exchange(getattr(made, name)) for name in POOLS]
        judged = self.method.discriminator_step(regions, *shown)
        self._check(judged, batch, batch_idx)
        judges.zero_grad()
        self.manual_backward(torch.stack(list(judged.values())).sum())
        judges.step()
        self.method.step()
        for name, loss in {"train_loss": total, **losses, **judged}.items():
            self.log(name, loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch["id"]))

    def _check(self, losses: dict[str, Tensor], batch: dict[str, Tensor], batch_idx: int) -> None:
        bad = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        if bad:
            raise UserError(
                f"{', '.join(bad)} not finite at step {self.method.steps_done} (epoch "
                f"{self.current_epoch}, batch {batch_idx}, first ids {batch['id'][:4].tolist()}): "
                "start again with a lower train.lr, in another --run_dir or by --overwrite; the "
                "last good checkpoint is kept until then"
            )

    # -- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what weights and optimizers don't hold: the pools and the method."""
        checkpoint["synthesis"] = {
            "pools": {name: pool.state() for name, pool in self.pools.items()},
            "method": self.method.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what `on_save_checkpoint` kept."""
        found = checkpoint["synthesis"]
        for name, pool in self.pools.items():
            pool.restore(found["pools"][name], self.device)
        self.method.load_state_dict(found["method"])


class RegionDataModule(pl.LightningDataModule):
    """Lend photos, shadows and lit regions to a Trainer.

    Args:
        experiment: the objects of the run.
    """

    def __init__(self, experiment: SynthesisExperiment) -> None:
        super().__init__()
        self.experiment = experiment

    def train_dataloader(self) -> Any:
        """Return shuffled, augmented batches, from the epoch that a resumed run begins with."""
        recipe = self.experiment.recipe
        loader = self.experiment.pairs.train_loader(
            batch_size=recipe.train.batch_size, seed=recipe.seed, augment=recipe.train.augment
        )
        loader.sampler.set_epoch(0 if self.trainer is None else self.trainer.current_epoch)
        return loader
