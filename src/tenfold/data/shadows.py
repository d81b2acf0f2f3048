"""`ShadowData`: what the tasks of removing and of synthesising shadows need.

Photos with shadows, masks of these, and the same scenes without shadows where they are known: a
remover can be trained without (weak supervision), but not be evaluated.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.labelled import at_least, whole
from tenfold.data.loader import MEMORY_LIMIT
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.shadow_crops import Crops
from tenfold.data.shadow_loader import (
    Part,
    ShadowLoader,
    TrainingBatches,
    WholeBatches,
    load,
)
from tenfold.data.shadow_set import ShadowSet
from tenfold.data.split import SampleSplit
from tenfold.errors import UserError, unknown_name

__all__ = ["ShadowData", "default_short_side", "shadow_augmentations"]

Size = tuple[int, int]

_AUGMENTATIONS = {
    "shadows": "flips, quarter turns, rotation by up to 20 degrees, resize, random crop; the same "
    "for photo, mask and target",
    "relight": "shadows, then another exposure and colour of light, weaker, deeper or rendered "
    "shadows",
    "none": "resize, crop out of the middle",
}


def shadow_augmentations() -> dict[str, str]:
    """Return the names that `augment` takes here, each with one line that describes it."""
    return {"auto": "shadows", **_AUGMENTATIONS}


class ShadowData:
    """Photos with shadows to train on, held-out ones to evaluate on, and the facts about them.

    `create_shadows` builds it; build it yourself for a set of your own. Batches are dicts: `image`
    uint8 `(B, 3, H, W)`, `mask` uint8 `(B, 1, H, W)` of 0 and 1 (1 in shadow), `target` uint8
    `(B, 3, H, W)` where it is known, and `id` int64 `(B,)`. Held-out batches of `shadow_frames`
    have `region` too, like `mask`: where anything was in shadow at any time.

    Args:
        name: of the data set.
        train: the triplets to train on.
        test: those held out.
        size: (H, W) of training crops.
        short_side: least and most of the photos' shorter side ahead of the crop, in pixels; None:
            from the crop's longer side to 479/256 of it.
        test_size_px: (H, W) of held-out photos; None: their own, one a batch.
        mask_above: share of white from which on a mask's level is shadow.
        targets: whether training sees targets where there are any.
        workers: default number of loader processes; None: as `train_loader` says.

    Attributes:
        name: of the data set.
        size: (H, W) of training crops.
        short_side: least and most of the photos' shorter side.
        test_size_px: (H, W) of held-out photos; None: their own.
        mask_above: share of white from which on a mask's level is shadow.
        shape: of a training crop: `(3, H, W)`.
        channels: 3.
        has_targets: whether training batches have targets.
        skipped: names of the photos left out.
        key: what a sample is called in a batch.

    Raises:
        UserError: sizes or a share that there can't be.
    """

    key = "image"
    channels = 3

    def __init__(
        self,
        *,
        name: str,
        train: ShadowSet | SampleSplit,
        test: ShadowSet | SampleSplit,
        size: Size = (256, 256),
        short_side: tuple[int, int] | None = None,
        test_size_px: Size | None = (256, 256),
        mask_above: float = 0.5,
        targets: bool = True,
        workers: int | None = None,
    ) -> None:
        short_side = short_side or default_short_side(size)
        check_sides(size, short_side)
        if not 0 <= mask_above < 1:
            raise UserError(
                f"data.mask_above is {mask_above}: expected a share of white, at least 0 and "
                "below 1; correct it in the recipe"
            )
        self.name = name
        self.size, self.short_side, self.test_size_px = size, short_side, test_size_px
        self.shape = (3, *size)
        self.mask_above = mask_above
        self._workers = workers
        self._train, self._test = _part("train", train), _part("test", test)
        self.has_targets = targets and self._train.triplets.has_targets
        self.skipped: list[str] = [*self._train.split.skipped, *self._test.split.skipped]

    @property
    def described(self) -> str:
        """What the network is given, for messages: `an image of 3x256x256`."""
        return f"an image of {'x'.join(str(length) for length in self.shape)}"

    @property
    def train_size(self) -> int:
        """How many photos make an epoch."""
        return self._train.split.size

    @property
    def test_size(self) -> int:
        """How many photos are held out."""
        return self._test.split.size

    @property
    def test_has_targets(self) -> bool:
        """Whether held-out batches have targets."""
        return self._test.triplets.has_targets

    @property
    def train_ids(self) -> Tensor:
        """The ids that are trained on, ascending: int64 `(train_size,)`."""
        return self._train.split.ids

    def train_loader(
        self,
        *,
        batch_size: int,
        seed: int,
        augment: str = "auto",
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
    ) -> ShadowLoader:
        """Return shuffled, augmented batches: `image`, `mask`, `target` if known, and `id`.

        Call `loader.sampler.set_epoch(epoch)` ahead of each epoch.

        Args:
            batch_size: photos per batch and rank; the last batch may be smaller.
            seed: with the epoch and the id, it decides everything random.
            augment: a name of `shadow_augmentations()`.
            rank: which of the processes this is.
            world_size: how many there are; each gets the same number of photos.
            workers: loader processes; None: 0 where the photos are kept in memory (all of them
                together in 1 GiB), else up to 4.

        Raises:
            UserError: an argument is out of range or unknown; while iterating, an unreadable photo.
        """
        if augment not in shadow_augmentations():
            raise unknown_name("augmentation", augment, shadow_augmentations())
        whole("seed", seed)
        crops = Crops(self.size, self.short_side, seed)
        return load(
            TrainingBatches(
                self._train,
                self.mask_above,
                self.has_targets,
                crops,
                "shadows" if augment == "auto" else augment,
            ),
            batch_size=at_least("batch_size", batch_size, 1),
            seed=seed,
            shuffle=True,
            rank=rank,
            world_size=world_size,
            workers=self._workers_or(workers),
        )

    def test_loader(
        self,
        *,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
    ) -> ShadowLoader:
        """Return the held-out photos in order, whole: `image`, `mask`, `target` if known, `id`.

        Raises:
            UserError: an argument is out of range; while iterating, an unreadable photo, or photos
                of several sizes in one batch, at their own size.
        """
        return load(
            WholeBatches(self._test, self.mask_above, True, self.test_size_px),
            batch_size=at_least("batch_size", batch_size, 1),
            seed=0,
            shuffle=False,
            rank=rank,
            world_size=world_size,
            workers=self._workers_or(workers),
        )

    def train_masks(self) -> list[Tensor]:
        """Return the masks to train on, to borrow the shapes of shadows from.

        Returns:
            uint8 `(H, W)` of 0 and 1, each at its photo's size, in the order of `train_ids`.

        Raises:
            UserError: an unreadable photo.
        """
        masks = []
        with self._train.split.explaining():
            for index in self.train_ids.tolist():
                levels = self._train.triplets.levels(index)
                masks.append(torch.from_numpy(thresholded(levels, self.mask_above)))
        return masks

    def holding_out(self, count: int) -> tuple[ShadowData, ShadowData]:
        """Hold further photos out of training, to choose among networks by.

        Args:
            count: the last so many training photos.

        Returns:
            The data without them, and one whose held-out photos they are.

        Raises:
            UserError: nothing would be left to train on.
        """
        ids = self.train_ids
        if not 0 < count < len(ids):
            raise UserError(
                f"{count} of {len(ids)} training photos to choose by: expected at least 1, and "
                "some that are left to train on"
            )
        training, choosing = copy.copy(self), copy.copy(self)
        training._train = self._train.with_ids(ids[:-count])
        choosing._test = self._train.with_ids(ids[-count:])
        return training, choosing

    def train_name_of(self, index: int) -> str:
        """Return what a person would look for: the name of a training photo by id."""
        return self._train.triplets.name(index)

    def name_of(self, index: int) -> str:
        """Return the name of a held-out photo by id."""
        return self._test.triplets.name(index)

    def preprocessing(self) -> dict[str, object]:
        """Return what is known of the network's input, JSON-able, for the artifact.

        A remover adds its `space`, `guess` and `composite`. Pixels go from 0..255 to 0..1.
        """
        facts = Preprocessing(
            channels=3, size=self.size, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bicubic"
        )
        return {"task": "shadow_removal", **facts.to_dict()}

    def _workers_or(self, workers: int | None) -> int | None:
        workers = self._workers if workers is None else workers
        return None if workers is None else at_least("workers", workers, 0)


def thresholded(levels: NDArray[np.uint8], above: float) -> NDArray[np.uint8]:
    """Return a mask of 0 and 1 from levels of 0 to 255."""
    return (levels > 255 * above).astype(np.uint8)


def default_short_side(size: Size) -> tuple[int, int]:
    """Return the range of the shorter side, as the paper has it: 256 to 479 for crops of 256.

    >>> default_short_side((256, 256)), default_short_side((64, 96))
    ((256, 479), (96, 180))
    """
    longer = max(size)
    return longer, round(longer * 479 / 256)


def check_sides(size: Size, short_side: tuple[int, int]) -> None:
    """Refuse a range of the shorter side that a crop can't be cut out of.

    Raises:
        UserError: it begins below the crop's longer side, or ends before it begins.
    """
    least, most = short_side
    if least < max(size) or most < least:
        raise UserError(
            f"data.short_side is {list(short_side)}: expected at least {max(size)}, the crop's "
            "longer side, and the larger number last; correct it in the recipe, or data.size"
        )


def _part(title: str, given: ShadowSet | SampleSplit) -> Part:
    split = given if isinstance(given, SampleSplit) else SampleSplit(title, given)
    triplets = split.samples
    if not isinstance(triplets, ShadowSet):
        raise UserError(f"the {title} set is {type(triplets).__name__}: expected a ShadowSet")
    count = triplets.byte_count()
    return Part(split, triplets, keep=count is not None and count <= MEMORY_LIMIT)
