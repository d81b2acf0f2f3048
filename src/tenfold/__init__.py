"""tenfold: vision models about ten times cheaper to train and to run, measured on your machine.

Importing the package is quick: each name below brings what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenfold.deploy.artifact import load as load
    from tenfold.deploy.artifact import save as save
    from tenfold.deploy.onnx import export as export
    from tenfold.deploy.optimize import optimize as optimize
    from tenfold.errors import StateError as StateError
    from tenfold.errors import UserError as UserError
    from tenfold.measure.bench import bench as bench
    from tenfold.measure.machine import doctor as doctor
    from tenfold.tasks.run import evaluate as evaluate
    from tenfold.tasks.run import plan as plan
    from tenfold.tasks.run import train as train

__version__ = "0.1.0"

_WHERE = {
    "train": "tenfold.tasks.run",
    "plan": "tenfold.tasks.run",
    "evaluate": "tenfold.tasks.run",
    "export": "tenfold.deploy.onnx",
    "optimize": "tenfold.deploy.optimize",
    "bench": "tenfold.measure.bench",
    "save": "tenfold.deploy.artifact",
    "load": "tenfold.deploy.artifact",
    "doctor": "tenfold.measure.machine",
    "UserError": "tenfold.errors",
    "StateError": "tenfold.errors",
}
__all__ = [
    "StateError",
    "UserError",
    "bench",
    "doctor",
    "evaluate",
    "export",
    "load",
    "optimize",
    "plan",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
