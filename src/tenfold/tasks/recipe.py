"""Recipes: a run in a few lines of YAML, checked before any work is done."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from tenfold.errors import UserError, unknown_name
from tenfold.methods import Method, find, in_order
from tenfold.tasks import removal_recipe, synthesis_recipe
from tenfold.tasks.gan_recipe import TRAIN_DEFAULTS, Gan, check_train

__all__ = [
    "Recipe",
    "Train",
    "keys_help",
    "load_recipe",
    "parse_overrides",
    "shipped",
    "task_of",
]

TASKS = ("classification", "translation", "shadow_removal", "shadow_synthesis")
# What `train` is where a recipe of the task says nothing; for others the dataclass below has it.
_TRAIN_DEFAULTS: dict[str, dict[str, Any]] = {
    "translation": TRAIN_DEFAULTS,
    "shadow_removal": removal_recipe.TRAIN_DEFAULTS,
    "shadow_synthesis": synthesis_recipe.TRAIN_DEFAULTS,
}


@dataclass(kw_only=True)
class Train:
    """How to train.

    Args:
        epochs: passes over the training data.
        batch_size: images a step and process.
        optimizer: sgd (momentum 0.9), adam, adamw, or any of timm's; a mapping of name and options.
        lr: peak learning rate; 0.1 for sgd, 0.001 for others.
        weight_decay: of weights with two or more axes; 0.0001 for sgd, 0.05 for others.
        schedule: cosine, step (a tenth at 1/2 and 3/4 of the run), linear or constant; linear is
            constant for a while first in translation and shadow_removal.
        warmup_epochs: epochs in which the learning rate rises from near zero.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of MixUp; 0 is off.
        cutmix: alpha of CutMix; 0 is off. With both, each batch takes one by chance.
        augment: auto (the data's own), none, shift, flip_crop, imagenet or randaugment.
        ema: decay of a running average of the weights, such as 0.9999; it is what is evaluated.
        accumulate: batches whose gradients make one step.
        clip_norm: largest norm of the gradient.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str | dict[str, Any] = "sgd"
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = "auto"
    ema: float | None = None
    accumulate: int = 1
    clip_norm: float | None = None

    def validate(self) -> None:
        """Refuse values out of range."""
        from tenfold.tasks.optimization import SCHEDULES

        least: dict[str, float] = {"epochs": 1, "batch_size": 1, "accumulate": 1}
        least |= {"warmup_epochs": 0, "label_smoothing": 0, "mixup": 0, "cutmix": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UserError(f"train.{name}={getattr(self, name)}: expected at least {minimum}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"train.{name}={value}: expected more than 0")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UserError(f"train.weight_decay={self.weight_decay}: expected at least 0")
        if self.label_smoothing >= 1:
            raise UserError(f"train.label_smoothing={self.label_smoothing}: expected less than 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"train.ema={self.ema}: expected a decay in (0, 1), such as 0.999")
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"train.warmup_epochs={self.warmup_epochs}: expected less than the "
                f"{self.epochs} epochs of the run"
            )
        if self.schedule not in SCHEDULES:
            raise unknown_name("train.schedule", self.schedule, SCHEDULES)


@dataclass(kw_only=True)
class Recipe:
    """A run: what to learn, from what, and by which methods.

    Args:
        task: what to learn: classification, translation of images into images, shadow_removal
            from photos, or shadow_synthesis, which paints shadows to learn that from.
        data: digits, cifar10, cifar100, motions, imagefolder:PATH, npz:PATH, hf:NAME, frames:PATH,
            video:PATH, clips_npz:PATH; for translation edges2photo, pairs:PATH, unpaired:PATH; for
            shadows rendered_shadows, triplets:PATH, shadow_frames:PATH; or a mapping of name, path
            and options (size, limit, skip_bad, workers and more).
        model: timm/NAME, torchvision/NAME, resnet20, mobile_resnet_generator, labnet and so on, or
            file.py:function; or a mapping of name and the network's own arguments.
        init: where to start: pretrained, a run, an artifact, or a .safetensors or .pth file.
        methods: the methods' sections by name, such as lbc: {n: 2, m: 4}.
        baseline: the run whose accuracy stands as "before" in bench and report.
        train: how to train.
        gan: how generators are trained; only for translation.
        trainer: goes to Lightning's Trainer as it is: devices, strategy, precision and so on.
        seed: of the weights, the order of the data and its augmentation.
        name: of the run; its folder is runs/NAME.
    """

    task: str
    data: str | dict[str, Any]
    model: str | dict[str, Any]
    init: str | None = None
    methods: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    baseline: str | None = None
    train: Train = field(default_factory=Train)
    gan: Gan = field(default_factory=Gan)
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    name: str | None = None

    def make_methods(self) -> list[Method]:
        """Make the methods, validated and in the order of their stages."""
        made = []
        for key, section in self.methods.items():
            if not isinstance(key, str):
                raise UserError(f"methods: expected names such as lbc, got {key!r}")
            made.append(_make_method(key, section or {}))
        return in_order(made, self.task)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, as it stands in `recipe.yaml`."""
        return copy.deepcopy(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """Return the resolved recipe; keys that are unset are left out."""
        values = {key: value for key, value in self.to_dict().items() if value not in (None, {})}
        for section in ("train", "gan"):
            values[section] = {k: v for k, v in values[section].items() if v is not None}
        if self.task != "translation":
            del values["gan"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @property
    def model_name(self) -> str:
        """The network's name."""
        return self.model if isinstance(self.model, str) else str(self.model.get("name"))

    @property
    def model_options(self) -> dict[str, Any]:
        """The network's own arguments."""
        if isinstance(self.model, str):
            return {}
        return {key: value for key, value in self.model.items() if key != "name"}


def shipped() -> dict[str, str]:
    """Return the recipes inside the package: name and first comment line."""
    folder = resources.files("tenfold") / "recipes"
    found = {}
    for entry in folder.iterdir():
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").splitlines()[0]
            found[entry.name.removesuffix(".yaml")] = first.lstrip("# ").strip()
    return dict(sorted(found.items()))


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        source: a shipped name, a YAML file, a mapping, or a recipe.
        overrides: values by dotted key, such as `train.lr`; they win.

    Raises:
        UserError: no such recipe, broken YAML, or a wrong key, type, value or combination.
    """
    if isinstance(source, Recipe):
        values, origin = source.to_dict(), source.name or "recipe"
    elif isinstance(source, Mapping):
        values, origin = copy.deepcopy(dict(source)), "recipe"
    else:
        values, origin = _read(source), Path(str(source)).stem
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    defaults = _TRAIN_DEFAULTS.get(str(values.get("task")), {})
    if defaults and isinstance(values.get("train") or {}, Mapping):
        values["train"] = {**defaults, **(values.get("train") or {})}
    recipe = _typed(values)
    recipe.name = recipe.name or origin
    if recipe.task not in TASKS:
        raise unknown_name("task", recipe.task, TASKS)
    if not isinstance(recipe.model, str) and not isinstance(recipe.model.get("name"), str):
        raise UserError("model: expected a name, or a mapping with a name")
    if not 0 <= recipe.seed < 2**63:
        raise UserError(f"seed={recipe.seed}: expected 0 to 2**63 - 1")
    recipe.train.validate()
    if recipe.task == "translation":
        check_train(recipe.train, recipe.gan.decay_epochs)
        recipe.gan.validate()
    elif recipe.gan != Gan():
        raise UserError(f"gan is for the task translation, and this is {recipe.task}: leave it out")
    if recipe.task == "shadow_removal":
        removal_recipe.check_train(recipe.train)
    elif recipe.task == "shadow_synthesis":
        synthesis_recipe.check_train(recipe.train)
    recipe.make_methods()
    return recipe


def task_of(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None
) -> str | None:
    """Return the task that a recipe names, ahead of any check; None where it names none.

    Raises:
        UserError: no such recipe, or broken YAML.
    """
    if "task" in (overrides or {}):
        return str((overrides or {})["task"])
    if isinstance(source, Recipe):
        return source.task
    found = source if isinstance(source, Mapping) else _read(source)
    return found.get("task")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--key value` and `--key=value` words into values by dotted key.

    Values are read as YAML: numbers, booleans, lists and null are what they look like.

    >>> parse_overrides(["--train.lr", "0.2", "--methods.lbc.include=[layer1.*]"])
    {'train.lr': 0.2, 'methods.lbc.include': ['layer1.*']}
    """
    found: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {word!r}: expected --key value, such as --train.epochs 5")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or re.match(r"--[A-Za-z_]", words[0]):
                raise UserError(f"--{key} lacks a value: write --{key} VALUE")
            value = words.pop(0)
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{key} {value!r} can't be read as a value") from error
        if isinstance(found[key], str) and _NUMBER.fullmatch(found[key]):
            found[key] = float(found[key])  # YAML 1.1 reads 1e-3 as text
    return found


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"recipe {path} does not exist: give a YAML file or a shipped name")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"recipe {path} is not UTF-8 text: save it as such") from error
    else:
        known = shipped()
        if str(source) not in known:
            raise unknown_name("recipe", str(source), known)
        text = (resources.files("tenfold") / "recipes" / f"{source}.yaml").read_text("utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        problem = getattr(error, "problem", None) or "it can't be read"
        raise UserError(f"recipe {source}{line} is not valid YAML: {problem}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {source}: expected keys such as task, data and model")
    return values


def _override(values: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    here = values
    for depth, key in enumerate(path):
        inner = here.get(key)
        if isinstance(inner, str) and key in ("data", "model") and depth == 0:
            inner = _as_mapping(key, inner)
        elif inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"--{dotted}: {'.'.join(path[: depth + 1])} is a single value")
        here[key] = inner
        here = inner
    here[last] = value


def _as_mapping(key: str, text: str) -> dict[str, Any]:
    name, colon, path = text.partition(":")
    if key == "data" and colon:
        return {"name": name, "path": path}
    return {"name": text}


def _typed(values: Mapping[str, Any]) -> Recipe:
    for key in values:
        if key not in _fields(Recipe):
            raise unknown_name("key", str(key), _fields(Recipe))
    for name, section, example in (("train", Train, "epochs"), ("gan", Gan, "teacher")):
        given = values.get(name)
        if given is not None and not isinstance(given, Mapping):
            raise UserError(f"{name}: expected keys such as {example}, got {given!r}")
        for key in given or {}:
            if key not in _fields(section):
                known = [f"{name}.{each}" for each in _fields(section)]
                raise unknown_name("key", f"{name}.{key}", known)
    missing = [key for key in ("task", "data", "model") if values.get(key) is None]
    if missing:
        raise UserError(f"the recipe lacks {', '.join(missing)}: only these three are required")
    given = {key: value for key, value in values.items() if value is not None}
    return _check_types(Recipe, given, "")  # type: ignore[no-any-return]


def _make_method(key: str, section: Mapping[str, Any]) -> Method:
    method = find(key)
    if not isinstance(section, Mapping):
        raise UserError(f"methods.{key}: expected its fields, got {section!r}")
    for name in section:
        if name not in _fields(method):
            raise unknown_name(
                "key", f"methods.{key}.{name}", [f"methods.{key}.{f}" for f in _fields(method)]
            )
    missing = [
        f.name
        for f in dataclasses.fields(method)
        if f.name not in section
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"methods.{key} lacks {', '.join(missing)}")
    try:
        made = _check_types(method, section, f"methods.{key}.")
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("methods.") else f"methods.{key}: {text}") from None
    return made  # type: ignore[no-any-return]


def _fields(of: type) -> list[str]:
    return [f.name for f in dataclasses.fields(of)]


def _check_types(of: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Let jsonargparse check every value against the dataclass, and make the object."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(of)
    try:
        parsed = parser.instantiate(parser.parse_object(copy.deepcopy(dict(values))))
    except ArgumentError as error:
        raise UserError(_readable(str(error), of, values, prefix)) from None
    return of(**vars(parsed))


def _readable(message: str, of: type, values: Mapping[str, Any], prefix: str) -> str:
    """Turn jsonargparse's message into one line: what was given, what is expected."""
    found = re.match(r'Parser key "([^"]+)"', message)
    if found is None:
        return f"{prefix.rstrip('.')} {message}".strip().splitlines()[0]
    hint: Any = of
    given: Any = values
    for key in found[1].split("."):
        hint = get_type_hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
        given = given.get(key) if isinstance(given, Mapping) else None
    return f"{prefix}{found[1]}: expected {_type_name(hint)}, got {given!r}"


def _type_name(hint: Any) -> str:
    """Write a type as a user would: `int or float`, `a list of str`, `one of cosine, step`.

    >>> _type_name(list[str] | None)
    'a list of str, or null'
    """
    arguments = get_args(hint)
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is list:
        return f"a list of {_type_name(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    if origin in (Union, UnionType):
        named = " or ".join(_type_name(a) for a in arguments if a is not type(None))
        return named + (", or null" if type(None) in arguments else "")
    return getattr(hint, "__name__", "another type")


def keys_help() -> str:
    """Return the recipe's keys with types, defaults and meanings, for `--help`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False, usage="")
    parser.add_class_arguments(Recipe)
    text = parser.format_help().partition("\n\n")[2]
    return f"Every key of the recipe can be overridden, such as --train.epochs 5:\n\n{text}"
