"""The task that learns classes from images or clips, for Lightning: a module and its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from tenfold.data import LabelledData
from tenfold.data.randomness import mix_one
from tenfold.errors import UserError
from tenfold.methods import Method, Mixing
from tenfold.tasks.callback import begin_epoch
from tenfold.tasks.optimization import make_optimizer, make_schedule, spared_of
from tenfold.tasks.recipe import Train

__all__ = [
    "CHANNELS_LAST",
    "Classification",
    "ImageDataModule",
    "as_batch",
    "in_channels_last",
    "inputs_of",
    "mixing_of",
]

Batch = dict[str, Tensor]

# The order of an input's or a weight's axes in memory that trains faster, by their number.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Classification(pl.LightningModule):
    """Train and validate a classifier of images or clips.

    A batch is a dict of `image` `(B, C, H, W)` or `clip` `(B, C, T, H, W)`, `label` `(B,)` and `id`
    `(B,)`; plain `(x, y)` pairs are taken too, unless a method needs ids.

    Args:
        model: the network; maps images or clips to logits `(B, num_classes)`.
        train: the recipe's section.
        num_classes: number of classes.
        total_steps: optimizer steps of the run.
        steps_per_epoch: of the first epoch, for the warm-up.
        methods: in the order of their stages; the callback attaches and drives them.
        normalize: turns stored images into the network's input.
        seed: of everything random in a step.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        *,
        num_classes: int,
        total_steps: int,
        steps_per_epoch: int,
        methods: Sequence[Method] = (),
        normalize: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.recipe = train
        self.num_classes = num_classes
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.methods = _Uncopied(methods)
        self.normalize = normalize
        self.seed = seed
        self.criterion = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        self.train_loss = MeanMetric()
        self.test_loss = MeanMetric()
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.has_trained = False
        self._mix = _mixing(train, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images `(B, C, H, W)`, or clips, to logits."""
        logits: Tensor = self.model(image)
        return logits

    def _prepared(self, batch: Any) -> Batch:
        """Normalise the batch, on the device that it has been moved to."""
        found = as_batch(batch, needs_ids=any(method.needs_ids for method in self.methods))
        key = _key(found)
        if self.normalize is not None and found[key].dtype == torch.uint8:
            found[key] = self.normalize(found[key])
        if found[key].ndim in CHANNELS_LAST:
            found[key] = found[key].contiguous(memory_format=CHANNELS_LAST[found[key].ndim])
        return found

    def on_train_epoch_start(self) -> None:
        """Draw what is random in steps (mixing, dropout) from seed, epoch and rank alone."""
        self.has_trained = True
        torch.manual_seed(mix_one(self.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the batch's loss.

        Raises:
            UserError: labels outside the classes, or a loss that is not finite.
        """
        batch = self._prepared(batch)
        label = batch["label"]
        if int(label.max()) >= self.num_classes or int(label.min()) < 0:
            raise UserError(
                f"labels from {int(label.min())} to {int(label.max())} with {self.num_classes} "
                f"classes: expected 0 to {self.num_classes - 1}"
            )
        replacing = next((method for method in self.methods if method.replaces_loss), None)
        if replacing is not None:
            if self._mix is not None and replacing.takes_mixed_labels:
                key = _key(batch)
                image, label = self._mix(batch[key], label)
                batch |= {key: image, "label": label}
            loss = replacing.training_loss(self.model, batch, self.criterion)
        else:
            image = inputs_of(batch)
            if self._mix is not None:
                image, label = self._mix(image, label)
            loss = self.criterion(self._logits(image), label)
        if not bool(torch.isfinite(loss)):
            self._stop(loss, batch, batch_idx)
        self.train_loss.update(loss.detach(), weight=len(batch["label"]))
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def _logits(self, image: Tensor) -> Tensor:
        try:
            logits: Tensor = self(image)
            return logits
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch of {len(image)} is too small for the network's batch norm: choose "
                f"another train.batch_size than {self.recipe.batch_size}, which leaves so few for "
                "the last batch"
            ) from error

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

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count hits and loss over the held-out samples."""
        batch = self._prepared(batch)
        logits = self(inputs_of(batch))
        size = len(batch["label"])
        self.test_loss.update(functional.cross_entropy(logits, batch["label"]), weight=size)
        self.test_accuracy.update(logits, batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log the held-out figures."""
        self.log("test_loss", self.test_loss, prog_bar=True)
        self.log("test_accuracy", self.test_accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what no method owns, and its schedule by steps."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for method in self.methods:
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
        schedule = make_schedule(
            recipe.schedule,
            optimizer,
            self.total_steps,
            round(recipe.warmup_epochs * self.steps_per_epoch),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class ImageDataModule(pl.LightningDataModule):
    """Lend a data set to a Trainer, each rank its own share.

    Args:
        data: the samples.
        train: the recipe's section.
        seed: of the order and the augmentation.
        methods: may choose among the training samples, and change images.
    """

    def __init__(self, data: LabelledData, train: Train, seed: int, methods: Sequence[Method] = ()):
        super().__init__()
        self.data = data
        self.recipe = train
        self.seed = seed
        self.methods = list(methods)

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> Any:
        """Return shuffled, augmented batches.

        The loader's processes may read ahead before Lightning announces the epoch that a resumed
        run begins with, so the loader begins with it here.

        Raises:
            UserError: two methods want to change images.
        """
        rank, world_size = self._ranks()
        loader = self.data.train_loader(
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            augment=self.recipe.augment,
            rank=rank,
            world_size=world_size,
            mixing=mixing_of(self.methods),
            views=any(method.wants_views() for method in self.methods),
        )
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        sampler: Any = loader.sampler
        sampler.set_epoch(epoch)
        begin_epoch(self.methods, loader, epoch)
        return loader

    def val_dataloader(self) -> Any:
        """Return the held-out samples in order."""
        rank, world_size = self._ranks()
        return self.data.test_loader(
            batch_size=self.recipe.batch_size, rank=rank, world_size=world_size
        )


class _Uncopied(list[Method]):
    """Methods that a copy of the module (a running average of it) shares, with all they hold."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Uncopied:
        return self


def mixing_of(methods: Sequence[Method]) -> Mixing | None:
    """Return what changes training images; at most one method may.

    Raises:
        UserError: two of them do.
    """
    found = {method.key(): method.mixing() for method in methods}
    found = {key: mixing for key, mixing in found.items() if mixing is not None}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} both mix images: keep one of them")
    return next(iter(found.values()), None)


def in_channels_last(model: nn.Module) -> nn.Module:
    """Put weights of 4 and 5 axes into the order in memory that trains faster, in place."""
    # One by one: `Module.to` has one format for all, which either 4 or 5 axes don't fit.
    for parameter in model.parameters():
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.to(memory_format=CHANNELS_LAST[parameter.ndim])
    return model


def as_batch(batch: Any, needs_ids: bool = False) -> Batch:
    """Bring what a loader gave into the form of a batch.

    Raises:
        UserError: neither a mapping with image (or clip) and label nor a pair, or ids are missing.
    """
    if isinstance(batch, Mapping) and {"image", "clip"} & {*batch} and "label" in batch:
        found: Batch = dict(batch)
    elif isinstance(batch, list | tuple) and len(batch) in (2, 3):
        found = dict(zip(("image", "label", "id"), batch, strict=False))
    else:
        raise UserError(
            f"the loader gave {type(batch).__name__}: expected (images, labels), or a dict with "
            "image or clip, label and id"
        )
    if needs_ids and "id" not in found:
        raise UserError(
            "the loader gives no ids, and a method of this recipe needs them: let its data set "
            "return (image, label, id)"
        )
    return found


def inputs_of(batch: Batch) -> Tensor:
    """Return a batch's images or clips."""
    return batch[_key(batch)]


def _key(batch: Batch) -> str:
    return "clip" if "clip" in batch else "image"


def _mixing(train: Train, num_classes: int) -> Callable[..., tuple[Tensor, Tensor]] | None:
    if not train.mixup and not train.cutmix:
        return None
    from torchvision.transforms import v2

    chosen = []
    if train.mixup:
        chosen.append(v2.MixUp(alpha=train.mixup, num_classes=num_classes))
    if train.cutmix:
        chosen.append(v2.CutMix(alpha=train.cutmix, num_classes=num_classes))
    mix: Callable[..., tuple[Tensor, Tensor]] = (
        v2.RandomChoice(chosen) if len(chosen) > 1 else chosen[0]
    )

    def mixed(inputs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if inputs.ndim == 4:
            return mix(inputs, label)
        from torchvision.tv_tensors import Video  # else v2 refuses a fifth axis

        video, shares = mix(Video(inputs), label)
        return video.as_subclass(Tensor), shares

    return mixed
