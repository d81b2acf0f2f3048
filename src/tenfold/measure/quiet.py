"""Keep other libraries' chatter off the user's screen, and put their errors on one line."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

__all__ = ["quiet", "reason"]

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow prints, warnings and log records below critical; exceptions pass."""
    before = logging.root.manager.disable
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def reason(error: BaseException, limit: int = 200) -> str:
    """Return the first telling line of an error: that of the cause at the bottom of its chain."""
    seen = {id(error)}
    while (cause := error.__cause__) is not None and id(cause) not in seen and str(cause).strip():
        seen.add(id(cause))
        error = cause
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines()]
    # OpenVINO opens its messages with the places in its own C++ sources.
    lines = [line for line in lines if line and not line.startswith("Exception from ")]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
