"""`shadow_frames:PATH`: frames of clips in which shadows move over a scene that doesn't.

    PATH/<clip>/*          frames, all of one size
    PATH/masks/<clip>/*    masks of the same names; not needed

Nobody took these scenes without shadows. As HQSS is evaluated on Video Shadow Removal, the maximum
of each pixel and colour over a clip stands for it (pseudo ground truth), since the shadow is
elsewhere at some time; and the moving-shadow region is where a pixel's grey level varies by more
than a threshold, 80, or 40, the other published one. Figures hold for that region alone: what lies
in shadow all the time does so in the pseudo truth. The camera must not move.

Frames to train on and held-out ones are the same: those who train without targets learn nothing
of the pseudo truth. Where there are no masks, the moving-shadow region stands for them too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenfold.data.decode import BadImage
from tenfold.data.frames import in_order
from tenfold.data.listing import ENDINGS
from tenfold.data.options import DataOptions
from tenfold.data.shadow_matching import some_of
from tenfold.data.shadow_options import shadow_options
from tenfold.data.shadow_photos import read_levels, read_pixels
from tenfold.data.shadow_set import Pixels, ShadowSet, Triplet
from tenfold.data.shadows import ShadowData
from tenfold.data.split import cpu_count
from tenfold.errors import UserError

__all__ = ["Clip", "FrameTriplets", "pseudo_truth", "shadow_frames"]

MASKS = "masks"
THRESHOLD = 80
MOSTLY = 0.5  # of a scene that varies: the camera moves


@dataclass(frozen=True)
class Clip:
    """A clip of a scene that doesn't move.

    Attributes:
        name: of its folder.
        frames: the files, in order.
        masks: theirs; empty: there are none.
        truth: the maximum over all frames, `(H, W, 3)`.
        region: 255 where the grey level varies by more than the threshold, else 0, `(H, W)`.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    truth: Pixels
    region: Pixels


class FrameTriplets(ShadowSet):
    """Frames of clips, their masks, and pseudo truths.

    Args:
        clips: in order.
        limit: use only the first so many frames.
    """

    def __init__(self, clips: Sequence[Clip], limit: int | None = None) -> None:
        self._clips = list(clips)
        places = [(k, i) for k, clip in enumerate(clips) for i in range(len(clip.frames))]
        self._places = places[:limit]

    def __len__(self) -> int:
        return len(self._places)

    def triplet(self, index: int) -> Triplet:  # noqa: D102
        number, frame = self._places[index]
        clip = self._clips[number]
        levels = read_levels(clip.masks[frame]) if clip.masks else clip.region
        if levels.shape != clip.region.shape:
            raise BadImage(
                str(clip.masks[frame]),
                f"it is {levels.shape[0]}x{levels.shape[1]}, and the clip's frames "
                f"{clip.region.shape[0]}x{clip.region.shape[1]}",
            )
        return Triplet(read_pixels(clip.frames[frame]), levels, clip.truth, clip.region)

    def name(self, index: int) -> str:  # noqa: D102
        number, frame = self._places[index]
        return f"{self._clips[number].name}/{self._clips[number].frames[frame].name}"

    def byte_count(self) -> int | None:  # noqa: D102
        return sum(8 * self._clips[number].region.size for number, _ in self._places)


def shadow_frames(options: DataOptions) -> ShadowData:
    """Build the data set of a folder of clips; every frame is read once, for the pseudo truth.

    Raises:
        UserError: no clips, a clip of one frame or of several sizes, a frame without its mask, or
            a frame that can't be read.
    """
    root = options.folder()
    chosen = shadow_options(options)
    folders = sorted(
        entry for entry in os.listdir(root)
        if (root / entry).is_dir() and entry != MASKS and not entry.startswith(".")
    )  # fmt: skip
    if not folders:
        raise UserError(
            f"{root} has no folders of frames: expected PATH/<clip>/<frames>; check the path"
        )
    clips, skipped = [], list[str]()
    for name in folders:
        clip, bad = _clip(root, name, options.threshold or THRESHOLD, options.skip_bad)
        clips.append(clip)
        skipped += bad
    _warn(clips, options.threshold or THRESHOLD)
    data = chosen.build("shadow_frames", FrameTriplets(clips, options.limit), FrameTriplets(clips))
    data.skipped += skipped
    return data


