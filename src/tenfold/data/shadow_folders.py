"""`triplets:PATH`: photos with shadows, masks and shadow-free photos in the layouts of known sets.

    ISTD           PATH/{train,test}/{train,test}_{A,B,C}, or PATH/{train,test}_{A,B,C}
    AISTD, ISTD+   the same; train_C_fixed_ours and test_C_fixed_official stand for C if there
    SRD            PATH/{train,test}/{shadow,mask,shadow_free}, or _B for the masks

A is a photo, B its mask, C the scene without the shadow. The three files of a scene have one name,
whatever the ending; SRD's free files may end in `_no_shadow`. Masks needn't be of two levels: what
is above a threshold is shadow.

All files' headers and all masks are looked at ahead of training, because what is wrong should show
now, not after an hour; the result is remembered until a file changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tenfold.data.cache import remembered
from tenfold.data.decode import BadImage
from tenfold.data.options import DataOptions
from tenfold.data.shadow_matching import Matched, match_folders, some_of
from tenfold.data.shadow_options import shadow_options
from tenfold.data.shadow_photos import photo_header, read_levels, read_pixels
from tenfold.data.shadow_set import Pixels, ShadowSet, Triplet
from tenfold.data.shadows import ShadowData, default_short_side
from tenfold.data.split import SampleSplit, cpu_count
from tenfold.data.translation_folders import _fingerprint
from tenfold.errors import UserError

__all__ = ["FolderTriplets", "find_folders", "triplets"]

SHADOW, MASKS, FREE = "shadow photos", "masks", "shadow-free photos"
_NAMES = {
    SHADOW: ("{split}_A", "shadow", "A"),
    MASKS: ("{split}_B", "mask", "masks", "B"),
    FREE: (
        "{split}_C_fixed_official",
        "{split}_C_fixed_ours",
        "{split}_C_fixed",
        "{split}_C",
        "shadow_free",
        "C",
    ),
}
_SPLITS = {"train": ("train",), "test": ("test", "val")}
_LAYOUTS = (
    "{split}/{split}_A and {split}_B (ISTD), with {split}_C, or {split}/shadow and mask (SRD), "
    "with shadow_free"
)
SRD_SHORT_SIDE = (400, 479)

MOSTLY = 0.95  # of a photo in shadow: a mask that may well be inverted, or a placeholder
GREY = 0.05  # of a mask's pixels between black and white
_BETWEEN = (26, 229)  # levels that are neither


class FolderTriplets(ShadowSet):
    """Triplets from files, read when they are asked for.

    Args:
        matched: the files of each photo, by role.
    """

    def __init__(self, matched: Sequence[Matched]) -> None:
        self._matched = list(matched)
        self.has_targets = FREE in self._matched[0].files
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._matched)

    def triplet(self, index: int) -> Triplet:  # noqa: D102
        files = self._matched[index].files
        image, levels = read_pixels(files[SHADOW]), read_levels(files[MASKS])
        target = read_pixels(files[FREE]) if self.has_targets else None
        for role, part in ((MASKS, levels), (FREE, target)):
            if part is not None and part.shape[:2] != image.shape[:2]:
                sizes = (image.shape[:2], part.shape[:2])
                raise BadImage(str(files[SHADOW]), _unlike(files[role], *sizes))
        return Triplet(image, levels, target)

    def levels(self, index: int) -> Pixels:  # noqa: D102
        return read_levels(self._matched[index].files[MASKS])

    def name(self, index: int) -> str:  # noqa: D102
        file = self._matched[index].files[SHADOW]
        return f"{file.parent.name}/{file.name}"

    def fingerprint(self) -> str:  # noqa: D102
        return _fingerprint([file for one in self._matched for file in one.files.values()])

    def byte_count(self) -> int | None:  # noqa: D102
        if self._sizes is None:
            return None
        planes = 7 if self.has_targets else 4
        return sum(planes * height * width for height, width in self._sizes)

    def look(self, index: int, mask_above: float, grey_allowed: bool) -> list[float]:
        """Return what headers and the mask alone tell of a photo.

        Args:
            index: of the photo.
            mask_above: share of white from which on a mask's level is shadow.
            grey_allowed: whether photos may be grey.

        Returns:
            Height, width, the share of pixels in shadow, and that of levels between.

        Raises:
            BadImage: a file can't be read, or is transparent in part.
            UserError: the files are of several sizes, or of a grey photo.
        """
        files = self._matched[index].files
        sizes = {}
        for role, file in files.items():
            sizes[role], kind = photo_header(file)
            if role != MASKS and kind == "grey" and not grey_allowed:
                raise UserError(
                    f"{file} is grey: expected photos in colour to train on; remove it, or put in "
                    "one in colour"
                )
            if role != MASKS and kind == "transparent":
                read_pixels(file)
            if sizes[role] != sizes[SHADOW]:
                raise UserError(
                    f"{files[SHADOW]} {_unlike(file, sizes[SHADOW], sizes[role])}: expected one "
                    "size for photo, mask and target; correct or remove them"
                )
        levels = read_levels(files[MASKS])
        low, high = _BETWEEN
        between = (levels >= low) & (levels <= high)
        return [*sizes[SHADOW], float((levels > 255 * mask_above).mean()), float(between.mean())]

    def found_sizes(self, sizes: list[tuple[int, int]]) -> None:
        """Take the photos' sizes, from which it follows whether they fit in memory."""
        self._sizes = sizes


