"""LAB-Net: a small network of two branches removes shadows in LAB, guided by a mask.

Paper: "LAB-Net: LAB Color-Space Oriented Lightweight Network for Shadow Removal" (arXiv 2208.13039)
and its released code; the network is `LABNet` (in `tenfold.nn.labnet`), and this file is how it is
trained. With o the network's codes for a photo in shadow, not clamped, and t those of the photo
without (L / 100, (a + 128) / 255, (b + 128) / 255):

    L = L_perc + 10 L_grad + 100 L_mse                       `lab_loss`, in `tenfold.nn.lab_loss`
    L + distillation * mean|o - o_T|                          with a teacher's codes o_T

What differs, and why:

- colours are converted in floats and not rounded to 8 bits, which alone costs 0.66 of LAB error;
- the high-pass kernel is the Laplacian that the paper means, not drawn at random by accident;
- `guess: ring` gives the network the photo with its shadow already brightened by the gain of its
  lit surroundings (`ring_guess`): what is left to learn is what one gain a colour can't do. Not the
  paper's, and off by default;
- `outside` below 1 lets pixels outside the shadow, which a composite keeps anyway, count less;
- `start: identity` begins with a network that gives its input back. Short runs need it: a plain
  start spends them on finding the image again, and learns better without L_grad then;
- distillation from a larger remover is not the paper's either;
- `composite` keeps the photo outside its shadow when the network is used; the paper takes the whole
  output. It changes nothing in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.methods.base import Kind, Method, Stage
from tenfold.nn.lab_loss import LabLoss, VggCuts, lab_loss
from tenfold.nn.labnet import LEAST_SIDE, LABNet
from tenfold.nn.models import Network
from tenfold.nn.shadow_gain import Guess, soft_mask
from tenfold.nn.shadow_remover import GUESSES, ShadowRemover
from tenfold.nn.vgg_stages import VggStages, read_state_dict

__all__ = [
    "LABNet",
    "LABNetTraining",
    "LabLoss",
    "RemovalLoss",
    "lab_loss",
    "removal_loss",
]

_STARTS = ("kaiming", "identity")
_FIFTH_STAGE = ((512, 512), (512, 512))  # of VGG16, up to the last layer that the loss looks at


class RemovalLoss(NamedTuple):
    """The loss and its parts, each without its weight.

    Attributes:
        total: weighted sum, which is what to minimise.
        perceptual: L_perc.
        gradient: L_grad.
        mse: L_mse.
        distillation: mean absolute difference to the teacher's codes; None without a teacher.
    """

    total: Tensor
    perceptual: Tensor
    gradient: Tensor
    mse: Tensor
    distillation: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """Return the parts by name."""
        found = {name: getattr(self, name) for name in self._fields[1:]}
        return {name: value for name, value in found.items() if value is not None}


def removal_loss(
    output: Tensor,
    target: Tensor,
    taught: Tensor | None = None,
    extractor: Callable[[Tensor], Any] | None = None,
    *,
    perceptual: float = 1.0,
    gradient: float = 10.0,
    mse: float = 100.0,
    distillation: float = 1.0,
    weight: Tensor | None = None,
) -> RemovalLoss:
    """Return the loss of a remover between codes, with or without a teacher's.

    Args:
        output: the network's codes, `(B, 3, H, W)`, not clamped.
        target: those of the images without shadow.
        taught: a teacher's codes for the same input; None: no distillation.
        extractor: maps codes to phi_1 to phi_5, such as `VggCuts`; None: phi_0 alone.
        perceptual: weight of L_perc.
        gradient: weight of L_grad.
        mse: weight of L_mse.
        distillation: weight of the distance to the teacher's codes.
        weight: of each pixel, `(B, 1, H, W)`; None: all count alike.

    Raises:
        UserError: codes of different shapes.

    >>> ones, zeros = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    >>> float(removal_loss(ones, zeros, gradient=0).total)
    101.0
    >>> float(removal_loss(ones, zeros, taught=zeros, gradient=0, distillation=3).total)
    104.0
    """
    found = lab_loss(output, target, extractor, perceptual, gradient, mse, weight)
    if taught is None:
        return RemovalLoss(*found)
    if taught.shape != output.shape:
        raise UserError(
            f"the teacher's codes have shape {tuple(taught.shape)}: expected "
            f"{tuple(output.shape)}, the student's"
        )
    away = (output.float() - taught.detach().float()).abs()
    distance = away.mean() if weight is None else (away * weight).sum() / (weight.sum() * 3)
    total = found.total + distillation * distance
    return RemovalLoss(total, found.perceptual, found.gradient, found.mse, distance)


@dataclass(kw_only=True, eq=False)
class LABNetTraining(Method):
    """Train a remover of shadows on photos, their masks, and the same photos without shadow.

    It takes any network that maps codes and a mask to codes: `LABNet`, or your own.

    Args:
        perceptual: weight of L_perc.
        gradient: weight of L_grad; short runs learn better with 0.
        mse: weight of L_mse.
        features: `vgg16`, or a file of its weights, for phi_1 to phi_5 of L_perc; None: phi_0
            alone, the mean absolute difference of codes.
        start: `kaiming`, the paper's, or `identity`, a network that gives its input back. A recipe
            does that; in a loop of your own call `model.identity_start()`.
        guess: what the network is given: the photo (`none`), or the photo with its shadow
            brightened by the gain of its surroundings (`ring`).
        composite: whether the finished remover keeps the photo outside its shadow.
        outside: weight of pixels outside the shadow in the losses; inside it is 1.
        side: shorter side of what the finished network sees of a photo: of larger ones it sees a
            small copy, and what is carried over is the gain of light. None: held-out photos as they
            are, and 256 pixels of a user's own.
        teacher: a larger remover; in a recipe a finished run or an artifact of one.
        distillation: weight of the distance to the teacher's codes.

    Example:
        ```python
        model = LABNet(width=8)
        training = LABNetTraining(gradient=0, guess="ring")
        model = training.attach(model, total_steps=epochs * len(loader))
        for images, masks, targets in loader_of_all_epochs:  # RGB in [0, 1]; masks of 0 and 1
            loss = training.loss(model, images, masks, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            training.step()
        model = training.finalize(model)
        lit = training.remover(model)(photo, mask)
        ```
    """

    kind: ClassVar[Kind] = Kind.NETWORK
    stage: ClassVar[Stage] = Stage.NETWORK
    tasks: ClassVar[frozenset[str]] = frozenset({"shadow_removal"})
    replaces_loss: ClassVar[bool] = True

    perceptual: float = 1.0
    gradient: float = 10.0
    mse: float = 100.0
    features: str | None = None
    start: Literal["kaiming", "identity"] = "kaiming"
    guess: Guess = "none"
    composite: bool = True
    outside: float = 1.0
    side: int | None = None
    teacher: str | nn.Module | None = None
    distillation: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._teacher = self.teacher if isinstance(self.teacher, nn.Module) else None
        self._extractor: VggCuts | None = None

    @classmethod
    def key(cls) -> str:
        """Return the name of the recipe's section."""
        return "labnet"

    def validate(self) -> None:
        """Check the fields."""
        for name in ("perceptual", "gradient", "mse", "distillation", "outside"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: expected a weight of at least 0")
        taught = self.teacher is not None and self.distillation > 0
        if not (self.perceptual or self.mse or taught):
            raise UserError(
                "perceptual, mse and distillation are 0: expected one of them above 0, as "
                "gradients alone leave colours free"
            )
        for name, known in (("start", _STARTS), ("guess", GUESSES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r}: expected {' or '.join(known)}")
        if self.side is not None and self.side < LEAST_SIDE:
            raise UserError(f"side={self.side}: expected at least {LEAST_SIDE} pixels, or none")
        if self.features is not None and (not isinstance(self.features, str) or not self.features):
            raise UserError(f"features={self.features!r}: expected vgg16, or a file of its weights")
        if self.teacher is not None and (
            not isinstance(self.teacher, str | nn.Module) or self.teacher == ""
        ):
            raise UserError(
                f"teacher={self.teacher!r}: expected a network, or in a recipe a finished run or "
                "an artifact of the task shadow_removal"
            )

    # -- ahead of the run -------------------------------------------------------------------------

    def networks(self) -> dict[str, Any]:
        """Ask for the teacher where it is named."""
        return {"teacher": self.teacher} if isinstance(self.teacher, str) else {}

    def use_network(self, role: str, network: nn.Module) -> None:
        """Take the teacher; it must have been trained with the same guess, in the same space."""
        self._teacher = network

    def wrap(self, model: nn.Module, network: Network, fresh: bool) -> tuple[nn.Module, Network]:
        """Begin where `start` says, if the weights are fresh.

        Raises:
            UserError: a network that has no identity start.
        """
        if self.start == "identity" and fresh:
            begin: Any = getattr(model, "identity_start", None)
            if begin is None:
                raise UserError(
                    f"start: identity, and {type(model).__name__} has no identity_start(): leave "
                    "start out, or choose a LAB-Net"
                )
            begin()
        return model, network

    def open_features(self) -> None:
        """Open the features of L_perc now, where there are any, so that what is wrong shows.

        Raises:
            UserError: no weights there, or those of another network.
        """
        if self.features is not None and self._extractor is None:
            self._extractor = _vgg_cuts(self.features)

    def notes(self) -> list[str]:
        """Return what the reader of a plan or a record should know, label first."""
        phi = "phi_0 alone, the mean absolute difference of codes: no weights of VGG16 are given"
        if self.features is not None:
            phi = f"phi_0 to phi_5 by VGG16 ({self.features})"
        weights = {"perceptual": self.perceptual, "gradient": self.gradient, "mse": self.mse}
        if self.teacher is not None:
            weights["teacher"] = self.distillation
        losses = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
        found = [f"losses      {losses}", f"perceptual  {phi}"]
        if self.guess != "none":
            found.append("guess       the shadow times the gain of the ring around it")
        return found

    def on_attach(self, model: nn.Module) -> nn.Module:
        """Open what the loss needs.

        Raises:
            UserError: the features can't be opened, or the teacher is named and wasn't given.
        """
        self.open_features()
        if self.teacher is not None and self._teacher is None:
            raise UserError(
                f"teacher {self.teacher} is a name: in a loop of your own give the network, "
                "LABNetTraining(teacher=tenfold.load(…))"
            )
        return model

    # -- the loss ---------------------------------------------------------------------------------

    def remover(self, model: Callable[[Tensor, Tensor], Tensor]) -> ShadowRemover:
        """Return what takes photos and masks, with the guess that the network is trained with."""
        bare = getattr(model, "module", model)  # of DDP
        space = str(getattr(bare, "space", "lab"))
        return ShadowRemover(
            model, guess=self.guess, composite=self.composite, space=space, side=self.side
        )

    def losses(
        self, model: nn.Module, images: Tensor, masks: Tensor, targets: Tensor
    ) -> RemovalLoss:
        """Run the network on a batch, and return the loss with its parts.

        Args:
            model: the network, or what wraps it (DDP, torch.compile).
            images: sRGB in [0, 1], `(B, 3, H, W)`.
            masks: `(B, 1, H, W)` of zeros and ones, 1 in shadow.
            targets: the images without shadow.
        """
        remover = self.remover(model)
        with torch.no_grad():
            codes = remover.inputs(images, masks).contiguous(memory_format=torch.channels_last)
            truth = remover.codes(targets)
            weight = None
            if self.outside != 1:
                weight = self.outside + (1 - self.outside) * soft_mask(masks)
        output = model(codes, masks)
        taught = None
        if self._teacher is not None and self.distillation:
            with torch.no_grad():
                taught = self._teacher.to(codes.device).eval()(codes, masks)
        if self._extractor is not None:
            self._extractor.to(codes.device)
        return removal_loss(
            output,
            truth,
            taught,
            self._extractor,
            perceptual=self.perceptual,
            gradient=self.gradient,
            mse=self.mse,
            distillation=self.distillation,
            weight=weight,
        )

    def loss(self, model: nn.Module, images: Tensor, masks: Tensor, targets: Tensor) -> Tensor:
        """Run the network on a batch, and return the loss to minimise; see `losses`."""
        return self.losses(model, images, masks, targets).total

    def training_loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], criterion: Callable[..., Tensor]
    ) -> Tensor:
        """Return the loss of a batch of `image`, `mask` and `target`, floats all; see `loss`."""
        return self.loss(model, batch["image"], batch["mask"], batch["target"])


def _vgg_cuts(weights: str) -> VggCuts:
    """Return phi_1 to phi_5 of VGG16: published weights, or those of a file."""
    named = weights == "vgg16"
    stages = VggStages(None if named else weights)
    layers = [*stages.features, nn.MaxPool2d(2)]
    for inputs, outputs in _FIFTH_STAGE:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
    features = nn.Sequential(*layers[:-1])
    given = _published() if named else read_state_dict(weights, "vgg16")
    own = {f"features.{name}": value for name, value in features.state_dict().items()}
    wrong = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if wrong:
        raise UserError(
            f"features {weights}: {', '.join(wrong[:3])} of VGG16 are missing or of another shape: "
            "expected the names of torchvision's vgg16, such as features.26.weight"
        )
    features.load_state_dict({key.removeprefix("features."): given[key] for key in own})
    return VggCuts(features)


def _published() -> dict[str, Tensor]:
    """Return the published weights, which `VggStages` has put into PyTorch's cache."""
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
        url, map_location="cpu", progress=False, weights_only=True
    )
    return state
