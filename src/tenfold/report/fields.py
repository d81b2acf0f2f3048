"""Ask a JSON object for its fields by type, with errors that name the file and the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenfold.errors import UserError

__all__ = ["Fields", "short"]

Item = TypeVar("Item")


class Fields:
    """A JSON object whose fields are asked for by type; the errors name file and field."""

    def __init__(self, file: Path, place: str, data: object) -> None:
        """Hold `data`, found at `place` in `file`.

        Raises:
            UserError: If it isn't a JSON object.
        """
        self.file, self.place = file, place
        if not isinstance(data, dict):
            raise self.error("", data, "an object")
        self.data: dict[str, object] = data

    def error(self, key: str, found: object, expected: str) -> UserError:
        """Build the error for a field that holds something else."""
        place = f"{self.place}.{key}".strip(".") or "the whole file"
        return UserError(
            f"{self.file}: {place} is {short(found)}, expected {expected}: "
            "write the file again with the tenfold command that made it"
        )

    def number(self, key: str) -> float | None:
        """Return a finite number, or `None` for null, missing and non-finite."""
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "a number or null")
        try:
            found = float(value)
        except OverflowError:
            return None
        return found if math.isfinite(found) else None

    def text(self, key: str) -> str | None:
        """Return a string, or `None` for null and missing."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, value, "a string or null")
        return value

    def name(self, key: str) -> str:
        """Return a string that must be there."""
        value = self.text(key)
        if value is None:
            raise self.error(key, None, "a string")
        return value

    def whole(self, key: str) -> int:
        """Return a whole number that must be there."""
        value = self.number(key)
        if value is None or value != int(value):
            raise self.error(key, self.data.get(key), "a whole number")
        return int(value)

    def values(self, key: str) -> list[object]:
        """Return a list, empty for null and missing."""
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, value, "a list")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings, empty for null and missing."""
        found = []
        for value in self.values(key):
            if not isinstance(value, str):
                raise self.error(key, value, "a list of strings")
            found.append(value)
        return tuple(found)

    def fields(self, key: str) -> Fields:
        """Return an object, empty for null and missing."""
        value = self.data.get(key)
        return Fields(self.file, f"{self.place}.{key}".strip("."), {} if value is None else value)

    def items(self, key: str, build: Callable[[Fields], Item]) -> tuple[Item, ...]:
        """Build one item from each object of a list."""
        place = f"{self.place}.{key}".strip(".")
        values = enumerate(self.values(key))
        return tuple(build(Fields(self.file, f"{place}[{at}]", value)) for at, value in values)


def short(value: object) -> str:
    """Return a value as Python writes it, cut to fit into one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