def triplets(options: DataOptions) -> ShadowData:
    """Build the data set of a folder of triplets.

    Raises:
        UserError: a folder is missing or empty, a file has no partner, files of one photo are of
            several sizes, a training photo is grey, or a file can't be read.
    """
    root = options.folder()
    chosen = shadow_options(options)
    found = {
        "train": find_folders(root, "train", targets=chosen.targets),
        "test": find_folders(root, "test", targets=None),
    }
    splits, orphans = {}, []
    for title, folders in found.items():
        matched, lonely = match_folders(folders, options.skip_bad, "--data.skip_bad true")
        limit = options.limit if title == "train" else None
        splits[title] = _looked_at(
            title, FolderTriplets(matched[:limit]), chosen.mask_above, options.skip_bad
        )
        orphans += lonely
    usual = default_short_side(chosen.size)
    if found["train"][SHADOW].name == "shadow":
        least, most = SRD_SHORT_SIDE
        usual = (max(least, usual[0]), max(most, usual[0]))
    data = chosen.build("triplets", splits["train"], splits["test"], usual)
    data.skipped += orphans
    return data


def find_folders(root: Path, split: str, targets: bool | None) -> dict[str, Path]:
    """Return the folders of a split, by role.

    Args:
        root: the data set's folder.
        split: "train" or "test".
        targets: whether shadow-free photos are needed; False: they aren't looked for; None: they
            are taken where they are.

    Raises:
        UserError: a folder is missing.
    """
    wanted = [SHADOW, MASKS] + ([FREE] if targets is not False else [])
    found: dict[str, Path] = {}
    for name in _SPLITS[split]:
        for role in wanted:
            there = _first_of(root, name, role)
            if there is not None:
                found[role] = there
        if found:
            break
    missing = [role for role in wanted if role not in found and (role != FREE or targets)]
    if missing:
        advice = "check the path"
        if missing == [FREE]:
            advice = "add them, or train without by data.targets: false"
        elif missing == [MASKS]:
            advice = "add them (SRD comes without any: others publish them)"
        raise UserError(
            f"{root} has no folder of {' and '.join(missing)} of {split}: expected "
            f"{_LAYOUTS.format(split=split)}; {advice}"
        )
    return found


def _first_of(root: Path, split: str, role: str) -> Path | None:
    for name in _NAMES[role]:
        # Names without the split's own stand for it only inside its folder.
        bases = (root / split, root) if "{split}" in name else (root / split,)
        for base in bases:
            folder = base / name.format(split=split)
            if folder.is_dir():
                return folder
    return None


@dataclass(frozen=True)
class _Facts:
    """What was found at the first look, by id."""

    size: tuple[int, int]
    shadow: float
    between: float


def _looked_at(
    title: str, triplets: FolderTriplets, mask_above: float, skip_bad: bool
) -> SampleSplit:
    """Look at all files of a split, leave out what can't be trained on, and warn of odd masks."""
    split = SampleSplit(title, triplets, skip_bad)
    ids: list[int] = split.ids.tolist()
    training = title == "train"

    def look(index: int) -> list[float] | BadImage:
        try:
            return triplets.look(index, mask_above, grey_allowed=not training)
        except BadImage as error:
            return error

    def all_facts() -> dict[str, object]:
        facts = []
        with ThreadPoolExecutor(cpu_count()) as pool:
            for seen in pool.map(look, ids):
                if isinstance(seen, BadImage):
                    raise split.explain(seen)
                facts.append(seen)
        return {"facts": facts}

    key = f"{title} {mask_above} {skip_bad} {triplets.fingerprint()}"
    known = remembered("triplets", key, all_facts)["facts"]
    facts = {i: _Facts((h, w), s, b) for i, (h, w, s, b) in zip(ids, known, strict=True)}
    triplets.found_sizes([one.size for one in facts.values()])
    _warn(title, {triplets.name(i): one for i, one in facts.items()})
    if training:
        empty = [i for i, one in facts.items() if one.shadow == 0]
        if len(empty) == len(ids):
            raise UserError(
                f"none of {len(ids)} masks to train on has a pixel above {mask_above} of white: "
                "expected white in the shadow; check the masks, or lower data.mask_above"
            )
        split.skipped += [f"{triplets.name(i)} (empty mask)" for i in empty]
        split.ids = split.ids[[facts[i].shadow > 0 for i in ids]]
    return split


def _warn(title: str, facts: dict[str, _Facts]) -> None:
    fate = "left out" if title == "train" else "kept"
    for text, names in (
        (f"empty: {fate}", [n for n, one in facts.items() if one.shadow == 0]),
        (
            f"white on more than {MOSTLY:.0%}, perhaps inverted: kept",
            [n for n, one in facts.items() if one.shadow > MOSTLY],
        ),
        (
            f"between black and white on more than {GREY:.0%}: the threshold data.mask_above "
            "decides",
            [n for n, one in facts.items() if one.between > GREY],
        ),
    ):
        if names:
            warnings.warn(
                f"{len(names):,} of {len(facts):,} {title} masks are {text} ({some_of(names)})",
                stacklevel=2,
            )


def _unlike(other: Path, size: tuple[int, ...], other_size: tuple[int, ...]) -> str:
    return f"is {size[0]}x{size[1]}, and {other} {other_size[0]}x{other_size[1]}"
