"""Keep the teacher's logits of views that come again, so that each is computed once.

A view is what augmentation makes of an image: without augmentation there is one, with mirroring
two, with CIFAR's crops and mirroring 162. An entry is found by sample, view, and the version of the
sample's pixels, a checksum once they were mixed: what is served is what the teacher said to the
same pixels, whichever run asked. It stands for the logits alone, not for features.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.methods.training_set import TrainingSet

__all__ = ["TeacherCache", "open_cache"]


class TeacherCache:
    """Logits by sample and view, in memory or in files.

    Args:
        size: ids are 0 to size - 1.
        views: views of a sample.
        classes: C.
        folder: for the files; None: in memory.
        facts: what the logits depend on; files of other facts are refused.
        limit: the most bytes that it may take.

    Raises:
        UserError: it would be too large, or the folder holds other logits.

    >>> cache = TeacherCache(10, views=2, classes=3)
    >>> ids, views, versions = torch.tensor([4, 7]), torch.tensor([0, 1]), torch.zeros(2).int()
    >>> cache.known(ids, views, versions).tolist()
    [False, False]
    >>> cache.store(ids, views, versions, torch.ones(2, 3))
    >>> cache.known(ids, views, versions).tolist(), cache.read(ids, views).sum().item()
    ([True, True], 6.0)
    """

    def __init__(
        self,
        size: int,
        views: int,
        classes: int,
        *,
        folder: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        limit: float = 2**33,
    ):
        needed = size * views * 4 * (classes + 1)
        if needed > limit:
            raise UserError(
                f"the teacher's logits of {size:,} samples in {views} views take "
                f"{needed / 2**30:,.1f} GiB: expected at most {limit / 2**30:,.1f} GiB; raise "
                "cache_limit_gib, choose an augmentation with fewer views, or teacher_cache: off"
            )
        shape = (size, views, classes)
        if folder is None:
            # The system hands out these pages one by one, as logits are written to them.
            self._logits = torch.empty(shape, dtype=torch.float32)
            self._stamps = torch.zeros(shape[:2], dtype=torch.int32)
        else:
            self._open(folder, shape, dict(facts or {}))

    def _open(self, folder: Path, shape: tuple[int, int, int], facts: dict[str, Any]) -> None:
        facts = {**facts, "size": shape[0], "views": shape[1], "classes": shape[2]}
        notes = folder / "cache.json"
        if notes.is_file():
            known = json.loads(notes.read_text(encoding="utf-8"))
            differing = sorted(key for key in facts if known.get(key) != facts[key])
            if differing:
                raise UserError(
                    f"{folder} holds logits of another teacher or data set; it differs in "
                    f"{', '.join(differing)}: give teacher_cache another folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for name, width in (("logits", shape[2]), ("stamps", 1)):
                with (folder / name).open("wb") as file:
                    file.truncate(4 * shape[0] * shape[1] * width)  # zeros that take no room yet
            notes.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        logits = np.memmap(folder / "logits", np.float32, "r+", shape=shape)
        stamps = np.memmap(folder / "stamps", np.int32, "r+", shape=shape[:2])
        self._logits, self._stamps = torch.from_numpy(logits), torch.from_numpy(stamps)

    def known(self, ids: Tensor, views: Tensor, versions: Tensor) -> Tensor:
        """Tell which logits are there.

        Args:
            ids: `(B,)`, on the CPU like all others.
            views: `(B,)`.
            versions: of the samples' pixels, int32 `(B,)`, at least 0.

        Returns:
            bool `(B,)`.
        """
        return self._stamps[ids, views] == versions + 1

    def read(self, ids: Tensor, views: Tensor) -> Tensor:
        """Return known logits `(B, C)`, float32."""
        return self._logits[ids, views]

    def store(self, ids: Tensor, views: Tensor, versions: Tensor, logits: Tensor) -> None:
        """Keep logits `(B, C)`."""
        self._logits[ids, views] = logits.to("cpu", torch.float32)
        self._stamps[ids, views] = versions + 1


def open_cache(
    place: str, data: TrainingSet, classes: int, *, teacher: int, limit: float
) -> TeacherCache:
    """Open a cache in memory or in a folder.

    Args:
        place: `memory`, or the folder.
        data: the training images.
        classes: of the logits.
        teacher: checksum of its weights.
        limit: the most bytes.

    Raises:
        UserError: see `TeacherCache`.
    """
    assert data.views is not None
    if place == "memory":
        return TeacherCache(data.size, data.views, classes, limit=limit)
    first = data.ids[:64]
    images = b"" if data.stored is None else data.stored(first).numpy().tobytes()
    facts = {
        "teacher": teacher,
        "data": data.name,
        "augment": data.augment,
        "labels": zlib.crc32(data.labels().numpy().tobytes()),
        "images": zlib.crc32(images),
    }
    folder = Path(place)
    return TeacherCache(data.size, data.views, classes, folder=folder, facts=facts, limit=limit)
