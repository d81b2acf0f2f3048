"""Checkpoints that survive whatever ends a run: written whole or not at all, checked when read."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tenfold.errors import UserError

__all__ = ["SafeCheckpoints", "every_epoch", "newest"]


class SafeCheckpoints(TorchCheckpointIO):
    """Write beside the target, flush to the disk, then rename.

    Lightning's own writer goes through the system's temporary folder, which is often on another
    disk: what ends the process in the middle of that copy leaves half a file under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save a checkpoint, or leave no trace.

        Raises:
            UserError: the disk is full or can't be written.
        """
        target = Path(path)
        draft = target.with_name(f".{target.name}.writing")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
            _flush_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch wraps what its writer meets
            with contextlib.suppress(OSError):
                draft.unlink()
            raise UserError(
                f"the checkpoint {target} could not be written ({str(error).splitlines()[0]}): "
                "make room or mend the disk, then go on with --resume from the one before"
            ) from error


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Keep the last two epochs: while one is written, the other is whole."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="{epoch}",
        monitor="epoch",
        mode="max",
        save_top_k=2,
        save_on_train_epoch_end=True,
    )


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None where there is none.

    Raises:
        UserError: there are checkpoints, and none of them can be read.
    """
    found = sorted(folder.glob("*.ckpt"), key=_epoch, reverse=True)
    for file in found:
        if _is_whole(file):
            return file
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} can be read: start anew with "
            "--overwrite"
        )
    return None


def _epoch(file: Path) -> tuple[int, int]:
    """Return the epoch, and the version that Lightning adds where a name was taken."""
    found = re.fullmatch(r"epoch=(\d+)(?:-v(\d+))?", file.stem)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def _is_whole(file: Path) -> bool:
    """Compare the sums that PyTorch's files carry; a torn or rotten one is passed over."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system allows it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
