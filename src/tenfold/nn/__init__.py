"""Networks and layers that are not a paper's own, and the forms in which weights are stored.

`from tenfold.nn import MobileResNetGenerator`: the networks that translate images can be imported
from here; each brings its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenfold.nn.discriminators import PatchDiscriminator as PatchDiscriminator
    from tenfold.nn.generators import MobileResNetGenerator as MobileResNetGenerator
    from tenfold.nn.generators import ResNetGenerator as ResNetGenerator
    from tenfold.nn.generators import UNetGenerator as UNetGenerator

_WHERE = {
    "MobileResNetGenerator": "tenfold.nn.generators",
    "PatchDiscriminator": "tenfold.nn.discriminators",
    "ResNetGenerator": "tenfold.nn.generators",
    "UNetGenerator": "tenfold.nn.generators",
}
__all__ = ["MobileResNetGenerator", "PatchDiscriminator", "ResNetGenerator", "UNetGenerator"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tenfold.nn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
