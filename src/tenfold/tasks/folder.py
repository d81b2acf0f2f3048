"""A run's folder: what lies where, and when an old one may be touched."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tenfold.errors import UserError
from tenfold.tasks.recipe import Recipe, load_recipe

__all__ = ["RunFolder", "open_run", "refuse_other_recipe", "write_json"]


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/<name>/`."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        """One row an epoch."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Lightning's checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The artifact."""
        return self.path / "model"

    @property
    def export(self) -> Path:
        """Exported files."""
        return self.path / "export"

    @property
    def records(self) -> Path:
        """What methods tell about the run."""
        return self.path / "methods.json"

    @property
    def is_run(self) -> bool:
        """Whether this is a run's folder."""
        return self.recipe_file.is_file()

    @property
    def is_empty(self) -> bool:
        """Whether an attempt was given up before its first epoch was over: nothing to lose."""
        return not self.metrics_file.exists() and not list(self.checkpoints.glob("*.ckpt"))

    @property
    def is_finished(self) -> bool:
        """Whether training came to its end."""
        return (self.path / "run.json").is_file() and (self.model / "model.json").is_file()

    def recipe(self) -> Recipe:
        """Read the resolved recipe.

        Raises:
            UserError: this is no run.
        """
        if not self.is_run:
            raise UserError(f"{self.path} is no run: it has no recipe.yaml")
        return load_recipe(self.recipe_file)

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` says, or nothing."""
        file = self.path / "run.json"
        if not file.is_file():
            return {}
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not valid JSON: {error}; train the run anew") from error
        return facts if isinstance(facts, dict) else {}

    def metrics(self) -> list[dict[str, str]]:
        """Return the rows of `metrics.csv`."""
        if not self.metrics_file.is_file():
            return []
        with self.metrics_file.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write `metrics.csv` anew, whole; its columns are all that occur, in order."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        draft = self.metrics_file.with_suffix(".csv.writing")
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.metrics_file)


def open_run(path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> RunFolder:
    """Make a run's folder, or open the one that is there, if that was asked for.

    Args:
        path: `runs/<name>` by custom.
        recipe: of the run to come; a resumed one must have the same.
        resume: go on with a run that was interrupted.
        overwrite: throw an older run away.

    Raises:
        UserError: there is something at the path and neither was asked for, or it's no run, or a
            run of another recipe.
    """
    folder = RunFolder(path)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: go on, or start anew")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: give another --run_dir")
    # What a killed process left half-written is nothing worth keeping.
    if path.is_dir() and any(entry.suffix != ".writing" for entry in path.iterdir()):
        if not folder.is_run:
            raise UserError(f"{path} holds something that is no run: give another --run_dir")
        if not folder.is_empty:
            if not (resume or overwrite):
                raise UserError(
                    f"{path} holds a run already: pass --resume to go on with it, --overwrite to "
                    "throw it away, or another --run_dir"
                )
            if resume:
                refuse_other_recipe(folder, recipe)
                return folder
            _throw_away(path)
    path.mkdir(parents=True, exist_ok=True)
    write_text(folder.recipe_file, recipe.to_yaml())
    return folder


def _throw_away(path: Path) -> None:
    """Remove a run's folder. Killed in the middle, it leaves no folder that is half a run."""
    trash = path.with_name(f".{path.name}.thrown-away")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(path, trash)
    shutil.rmtree(trash)


def refuse_other_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse a run of another recipe than this.

    Raises:
        UserError: it differs; the keys are named.
    """
    try:
        old = yaml.safe_load(folder.recipe_file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{folder.recipe_file} is not valid YAML: start the run anew") from error
    new = yaml.safe_load(recipe.to_yaml())
    for free in ("name", "baseline", "trainer"):  # where it runs may change, what it computes not
        old.pop(free, None)
        new.pop(free, None)
    differing = sorted(set(_differences(old, new)))
    if differing:
        raise UserError(
            f"{folder.path} was started with another recipe; it differs in "
            f"{', '.join(differing[:5])}: resume with the same, or give another --run_dir"
        )


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    return [] if old == new else [prefix.rstrip(".")]


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.writing")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
