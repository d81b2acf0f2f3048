"""Folders of image files in two domains, in the layouts that the papers' own data come in.

Pairs: PATH/{train,test}/* with both images side by side in one file, A on the left; or two files
of the same name in PATH/{trainA,trainB,testA,testB} or PATH/{A,B}/{train,test}. Unpaired images:
PATH/{trainA,trainB,testA,testB}, with any names. `val` does as well as `test`. All become RGB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from tenfold.data.base import ImageSet
from tenfold.data.cache import remembered
from tenfold.data.decode import BadImage, decode, encoded_size
from tenfold.data.folder import FileSet
from tenfold.data.listing import ENDINGS, Listing, list_files
from tenfold.data.options import DataOptions
from tenfold.data.split import Split, cpu_count
from tenfold.data.translation import TranslationData
from tenfold.data.translation_options import translation_options
from tenfold.errors import UserError

__all__ = ["MatchedSet", "SideBySideSet", "pairs", "unpaired"]

_HELD_OUT = ("test", "val", "validation")
_LAYOUTS = "train and test, trainA, trainB, testA and testB, or A and B with train and test in each"


class _PairSet(ImageSet):
    """Pairs from files: an image of 6 channels, RGB of domain A and RGB of B."""

    unit = "pair"

    def label(self, index: int) -> int:
        """Return 0: pairs have no classes."""
        return 0

    def labels(self) -> Tensor:
        return torch.zeros(len(self), dtype=torch.int64)

    def fingerprint(self) -> str:
        return _fingerprint([file for i in range(len(self)) for file in self.files(i)])

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the files of one pair."""
        raise NotImplementedError

    def check_header(self, index: int) -> None:
        """Refuse a pair by its files' headers alone.

        Raises:
            BadImage: a header can't be read.
            UserError: the files are images, but no pair.
        """
        raise NotImplementedError


