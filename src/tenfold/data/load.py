"""One clip for `predict`, from a video file or a folder of frames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tenfold.data.clips import chosen_frames
from tenfold.data.decode import BadClip
from tenfold.data.frames import in_order, read_frames
from tenfold.data.listing import ENDINGS
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.video import count_frames, read_video
from tenfold.errors import UserError

__all__ = ["load_clip"]


def load_clip(path: str | os.PathLike[str], preprocessing: Mapping[str, object]) -> Tensor:
    """Read one clip as the network's input before normalisation: uint8 `(C, T, H, W)`.

    Frames are taken from the middle, resized and cropped.

    Args:
        path: a video file, or a folder of image files.
        preprocessing: of an artifact that takes clips.

    Raises:
        UserError: it can't be read, PyAV is missing for a video, or `preprocessing` is not of the
            expected kind.
    """
    facts = Preprocessing.from_dict(preprocessing)
    place, name = Path(path), str(path)
    if facts.frames is None or facts.channels != 3:
        raise UserError(
            f"the preprocessing for {name} is one for images: expected frames and 3 channels; "
            "use load_image, or take it from a network that was trained on clips"
        )
    if place.is_dir():
        files = in_order([file for file in place.iterdir() if _is_frame(file)])
        if not files:
            raise BadClip(name, f"the folder has no files ending in {', '.join(ENDINGS)}")
        chosen = chosen_frames(len(files), facts.frames, facts.stride)
        return facts.fit(read_frames(files, chosen, name))
    chosen = chosen_frames(count_frames(place, name), facts.frames, facts.stride)
    return facts.fit(read_video(place, chosen, name))


def _is_frame(file: Path) -> bool:
    return file.name.lower().endswith(ENDINGS) and not file.name.startswith(".")
