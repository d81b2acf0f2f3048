"""What a method may know of the training images, and what it may ask of a run.

An engine tells a method ahead of `attach`; in a plain loop the method that needs it asks for a data
set. Images have ids that never shift: 0 to size - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from tenfold.nn.models import Network

__all__ = ["Mixing", "Requests", "TrainingSet"]


class Mixing(Protocol):
    """Changes images as they are loaded; loaders call it, and hand it to their processes."""

    def replaced(self, ids: Tensor, images: Tensor) -> Tensor:
        """Return what stands in place of stored images `(B, ...)`, ahead of augmentation."""
        ...

    def blended(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions in a batch that get another image's view, whose, and how much of it."""
        ...

    def blend(self, images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        """Return augmented images `(L, ...)` with their partners' views mixed in."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The training images of a run.

    Attributes:
        name: of the data.
        size: ids are 0 to size - 1.
        ids: those in use, ascending, `(M,)`.
        labels: returns the class of every id, int64 `(size,)`.
        example: one image as the network gets it, `(1, C, H, W)`.
        num_classes: number of classes, where it is known.
        stored: returns images by id, uint8 `(B, ...)`, as they are ahead of augmentation; None
            where they are not of one size then.
        views: how many different images augmentation makes of one; None: too many to count.
        augment: name of the augmentation.
        scale: mean and standard deviation, by channel, that images are normalised by.
    """

    name: str
    size: int
    ids: Tensor
    labels: Callable[[], Tensor]
    example: Tensor
    num_classes: int | None = None
    stored: Callable[[Tensor], Tensor] | None = None
    views: int | None = None
    augment: str = "none"
    scale: tuple[Sequence[float], Sequence[float]] | None = None


class Requests:
    """What a method may ask for beside the network; nothing by default. The base of `Method`."""

    needs_every_sample: ClassVar[bool] = False

    def networks(self) -> dict[str, Any]:
        """Return further networks that the method needs: by role, what the recipe says of them."""
        return {}

    def wrap(self, model: nn.Module, network: Network, fresh: bool) -> tuple[nn.Module, Network]:
        """Return the network that is trained in place of the recipe's own; by default that itself.

        Args:
            model: as the recipe names it.
            network: how it was built.
            fresh: whether its weights are fresh ones.

        Raises:
            UserError: it can't be wrapped.
        """
        return model, network

    def use_network(self, role: str, network: nn.Module) -> None:
        """Take a network that `networks` asked for, in evaluation mode."""

    def prepare(self, model: nn.Module, data: TrainingSet, epochs: int) -> None:
        """Look at network and data ahead of `attach`, and refuse what can't work.

        Called once the other networks are there; they may have fresh weights still. The model must
        not be changed.

        Args:
            model: as the recipe names it, before any method.
            data: the training images.
            epochs: of the run.

        Raises:
            UserError: something doesn't fit.
        """

    def epoch_samples(self, dataset_size: int, epochs: int) -> list[int]:
        """Return how many training samples each epoch will draw (fewer when data is condensed)."""
        return [dataset_size] * epochs

    def epoch_ids(self, epoch: int, ids: Tensor) -> Tensor:
        """Return which of the training ids `(N,)` this epoch draws; all of them by default."""
        return ids

    def epoch_repeats(self, ids: Tensor) -> None:
        """Take note of ids that this process draws in vain, to have as many as the others."""

    def mixing(self) -> Mixing | None:
        """Return what changes training images as they are loaded; None: nothing."""
        return None

    def wants_views(self) -> bool:
        """Tell whether batches shall say which `view` of each image they hold."""
        return False

    def record(self) -> dict[str, Any]:
        """Return what a finished run shall tell about the method, as plain values.

        Called at the end of training, ahead of `finalize`. Keys, all optional:

        - `facts`: pairs of label and text.
        - `charts`: dicts of `title`, `x_label`, `y_label` and `lines`, each of these with a `label`
          and `points`, a list of pairs.
        - `images`: dicts of `title`, `ids` of training images, and a note for each in `notes`; or
          `pictures`, uint8 `(3, h, w)`, in place of ids.
        """
        return {}
