"""KCD: distil a teacher into a student, from the samples that still teach this student something.

Paper: "Knowledge Condensation Distillation", ECCV 2022 (arXiv 2207.05409).

Training has S stages. While a stage runs, every forward pass of the student gives the entropy of
its predictions, from logits that are there anyway; V(x) is its mean over all visits of x, F(x)
their number. Between two stages all samples are ranked by V * F^0.03, the first K_t are kept, and
those that leave are mixed, a little, into the least valuable that stay:

    loss   label_weight * CE(z_s, y) + logit_weight * KL_T(z_s, z_t) + feature_weight * L_features
    K_t    max(floor(r N), K_{t-1} - floor(N (1 - r) / S));     r is `keep_ratio`
    mix    x[boundary_i] <- (1 - e_i) x[boundary_i] + e_i x[drop_i],   e_i = augment_max * i / L

Samples that are out cost nothing: no forward pass of either network. With r = 0.7 and six stages
12.5 % of all forward passes are saved. Any loss of a batch composes with it, which is why a feature
distiller is one word (`distiller: at`).

What differs from the authors' code: entropies by log-softmax (theirs turns into NaN, and then every
score with it); a sample that was never visited is refused (theirs ranks first); no condensation
after the last epoch; nothing to do when nothing leaves (theirs fails); sums on the batch's device
instead of a table of all epochs. Ties go to the lower id.

Beside this file: `condensation` (values, ranking, schedule), `knowledge` (samples of a stage),
`mixing`, `distillers` and `contrast` (losses), `distillation` (the loss of a batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer

from tenfold.errors import StateError, UserError
from tenfold.methods.base import Kind, Stage
from tenfold.methods.condensation import condense, condensed_sizes, prediction_entropy
from tenfold.methods.contrast import ContrastLoss
from tenfold.methods.distillation import Distillation, check_ids
from tenfold.methods.distillers import (
    VariationalLoss,
    attention_loss,
    distillation_loss,
    neighbour_loss,
    relation_loss,
    similarity_loss,
)
from tenfold.methods.kcd_fields import check_fields
from tenfold.methods.mixing import mix_images
from tenfold.methods.own_loop import SampleMethod
from tenfold.methods.preparation import Prepared, prepare
from tenfold.methods.schedule import Schedule
from tenfold.methods.training_set import Mixing, TrainingSet

__all__ = [
    "KCD",
    "ContrastLoss",
    "VariationalLoss",
    "attention_loss",
    "condense",
    "condensed_sizes",
    "distillation_loss",
    "mix_images",
    "neighbour_loss",
    "prediction_entropy",
    "relation_loss",
    "similarity_loss",
]

ADAPTER_RATE = 1e-3


@dataclass(kw_only=True, eq=False)
class KCD(SampleMethod):
    """Distil a teacher from the samples that still teach, fewer in each stage.

    Args:
        teacher: a network in evaluation mode, frozen; in a recipe a run, an artifact, a pretrained
            `timm/…` or `torchvision/…`, or a model name, which is then trained first.
        keep_ratio: share of the samples that is kept in the end, in (0, 1]; 1 condenses nothing.
        stages: how often the set is condensed over the run.
        temperature: T of the softened logits.
        distiller: `kd` (logits alone), `at`, `sp`, `rkd`, `pkt`, `vid` or `contrast`.
        layers: names of the student's modules whose outputs a feature distiller compares.
        teacher_layers: names of the teacher's; the same as the student's if None.
        label_weight: weight of the cross-entropy. From the distiller if None.
        logit_weight: weight of the distilled logits. From the distiller if None.
        feature_weight: weight of the feature loss. From the distiller if None.
        negatives: samples of other classes that `contrast` compares each sample with.
        visit_power: exponent of the number of visits in the ranking.
        augment_max: largest share of a dropped image in a kept one, in [0, 1); 0 mixes nothing.
        revive: rank all samples, so that those that are out may come back.
        drop_window: `step`: those that leave now are mixed in; `all`: everything that is out.
        mix_source: `current`: raw pixels, mixed once and again later; `original`: augmented views,
            as they are loaded.
        unseen: what to do when samples were never visited: `refuse` or `keep`.
        teacher_cache: `off`, `memory`, or a folder: the teacher answers once for each view.
        cache_limit_gib: the most that the cache may take.
        teacher_precision: `same` as the student's, `float32` or `bfloat16`.

    Raises:
        UserError: a value is out of range.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> images = torch.randint(0, 256, (24, 1, 4, 4), dtype=torch.uint8)
    >>> data = TensorDataset(images, torch.arange(24) % 3)
    >>> teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2))
    >>> kcd = KCD(teacher=teacher.eval().requires_grad_(False), keep_ratio=0.5, stages=2)
    >>> student = kcd.attach(student, dataset=data, epochs=2, transform=lambda x: x / 255)
    >>> loader = DataLoader(kcd.dataset, batch_size=6, sampler=kcd.sampler)
    >>> optimizer = torch.optim.SGD(kcd.parameters_for(student), lr=0.1)
    >>> for epoch in range(2):
    ...     for images, labels, ids in loader:
    ...         optimizer.zero_grad()
    ...         kcd.loss(images, labels, ids).backward()
    ...         optimizer.step()
    ...     kcd.epoch_end()
    >>> student = kcd.finalize(student)
    >>> kcd.forwards
    {'student': 42, 'teacher': 42}
    """

    kind: ClassVar[Kind] = Kind.LOSS
    stage: ClassVar[Stage] = Stage.LOSS
    replaces_loss: ClassVar[bool] = True
    needs_ids: ClassVar[bool] = True
    needs_every_sample: ClassVar[bool] = True

    teacher: str | dict[str, Any] | nn.Module
    keep_ratio: float = 0.7
    stages: int = 6
    temperature: float = 4.0
    distiller: Literal["kd", "at", "sp", "rkd", "pkt", "vid", "contrast"] = "kd"
    layers: list[str] | None = None
    teacher_layers: list[str] | None = None
    label_weight: float | None = None
    logit_weight: float | None = None
    feature_weight: float | None = None
    negatives: int = 16384
    visit_power: float = 0.03
    augment_max: float = 0.3
    revive: bool = True
    drop_window: Literal["step", "all"] = "step"
    mix_source: Literal["current", "original"] = "current"
    unseen: Literal["refuse", "keep"] = "refuse"
    teacher_cache: str = "off"
    cache_limit_gib: float = 8.0
    teacher_precision: Literal["same", "float32", "bfloat16"] = "same"

    def validate(self) -> None:
        """Check the fields."""
        check_fields(self)
        self._network = self.teacher if isinstance(self.teacher, nn.Module) else None
        self._prepared: Prepared | None = None
        self._work: Distillation | None = None
        self._optimizer: Optimizer | None = None

    # -- ahead of the run -----------------------------------------------------------------------

    def networks(self) -> dict[str, Any]:
        """Ask for the teacher where it is named."""
        return {} if isinstance(self.teacher, nn.Module) else {"teacher": self.teacher}

    def use_network(self, role: str, network: nn.Module) -> None:
        """Take the teacher."""
        self._network = network

    def epoch_samples(self, dataset_size: int, epochs: int) -> list[int]:
        """Return the sizes of the knowledge set, epoch by epoch.

        >>> sizes = KCD(teacher="resnet56").epoch_samples(50_000, 240)
        >>> sizes[0], sizes[40], sizes[239], sum(sizes)
        (50000, 47500, 37500, 10500000)
        """
        length = self._stage_epochs(epochs)
        sizes = condensed_sizes(dataset_size, self.keep_ratio, self.stages)
        return [sizes[min(epoch // length, self.stages)] for epoch in range(epochs)]

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuse a run without epochs, or with fewer than there are stages."""
        if schedule.epochs is None:
            raise UserError(
                "KCD condenses between epochs, and this loop has none: give steps_per_epoch, or "
                "a dataset and epochs"
            )
        self._stage_epochs(schedule.epochs)

    def _stage_epochs(self, epochs: int) -> int:
        if epochs < self.stages:
            raise UserError(
                f"stages={self.stages} and {epochs} epochs: expected at least one epoch a stage; "
                "train longer, or give fewer stages"
            )
        return epochs // self.stages

    def prepare(self, model: nn.Module, data: TrainingSet, epochs: int) -> None:
        """Try both networks on an image, and see whether the data can be condensed.

        Raises:
            UserError: another number of classes, a layer that isn't there, features that can't be
                compared, images that can't be mixed, or views that can't be counted.
        """
        self._stage_epochs(epochs)
        if self._prepared is not None:
            self._prepared.teacher.remove()
        self._prepared = prepare(self, self._network, model, data, epochs)

    # -- the contract ---------------------------------------------------------------------------

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Watch the layers, and register the weights of the feature loss."""
        assert self.schedule is not None
        self.check_schedule(self.schedule)
        prepared = self._prepared
        if prepared is None:
            raise UserError(
                "KCD chooses among samples and doesn't know them yet: in a loop of your own "
                "attach(student, dataset=…, epochs=…); in a recipe use data with ids"
            )
        if self.schedule.epochs != prepared.epochs:
            raise UserError(
                f"the run has {self.schedule.epochs} epochs, and KCD was prepared for "
                f"{prepared.epochs}: give the same"
            )
        features = prepared.feature_loss(self, model)
        if features is not None and features.parts:
            trained = list(features.parameters())
            self._optimizer = torch.optim.Adam(trained, lr=ADAPTER_RATE)
            self.own(features, self._optimizer)
        self._work = prepared.distillation(self, model, features)
        return model

    @property
    def kept(self) -> Tensor:
        """Ids of the present stage, int64, ascending."""
        return self._work_of().knowledge.ids

    @property
    def forwards(self) -> dict[str, int]:
        """Samples that went through `student` and `teacher` in training so far."""
        return self._work_of().counted()

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        *,
        logits: Tensor | None = None,
        views: Tensor | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    ) -> Tensor:
        """Run both networks on a batch and return its loss.

        With gradients on, it notes what the samples are worth, and counts the forward passes.

        Args:
            images: as the networks take them, `(B, ...)`.
            labels: `(B,)`.
            ids: index of each sample in the data set, `(B,)`; leave them on the CPU.
            logits: the student's for these images, if you have run it yourself (DDP wraps it).
            views: which of its views each image is, `(B,)` from 0; for `teacher_cache`.
            criterion: loss of logits and labels.

        Raises:
            StateError: not attached.
            UserError: ids that can't be, or logits that are not finite; their ids are named.
        """
        model = self._attached_model()
        ids = check_ids(ids, len(images), self._work_of().knowledge.data.size)
        if logits is None:
            logits = model(images)
        return self._loss(logits, images, labels, ids, views, criterion)

    def _loss(
        self,
        logits: Tensor,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        views: Tensor | None,
        criterion: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        work = self._work_of()
        if self.teacher_cache != "off":
            if work.cache is None:
                assert self._prepared is not None
                work.cache = self._prepared.cache(self)
            if views is None and work.knowledge.data.views == 1:
                views = torch.zeros_like(ids)
        return work.loss(logits, images, labels, ids, views, criterion)

    def training_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        criterion: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the batch's loss; see the contract."""
        image, ids = batch["image"], batch["id"]
        if ids.device.type == "cpu":  # elsewhere looking at them would stop the device
            ids = check_ids(ids, len(image), self._work_of().knowledge.data.size)
        logits = model(image)
        return self._loss(logits, image, batch["label"], ids, batch.get("view"), criterion)

    # -- time -----------------------------------------------------------------------------------

    def on_epoch_start(self, epoch: int) -> None:
        """Condense, where a stage has ended; the end of the run needs none."""
        prepared = self._prepared
        if prepared is None or epoch >= prepared.epochs:
            return
        due = min(epoch // self._stage_epochs(prepared.epochs), self.stages)
        while prepared.knowledge.done < due:
            prepared.knowledge.condense()

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Move the weights of the feature loss, from the gradients of the same backward pass."""
        if self._optimizer is None:
            return
        found = [p.grad for p in self.owned_parameters() if p.grad is not None]
        # After an overflow there is nothing to learn from; another optimizer's step has none.
        if found and all(bool(torch.isfinite(gradient).all()) for gradient in found):
            self._optimizer.step()
        self._optimizer.zero_grad()

    def on_step(self) -> None:
        """Under an engine, notice the end of an epoch."""
        assert self.schedule is not None
        if self.steps_done in self.schedule.epoch_ends:
            self.on_epoch_end()

    def on_epoch_end(self) -> None:
        """Add up what all processes have seen."""
        self._work_of().share()

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Take the hooks away; the student itself was never changed."""
        work = self._work_of()
        if work.taps is not None:
            work.taps.remove()
        work.teacher.remove()
        return model

    # -- the engine's data ----------------------------------------------------------------------

    def epoch_ids(self, epoch: int, ids: Tensor) -> Tensor:
        """Return the ids of the present stage, ascending."""
        return self._work_of().knowledge.ids

    def epoch_repeats(self, ids: Tensor) -> None:
        """Don't count these as visits in this epoch."""
        self._work_of().repeats = ids

    def mixing(self) -> Mixing | None:
        """Return what changes images as they are loaded."""
        return None if self._prepared is None else self._prepared.knowledge.mixing

    def wants_views(self) -> bool:
        """Tell whether the cache needs to know each image's view."""
        return self.teacher_cache != "off"

    def local_buffers(self, model: nn.Module) -> list[str]:
        """Return the names of memory banks, which all processes write alike."""
        return [
            f"{key}.{name}"
            for key, owned in self._owned.items()
            for name, _ in owned.named_buffers()
        ]

    # -- checkpoints and records ----------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return values, the present stage, mixed pixels and counts."""
        assert self._prepared is not None
        return {"facts": self._prepared.facts(self), **self._work_of().state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            UserError: the state is of other data, another teacher or another configuration.
        """
        assert self._prepared is not None
        ours = self._prepared.facts(self)
        for name, value in state["facts"].items():
            if value != ours.get(name):
                raise UserError(
                    f"this checkpoint was written with {name}={value}, and this KCD has "
                    f"{ours.get(name)}: go on with the same data, teacher and fields"
                )
        self._work_of().load_state_dict(state)
        self.note_repeats()

    def metrics(self) -> dict[str, float]:
        """Return the samples of the present stage."""
        return {"kept": float(len(self._work_of().knowledge.keep))}

    def record(self) -> dict[str, Any]:
        """Return forward passes, the value distribution, and the most and least valuable images."""
        assert self._prepared is not None
        samples = len(self._prepared.data.ids)
        return self._work_of().record(self.epoch_samples(samples, self._prepared.epochs))

    def _work_of(self) -> Distillation:
        if self._work is None:
            raise StateError("this KCD is attached to no student: call attach first")
        return self._work
