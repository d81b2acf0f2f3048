from __future__ import annotations

import pytest
import yaml

from tenfold.errors import UserError
from tenfold.tasks.recipe import keys_help, load_recipe, parse_overrides, shipped
from tests.tasks.conftest import MADE_UP, recipe

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"tasks": 3}, "unknown key 'tasks': did you mean task?"),
        ({"task": "clasification"}, "unknown task 'clasification': did you mean classification?"),
        ({"train.epoch": 3}, "unknown key 'train.epoch': did you mean train.epochs"),
        ({"train.epochs": "abc"}, "train.epochs: expected int, got 'abc'"),
        ({"train.epochs": 2.5}, "train.epochs: expected int, got 2.5"),
        ({"train.epochs": 0}, "train.epochs=0: expected at least 1"),
        ({"train": 3}, "train: expected keys such as epochs, got 3"),
        ({"train.lr": -1}, "train.lr=-1.0: expected more than 0"),
        ({"train.optimizer": 3}, "train.optimizer: expected str or a mapping, got 3"),
        ({"train.schedule": "cos"}, "unknown train.schedule 'cos': did you mean cosine?"),
        ({"train.warmup_epochs": 3}, "expected less than the 3 epochs"),
        ({"train.ema": 1}, "expected a decay in (0, 1)"),
        ({"train.label_smoothing": 1}, "expected less than 1"),
        ({"methods.lbc.n": "x"}, "methods.lbc.n: expected int, got 'x'"),
        ({"methods.lbc.n": 4}, "methods.lbc: n=4, m=4: expected 1 <= n < m"),
        ({"methods.lbc.q": 4}, "unknown key 'methods.lbc.q': did you mean methods.lbc."),
        ({"methods.lbc.preset": "vgg"}, "expected one of resnet, deit, got 'vgg'"),
        ({"methods.lbc.include": 3}, "expected a list of str, or null, got 3"),
        ({"methods.lbcc": {}}, "unknown method 'lbcc': did you mean lbc?"),
        ({"methods": {"lbc": None}}, "methods.lbc lacks n, m"),
        ({"methods": ["lbc"]}, "methods: expected a mapping, got ['lbc']"),
        ({"trainer": 3}, "trainer: expected a mapping, got 3"),
        ({"seed": -1}, "seed=-1: expected 0 to 2**63 - 1"),
        ({"model": {"width": 3}}, "expected a name, or a mapping with a name"),
        ({"data": None}, "the recipe lacks data"),
        ({"train.epochs.more": 3}, "--train.epochs.more: train.epochs is a single value"),
    ],
)
def test_bad_values(overrides, text):
    values = recipe()
    with pytest.raises(UserError) as error:
        load_recipe(values, overrides)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_two_losses_are_refused_before_anything_starts():
    methods = {f"{MADE_UP}:Focal": {}, f"{MADE_UP}:OtherLoss": {}}
    with pytest.raises(UserError, match="both replace the batch's loss"):
        load_recipe(recipe(methods=methods))


def test_the_order_in_yaml_does_not_matter():
    methods = {f"{MADE_UP}:Focal": {}, "lbc": {"n": 2, "m": 4}, f"{MADE_UP}:Gain": {}}
    made = load_recipe(recipe(methods=methods)).make_methods()
    assert [method.key() for method in made] == ["gain", "lbc", "focal"]


def test_yaml_round_trip(tmp_path):
    first = load_recipe(recipe(), {"train.lr": 0.2, "name": "x"})
    (tmp_path / "again.yaml").write_text(first.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "line 1 is not valid YAML"),
        ("- a\n- b", "expected keys such as task"),
        ("", "expected keys such as task"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "bad.yaml")


def test_missing_files_and_names():
    with pytest.raises(UserError, match=r"recipe gone\.yaml does not exist"):
        load_recipe("gone.yaml")
    with pytest.raises(UserError, match="did you mean digits-lbc"):
        load_recipe("digits-lcb")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_is_valid_and_described(name):
    assert load_recipe(name).name == name
    assert len(shipped()[name]) > 20


def test_overrides_from_the_command_line():
    words = "--train.lr 1e-3 --seed=3 --methods.lbc.include [a,b] --data npz:x --trainer.devices -1"
    assert parse_overrides(words.split()) == {
        "train.lr": 0.001,
        "seed": 3,
        "methods.lbc.include": ["a", "b"],
        "data": "npz:x",
        "trainer.devices": -1,
    }
    with pytest.raises(UserError, match=r"--train\.lr lacks a value"):
        parse_overrides(["--train.lr", "--seed", "3"])
    with pytest.raises(UserError, match="unexpected 'train"):
        parse_overrides(["train.lr", "3"])


def test_options_on_a_named_data_set_or_model():
    values = recipe(data="imagefolder:some/path", model="resnet20")
    made = load_recipe(values, {"data.skip_bad": True, "model.shortcut": "B"})
    assert made.data == {"name": "imagefolder", "path": "some/path", "skip_bad": True}
    assert (made.model_name, made.model_options) == ("resnet20", {"shortcut": "B"})


def test_help_lists_every_key_with_its_type():
    text = keys_help()
    for key in ("--train.epochs", "--data", "--methods", "--trainer", "--seed"):
        assert key in text
    assert "default: cosine" in text


def test_resolved_recipe_is_plain_yaml():
    assert yaml.safe_load(load_recipe(recipe()).to_yaml())["methods"] == {"lbc": {"n": 2, "m": 4}}
