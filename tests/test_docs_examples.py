"""The Python in the docs runs, or at least compiles.

A block below `<!-- run -->` is run; the blocks of a page run one after the other, in one namespace
and one folder, as a reader would type them. `<!-- file: NAME -->` writes the block to that file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.pages import blocks

pytestmark = pytest.mark.path
PYTHON = blocks("python")
RUN = sorted({block.page for block in PYTHON if block.mark == "run"})


def photos(folder: Path) -> None:
    """What the page on data packs: two classes of grey squares, dark and light."""
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((16, 16, 3), 60 + 120 * label + index, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{index}.png")


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch):
    """A folder of its own, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "cache"))
    for block in PYTHON:
        if block.mark.startswith("file: "):
            module = block.mark.removeprefix("file: ").removesuffix(".py")
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
            del sys.modules[module]


def test_what_is_run():
    assert {"docs/guide/loop.md", "docs/guide/data.md", "docs/guide/network.md"} <= set(RUN)
    known = ("", "run", "file: nets.py")
    assert {block.mark for block in PYTHON} <= set(known), "a mark that nothing acts on"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_every_block_compiles(block):
    compile(block.text, block.page, "exec")


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("page", RUN)
def test_examples_run(page, tmp_path, capsys):
    if page == "docs/guide/data.md":
        photos(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for block in PYTHON:
        if block.page != page:
            continue
        if block.mark.startswith("file: "):
            Path(block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.mark == "run":
            exec(compile(block.text, page, "exec"), namespace)
    if page == "docs/guide/loop.md":  # what the page says that it prints
        assert "0.5" in capsys.readouterr().out.splitlines()
