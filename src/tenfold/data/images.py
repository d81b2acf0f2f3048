"""`ImageData`: what a task needs of its data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.labelled import LabelledData, at_least, whole
from tenfold.data.loader import FittedImages, ImageLoader, Mixing, make_loader
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split
from tenfold.data.stream import StreamSplit
from tenfold.data.stream_loader import StreamLoader, make_stream_loader
from tenfold.data.transforms import Augmentation, resolve
from tenfold.errors import UserError

__all__ = ["ImageData"]


class ImageData(LabelledData):
    """Images to train on, held-out images to evaluate on, and the facts about them.

    `create` builds it; build it yourself for a set of your own. Batches are dicts: `image` uint8
    `(B, C, H, W)`, `label` int64 `(B,)`, `id` int64 `(B,)`, the index in `train` or `test`, or the
    position in a stream.

    Args:
        name: of the data set.
        classes: their names, by label.
        train: the images to train on; a `StreamSplit` is read while training.
        test: the held-out images, likewise.
        preprocessing: size, mean and so on of the network's input.
        default_augment: what `augment="auto"` means.
        workers: default number of loader processes; None: as `train_loader` says.
    """

    key = "image"
    eval_batch_size = 256

    def __init__(
        self,
        *,
        name: str,
        classes: Sequence[str],
        train: ImageSet | Split | StreamSplit,
        test: ImageSet | Split | StreamSplit,
        preprocessing: Preprocessing,
        default_augment: str = "none",
        workers: int | None = None,
    ) -> None:
        self._train = train if isinstance(train, Split | StreamSplit) else Split("train", train)
        self._test = test if isinstance(test, Split | StreamSplit) else Split("test", test)
        super().__init__(
            name=name,
            classes=classes,
            train=self._train,
            test=self._test,
            preprocessing=preprocessing,
            default_augment=default_augment,
            workers=workers,
        )
        self._fitted_train, self._fitted_test = (
            None if isinstance(part, StreamSplit) else FittedImages(part.images, preprocessing)
            for part in (self._train, self._test)
        )

    @property
    def train(self) -> ImageSet:
        """The training images by id, with those that `skip_bad` leaves out: ids don't shift."""
        return self._indexed(self._train).images

    @property
    def test(self) -> ImageSet:
        """The held-out images by id, likewise."""
        return self._indexed(self._test).images

    @property
    def train_ids(self) -> Tensor:
        """The training ids that the loader visits, all but the skipped ones: int64, ascending."""
        return self._indexed(self._train).ids

    @property
    def test_ids(self) -> Tensor:
        """The held-out ids that the loader visits, likewise."""
        return self._indexed(self._test).ids

    def _indexed(self, part: Split | StreamSplit) -> Split:
        if isinstance(part, StreamSplit):
            raise UserError(
                f"the {part.title} images of {self.name} are a stream: expected images that can be "
                "picked by id; set data.streaming false"
            )
        return part

    def train_loader(
        self,
        *,
        batch_size: int,
        seed: int,
        augment: str = "auto",
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        mixing: Mixing | None = None,
        views: bool = False,
    ) -> ImageLoader | StreamLoader:
        """Return shuffled, augmented batches of the training images.

        Call `loader.sampler.set_epoch(epoch)` ahead of each epoch (Lightning does it by itself, but
        give its Trainer `use_distributed_sampler=False`: rank and world size are known here).

        Args:
            batch_size: images per batch and rank.
            seed: with the epoch and the id, it decides everything random.
            augment: a name of `augmentations()`.
            rank: which of the processes this is.
            world_size: how many there are; each gets the same number of images.
            workers: loader processes; None: 0 where nothing is slow (images kept in memory, no
                transforms per sample), else up to 4.
            mixing: changes images as they are loaded; a method brings it.
            views: have each batch say in `view` which of its views every image is, int64 `(B,)`;
                for augmentations whose views can be counted, see `train_views`.

        Raises:
            UserError: an argument is out of range or unknown; while iterating, an unreadable image.
        """
        if mixing is not None or views:
            self._indexed(self._train)
        if views and self.train_views(augment) is None:
            raise UserError(
                f"augment {augment!r} makes too many views of an image to number them: use none, "
                "flip, shift or flip_crop"
            )
        return self._loader(
            self._train,
            self._fitted_train,
            resolve(augment, self.default_augment),
            mixing=mixing,
            views=views,
            batch_size=batch_size,
            seed=whole("seed", seed),
            rank=rank,
            world_size=world_size,
            workers=workers,
        )

    def train_views(self, augment: str = "auto") -> int | None:
        """Return how many different images augmentation makes of one; None: too many to count."""
        return resolve(augment, self.default_augment).views(self.size)

    def crops_stored_images(self, augment: str = "auto") -> bool:
        """Tell whether augmentation crops images as they are stored, of any size."""
        return resolve(augment, self.default_augment).resized_crop

    def train_images(self, ids: Tensor) -> Tensor:
        """Return training images by id at the network's size: uint8 `(B, C, H, W)`, a copy.

        Raises:
            UserError: a stream, or an image that can't be read.
        """
        part = self._indexed(self._train)
        fitted = self._fitted_train or FittedImages(part.images, self._facts)
        with part.explaining():
            return fitted.batch(ids)

    def test_loader(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int | None = None
    ) -> ImageLoader | StreamLoader:
        """Return batches of the held-out images in order; no rank sees an image twice.

        Raises:
            UserError: an argument is out of range; while iterating, an unreadable image.
        """
        return self._loader(
            self._test,
            self._fitted_test,
            None,
            batch_size=batch_size,
            seed=0,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )

    def _loader(
        self,
        part: Split | StreamSplit,
        fitted: FittedImages | None,
        augmentation: Augmentation | None,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        workers: int | None,
        mixing: Mixing | None = None,
        views: bool = False,
    ) -> ImageLoader | StreamLoader:
        at_least("batch_size", batch_size, 1)
        workers = self._workers_or(workers)
        if isinstance(part, StreamSplit):
            return make_stream_loader(
                part,
                self._facts,
                augmentation,
                batch_size=batch_size,
                seed=seed,
                rank=rank,
                world_size=world_size,
                workers=workers,
            )
        return make_loader(
            part,
            fitted or FittedImages(part.images, self._facts),
            augmentation,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            workers=workers,
            mixing=mixing,
            views=views,
        )
