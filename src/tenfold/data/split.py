"""One half of a data set (train or test) and the search for images in it that can't be read."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.cache import remembered
from tenfold.data.decode import BadImage
from tenfold.errors import UserError

__all__ = ["Split", "cpu_count"]

SCAN_SECONDS = 30.0


class Split:
    """A set of images and the ids in it that are used.

    Args:
        title: "train" or "test", for messages.
        images: the whole set.
        skip_bad: read every image once now and leave out those that can't be read. The result is
            remembered in the cache folder until the files change. Ids don't shift.

    Attributes:
        ids: int64, ascending, the ids in use.
        skipped: names of the images left out.

    Raises:
        UserError: nothing is left.
    """

    def __init__(self, title: str, images: ImageSet, skip_bad: bool = False) -> None:
        self.title = title
        self.images = images
        self.ids: Tensor = torch.arange(len(images))
        self.skipped: list[str] = []
        # Asked for only where it is needed: it may look at every file.
        fingerprint = images.fingerprint() if skip_bad else None
        if fingerprint is not None:
            self._skip_bad(fingerprint)

    @property
    def size(self) -> int:
        """How many images are used."""
        return len(self.ids)

    @property
    def labels(self) -> Tensor:
        """The class of every id, used or not: int64 `(N,)`."""
        return self.images.labels()

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the first `BadImage` inside into an error that tells about the whole split."""
        try:
            yield
        except BadImage as error:
            raise self.explain(error) from None

    def explain(self, error: BadImage) -> UserError:
        """Return the error for an image that can't be read, with a count over the split."""
        bad, checked = self._scan(SCAN_SECONDS)
        total = len(self.ids)
        among = f"{total:,} {self.title} images"
        if checked < total:
            among = f"the first {checked:,} of {among}, checked in {SCAN_SECONDS:.0f} s,"
        names = ", ".join(self.images.name(i) for i in bad[:3]) + (", …" if len(bad) > 3 else "")
        count = f"{len(bad):,} of {among} can't be read ({names}); " if bad else ""
        return UserError(
            f"can't read image {error.name}: {error.reason}; {count}"
            "pass --data.skip_bad true to go on without them"
        )

    def _scan(self, seconds: float | None) -> tuple[list[int], int]:
        """Decode every used image; return the ids that fail and how many were tried in time."""

        def fails(index: int) -> bool:
            try:
                self.images.image(index)
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
        self.skipped = [self.images.name(i) for i in bad]
        self.ids = self.ids[keep]
        if len(self.ids) == 0:
            raise UserError(
                f"none of the {len(bad):,} {self.title} images can be read "
                f"({', '.join(self.skipped[:3])}): expected image files; check the data's path"
            )


def cpu_count() -> int:
    """Return how many cores this process may use, which in a container is less than there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
