"""The cache folder, and small results that are worth remembering between starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "remembered"]


def cache_folder() -> Path:
    """Return the folder for downloads and scan results: TENFOLD_DATA, or ~/.cache/tenfold."""
    given = os.environ.get("TENFOLD_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "tenfold"


def remembered(
    kind: str, fingerprint: str, compute: Callable[[], Mapping[str, object]]
) -> dict[str, Any]:
    """Return the JSON-able result of `compute`, from the cache folder if it is known there.

    Args:
        kind: what is computed; part of the file's name.
        fingerprint: everything that the result depends on.
        compute: called when the result isn't known.
    """
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
    path = cache_folder() / "checked" / f"{kind}-{digest}.json"
    # Neither a cache that can't be read nor one that can't be written is worth an error.
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text("utf-8"))
        if isinstance(known, dict):
            return known
    result = dict(compute())
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(result), "utf-8")
        unfinished.replace(path)  # whole or not at all, whoever else starts right now
    return result
