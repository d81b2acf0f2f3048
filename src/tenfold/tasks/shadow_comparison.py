"""Photos without their shadows beside the ground truth, read and compared by threads.

A thread takes a photo from its files to its sums of errors. Pillow decodes and resizes, and the
compiled kernels compare, without Python's lock and in one thread a photo, so as many photos are in
work, and in memory, as there are threads. Without compiled kernels the threads only read, a few
photos ahead: PyTorch's own operators take all cores for one photo.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tenfold.data.decode import BadImage
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.measure.shadow_errors import ShadowErrors, shadow_errors, shadow_masks
from tenfold.tasks.shadow_files import Matched, Sample, read_sample

__all__ = ["Comparison", "MaskRule", "compare_photos"]


@dataclass(frozen=True)
class MaskRule:
    """Which pixels of a mask are shadow.

    Attributes:
        above: share of white that a pixel has to exceed.
        dilate: pixels that the shadow grows by.
    """

    above: float = 0.0
    dilate: int = 0


@dataclass(frozen=True)
class Comparison:
    """One photo's errors.

    Attributes:
        name: of the photo.
        errors: of the result.
        untouched: of the input photo; None where there is none.
        notes: what was converted or resized.
    """

    name: str
    errors: ShadowErrors
    untouched: ShadowErrors | None
    notes: tuple[str, ...]


def compare_photos(
    matched: Sequence[Matched],
    size: tuple[int, int] | None,
    rule: MaskRule,
    workers: int | None = None,
    unread: list[str] | None = None,
) -> Iterator[Comparison]:
    """Yield the photos' errors in their order.

    Args:
        matched: the files of each photo.
        size: photos and masks are resized to it; None: as the files are.
        rule: of the masks.
        workers: threads; by default one a processor.
        unread: photos that can't be read are added here, with the reason; None: they are an error.

    Raises:
        UserError: files that can't be read, or compared.
    """

    def whole(one: Matched) -> Comparison:
        return _compared(read_sample(one, size), rule)

    def ahead(one: Matched) -> Sample:
        return read_sample(one, size)

    alone = native.instruction_set() is not None
    workers = workers or os.cpu_count() or 1
    waiting: collections.deque[Future[Any]] = collections.deque()
    todo = iter(matched)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(waiting) < 2 * workers and (one := next(todo, None)):
                    waiting.append(pool.submit(whole if alone else ahead, one))
                if not waiting:
                    return
                try:
                    found = waiting.popleft().result()
                except BadImage as error:
                    if unread is None:
                        raise UserError(f"{error}, or leave it out with --skip_bad") from None
                    unread.append(f"{error.name}: {error.reason}")
                    continue
                yield found if alone else _compared(found, rule)
        finally:
            pool.shutdown(cancel_futures=True)


def _compared(sample: Sample, rule: MaskRule) -> Comparison:
    pictures = {role: picture[None] for role, picture in sample.pictures.items()}
    masks = shadow_masks(sample.levels[None], rule.above, rule.dilate)
    truth = pictures["ground truth"]
    untouched = shadow_errors(pictures["input"], truth, masks) if "input" in pictures else None
    errors = shadow_errors(pictures["results"], truth, masks)
    return Comparison(sample.name, errors, untouched, sample.notes)