def pseudo_truth(
    frames: Sequence[Path], threshold: int = THRESHOLD, skip_bad: bool = False
) -> tuple[Pixels, Pixels, list[Path]]:
    """Return what stands for a scene without its moving shadow.

    Args:
        frames: of a clip from a camera at rest.
        threshold: by more than so many grey levels a pixel varies where a shadow moves.
        skip_bad: go on without frames that can't be read.

    Returns:
        The maximum of each pixel and colour, `(H, W, 3)`; the moving-shadow region, `(H, W)` of 0
        and 255; the frames left out.

    Raises:
        UserError: a frame can't be read, frames of several sizes, or fewer than 2 frames.
    """
    bad: list[Path] = []
    read: list[Path] = []
    highest = lowest = most = np.empty(0, np.uint8)
    with ThreadPoolExecutor(cpu_count()) as pool:
        # A few at a time: all of a clip's frames needn't fit in memory.
        for first in range(0, len(frames), 16):
            chunk = frames[first : first + 16]
            for file, found in zip(chunk, pool.map(_read, chunk), strict=True):
                if isinstance(found, BadImage):
                    if not skip_bad:
                        raise UserError(
                            f"{found}, or pass --data.skip_bad true to go on without it"
                        ) from found
                    bad.append(file)
                    continue
                pixels, grey = found
                if not read:
                    most, highest, lowest = pixels.copy(), grey.copy(), grey.copy()
                elif pixels.shape != most.shape:
                    raise UserError(
                        f"{file} is {_sides(pixels)}, and {read[0]} {_sides(most)}: expected "
                        "frames of one size in a clip"
                    )
                read.append(file)
                for total, part, choose in (
                    (most, pixels, np.maximum),
                    (highest, grey, np.maximum),
                    (lowest, grey, np.minimum),
                ):
                    choose(total, part, out=total)
    if len(read) < 2:
        raise UserError(
            f"{frames[0].parent if frames else 'a clip'} has {len(read)} frame(s): expected at "
            "least 2, in which the shadow lies elsewhere"
        )
    region = np.where(highest - lowest > threshold, 255, 0).astype(np.uint8)
    return most, region, bad


def _read(file: Path) -> tuple[Pixels, Pixels] | BadImage:
    from PIL import Image

    try:
        pixels = read_pixels(file)
    except BadImage as error:
        return error
    return pixels, np.asarray(Image.fromarray(pixels).convert("L"))


def _sides(pixels: Pixels) -> str:
    return "x".join(str(side) for side in pixels.shape[:2])


def _clip(root: Path, name: str, threshold: int, skip_bad: bool) -> tuple[Clip, list[str]]:
    frames = in_order(_images(root / name))
    if not frames:
        raise UserError(
            f"{root / name} has no images: expected a clip's frames, files ending in "
            f"{', '.join(ENDINGS)}; remove the folder if it is none"
        )
    truth, region, bad = pseudo_truth(frames, threshold, skip_bad)
    left = tuple(file for file in frames if file not in bad)
    masks: tuple[Path, ...] = ()
    if (root / MASKS).is_dir():
        by_stem = {file.stem: file for file in _images(root / MASKS / name)}
        lonely = [f"{name}/{file.name}" for file in left if file.stem not in by_stem]
        if lonely:
            raise UserError(
                f"{len(lonely)} frames without masks in {root / MASKS}: {some_of(lonely)}; "
                "expected masks of the same names for all frames, or no folder masks"
            )
        masks = tuple(by_stem[file.stem] for file in left)
    return Clip(name, left, masks, truth, region), [f"{name}/{file.name}" for file in bad]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        folder / entry
        for entry in sorted(os.listdir(folder))
        if entry.lower().endswith(ENDINGS) and not entry.startswith(".")
    ]


def _warn(clips: Sequence[Clip], threshold: int) -> None:
    still = [clip.name for clip in clips if not clip.region.any()]
    moving = [clip.name for clip in clips if (clip.region > 0).mean() > MOSTLY]
    for text, names in (
        (f"nowhere vary by more than {threshold} levels: lower data.threshold", still),
        (f"vary on more than {MOSTLY:.0%} of the picture: does the camera move?", moving),
    ):
        if names:
            warnings.warn(
                f"{len(names)} of {len(clips)} clips {text} ({some_of(names)})", stacklevel=2
            )
