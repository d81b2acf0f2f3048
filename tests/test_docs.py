"""The docs agree with the results and with the code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.methods import registry
from tenfold.tasks.recipe import load_recipe, shipped

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_has_a_page_a_test_and_a_reference():
    citation = (ROOT / "CITATION.cff").read_text()
    for key in registry():
        assert (ROOT / "docs" / "methods" / f"{key}.md").is_file()
        assert (ROOT / "tests" / "methods" / f"test_{key}.py").is_file()
        assert f'"{key}' in citation


def test_links_between_pages_hold():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_field_of_a_method_is_documented():
    for key, method in registry().items():
        page = (ROOT / "docs" / "methods" / f"{key}.md").read_text()
        for field in dataclasses.fields(method):
            assert f"`{field.name}`" in page, f"{key}.md doesn't name {field.name}"


def test_recipes_in_the_guide_are_valid():
    import yaml

    text = (ROOT / "docs" / "guide.md").read_text()
    blocks = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "task:" in b]
    assert blocks
    for block in blocks:
        load_recipe(yaml.safe_load(block))
    assert {"digits-dense", "digits-lbc", "cifar10-lbc"} <= set(shipped())