class SideBySideSet(_PairSet):
    """Pairs in one file each, A on the left and B on the right.

    Args:
        listing: the files.
        limit: use only the first so many.
    """

    def __init__(self, listing: Listing, limit: int | None = None) -> None:
        self._listing = listing
        self._count = len(range(len(listing))[:limit])

    def __len__(self) -> int:
        return self._count

    def files(self, index: int) -> tuple[Path, ...]:  # noqa: D102
        return (self._listing.path(index),)

    def image(self, index: int) -> Tensor:  # noqa: D102
        file = self._listing.path(index)
        both = decode(file, 3, str(file))
        width = both.shape[2]
        if width % 2:
            raise BadImage(str(file), _odd(width))
        return torch.cat([both[..., : width // 2], both[..., width // 2 :]])

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self._listing.root.name}/{self._listing.relative(index)}"

    def check_header(self, index: int) -> None:  # noqa: D102
        file = self._listing.path(index)
        _, width = encoded_size(file, str(file))
        if width % 2:
            raise UserError(
                f"{file} is {_odd(width)}: expected A and B side by side, of the same width; "
                "correct or remove it"
            )


class MatchedSet(_PairSet):
    """Pairs in two files each, of the same name but for the ending.

    Args:
        domain_a: the files of A.
        domain_b: the files of B.
        limit: use only the first so many.

    Raises:
        UserError: a file has no partner, or two of them.
    """

    def __init__(self, domain_a: Listing, domain_b: Listing, limit: int | None = None) -> None:
        self._listings = (domain_a, domain_b)
        a, b = _by_stem(domain_a), _by_stem(domain_b)
        for have, there, other in ((a, domain_a, domain_b), (b, domain_b, domain_a)):
            known = a if have is b else b
            lonely = [str(there.path(i)) for stem, i in have.items() if stem not in known]
            if lonely:
                more = f" (and {len(lonely) - 3:,} more)" if len(lonely) > 3 else ""
                raise UserError(
                    f"no partner in {other.root} for {', '.join(lonely[:3])}{more}: expected files "
                    "of the same name in both folders; add the partners or remove the files, or "
                    "use unpaired:PATH"
                )
        stems = list(a)[:limit]
        self._numbers = np.array([[a[stem], b[stem]] for stem in stems], np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._numbers)

    def files(self, index: int) -> tuple[Path, ...]:  # noqa: D102
        numbers = self._numbers[index].tolist()
        return tuple(there.path(i) for there, i in zip(self._listings, numbers, strict=True))

    def image(self, index: int) -> Tensor:  # noqa: D102
        files = self.files(index)
        first, second = (decode(file, 3, str(file)) for file in files)
        if first.shape != second.shape:
            sizes = (first.shape[1:], second.shape[1:])
            raise BadImage(str(files[0]), _unlike(files, sizes))
        return torch.cat([first, second])

    def name(self, index: int) -> str:  # noqa: D102
        listing = self._listings[0]
        return f"{listing.root.name}/{listing.relative(int(self._numbers[index, 0]))}"

    def check_header(self, index: int) -> None:  # noqa: D102
        files = self.files(index)
        sizes = [encoded_size(file, str(file)) for file in files]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{files[0]} {_unlike(files, sizes)}: expected a pair of one size; "
                "correct or remove it"
            )


class _DomainSet(FileSet):
    """Images of one domain, RGB."""

    def __init__(self, listing: Listing, limit: int | None = None) -> None:
        order = np.arange(len(listing), dtype=np.int32)[:limit]
        super().__init__(listing, [0] * len(listing.folders), order)

    def check_header(self, index: int) -> None:
        file = self._listing.path(int(self._order[index]))
        encoded_size(file, str(file))


def pairs(options: DataOptions) -> TranslationData:
    """Build the data set of a folder of pairs.

    Raises:
        UserError: the folder has none of the layouts, a folder is missing or empty, a file has no
            partner, a file side by side is of odd width, two partners aren't of one size, or an
            image can't be read.
    """
    root = options.folder()
    chosen = translation_options(options)
    found = _layout(root)

    def side(folders: tuple[Path, ...], limit: int | None) -> _PairSet:
        listings = [_listed(folder) for folder in folders]
        if len(listings) == 1:
            return SideBySideSet(listings[0], limit)
        return MatchedSet(listings[0], listings[1], limit)

    splits = [
        _checked(title, side(folders, limit), options.skip_bad)
        for title, folders, limit in (
            ("train", found.train, options.limit),
            ("test", found.test, None),
        )
    ]
    return chosen.build("pairs", splits[:1], splits[1:])


def unpaired(options: DataOptions) -> TranslationData:
    """Build the data set of a folder of images of two domains.

    Raises:
        UserError: a folder is missing or empty, or an image can't be read.
    """
    root = options.folder()
    chosen = translation_options(options)
    found = _domain_folders(root)
    train, test = (
        [_checked(title, _DomainSet(_listed(f), limit), options.skip_bad) for f in folders]
        for title, folders, limit in (
            ("train", found.train, options.limit),
            ("test", found.test, None),
        )
    )
    return chosen.build("unpaired", train, test)


@dataclass(frozen=True)
class _Folders:
    """The folders of both splits: one of pairs side by side, or that of A and that of B."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]


def _layout(root: Path) -> _Folders:
    """Tell which of the layouts of pairs a folder has."""
    known: dict[str, Callable[[Path], _Folders]] = {
        "train": _side_by_side_folders,
        "trainA": _domain_folders,
        "A": _split_folders,
    }
    other = {"train": "train", "trainA": "trainB", "A": "B"}
    there = [n for n in known if (root / n).is_dir() or (root / other[n]).is_dir()]
    if not there:
        raise UserError(
            f"{root} has no folder train, trainA or A: expected {_LAYOUTS}; "
            "give the folder above them"
        )
    if len(there) > 1:
        raise UserError(
            f"{root} has folders {' and '.join(there)}: expected one layout of pairs, {_LAYOUTS}; "
            "move the others away"
        )
    return known[there[0]](root)


def _side_by_side_folders(root: Path) -> _Folders:
    return _Folders((_needed(root, "train"),), (_held_out(root, ""),))


def _domain_folders(root: Path) -> _Folders:
    train = (_needed(root, "trainA"), _needed(root, "trainB"))
    return _Folders(train, (_held_out(root, "A"), _held_out(root, "B")))


def _split_folders(root: Path) -> _Folders:
    domains = (_needed(root, "A"), _needed(root, "B"))
    train = (_needed(domains[0], "train"), _needed(domains[1], "train"))
    return _Folders(train, (_held_out(domains[0], ""), _held_out(domains[1], "")))


def _needed(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise UserError(
            f"{root} has no folder {name}: expected image files in {root / name}; "
            "add it, or check the path"
        )
    return root / name


def _held_out(root: Path, domain: str) -> Path:
    names = [f"{name}{domain}" for name in _HELD_OUT]
    found = next((name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise UserError(
            f"{root} has no folder {' or '.join(names)}: expected images to evaluate on in "
            f"{root / names[0]}; move some there"
        )
    return root / found


def _listed(folder: Path) -> Listing:
    listing = list_files(folder)
    if not len(listing):
        raise UserError(
            f"{folder} has no images: expected files ending in {', '.join(ENDINGS)}; "
            "add some, or check the path"
        )
    return listing


def _by_stem(listing: Listing) -> dict[str, int]:
    found: dict[str, int] = {}
    for index in range(len(listing)):
        stem = str(PurePosixPath(listing.relative(index)).with_suffix(""))
        if stem in found:
            raise UserError(
                f"{listing.path(found[stem])} and {listing.path(index)} have the same name: "
                "expected one file of a name, to find its partner; remove one of them"
            )
        found[stem] = index
    return found


def _checked(title: str, images: _PairSet | _DomainSet, skip_bad: bool) -> Split:
    """Look at every file's header, and make the split.

    Whatever is wrong should show now, not after an hour of training. A header takes 0.15 ms, so
    that it is remembered in the cache folder that all are well, until a file changes.
    """

    def problem(index: int) -> BadImage | None:
        try:
            images.check_header(index)
        except BadImage as error:
            return error
        return None

    def look() -> dict[str, object]:
        with ThreadPoolExecutor(cpu_count()) as pool:
            bad = next((found for found in pool.map(problem, range(len(images))) if found), None)
        if bad is not None and not skip_bad:
            raise Split(title, images).explain(bad)
        return {"files": len(images)}

    remembered("headers", f"{type(images).__name__} {skip_bad} {images.fingerprint()}", look)
    return Split(title, images, skip_bad)


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(file))
        digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _odd(width: int) -> str:
    return f"{width} pixels wide, an odd number"


def _unlike(files: Sequence[Path], sizes: Sequence[Sequence[int]]) -> str:
    (height, width), (other_height, other_width) = sizes
    return f"is {height}x{width}, and {files[1]} {other_height}x{other_width}"
