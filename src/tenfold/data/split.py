"""One half of a data set (train or test) and the search for samples in it that can't be read."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tenfold.data.base import ClipSet, ImageSet, LabelledSet
from tenfold.data.cache import remembered
from tenfold.data.decode import BadImage
from tenfold.errors import UserError

__all__ = ["ClipSplit", "SampleSplit", "Split", "cpu_count"]

SCAN_SECONDS = 30.0


class SampleSplit:
    """A set of samples and the ids in it that are used.

    Args:
        title: "train" or "test", for messages.
        samples: the whole set.
        skip_bad: read every sample once now and leave out those that can't be read. The result is
            remembered in the cache folder until the files change. Ids don't shift.

    Attributes:
        ids: int64, ascending, the ids in use.
        skipped: names of the samples left out.

    Raises:
        UserError: nothing is left.
    """

    def __init__(self, title: str, samples: LabelledSet, skip_bad: bool = False) -> None:
        self.title = title
        self.samples = samples
        self.ids: Tensor = torch.arange(len(samples))
        self.skipped: list[str] = []
        # Asked for only where it is needed: it may look at every file.
        fingerprint = samples.fingerprint() if skip_bad else None
        if fingerprint is not None:
            self._skip_bad(fingerprint)

    @property
    def size(self) -> int:
        """How many samples are used."""
        return len(self.ids)

    @property
    def labels(self) -> Tensor:
        """The class of every id, used or not: int64 `(N,)`."""
        return self.samples.labels()

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the first `BadImage` inside into an error that tells about the whole split."""
        try:
            yield
        except BadImage as error:
            raise self.explain(error) from None

    def explain(self, error: BadImage) -> UserError:
        """Return the error for a sample that can't be read, with a count over the split."""
        bad, checked = self._scan(SCAN_SECONDS)
        total, unit = len(self.ids), self.samples.unit
        among = f"{total:,} {self.title} {unit}s"
        if checked < total:
            among = f"the first {checked:,} of {among}, checked in {SCAN_SECONDS:.0f} s,"
        names = ", ".join(self.samples.name(i) for i in bad[:3]) + (", …" if len(bad) > 3 else "")
        count = f"{len(bad):,} of {among} can't be read ({names}); " if bad else ""
        return UserError(
            f"can't read {unit} {error.name}: {error.reason}; {count}"
            "pass --data.skip_bad true to go on without them"
        )

    def _scan(self, seconds: float | None) -> tuple[list[int], int]:
        """Decode every used sample; return the ids that fail and how many were tried in time."""

        def fails(index: int) -> bool:
            try:
                self.samples.check(index)
            except BadImage:
                return True
            return False

        ids: list[int] = self.ids.tolist()
        bad: list[int] = []
        started = time.monotonic()
        # Threads: Pillow decodes without the interpreter lock. Chunks: to look at the clock.
        with ThreadPoolExecutor(cpu_count()) as pool:
            for first in range(0, len(ids), 64):
                if seconds is not None and time.monotonic() - started > seconds:
                    return bad, first
                chunk = ids[first : first + 64]
                bad += [
                    i for i, failed in zip(chunk, pool.map(fails, chunk), strict=True) if failed
                ]
        return bad, len(ids)

    def _skip_bad(self, fingerprint: str) -> None:
        from PIL import __version__ as pillow  # another Pillow may read other files

        bad: list[int] = remembered(
            "unreadable", f"{fingerprint} pillow {pillow}", lambda: {"bad": self._scan(None)[0]}
        )["bad"]
        keep = torch.ones(len(self.ids), dtype=torch.bool)
        keep[bad] = False
        self.skipped = [self.samples.name(i) for i in bad]
        self.ids = self.ids[keep]
        if len(self.ids) == 0:
            raise UserError(
                f"none of the {len(bad):,} {self.title} {self.samples.unit}s can be read "
                f"({', '.join(self.skipped[:3])}): expected whole files; check the data's path"
            )


class Split(SampleSplit):
    """A split of images."""

    def __init__(self, title: str, images: ImageSet, skip_bad: bool = False) -> None:
        self.images = images
        super().__init__(title, images, skip_bad)


class ClipSplit(SampleSplit):
    """A split of clips."""

    def __init__(self, title: str, clips: ClipSet, skip_bad: bool = False) -> None:
        self.clips = clips
        super().__init__(title, clips, skip_bad)


def cpu_count() -> int:
    """Return how many cores this process may use, which in a container is less than there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
