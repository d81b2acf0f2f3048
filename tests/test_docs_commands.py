"""The commands and tables of options in the docs are those of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from typing import Any

import pytest
import yaml

from tenfold import data
from tenfold.cli import _parser, main
from tenfold.data import DataOptions
from tenfold.errors import UserError
from tenfold.nn import models
from tenfold.tasks.gan_recipe import Gan
from tenfold.tasks.recipe import Recipe, Train, parse_overrides, shipped
from tests.pages import ROOT, blocks, commands, mentioned, names_in, tables
from tests.test_docs import check_recipe

pytestmark = pytest.mark.unit


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb."""
    parser = _parser()
    return next(
        action.choices
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )


def check_command(words: list[str]) -> None:
    """Refuse what the command line would refuse before it opens a file.

    Raises:
        UserError: an unknown verb or option, a missing argument, a wrong key or value.
    """
    if words == ["--version"] or "--help" in words:
        return check_words(words)
    options, rest = _parser().parse_known_args(words)
    if not options.takes_overrides:
        if rest:
            raise UserError(f"{options.verb} has no {rest[0]}")
        return None
    known = options.recipe in shipped()
    example = {"task": "classification", "data": "digits", "model": "digitnet"}
    return check_recipe(options.recipe if known else example, parse_overrides(rest))


def check_words(words: list[str]) -> None:
    """Refuse unknown verbs and options of a command that may be cut short."""
    if words == ["--version"]:
        return
    if words[0] not in verbs():
        raise UserError(f"unknown {words[0]}")
    parser = verbs()[words[0]]
    known = {option for action in parser._actions for option in action.option_strings}
    for word in words[1:]:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            if not parser.get_default("takes_overrides"):
                raise UserError(f"{words[0]} has no {flag}")
            section, _, key = flag.removeprefix("--").partition(".")
            fields = {field.name for field in dataclasses.fields(Recipe)}
            keys = {field.name for field in dataclasses.fields(Train)}
            if section not in fields or (section == "train" and key not in keys):
                raise UserError(f"a recipe has no {flag}")


def test_commands_in_the_pages_exist():
    found = list(commands())
    assert len(found) > 30
    assert {words[0] for _, words in found} >= set(verbs())
    for page, words in found:
        try:
            check_command(words)
        except (UserError, SystemExit) as error:
            pytest.fail(f"{page}: tenfold {' '.join(words)}: {error}")


def test_commands_in_running_text_exist():
    found = list(mentioned())
    assert len(found) > 10
    for page, words in found:
        try:
            check_words(words)
        except UserError as error:
            pytest.fail(f"{page}: tenfold {' '.join(words)}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "trian digits-lbc",
        "bench RUN --batches 1",
        "bench",
        "export RUN --to onxx",
        "train digits-lbc --train.epoch 3",
        "train digits-lbc --methods.lbc.k 3",
        "train mine.yaml --trainer.gpus 2",
        "plan digits-lbc --data.sise 8",
    ],
)
def test_a_wrong_command_would_be_found(line):
    with pytest.raises(UserError):
        check_command(line.split())


@pytest.mark.parametrize("line", ["trian x", "bench --batches 1", "train --train.epoch 3"])
def test_a_wrong_mention_would_be_found(line):
    with pytest.raises(UserError):
        check_words(line.split())


def test_make_targets_in_the_pages_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        found
        for block in blocks("", "sh")
        for found in re.findall(r"^make (\w+)", block.text, re.MULTILINE)
    }
    assert {"quickstart", "test", "lint", "docs", "bench"} <= used
    assert used <= targets


def test_outputs_are_what_the_command_prints(capsys):
    shown = [block for block in blocks("text") if block.mark.startswith("output: tenfold ")]
    assert shown
    for block in shown:
        assert main(block.mark.removeprefix("output: tenfold ").split()) == 0
        assert capsys.readouterr().out.strip() == block.text.strip(), block.mark


# -- tables of options -----------------------------------------------------------------------------


def _callback() -> list[tuple[str, Any]]:
    from tenfold.tasks.callback import MethodCallback

    parameters = inspect.signature(MethodCallback).parameters.values()
    return [(p.name, REQUIRED if p.default is p.empty else p.default) for p in parameters]


def _fields(of: type) -> list[tuple[str, Any]]:
    found = []
    for field in dataclasses.fields(of):
        if field.default is not dataclasses.MISSING:
            found.append((field.name, field.default))
        elif field.default_factory is not dataclasses.MISSING:
            found.append((field.name, field.default_factory()))
        else:
            found.append((field.name, REQUIRED))
    return found


REQUIRED = object()
OPTIONS = {
    "Recipe": lambda: _fields(Recipe),
    "Train": lambda: _fields(Train),
    "DataOptions": lambda: _fields(DataOptions),
    "Gan": lambda: _fields(Gan),
    "MethodCallback": _callback,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_key_stands_in_its_table_with_its_default(name):
    rows = tables()[f"keys: {name}"]
    expected = OPTIONS[name]()
    assert [names_in(row[0])[0] for row in rows] == [key for key, _ in expected]
    for row, (key, default) in zip(rows, expected, strict=True):
        assert (row[2] == "required") == (default is REQUIRED), key
        if row[2].startswith("`"):
            assert yaml.safe_load(row[2].strip("`")) == default, key
        elif default is not REQUIRED:
            assert default is None or default in ([], {}) or dataclasses.is_dataclass(default), key


def test_names_stand_in_their_tables():
    found = tables()
    own = [name for name in models.names() if "<" not in name]
    listed = [name for row in found["names: models"] for name in names_in(row[0])]
    assert set(own) == {name for name in listed if "/" not in name and ":" not in name}
    assert {"timm/NAME", "torchvision/NAME"} <= set(listed)
    sets = [names_in(row[0])[0].partition(":")[0] for row in found["names: data"]]
    assert sets == list(data.names())
    augmentations = [names_in(row[0])[0] for row in found["names: augmentations"]]
    known = data.translation_augmentations() | data.augmentations() | data.shadow_augmentations()
    assert sorted(augmentations) == sorted(known)
    recipes = [names_in(row[0])[0] for row in found["names: recipes"]]
    assert sorted(recipes) == sorted(shipped())


def test_keys_that_the_trainer_may_not_set():
    from tenfold.tasks.trainer import _OURS

    rows = tables()["keys: refused"]
    assert sorted(key for row in rows for key in names_in(row[0])) == sorted(_OURS)


@pytest.mark.parametrize("verb", verbs())
def test_every_option_of_a_verb_stands_in_its_table(verb):
    parser = verbs()[verb]
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    if not actions:
        return
    rows = {names_in(row[0])[0]: row for row in tables()[f"verb: {verb}"]}
    assert bool(rows.pop("--KEY", None)) == parser.get_default("takes_overrides")
    named = [a.option_strings[0] for a in actions if a.option_strings]
    positional = [str(a.metavar or a.dest).upper().split("|")[0] for a in actions][
        : len(actions) - len(named)
    ]
    assert set(rows) == {*named, *positional}
    for action in actions:
        if not action.option_strings:
            continue
        _, meaning, default = rows[action.option_strings[0]]
        for choice in action.choices or ():
            assert f"`{choice}`" in meaning, f"{verb} {action.dest}: {choice}"
        if action.default not in (None, False):
            values = action.default if isinstance(action.default, list) else [action.default]
            assert default == f"`{' '.join(str(value) for value in values)}`", action.dest
        else:
            assert (default == "required") == action.required, action.dest
