"""The section `gan` of a recipe: how teacher, discriminator and student are trained together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tenfold.errors import UserError, unknown_name
from tenfold.nn.adversarial import MODES

__all__ = ["TRAIN_DEFAULTS", "Gan", "check_train"]

# What `train` is where a recipe of this task says nothing: the papers' settings.
TRAIN_DEFAULTS: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 1,
    "optimizer": {"name": "adam", "betas": [0.5, 0.999]},
    "lr": 2e-4,
    "weight_decay": 0.0,
    "schedule": "linear",
}
# Keys of `train` that mean nothing here, with the value that leaves them out.
_UNUSED: dict[str, Any] = {
    "warmup_epochs": 0, "label_smoothing": 0, "mixup": 0, "cutmix": 0, "ema": None,
    "accumulate": 1, "clip_norm": None,
}  # fmt: skip
_KEEP = ("last", "best")


@dataclass(kw_only=True)
class Gan:
    """How generators are trained; only for the task translation.

    Args:
        teacher: the teacher's own arguments, such as {ngf: 64}; with a name where it is another
            network than the student.
        teacher_init: a checkpoint that the teacher starts from, .pth, .safetensors or an artifact.
        discriminator_init: likewise for its discriminator.
        ndf: filters of the discriminator; 64 unpaired, 128 for pairs.
        loss: lsgan (unpaired) or hinge (pairs).
        reconstruction: pairs: weight of the teacher's L1 distance to the target.
        cycle: unpaired: weight of the way there and back.
        identity: unpaired: weight of leaving a target image alone, as a share of cycle.
        pool: unpaired: made images that the discriminator is shown again; 0: none.
        teacher_every: pairs: the teacher takes a step every so many batches.
        round_epochs: unpaired: epochs of the teacher between rounds of the student.
        student_epochs: unpaired: epochs of the student for each of them.
        decay_epochs: the last so many epochs, in which the rate falls to zero; half by default.
        adversarial: weight of the student's loss by the teacher's discriminator.
        style: weight of the distance of Gram matrices; 10000 with a method, else 0.
        feature: weight of the distance of features; 10 with a method, else 0.
        perceptual: whose features: vgg16, a run of stagenet, weights, or file.py:function.
        student_reconstruction: weight of the student's L1 distance to the target, or to the
            teacher's image where there is none; without a method 100 and 10, else 0.
        extractor: for FID and KID: inception, a run of stagenet, weights, or file.py:function.
        evaluate_every: pairs: epochs between evaluations; a tenth of the run by default.
        keep: the last student, or the best one by FID, else by L1.
        validation: training images that are held out to choose teacher and student by; 0: the
            held-out images that are reported are taken, as the papers' code does.
        pictures: how many held-out images are shown as training goes.
    """

    teacher: str | dict[str, Any] | None = None
    teacher_init: str | None = None
    discriminator_init: str | None = None
    ndf: int | None = None
    loss: str | None = None
    reconstruction: float = 100.0
    cycle: float = 10.0
    identity: float = 0.5
    pool: int = 50
    teacher_every: int = 1
    round_epochs: int = 10
    student_epochs: int = 4
    decay_epochs: int | None = None
    adversarial: float = 1.0
    style: float | None = None
    feature: float | None = None
    perceptual: str | dict[str, Any] | None = None
    student_reconstruction: float | None = None
    extractor: str | dict[str, Any] | None = None
    evaluate_every: int | None = None
    keep: str = "last"
    validation: int = 0
    pictures: int = 4

    def validate(self) -> None:
        """Refuse values out of range."""
        least: dict[str, float] = dict.fromkeys(
            ("ndf", "teacher_every", "round_epochs", "student_epochs", "evaluate_every"), 1
        )
        least |= dict.fromkeys(
            ("reconstruction", "cycle", "identity", "pool", "decay_epochs", "adversarial", "style",
             "feature", "student_reconstruction", "validation", "pictures"), 0,
        )  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise UserError(f"gan.{name}={value}: expected at least {minimum}")
        if self.loss is not None and self.loss not in MODES:
            raise unknown_name("gan.loss", self.loss, MODES)
        if self.keep not in _KEEP:
            raise unknown_name("gan.keep", self.keep, _KEEP)

    def teacher_of(self, student: str) -> tuple[str, dict[str, Any]]:
        """Return the teacher's name and arguments; by default the student's kind with ngf 64.

        Args:
            student: the student's name.
        """
        given = {"name": self.teacher} if isinstance(self.teacher, str) else self.teacher or {}
        options = {key: value for key, value in given.items() if key != "name"}
        name = str(given.get("name", student))
        if "generator" in name:
            options.setdefault("ngf", 64)
        return name, options

    def student_weights(self, methods: bool, paired: bool) -> dict[str, float]:
        """Return the weights of the student's losses that no method owns.

        Args:
            methods: whether any method adds losses.
            paired: whether there are targets.
        """
        plain = 0.0 if methods else (100.0 if paired else 10.0)
        given = {
            "adversarial": self.adversarial,
            "style": self.style if self.style is not None else 1e4 * methods,
            "feature": self.feature if self.feature is not None else 10.0 * methods,
            "reconstruction": plain
            if self.student_reconstruction is None
            else self.student_reconstruction,
        }
        if not methods and not any(given.values()):
            raise UserError(
                "all weights of the student's losses are 0: expected one of gan.adversarial, "
                "style, feature and student_reconstruction above 0, or a method"
            )
        return given


def check_train(train: Any, decay: int | None) -> None:
    """Refuse settings of `train` that this task doesn't have.

    Args:
        train: the recipe's section.
        decay: of the section `gan`.
    """
    for name, value in _UNUSED.items():
        given = getattr(train, name)
        if given != value:
            raise UserError(f"train.{name}={given}: the task translation has none; leave it out")
    if train.schedule not in ("linear", "constant"):
        raise UserError(
            f"train.schedule={train.schedule}: expected linear (constant, then falling to zero) or "
            "constant for the task translation"
        )
    if decay is not None and decay > train.epochs:
        raise UserError(f"gan.decay_epochs={decay}: expected at most the {train.epochs} epochs")
