"""Every pair of methods that serve the task translation trains together, by recipe."""

from itertools import combinations

import pytest
import torch

import tenfold
from tenfold.methods import registry
from tests.test_pairs import SECTIONS
from tests.translations import make_pairs, recipe

SERVING = sorted(key for key, method in registry().items() if "translation" in method.tasks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("images") / "pairs", 2, 1)


@pytest.mark.parametrize("pair", combinations(SERVING, 2), ids="+".join)
def test_a_pair_of_methods_trains_and_is_loaded(pair, folder, tmp_path):
    given = recipe(folder, methods={key: SECTIONS[key] for key in pair}, gan={"pictures": 0})
    run = tenfold.train(given, run_dir=tmp_path / "run")
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    assert torch.equal(tenfold.load(run.path)(x), run.model(x))
    columns = (run.path / "metrics.csv").read_text().splitlines()[0].split(",")
    adds = {"dcd": "dcd", "crd": "relations", "omgd": "channel"}
    assert {adds[key] for key in pair if key in adds} <= set(columns)
