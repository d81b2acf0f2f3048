"""A plain loop's data set and sampler, condensed: what `KCD` gives to a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from tenfold.errors import UserError
from tenfold.methods.condensation import several_processes
from tenfold.methods.training_set import Mixing, TrainingSet

__all__ = ["CondensedSampler", "CondensedSet", "training_set_of"]

Transform = Callable[[Any], Any]


class CondensedSet(Dataset[Any]):
    """A data set of (image, label) pairs as (image, label, id), with mixed images in their place.

    Args:
        source: any data set with a length; its items begin with image and label.
        transform: what is done to an image after mixing: crop, flip, to floats, normalise.
        mixing: which images stand in place of others; None: none.

    Raises:
        UserError: a stream, or items of another form.
    """

    def __init__(self, source: Any, transform: Transform | None = None):
        if isinstance(source, IterableDataset) or not isinstance(source, Sized):
            raise UserError(
                f"dataset {type(source).__name__} is a stream: expected one with a length, whose "
                "items keep their index, because samples are chosen by it"
            )
        if len(source) == 0:
            raise UserError("the dataset is empty: expected at least one sample")
        self.source: Any = source
        self.transform = transform
        self.mixing: Mixing | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        if self.mixing is None:
            image, label = self._item(index)
            return self._view(image), label, index
        ids = torch.tensor([index])
        image, label = self._item(index)
        stored = as_array(image)
        if stored is not None:
            image = like(image, self.mixing.replaced(ids, stored.unsqueeze(0))[0])
        view = self._view(image)
        at, partners, shares = self.mixing.blended(ids)
        if len(at):
            other = self._view(self._item(int(partners[0]))[0])
            if not (isinstance(view, Tensor) and isinstance(other, Tensor)):
                raise UserError(
                    f"mix_source='original' mixes images behind the transform, and it returns "
                    f"{type(view).__name__}: expected tensors"
                )
            view = self.mixing.blend(view.unsqueeze(0), other.unsqueeze(0), shares)[0]
        return view, label, index

    def labels(self) -> Tensor:
        """Return the class of every sample, int64 `(N,)`; reads all of them if it has to."""
        found = getattr(self.source, "targets", None)
        if found is None:
            found = [self._item(index)[1] for index in range(len(self))]
        return torch.as_tensor(found, dtype=torch.int64)

    def stored(self, ids: Tensor) -> Tensor:
        """Return images by id as they are ahead of the transform: uint8 `(B, ...)`.

        Raises:
            UserError: other than uint8, or not of one size.
        """
        found: list[Tensor] = []
        for index in ids.tolist():
            image = as_array(self._item(index)[0])
            if image is None:
                given = self._item(index)[0]
                kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
                raise UserError(
                    f"image {index} of the dataset is {kind}: expected uint8 pixels, because "
                    "images are mixed ahead of all else; give the transform apart, "
                    "attach(…, transform=…), or use mix_source='original', or augment_max=0"
                )
            if found and image.shape != found[0].shape:
                raise UserError(
                    f"images of the dataset have shapes {tuple(found[0].shape)} and "
                    f"{tuple(image.shape)} (id {index}): expected one shape to mix them; use "
                    "mix_source='original', or augment_max=0"
                )
            found.append(image)
        return torch.stack(found)

    def _item(self, index: int) -> tuple[Any, Any]:
        item = self.source[index]
        if not isinstance(item, list | tuple) or len(item) < 2:
            raise UserError(
                f"item {index} of the dataset is {type(item).__name__}: expected (image, label)"
            )
        return item[0], item[1]

    def _view(self, image: Any) -> Any:
        return image if self.transform is None else self.transform(image)


class CondensedSampler(Sampler[int]):
    """Yield the ids of the present stage in an order that (seed, epoch) alone decides.

    In several processes each gets its share, padded to the same length by ids of other shares.

    Args:
        ids: returns the ids of the present stage, ascending.
        epoch: returns the present epoch.
        size: of the data set, as it was given.
        seed: of the order.
    """

    def __init__(self, ids: Callable[[], Tensor], epoch: Callable[[], int], size: int, seed: int):
        self._ids = ids
        self.size = size
        self._epoch = epoch
        self.seed = seed

    def __len__(self) -> int:
        return -(-len(self._ids()) // _world()[1])

    def __iter__(self) -> Iterator[int]:
        rank, world = _world()
        order = self._order()
        order = order[torch.arange(len(self) * world) % len(order)]
        yield from order[rank::world].tolist()

    def repeats(self) -> Tensor:
        """Return the ids that this process draws only to have as many as the others."""
        rank, world = _world()
        order = self._order()
        place = torch.arange(len(order), len(self) * world)
        return order[place[place % world == rank] % len(order)]

    def _order(self) -> Tensor:
        ids = self._ids()
        seed = (self.seed * 1_000_003 + self._epoch()) % 2**63
        generator = torch.Generator().manual_seed(seed)
        return ids[torch.randperm(len(ids), generator=generator)]


def training_set_of(data: CondensedSet, views: int | None) -> TrainingSet:
    """Describe a plain loop's data set.

    Raises:
        UserError: images that are no tensors, or a number of views below 1.
    """
    if views is not None and views < 1:
        raise UserError(f"views={views}: expected at least 1, the image as it is")
    example = data[0][0]
    if not isinstance(example, Tensor):
        raise UserError(
            f"the dataset gives images as {type(example).__name__}: expected tensors; give a "
            "transform that makes them, attach(…, transform=…)"
        )
    return TrainingSet(
        name=type(data.source).__name__,
        size=len(data),
        ids=torch.arange(len(data)),
        labels=data.labels,
        example=example.unsqueeze(0),
        stored=data.stored,
        views=views,
    )


def as_array(image: Any) -> Tensor | None:
    """Return uint8 pixels of a tensor, an array or a PIL image; None for anything else."""
    if isinstance(image, Tensor):
        return image.clone() if image.dtype == torch.uint8 else None
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image.copy()) if image.dtype == np.uint8 else None
    if type(image).__module__.startswith("PIL."):
        pixels = np.array(image)
        return torch.from_numpy(pixels) if pixels.dtype == np.uint8 else None
    return None


def like(image: Any, pixels: Tensor) -> Any:
    """Return pixels in the form that the image has."""
    if isinstance(image, Tensor):
        return pixels
    if isinstance(image, np.ndarray):
        return pixels.numpy()
    from PIL import Image

    return Image.fromarray(pixels.numpy(), mode=image.mode)


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if several_processes() else (0, 1)
