"""Reading and checking .npz files of encoded images, whoever wrote them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.errors import UserError

__all__ = ["check_cuts", "check_kinds", "check_labels", "read_arrays"]

# NumPy's letters for the types that an array may have.
_KINDS = {"bytes": "u", "offsets": "iu", "clip_start": "iu", "labels": "iu", "classes": "U"}


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read some arrays of a file.

    Raises:
        UserError: it can't be read, or lacks one of them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise UserError(
                    f"{path} has no {', '.join(missing)}: expected the keys {', '.join(keys)}; "
                    "pack it again"
                )
            return {key: file[key] for key in keys}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} can't be read ({reason}): expected a .npz of plain arrays; pack it again"
        ) from None


def check_kinds(path: Path, arrays: Mapping[str, Any]) -> None:
    """Refuse arrays of another type, or of more than one dimension."""
    for key, array in arrays.items():
        if (
            array.ndim != 1
            or array.dtype.kind not in _KINDS[key]
            or (key == "bytes" and array.itemsize > 1)
        ):
            raise UserError(
                f"{key} of {path} is {array.dtype} of shape {array.shape}: expected one dimension "
                "of uint8 bytes, whole offsets and labels, and names as text; pack it again"
            )


def check_cuts(
    path: Path, arrays: Mapping[str, Any], key: str, unit: str, length: int, of: str
) -> None:
    """Refuse cuts that don't divide what they cut.

    Args:
        path: the file.
        arrays: its arrays.
        key: of the cuts.
        unit: what lies between two cuts.
        length: of what is cut.
        of: what is cut.
    """
    cuts = arrays[key]
    falling = np.flatnonzero(cuts[1:] < cuts[:-1])
    if len(falling):
        raise UserError(
            f"{key} of {path} fall from {cuts[falling[0]]} to {cuts[falling[0] + 1]} at "
            f"{unit} {falling[0]}: expected them in ascending order; pack it again"
        )
    if cuts[0] < 0 or cuts[-1] > length:
        raise UserError(
            f"{key} of {path} go from {cuts[0]} to {cuts[-1]}: expected them inside its "
            f"{length} {of}; the file is damaged or packed wrongly, pack it again"
        )


def check_labels(path: Path, arrays: Mapping[str, Any], cuts: str, unit: str) -> None:
    """Refuse labels that aren't one to each sample, or outside the classes.

    Args:
        path: the file.
        arrays: its arrays.
        cuts: the key of the cuts between samples.
        unit: what a sample is called.
    """
    labels, classes = arrays["labels"], arrays["classes"]
    if len(labels) == 0 or len(arrays[cuts]) != len(labels) + 1:
        raise UserError(
            f"{path} has {len(labels)} labels and {len(arrays[cuts])} {cuts}: expected at least "
            f"one label, and one more of {cuts} than labels; pack it again"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        raise UserError(
            f"{unit} {outside[0]} of {path} has label {labels[outside[0]]}: expected 0 to "
            f"{len(classes) - 1}, for {len(classes)} classes; correct the labels"
        )
