"""`ClipData`: labelled clips, and which frames of them a network sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.data.base import ClipSet
from tenfold.data.labelled import LabelledData, at_least, whole
from tenfold.data.loader import Batch, FittedSamples, ImageLoader, Mixing, load_batches
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.randomness import below, mix
from tenfold.data.split import ClipSplit, cpu_count
from tenfold.data.transforms import Augmentation, BatchTransform, resolve
from tenfold.errors import UserError

__all__ = ["ClipData", "chosen_frames"]


class ClipData(LabelledData):
    """Clips to train on, held-out clips to evaluate on, and the facts about them.

    `create` builds it; build it yourself for a set of your own. Batches are dicts: `clip` uint8
    `(B, C, T, H, W)`, `label` int64 `(B,)`, `id` int64 `(B,)`, the index in `train` or `test`.
    Training takes frames from a random place of each clip, drawn anew in every epoch; evaluation
    takes them from the middle.

    Args:
        name: of the data set.
        classes: their names, by label.
        train: the clips to train on.
        test: the held-out clips.
        preprocessing: size, frames, stride, mean and so on of the network's input.
        default_augment: what `augment="auto"` means.
        mirror: whether a mirrored clip is still of its class; if not, augmentations that flip are
            refused.
        workers: default number of loader processes; None: 0 where all clips stay in memory, else up
            to 4.

    Raises:
        UserError: `preprocessing` is one for images.
    """

    key = "clip"
    eval_batch_size = 32

    def __init__(
        self,
        *,
        name: str,
        classes: Sequence[str],
        train: ClipSet | ClipSplit,
        test: ClipSet | ClipSplit,
        preprocessing: Preprocessing,
        default_augment: str = "none",
        mirror: bool = True,
        workers: int | None = None,
    ) -> None:
        if preprocessing.frames is None:
            raise UserError(
                f"the preprocessing of {name} has no frames: expected the number of a clip's "
                "frames; give Preprocessing(frames=…), or use ImageData for images"
            )
        self._train = train if isinstance(train, ClipSplit) else ClipSplit("train", train)
        self._test = test if isinstance(test, ClipSplit) else ClipSplit("test", test)
        self.mirror = mirror
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
            _FittedClips(part.clips, preprocessing) for part in (self._train, self._test)
        )

    @property
    def train(self) -> ClipSet:
        """The training clips by id, with those that `skip_bad` leaves out: ids don't shift."""
        return self._train.clips

    @property
    def test(self) -> ClipSet:
        """The held-out clips by id, likewise."""
        return self._test.clips

    @property
    def train_ids(self) -> Tensor:
        """The training ids that the loader visits, all but the skipped ones: int64, ascending."""
        return self._train.ids

    @property
    def test_ids(self) -> Tensor:
        """The held-out ids that the loader visits, likewise."""
        return self._test.ids

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
    ) -> ImageLoader:
        """Return shuffled, augmented batches of the training clips.

        Call `loader.sampler.set_epoch(epoch)` ahead of each epoch, as for images.

        Args:
            batch_size: clips per batch and rank.
            seed: with the epoch and the id, it decides everything random.
            augment: a name of `augmentations()`; all frames of a clip go the same way.
            rank: which of the processes this is.
            world_size: how many there are; each gets the same number of clips.
            workers: loader processes.
            mixing: is for images; refused.
            views: likewise.

        Raises:
            UserError: an argument is out of range, unknown or for images, or flips clips whose
                class changes with it; while iterating, an unreadable clip.
        """
        if mixing is not None or views:
            raise UserError(
                f"{self.name} gives clips: expected images, which alone are mixed and have views "
                "that are numbered; leave out the method that wants it"
            )
        augmentation = resolve(augment, self.default_augment)
        if augmentation.flip and not self.mirror:
            raise UserError(
                f"augment {augment} mirrors clips, and a mirrored clip of {self.name} is of "
                "another class: expected none, shift or randaugment; choose another train.augment"
            )
        return self._loader(
            self._train,
            self._fitted_train,
            augmentation,
            batch_size=batch_size,
            seed=whole("seed", seed),
            rank=rank,
            world_size=world_size,
            workers=workers,
        )

    def test_loader(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int | None = None
    ) -> ImageLoader:
        """Return batches of the held-out clips in order; no rank sees a clip twice.

        Raises:
            UserError: an argument is out of range; while iterating, an unreadable clip.
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
        split: ClipSplit,
        fitted: _FittedClips,
        augmentation: Augmentation | None,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        workers: int | None,
    ) -> ImageLoader:
        workers = self._workers_or(workers)
        if workers is None:
            slow = augmentation is not None and (augmentation.resized_crop or augmentation.policy)
            workers = 0 if fitted.kept and not slow else min(4, cpu_count())
        return load_batches(
            split,
            _ClipSource(split.clips, fitted, augmentation, seed),
            batch_size=at_least("batch_size", batch_size, 1),
            seed=seed,
            shuffle=augmentation is not None,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )


def chosen_frames(length: int, frames: int, stride: int, word: int | None = None) -> list[int]:
    """Return the numbers of the frames that a network sees of a clip.

    Every `stride`-th frame is taken, from the middle of the clip or from a random place. Of a clip
    that is too short for it, frames are taken evenly over the whole of it, some of them repeatedly
    where there are fewer than wanted.

    Args:
        length: frames that the clip has.
        frames: how many to take.
        stride: how far they lie apart.
        word: 64 random bits; None: from the middle.

    >>> chosen_frames(100, frames=4, stride=2)
    [46, 48, 50, 52]
    >>> chosen_frames(6, frames=4, stride=2)
    [0, 2, 3, 5]
    >>> chosen_frames(2, frames=4, stride=2)
    [0, 0, 1, 1]
    """
    room = length - (frames - 1) * stride - 1
    if room < 0:
        return [(2 * number + 1) * length // (2 * frames) for number in range(frames)]
    start = room // 2
    if word is not None:
        start = int(below(room + 1, np.array([word], np.uint64))[0])
    return list(range(start, start + frames * stride, stride))


class _FittedClips(FittedSamples):
    """The frames from the middle of each clip, at the network's size.

    They stay in memory where that is all there is to a clip.
    """

    def __init__(self, clips: ClipSet, facts: Preprocessing) -> None:
        self.clips = clips
        whole = clips.keep_decoded and clips.length(0) == facts.frames
        super().__init__(len(clips), facts, keep=whole)

    def stored(self, index: int) -> Tensor:
        """Return the frames from the middle of one clip as they are stored: `(C, T, h, w)`."""
        return self.at(index)

    def at(self, index: int, word: int | None = None) -> Tensor:
        """Return the chosen frames of one clip as they are stored, from the middle or by chance."""
        facts, length = self.facts, self.clips.length(index)
        numbers = chosen_frames(length, facts.frames or 1, facts.stride, word)
        return self.clips.clip(index, numbers)


class _ClipSource:
    """Clips of a split: their frames chosen, resized, cropped and augmented."""

    def __init__(
        self, clips: ClipSet, fitted: _FittedClips, augmentation: Augmentation | None, seed: int
    ) -> None:
        self.fitted = fitted
        self.training = augmentation is not None
        self.seed = seed
        self.transform = BatchTransform(
            augmentation or Augmentation("none"), fitted.facts.size, seed
        )

    def __call__(self, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> Batch:
        words = mix(self.seed, epochs, ids, 4).tolist() if self.training else [None] * len(ids)

        def stored(number: int) -> Tensor:
            return self.fitted.at(int(ids[number]), words[number])

        def fitted() -> Tensor:
            if self.fitted.kept:  # the chosen frames are all there are
                return self.fitted.batch(torch.from_numpy(ids))
            facts = self.fitted.facts
            return torch.stack([facts.fit(stored(number)) for number in range(len(ids))])

        return {"clip": self.transform(epochs, ids, stored=stored, fitted=fitted)}
