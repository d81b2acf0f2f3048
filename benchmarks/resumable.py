"""Finished runs of a comparison in one JSON file, which several processes may share."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, save
from tenfold.errors import UserError

Runs = dict[str, dict[str, Any]]


class Results:
    """The finished runs of one output, in its JSON file; several processes may share it.

    Args:
        output: name of the file in benchmarks/results, without `.json`.
        settings: common to all runs; a file of other settings is refused.
        command: that makes the file.
        folder: for the lock, of these settings alone.
        summarize: makes of all runs what else the file holds.
        gpu: name of the GPU that is trained on.
    """

    def __init__(
        self,
        output: str,
        settings: Mapping[str, Any],
        command: str,
        folder: Path,
        summarize: Callable[[Runs], Mapping[str, Any]],
        gpu: str | None = None,
    ) -> None:
        self.output, self.settings, self.command = output, dict(settings), command
        self.folder, self.summarize, self.gpu = folder, summarize, gpu
        known = self._read()
        if known and known["settings"] != self.settings:
            old, new = known["settings"], self.settings
            differing = ", ".join(
                f"{key} {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]
            )
            raise UserError(
                f"results/{output}.json holds runs of other settings ({differing}): give the "
                "same, or another --output"
            )

    def _read(self) -> dict[str, Any]:
        file = RESULTS / f"{self.output}.json"
        found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return found

    @property
    def runs(self) -> Runs:
        """Return the finished runs by name."""
        found: Runs = self._read().get("runs", {})
        return found

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Take in a finished run; a result holds its `seed`."""
        with locked(self.folder / "results.lock", wait=True):
            runs = {**self.runs, name: dict(result)}
            commands = self._read().get("command", self.command).split("; ")
            save(
                self.output,
                "; ".join(dict.fromkeys([*commands, self.command])),
                sorted({entry["seed"] for entry in runs.values()}),
                {
                    "threads": torch.get_num_threads(),
                    "gpu": self.gpu,
                    "settings": self.settings,
                    **self.summarize(runs),
                    "runs": runs,
                },
            )


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that ends with the process; yield whether it was got."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: one process at a time, nothing to lock
            yield True
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def command_of(script: str, words: Sequence[str]) -> str:
    """Return the command without --minutes, which changes nothing in the result."""
    kept = list(words)
    if "--minutes" in kept:
        at = kept.index("--minutes")
        del kept[at : at + 2]
    return shlex.join(["python", f"benchmarks/{script}.py", *kept])
