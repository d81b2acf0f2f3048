"""Show the doctests of docstrings as code: Markdown takes `>>>` for a quotation in a quotation."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["Doctests", "fenced"]

# Lines from a `>>>` up to the next empty line: what was typed, and what came back.
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).+)*", re.MULTILINE)


def fenced(docstring: str) -> str:
    """Return a docstring whose doctests stand in fences, at their own indentation."""
    return _EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", docstring)


class Doctests(Extension):
    """Rewrite each docstring before it is parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Put the doctests of one object into fences."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
