"""Evaluate photos whose shadows any method removed, so that others get the same numbers.

Whatever moves the numbers is part of the result: size, filter, mask rule, dilation, formula.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.measure.shadow_errors import FIGURES, REGIONS, ShadowErrors, shadow_masks
from tenfold.tasks.shadow_comparison import MaskRule, compare_photos
from tenfold.tasks.shadow_files import match_folders

__all__ = ["ShadowEvaluation", "check_json", "evaluate_shadows", "parse_size", "write_json"]

FORMULAS = {
    "lab_mae": "mean over pixels of |dL| + |da| + |db|; papers call it RMSE",
    "lab_rmse": "root of the mean of d^2 over pixels and the channels L, a, b",
    "psnr": "of RGB in [0, 1]; a region's: the other region 0 in both images, over the whole frame",
    "ssim": "Gaussian of sigma 1.5, 11 pixels, mean over R, G, B; a region's as for PSNR",
}
COLOURS = "sRGB to LAB under D65 (MATLAB's srgb2lab takes D50, about 2 % larger)"
HEADS = ('LAB MAE ("RMSE" in papers)', "LAB RMSE", "PSNR", "SSIM")
DIGITS = (2, 2, 2, 4)
SHOWN = 5


@dataclass(frozen=True)
class ShadowEvaluation:
    """Figures of a folder of results.

    Attributes:
        folders: by role: results, ground truth, masks, and input where it was compared.
        protocol: size, filter, mask rule, dilation, colours and formulas, in words.
        names: of the photos.
        errors: of the results, photos in the order of the names.
        untouched: of the input photos as they are; None where no input was given.
        shadow_share: of all pixels, by the mask rule.
        notes: what a reader of the figures has to know.
    """

    folders: dict[str, str]
    protocol: dict[str, str]
    names: tuple[str, ...]
    errors: ShadowErrors
    untouched: ShadowErrors | None
    shadow_share: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; None stands for a region without pixels or an infinite PSNR."""
        compared = {"results": self.errors}
        if self.untouched is not None:
            compared["input"] = self.untouched
        each = {name: errors.per_image() for name, errors in compared.items()}
        return {
            "folders": self.folders,
            "protocol": self.protocol,
            "notes": list(self.notes),
            "images": len(self.names),
            "shadow_share": self.shadow_share,
            "mean_of_images": {
                name: _by_name(errors.mean_of_images()) for name, errors in compared.items()
            },
            "pooled": {name: _by_name(errors.pooled()) for name, errors in compared.items()},
            "per_image": [
                {"name": name, **{of: _by_name(found[index]) for of, found in each.items()}}
                for index, name in enumerate(self.names)
            ],
        }

    def __str__(self) -> str:
        """Write what was compared and how, and the tables; the last one is the results'."""
        facts = {**self.folders, **self.protocol}
        facts["mask"] += f"; {self.shadow_share:.1%} of the pixels"
        width = max(len(name) for name in facts) + 2
        lines = [f"{name:<{width}}{text}" for name, text in facts.items()]
        lines += [f"note: {note}" for note in self.notes]
        count = f"{len(self.names)} image{'' if len(self.names) == 1 else 's'}"
        if self.untouched is not None:
            title = f"the untouched input, mean of {count} (PI)"
            lines += ["", title, *_table(self.untouched.mean_of_images())]
        lines += ["", f"results, all pixels of {count} together (PP)"]
        lines += _table(self.errors.pooled())
        lines += ["", f"results, mean of {count} (PI)", *_table(self.errors.mean_of_images())]
        return "\n".join(lines)


def evaluate_shadows(
    results: str | os.PathLike[str],
    ground_truth: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    *,
    input: str | os.PathLike[str] | None = None,
    size: int | tuple[int, int] | None = 256,
    mask_above: float = 0.0,
    dilate: int = 0,
    skip_unmatched: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
) -> ShadowEvaluation:
    """Compare a folder of results with the shadow-free photos, in the shadow and outside it.

    Args:
        results: folder of photos whose shadows were removed.
        ground_truth: folder of the shadow-free photos, of the same stems.
        masks: folder of the shadow masks.
        input: folder of the shadow photos, whose own error is given too.
        size: everything is resized to it, a side or (height, width); None: as the files are.
        mask_above: share of white above which a resized mask's pixel is shadow: 0 or 0.5.
        dilate: grow the masks by so many pixels, at the size of the evaluation.
        skip_unmatched: leave out files without partners.
        skip_bad: leave out photos of which a file can't be read.
        workers: threads that read and compare; by default one a processor.

    Raises:
        UserError: folders that don't match, files that can't be compared, or options out of range.
    """
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is not None and min(wanted) < 11:
        raise UserError(f"size {wanted[0]}x{wanted[1]}: expected sides of at least 11")
    shadow_masks(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), mask_above, dilate)  # are they valid?
    folders = {"results": results, "ground truth": ground_truth, "masks": masks}
    if input is not None:
        folders["input"] = input
    matched, orphans = match_folders(folders, skip_unmatched)
    unread = list[str]()
    rule = MaskRule(mask_above, dilate)
    found = list(compare_photos(matched, wanted, rule, workers, unread if skip_bad else None))
    if not found:
        raise UserError(f"none of {len(matched)} photos could be read: {unread[0]}")
    names = tuple(one.name for one in found)
    errors = ShadowErrors.joined([one.errors for one in found])
    untouched = [one.untouched for one in found if one.untouched is not None]
    shadow, _, pixels = errors.pixels.sum(0).tolist()
    converted = collections.Counter(text for one in found for text in one.notes)
    notes = [f"left out, without partners: {_some(orphans)}"] if orphans else []
    notes += [f"left out, unreadable: {_some(unread)}"] if unread else []
    jpegs = sum(one.files["masks"].suffix.lower() in (".jpg", ".jpeg") for one in matched)
    if jpegs and mask_above == 0:
        notes.append(
            f"{jpegs} masks are JPEG: noise counts as shadow; mask_above 0.5 leaves it out"
        )
    notes += [f"{text} ({n} photo{'s' * (n > 1)})" for text, n in converted.items()]
    return ShadowEvaluation(
        folders={role: os.fspath(folder) for role, folder in folders.items()},
        protocol=_protocol(wanted, mask_above, dilate),
        names=names,
        errors=errors,
        untouched=ShadowErrors.joined(untouched) if untouched else None,
        shadow_share=shadow / pixels,
        notes=(*notes, *_notes_on(errors, names)),
    )


