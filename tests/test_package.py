"""The package as a whole: what importing it costs, what it promises in its docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import tenfold

pytestmark = pytest.mark.unit


def modules() -> list[str]:
    return [
        entry.name
        for entry in pkgutil.walk_packages(tenfold.__path__, "tenfold.")
        if not entry.name.endswith("__main__")
    ]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_importing_is_light():
    code = (
        "import sys, tenfold, tenfold.methods\n"
        "from tenfold.methods import LBC\n"
        "heavy = {'lightning', 'timm', 'torchvision', 'onnx', 'onnxruntime', 'openvino',\n"
        "         'matplotlib', 'jsonargparse', 'sklearn', 'PIL', 'jinja2', 'rich'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_resolves():
    for name in tenfold.__all__:
        assert callable(getattr(tenfold, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = tenfold.nosuch


def test_networks_that_translate_images_are_public():
    from tenfold import nn

    for name in ("ResNetGenerator", "MobileResNetGenerator", "UNetGenerator", "PatchDiscriminator"):
        assert name in nn.__all__
        assert getattr(nn, name).__name__ == name
    assert nn.PatchDiscriminator(6, 8).channels == 6
    with pytest.raises(AttributeError, match=r"'tenfold\.nn' has no attribute 'nosuch'"):
        _ = nn.nosuch


def test_methods_and_their_pure_functions_are_public():
    from tenfold import methods

    names = ("LBC", "candidates", "to_blocks", "from_blocks", "removed_candidates")
    for name in (*names, "Winograd3d", "convert", "transforms", "winograd_weight", "gain_scales"):
        assert callable(getattr(methods, name))
    with pytest.raises(ImportError):
        from tenfold.methods import NoSuchMethod  # noqa: F401
