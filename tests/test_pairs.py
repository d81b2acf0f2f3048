"""Every pair of registered methods: it trains and exports, or is refused and told why."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import tenfold
from tenfold.errors import UserError
from tenfold.measure import OnnxModel
from tenfold.methods import find, in_order, registry
from tests import nets
from tests.made_up import Hermit
from tests.tasks.conftest import NETS, recipe

pytestmark = pytest.mark.path

# What stands in a recipe for each method; a new one fails `test_every_method_has_a_section`.
SECTIONS: dict[str, dict[str, Any]] = {
    "crd": {"weight": 5.0},
    "dcd": {"weight": 0.5},
    "hqss": {"adversarial": 0.05},
    "kcd": {"teacher": f"{NETS}:small", "stages": 2},
    "labnet": {"guess": "ring"},
    "lbc": {"n": 2, "m": 4},
    "lts": {"bits": 4},
    "omgd": {"channel": 100.0},
    "smmix": {"switch_prob": 0.7},
    "supervit": {"sizes": [4, 8], "drop_blocks": [1]},
    "winograd3d": {"tile": 2, "rank": 2, "min_channels": 4},
}
# Networks of images for methods that need others than the small one.
NETWORKS = {"smmix": nets.vit, "supervit": nets.vit, "winograd3d": nets.deep}
ALL_PAIRS = list(itertools.combinations(sorted(registry()), 2))
PAIRS = [pair for pair in ALL_PAIRS if all("classification" in find(key).tasks for key in pair)]
# Methods that share no task: whatever the recipe's task is, one of the two doesn't serve it.
STRANGERS = [pair for pair in ALL_PAIRS if not find(pair[0]).tasks & find(pair[1]).tasks]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_method_has_a_section():
    assert set(registry()) <= set(SECTIONS)


def reason(pair: tuple[str, str]) -> str | None:
    """Return why two methods refuse each other, or None."""
    try:
        in_order([find(key)(**SECTIONS[key]) for key in pair], "classification")
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.filterwarnings("ignore")
def test_a_pair_trains_five_steps_and_exports_or_says_why_not(pair):
    build = next((NETWORKS[key] for key in pair if key in NETWORKS), nets.small)
    values = recipe(
        data={"name": "digits", "limit": 64},
        model=f"{NETS}:{build.__name__}",
        methods={key: SECTIONS[key] for key in pair},
        train={"epochs": 5, "batch_size": 64},
    )
    why_not = reason(pair)
    if why_not is not None:
        assert all(key in why_not for key in pair), "the reason names both"
        with pytest.raises(UserError):
            tenfold.train(values, run_dir="run")
        assert not Path("run").exists(), "refused before anything was written"
        return
    run = tenfold.train(values, run_dir="run")
    assert run is not None
    assert not any("parametrizations" in key for key in run.model.state_dict())
    images = torch.randn(3, 1, 8, 8)
    loaded = tenfold.load("run", model=(nets.supervit if "supervit" in pair else build)(10))
    with torch.inference_mode():
        expected = run.model(images)
        torch.testing.assert_close(loaded(images), expected)
    exported = tenfold.export(run.model, "run/model.onnx", images)
    torch.testing.assert_close(OnnxModel(exported.path)(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pair", STRANGERS, ids="+".join)
def test_a_pair_that_shares_no_task_is_refused_in_each(pair):
    methods = [find(key)(**SECTIONS[key]) for key in pair]
    for method, other in (methods, methods[::-1]):
        for task in sorted(method.tasks):
            with pytest.raises(UserError) as caught:
                in_order(methods, task)
            served = ", ".join(sorted(other.tasks))
            expected = f"{other.key()} doesn't serve the task '{task}': it serves {served}"
            assert str(caught.value) == expected


@pytest.mark.parametrize("key", sorted({key for pair in STRANGERS for key in pair}))
def test_a_recipe_of_another_task_is_refused_before_anything_is_written(key):
    if "classification" in find(key).tasks:
        values = recipe(task="translation", data="edges2photo", methods={key: SECTIONS[key]})
        values["model"] = "mobile_resnet_generator"
        del values["train"]
    else:
        values = recipe(methods={key: SECTIONS[key]})
    with pytest.raises(
        UserError, match=f"{key} doesn't serve the task '{values['task']}'"
    ) as caught:
        tenfold.train(values, run_dir="run")
    assert "\n" not in str(caught.value)
    assert not Path("run").exists()


def test_every_pair_has_its_place():
    """Pairs within translation or shadow removal alone are run in the tests of that task."""
    elsewhere = {
        task: [pair for pair in ALL_PAIRS if all(task in find(k).tasks for k in pair)]
        for task in ("translation", "shadow_removal")
    }
    both = itertools.chain.from_iterable(elsewhere.values())
    assert sorted({*PAIRS, *STRANGERS, *both}) == ALL_PAIRS
    for task, pairs in elsewhere.items():
        for pair in pairs:
            methods = [find(key)(**SECTIONS[key]) for key in pair]
            assert set(in_order(methods, task)) == set(methods)


def test_a_pair_that_is_refused_would_be_noticed():
    """The loop above takes the other branch for methods that exclude each other."""
    from tests.made_up import Gain

    with pytest.raises(UserError, match="hermit and gain exclude each other"):
        in_order([Gain(), Hermit()], "classification")
