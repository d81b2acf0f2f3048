"""Find the files that belong to one photo in folders: the same stem, whatever the ending."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.data.listing import ENDINGS
from tenfold.errors import UserError

__all__ = ["SHOWN", "Matched", "match_folders", "some_of"]

# What SRD's shadow-free files carry behind the name of the shadow photo.
SUFFIXES = ("_no_shadow", "_shadow_free", "_free")
SHOWN = 5


@dataclass(frozen=True)
class Matched:
    """The files of one photo.

    Attributes:
        name: the stem that they share.
        files: by role.
    """

    name: str
    files: Mapping[str, Path]


def match_folders(
    folders: Mapping[str, str | os.PathLike[str]],
    skip_unmatched: bool = False,
    option: str = "--skip_unmatched",
) -> tuple[list[Matched], list[str]]:
    """Match the files of folders by stem; SRD's `_no_shadow` and `_free` don't count.

    Where masks of one stem differ in their ending, the PNG is taken.

    Args:
        folders: by role; that of masks is `masks`.
        skip_unmatched: leave out what isn't in all folders.
        option: what an error says to leave them out with.

    Returns:
        The photos, sorted by name, and what was left out, as `file of role (not in roles)`.

    Raises:
        UserError: no such folder, no images, two files of one stem, or files without partners.
    """
    found = {role: _by_stem(Path(folder), role) for role, folder in folders.items()}
    everywhere = set.intersection(*(set(files) for files in found.values()))
    orphans = []
    for name in sorted(set().union(*found.values()) - everywhere):
        missing = [role for role, files in found.items() if name not in files]
        there = next((role, files[name]) for role, files in found.items() if name in files)
        orphans.append(f"{there[1].name} of {there[0]} (not in {' and '.join(missing)})")
    if orphans and not skip_unmatched:
        raise UserError(
            f"{len(orphans)} without partners: {some_of(orphans)}; expected the "
            f"same names in all folders: rename them, or leave them out with {option}"
        )
    if not everywhere:
        raise UserError(
            f"no name is in all of {', '.join(str(folder) for folder in folders.values())}: "
            "expected files of the same names"
        )
    matched = [
        Matched(name, {role: files[name] for role, files in found.items()})
        for name in sorted(everywhere)
    ]
    return matched, orphans


def some_of(names: Sequence[str]) -> str:
    """Return the first five of names, and how many more there are.

    >>> some_of(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _by_stem(folder: Path, role: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected the folder of {role}")
    found: dict[str, Path] = {}
    for entry in sorted(os.listdir(folder)):
        path = folder / entry
        if path.suffix.lower() not in ENDINGS or entry.startswith("."):
            continue
        name = path.stem
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix) or name
        if name in found:
            pngs = [file for file in (found[name], path) if file.suffix.lower() == ".png"]
            if role != "masks" or len(pngs) != 1:
                raise UserError(
                    f"{folder} has {found[name].name} and {path.name}, which both stand for "
                    f"{name}: expected one file a photo, remove the other"
                )
            path = pngs[0]
        found[name] = path
    if not found:
        raise UserError(
            f"{folder} has no images: expected {role}, files ending in {', '.join(ENDINGS)}"
        )
    return found
