"""The files below a folder that have certain endings, held compactly and remembered between starts.

A million `Path` objects take hundreds of megabytes and seconds to make. Here the files' names lie
end to end in one array, about 12 bytes beside each name; forked workers share them, because there
are no Python objects whose reference counts would copy the pages.

A listing is kept in the cache folder together with the modification time of every folder below. A
folder's time changes when an entry is added, removed or renamed, so that later starts look at the
folders alone (a thousand for ImageNet), not at their files. Whatever is written in place leaves the
names as they are. A folder that changed within the last seconds could change again without its time
showing it, so its listing isn't kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenfold.data.cache import cache_folder
from tenfold.errors import UserError

__all__ = ["ENDINGS", "Listing", "list_files"]

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# Clocks of file systems tick as slowly as every 2 s.
_TICK_NS = 2_000_000_000

# What can be wrong with a file that was cut off, overwritten, or written by another version.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, IndexError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Listing:
    """Files below a root, sorted by path, part for part.

    Attributes:
        root: names are relative to it.
        folders: every folder below the root, and "" for itself, in the order they were visited.
        changed: their modification times, ns.
        names: the files' names, one after the other, in the file system's own bytes.
        ends: where each name ends in `names`.
        holder: the index in `folders` of each file's folder.
    """

    root: Path
    folders: tuple[str, ...]
    changed: NDArray[np.int64]
    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    holder: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ends)

    def relative(self, index: int) -> str:
        """Return one file's path below the root, with forward slashes."""
        first = int(self.ends[index - 1]) if index else 0
        name = os.fsdecode(self.names[first : int(self.ends[index])].tobytes())
        folder = self.folders[int(self.holder[index])]
        return f"{folder}/{name}" if folder else name

    def path(self, index: int) -> Path:
        """Return one file's path."""
        return self.root / self.relative(index)

    def is_current(self) -> bool:
        """Tell whether no folder has changed since."""
        for folder, changed in zip(self.folders, self.changed.tolist(), strict=True):
            try:
                if os.stat(self.root / folder).st_mtime_ns != changed:
                    return False
            except OSError:
                return False
        return True


def list_files(root: Path, endings: tuple[str, ...] = ENDINGS) -> Listing:
    """List the files below a folder, from the cache folder if nothing has changed.

    Links are followed. Names that start with a dot are left out: they are what file systems and
    other programs leave beside pictures.

    Args:
        root: the folder.
        endings: of the files to list, in lower case; by default those of images.

    Raises:
        UserError: a folder can't be read.
    """
    place = root.resolve()  # one listing, whichever way it is named
    key = hashlib.sha256(f"{place}\0{endings}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    kept = cache_folder() / "listings" / f"{key}.npz"
    with contextlib.suppress(*_UNREADABLE):
        known = _read(kept, root)
        if known.is_current():
            return known
    started = time.time_ns()
    listing = _scan(root, endings)
    if int(listing.changed.max()) < started - _TICK_NS:
        with contextlib.suppress(OSError):  # it is only slower without
            _write(kept, listing)
    return listing


class _Scan:
    """A scan under way."""

    def __init__(self, root: Path, endings: tuple[str, ...]) -> None:
        self.root = root
        self.endings = endings
        self.folders: list[str] = []
        self.changed = array("q")
        self.names = bytearray()
        self.ends = array("q")
        self.holder = array("i")

    def visit(self, folder: str, above: frozenset[tuple[int, int]]) -> None:
        """Take in a folder and those below it, unless it is a link back to one above."""
        # Its time ahead of its entries: what changes meanwhile then shows.
        stat, found = _look_at(self.root / folder)
        this = (stat.st_dev, stat.st_ino)
        if this in above:
            return
        number = len(self.folders)
        self.folders.append(folder)
        self.changed.append(stat.st_mtime_ns)
        for name, is_folder in found:
            if is_folder:
                self.visit(f"{folder}/{name}" if folder else name, above | {this})
            elif name.lower().endswith(self.endings):
                self.names.extend(os.fsencode(name))
                self.ends.append(len(self.names))
                self.holder.append(number)


def _scan(root: Path, endings: tuple[str, ...]) -> Listing:
    scan = _Scan(root, endings)
    scan.visit("", frozenset())
    return Listing(
        root,
        tuple(scan.folders),
        np.array(scan.changed, np.int64),
        np.frombuffer(bytes(scan.names), np.uint8),
        np.array(scan.ends, np.int64),
        np.array(scan.holder, np.int32),
    )


def _look_at(folder: Path) -> tuple[os.stat_result, list[tuple[str, bool]]]:
    """Return a folder's own facts, and its entries by name: whether each is a folder."""
    try:
        stat = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = (entry for entry in entries if not entry.name.startswith("."))
            return stat, sorted((entry.name, _is_folder(entry)) for entry in visible)
    except OSError as error:
        raise UserError(
            f"folder {folder} can't be read ({error.strerror}): expected folders that this user "
            "may read; correct its permissions, or remove it"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()  # known from reading the folder, in most file systems
    except OSError:
        return False


def _write(path: Path, listing: Listing) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez(
                file,
                folders=np.frombuffer(_joined(listing.folders), np.uint8),
                changed=listing.changed,
                names=listing.names,
                ends=listing.ends,
                holder=listing.holder,
            )
        unfinished.replace(path)  # whole or not at all, whoever else starts right now
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path, root: Path) -> Listing:
    with np.load(path, allow_pickle=False) as file:  # checks the sums of what it reads
        folders = tuple(os.fsdecode(f) for f in file["folders"].tobytes().split(b"\0"))
        listing = Listing(
            root, folders, file["changed"], file["names"], file["ends"], file["holder"]
        )
    if not len(listing.folders) == len(listing.changed) or len(listing.ends) != len(listing.holder):
        raise ValueError("lengths differ")
    return listing


def _joined(folders: tuple[str, ...]) -> bytes:
    return b"\0".join(os.fsencode(folder) for folder in folders)
