"""SuperViT by recipe: training, resuming, starting from other weights, composing, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tenfold
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.nn.blocks import nm_pattern
from tenfold.nn.supervit import SuperViT
from tenfold.tasks.cells import evaluate_cells
from tenfold.tasks.recipe import load_recipe, shipped
from tenfold.tasks.run import plan, train
from tenfold.tasks.setup import set_up
from tests import nets
from tests.tasks.conftest import NETS, recipe
from tests.tasks.test_kcd_run import stop_at
from tests.tasks.test_processes import TWO, finish, launch

pytestmark = pytest.mark.path

VIT = {
    "name": "timm/vit_tiny_patch16_224",
    "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2,
}  # fmt: skip
GRID = {"sizes": [8, 12, 16], "drop_blocks": [1, 2]}


def values(**changes: Any) -> dict[str, Any]:
    """A SuperViT of nine cells on 256 digits of 16 x 16."""
    made = recipe(
        data={"name": "digits", "size": 16, "limit": 256},
        model=VIT,
        methods={"supervit": GRID},
        train={"epochs": 3, "batch_size": 64, "optimizer": "adamw", "lr": 0.002},
    )
    for key, value in changes.items():
        made[key] = {**made[key], **value} if key == "train" else value
    return made


def rows(run: Path | str) -> list[dict[str, str]]:
    with Path(run, "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_a_run_ends_with_a_network_of_many_cells():
    run = train(values(), run_dir="run")
    assert run is not None
    assert isinstance(run.model, SuperViT)
    found = artifact.read("run")
    assert found.network.name == "tenfold/supervit"
    assert found.network.arguments["model"] == VIT["name"]
    assert found.network.arguments["channels"] == 1
    loaded = tenfold.load("run")
    equal(loaded, run.model)
    assert isinstance(loaded, SuperViT)
    table = json.loads(Path("run/model/cells.json").read_text())["cells"]
    assert [(row["size"], row["keep_rate"]) for row in table] == loaded.cells
    full = next(row for row in table if (row["size"], row["keep_rate"]) == (16, 1.0))
    assert full["accuracy"] == pytest.approx(run.evaluation.accuracy)
    data = set_up(values()).data
    again = evaluate_cells(loaded, data, batch_size=50)
    assert [row["accuracy"] for row in table] == pytest.approx(list(again.values()))
    assert json.loads(Path("run/run.json").read_text())["label"] == "supervit"


def test_a_plan_lists_the_cells():
    head, _, text = str(plan(values())).partition("one network, many budgets:\n")
    assert "blocks.2.mlp.fc2" in head
    assert len(text.splitlines()) == 1 + 9
    found = plan(values())
    assert found.macs == set_up(values()).model.macs(16, 1.0)


@pytest.mark.parametrize(
    "changes",
    [{"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}, {"ema": 0.9, "accumulate": 2}],
    ids=["mixed", "averaged"],
)
def test_resume_equals_the_unbroken_run(changes, monkeypatch):
    settings = values(train=changes, model={**VIT, "drop_path_rate": 0.1})
    whole = train(settings, run_dir="whole")
    with monkeypatch.context() as patched:
        stop_at(2, patched)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(settings, run_dir="broken")
    resumed = train(settings, run_dir="broken", resume=True)
    assert whole is not None
    assert resumed is not None
    equal(whole.model, resumed.model)
    assert rows("whole") == rows("broken")


# -- other beginnings -----------------------------------------------------------------------------


def test_lvvit_by_recipe():
    model = {"name": "lvvit_small", "depth": 4, "dim": 32, "heads": 2}
    settings = values(
        data={"name": "digits", "size": 32, "limit": 128},
        model=model,
        methods={"supervit": {"sizes": [16, 32], "drop_blocks": [1]}},
        train={"epochs": 1, "mixup": 0.5},
    )
    run = train(settings, run_dir="run")
    assert run is not None
    loaded = tenfold.load("run")
    equal(loaded, run.model)
    assert loaded.aux_head is not None


def test_a_network_of_the_users_own():
    settings = values(
        data={"name": "digits", "limit": 128},
        model=f"{NETS}:vit",
        methods={"supervit": {"sizes": [4, 8], "drop_blocks": [1]}},
        train={"epochs": 1},
    )
    run = train(settings, run_dir="run")
    assert run is not None
    assert artifact.read("run").network.name is None
    equal(tenfold.load("run", model=nets.supervit(10)), run.model)
    from tenfold.tasks.cells import evaluate_run_cells

    assert len(evaluate_run_cells("run").rows) == 6  # its code is where the recipe says


def test_from_a_plain_run_and_from_another_of_its_kind():
    dense = train(values(methods={}, train={"epochs": 1}), run_dir="dense")
    assert dense is not None
    made = set_up(values(init="dense"))
    assert made.fresh == []
    assert isinstance(made.model, SuperViT)
    with torch.no_grad():
        x = torch.randn(2, 1, 16, 16)
        torch.testing.assert_close(made.model.eval()(x), dense.model(x), atol=1e-5, rtol=1e-5)
    run = train(values(init="dense", train={"epochs": 1}), run_dir="first")
    assert run is not None
    equal(set_up(values(init="first")).model, run.model)
    other = {"supervit": {**GRID, "sizes": [8, 16]}}
    with pytest.raises(UserError, match="5, 10, 17 tokens, and the sizes 8, 16 need 5, 17"):
        set_up(values(init="first", methods=other))


def test_fresh_weights_follow_the_seed_and_not_the_grid():
    one, two = set_up(values()).model, set_up(values()).model
    equal(one, two)
    other = set_up(values(seed=1)).model
    assert not torch.equal(one.pos_embed_list[0], other.pos_embed_list[0])
    plain = set_up(values(methods={})).model
    assert torch.equal(one.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    assert one.cls_token.std() > 0.01


@pytest.mark.parametrize("decay", [True, False])
def test_which_parameters_decay(decay):
    from tenfold.tasks.optimization import make_optimizer, spared_of

    methods = {"supervit": {**GRID, "decay_pos_embed": decay}}
    model = set_up(values(methods=methods)).model
    optimizer = make_optimizer("adamw", model.parameters(), spared=spared_of(model))
    decaying = {
        id(parameter)
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert id(model.cls_token) not in decaying
    assert all((id(table) in decaying) == decay for table in model.pos_embed_list)
    assert id(model.blocks[0].attn.qkv.weight) in decaying


# -- with other methods ---------------------------------------------------------------------------


def test_beside_lbc():
    methods = {"supervit": GRID, "lbc": {"n": 2, "m": 4, "preset": "deit"}}
    run = train(values(methods=methods), run_dir="both")
    assert run is not None
    for block in run.model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert nm_pattern(layer.weight) == (2, 4)
    loaded = tenfold.load("both")
    equal(loaded, run.model)
    label = json.loads(Path("both/run.json").read_text())["label"]
    assert set(label.split("+")) == {"lbc", "supervit"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"methods": {"supervit": {**GRID, "sizes": [8, 12]}}}, r"methods\.supervit: sizes=\[8, 1"),
        ({"methods": {"supervit": {**GRID, "drop_blocks": [3]}}}, r"methods\.supervit: drop_bloc"),
        ({"methods": {"supervit": {**GRID, "keep_rates": [0.5]}}}, "expected 1 among them"),
        ({"methods": {"supervit": {**GRID, "teacher": "small"}}}, "of same_size, largest"),
        ({"methods": {"supervit": {**GRID, "size": [8]}}}, "did you mean methods.supervit.sizes"),
        ({"model": f"{NETS}:small"}, r"methods\.supervit: SuperViT can't be made of Sequential"),
        ({"methods": {"supervit": GRID, "smmix": {}}}, "both replace the batch's loss"),
        ({"init": "nothing.pth"}, r"nothing\.pth does not exist"),
    ],
)
def test_what_is_refused_before_anything_starts(changes, text):
    with pytest.raises(UserError, match=text):
        train(values(**changes), run_dir="refused")
    assert not Path("refused").exists()


# -- two processes, shipped recipes ---------------------------------------------------------------


def test_two_processes():
    methods = {"supervit": {**GRID, "same_on_ranks": False}}
    settings = values(methods=methods, trainer=TWO, train={"epochs": 1, "batch_size": 25})
    finish(launch("two", settings))
    assert isinstance(tenfold.load("two"), SuperViT)
    shutil.rmtree("two")


@pytest.mark.parametrize("name", [name for name in shipped() if "supervit" in name])
def test_shipped_recipes_name_networks_that_can_be(name):
    checked = load_recipe(name)
    (method,) = (m for m in checked.make_methods() if m.key() == "supervit")
    from tenfold.nn import models

    size = max(method.sizes)  # type: ignore[attr-defined]
    with torch.device("meta"):
        base, network = models.build(
            checked.model_name, num_classes=10, size=(size, size), options=checked.model_options
        )
        made, named = method.wrap(base, network, True)
        rebuilt = models.rebuild(named)
    assert isinstance(made, SuperViT)
    assert made.state_dict().keys() == rebuilt.state_dict().keys()