def parse_size(text: str) -> int | tuple[int, int] | None:
    """Return what `--size` says: a side, HEIGHTxWIDTH, or None for native.

    Raises:
        UserError: anything else.

    >>> parse_size("480x640")
    (480, 640)
    """
    if text == "native":
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(
            f"--size {text!r}: expected a side such as 256, HEIGHTxWIDTH such as 480x640, or native"
        )
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def check_json(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Refuse a path that `write_json` wouldn't write to; call it before the work is done.

    Raises:
        UserError: a folder, or a file that is there.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        why = "it is a folder" if path.is_dir() else "the file is there; --overwrite replaces it"
        raise UserError(f"can't write {path}: {why}; or give another name")
    return path


def write_json(
    evaluation: ShadowEvaluation,
    path: str | os.PathLike[str],
    *,
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Write all figures, each photo's too, whole or not at all.

    Args:
        evaluation: the figures.
        path: the file; its folder is created.
        command: what made them.
        overwrite: replace a file that is there.

    Raises:
        UserError: a folder, or a file that is there.
    """
    from tenfold import __version__

    path = check_json(path, overwrite)
    values = {"tenfold": __version__, "command": command, **evaluation.to_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


# -- for a person ----------------------------------------------------------------------------------


def _protocol(size: tuple[int, int] | None, above: float, dilate: int) -> dict[str, str]:
    native = "native, no file is resized"
    return {
        "size": native if size is None else f"{size[0]}x{size[1]}; results, truth, masks alike",
        "filter": "none" if size is None else "bicubic against aliasing, Pillow's, in 8 bits",
        "mask": f"shadow where the {'' if size is None else 'resized '}mask is > {above:g}, "
        f"{f'grown by {dilate} pixels, in a square' if dilate else 'not grown'}",
        "colours": COLOURS,
        **{
            head.partition(" (")[0]: formula
            for head, formula in zip(HEADS, FORMULAS.values(), strict=True)
        },
    }


def _notes_on(errors: ShadowErrors, names: Sequence[str]) -> Iterator[str]:
    for index, (region, text) in enumerate(
        zip(REGIONS[:2], ("empty masks", "masks that cover everything"), strict=True)
    ):
        found = [names[i] for i in (errors.pixels[:, index] == 0).nonzero().flatten().tolist()]
        if found:
            yield f"{text}, left out of the {region}'s figures: {_some(found)}"
    for region, count, empty in zip(
        REGIONS, errors.infinite().tolist(), errors.empty().tolist(), strict=True
    ):
        if 0 < count < len(names) - empty:
            yield f"{region}: {count} equal the truth; their infinite PSNR is left out of the mean"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}, {', '.join(names[:SHOWN])}{more}"


def _table(figures: Tensor) -> list[str]:
    side = max(len(region) for region in REGIONS) + 2
    widths = [len(head) + 2 if index == 0 else 10 for index, head in enumerate(HEADS)]
    heads = "".join(f"{head:>{width}}" for head, width in zip(HEADS, widths, strict=True))
    lines = [" " * side + heads]
    for region, row in zip(REGIONS, figures.tolist(), strict=True):
        cells = (
            f"{'-' if math.isnan(value) else format(value, f'.{digits}f'):>{width}}"
            for value, digits, width in zip(row, DIGITS, widths, strict=True)
        )
        lines.append(f"{region:<{side}}{''.join(cells)}")
    return lines


def _by_name(figures: Tensor) -> dict[str, dict[str, float | None]]:
    return {
        region: {
            name: value if math.isfinite(value) else None
            for name, value in zip(FIGURES, row, strict=True)
        }
        for region, row in zip(REGIONS, figures.tolist(), strict=True)
    }
