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
    "kcd": {"teacher": f"{NETS}:small", "stages": 2},
    "lbc": {"n": 2, "m": 4},
    "lts": {"bits": 4},
    "smmix": {"switch_prob": 0.7},
    "supervit": {"sizes": [4, 8], "drop_blocks": [1]},
    "winograd3d": {"tile": 2, "rank": 2, "min_channels": 4},
}
# Networks of images for methods that need others than the small one.
NETWORKS = {"smmix": nets.vit, "supervit": nets.vit, "winograd3d": nets.deep}
PAIRS = [
    pair
    for pair in itertools.combinations(sorted(registry()), 2)
    if all("classification" in find(key).tasks for key in pair)
]


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


def test_a_pair_that_is_refused_would_be_noticed():
    """The loop above takes the other branch for methods that exclude each other."""
    from tests.made_up import Gain

    with pytest.raises(UserError, match="hermit and gain exclude each other"):
        in_order([Gain(), Hermit()], "classification")
