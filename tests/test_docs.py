"""The docs agree with the results and with the code."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import tenfold
from tenfold import data, measure, methods
from tenfold.methods import registry
from tenfold.tasks.recipe import load_recipe
from tests.pages import DOCS, ROOT, blocks, pages, tables

pytestmark = pytest.mark.unit


def test_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_has_a_page_a_test_and_a_reference():
    citation = (ROOT / "CITATION.cff").read_text()
    overview = (DOCS / "methods" / "index.md").read_text()
    for key in registry():
        assert (DOCS / "methods" / f"{key}.md").is_file()
        assert f"]({key}.md) |" in overview
        # Two test files can't have one name: that of LAB-Net's network is taken.
        assert list((ROOT / "tests" / "methods").glob(f"test_{key}*.py")), key
        assert f'"{key}' in citation


def test_every_field_of_a_method_is_documented():
    for key, method in registry().items():
        page = (DOCS / "methods" / f"{key}.md").read_text()
        for field in dataclasses.fields(method):
            assert f"`{field.name}`" in page, f"{key}.md doesn't name {field.name}"


def test_costs_of_generators_are_those_that_are_tested():
    """Parameters and both counts of MACs, to the digits shown."""
    from tests.nn.test_generators import COUNTS

    known = {parameters: (paper, true) for _, _, parameters, paper, true in COUNTS}
    rows = tables()["counts: generators"]
    assert len(rows) == 11
    for _, _, parameters, true, paper in rows:
        expected = known[int(parameters.replace(",", ""))]
        shown = [float(cell.removesuffix(" G")) for cell in (paper, true)]
        assert shown == [round(value, 3) for value in expected]


def test_links_between_pages_hold():
    for page in pages():
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from _entries(value)
        else:
            yield value


def test_every_page_is_in_the_navigation_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(_entries(site["nav"]))
    there = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_included_parts_exist():
    """What a page takes over from the README and its like, so that no copy drifts."""
    taken = {
        tuple(found)
        for page in DOCS.rglob("*.md")
        for found in re.findall(r'^--8<-- "([^":]+)(?::(\w+))?"$', page.read_text(), re.MULTILINE)
    }
    assert ("README.md", "opening") in taken
    for file, part in taken:
        text = (ROOT / file).read_text()
        for edge in ("start", "end") if part else ():
            assert text.count(f"<!-- --8<-- [{edge}:{part}] -->") == 1, f"{file}: {edge} of {part}"


def test_recipes_in_the_pages_are_valid():
    found = blocks("yaml")
    assert len(found) > 5
    for block in found:
        values = yaml.safe_load(block.text)
        assert isinstance(values, dict), block
        check_recipe({"task": "classification", "data": "digits", "model": "digitnet", **values})


def check_recipe(values: Any, overrides: dict[str, Any] | None = None) -> None:
    """Refuse what a run would refuse, as far as that needs neither data nor network."""
    from tenfold.tasks.run import check_trainer

    recipe = load_recipe(values, overrides)
    data.DataOptions.parse(recipe.data)
    check_trainer(recipe.trainer)


def test_a_wrong_recipe_would_be_found():
    wrong = [{"data": {"name": "digits", "sise": 8}}, {"trainer": {"gpus": 1}}, {"trian": {}}]
    for section in wrong:
        with pytest.raises(tenfold.UserError):
            check_recipe(
                {"task": "classification", "data": "digits", "model": "digitnet", **section}
            )


# -- the reference ---------------------------------------------------------------------------------


def _resolved(dotted: str) -> object:
    """Import what the reference names."""
    module, _, attribute = dotted.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    described = [_resolved(name) for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    linked = set(re.findall(r"\]\(\S*?#(tenfold\.[\w.]+)\)", text))
    public = [getattr(tenfold, name) for name in tenfold.__all__]
    for package in (methods, data, measure):
        public += [getattr(package, name) for name in package.__all__]
    for key, method in registry().items():
        module = importlib.import_module(f"tenfold.methods.{key}")
        public += [method, *(getattr(module, name) for name in module.__all__)]
    missing = [found for found in public if not any(found is known for known in described)]
    assert not missing
    for name in linked:
        assert _resolved(name) is not None


# -- what the build itself checks ------------------------------------------------------------------


def test_the_build_refuses_what_comes_from_a_network():
    fetched = runpy.run_path(str(DOCS / "_hooks.py"))["fetched"]
    for bad in (
        '<script src="https://cdn.example/x.js"></script>',
        "<link rel=stylesheet href=//fonts.example/a.css>",
        '<img alt="a" src="http://example/x.png">',
        "@import 'https://fonts.example/a.css';",
        "a { background: url(https://example/x.png) }",
    ):
        assert len(fetched(bad)) == 1, bad
    for good in (
        '<a href="https://example/paper">the paper</a>',
        '<link rel="canonical" href="https://example/page">',
        '<script src="assets/x.js"></script>',
        '<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        "a { background: url(x.png) }",
    ):
        assert not fetched(good), good


def test_doctests_are_shown_as_code():
    pytest.importorskip("griffe", reason="comes with the docs extra")
    fenced = runpy.run_path(str(DOCS / "_doctests.py"))["fenced"]
    text = "Add.\n\n    >>> for i in (1,):\n    ...     i\n    1\n\nMore."
    shown = "Add.\n\n    ```pycon\n    >>> for i in (1,):\n    ...     i\n    1\n    ```\n\nMore."
    assert fenced(text) == shown
    assert fenced("No example: a >>> b.") == "No example: a >>> b."
