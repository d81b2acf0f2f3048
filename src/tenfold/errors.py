"""Errors meant for people: what was given, what is expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["StateError", "UserError", "nearest", "unknown_name"]


class UserError(ValueError):
    """A mistake in what the user gave. The command line prints its text alone and exits with 2."""


class StateError(UserError, RuntimeError):
    """A call that came at the wrong moment, such as `finalize` before the schedule has ended."""


def nearest(given: str, known: Iterable[str]) -> str:
    """Return a phrase naming the nearest known names, or all of them when none is near.

    >>> nearest("resnt20", ["resnet20", "resnet32"])
    'did you mean resnet20 or resnet32?'
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"known: {shown}" if names else "none is known"


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that isn't in a list, suggesting the nearest ones."""
    return UserError(f"unknown {kind} {given!r}: {nearest(given, known)}")
