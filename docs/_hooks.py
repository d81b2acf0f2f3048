"""Fail the build when a page would load something from a network: the site works offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["fetched", "on_post_build"]

# What a browser fetches by itself; a link (`<a href>`) is followed by a person.
_TAGS = re.compile(
    r"<(?:link(?![^>]*\brel\s*=\s*[\"']?(?:canonical|alternate|prev|next)\b)"
    r"|script|img|iframe|source|video|audio|object|embed)\b[^>]*?"
    r"\b(?:href|src|srcset|data|poster)\s*=\s*[\"']?\s*((?:https?:)?//[^\"'\s>]+)",
    re.IGNORECASE,
)
_STYLES = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


def fetched(text: str) -> list[str]:
    """Return the addresses that a page or a style sheet fetches from elsewhere."""
    return [*_TAGS.findall(text), *_STYLES.findall(text)]


def on_post_build(config: Any) -> None:
    """Look through what was built."""
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    for file in sorted(site.rglob("*")):
        if file.suffix not in (".html", ".css", ".svg"):
            continue
        found = fetched(file.read_text(encoding="utf-8"))
        if found:
            raise PluginError(
                f"{file.relative_to(site)} fetches {found[0]}: expected files of the site alone; "
                "put the file into docs/assets, or leave it out"
            )
