"""LTS, LBC and KCD in one recipe: quantized, then masked, distilled from a dense teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import tenfold
from tenfold.errors import UserError
from tenfold.methods import condensed_sizes, in_order
from tenfold.nn.blocks import to_blocks
from tenfold.nn.quantized import QuantizedLayer
from tenfold.report import write_report
from tenfold.tasks.recipe import load_recipe, shipped
from tenfold.tasks.run import train
from tenfold.tasks.verbs import export_run
from tests import nets
from tests.tasks.conftest import NETS, recipe
from tests.tasks.test_kcd_run import rows, stop_at
from tests.tasks.test_processes import TWO, finish, launch

pytestmark = [
    pytest.mark.path,
    pytest.mark.filterwarnings("ignore:.*starts from fresh weights"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    """A finished dense run: the teacher, and where the student starts."""
    path = tmp_path_factory.mktemp("dense") / "run"
    train(recipe(methods={}, model=f"{NETS}:plain", train={"epochs": 2}), run_dir=path)
    return str(path)


def values(dense: str, **changes: Any) -> dict[str, Any]:
    methods = {
        # in another order than they act: their stages decide
        "kcd": {"teacher": dense, "keep_ratio": 0.5, "stages": 3},
        "lbc": {"n": 2, "m": 4},
        "lts": {"bits": 4},
    }
    changes.setdefault("train", {"epochs": 6, "lr": 0.01})
    return recipe(model=f"{NETS}:plain", init=dense, baseline=dense, methods=methods, **changes)


def counted(file: Path) -> dict[str, set[int]]:
    """Return how many weights of a block of four are not zero, by weight, in an ONNX file."""
    found = {}
    for tensor in onnx.load(file).graph.initializer:
        weight = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        if weight.ndim in (2, 4) and weight.shape[1] % 4 == 0 and weight.numel() > 64:
            found[tensor.name] = set(to_blocks(weight != 0, 4).sum(dim=1).tolist())
    return found


def test_one_recipe_one_export(dense):
    run = train(values(dense), run_dir="runs/small")
    assert run is not None
    assert json.loads((run.path / "run.json").read_text())["label"] == "lts+lbc+kcd"
    layers = {name: m for name, m in run.model.named_modules() if isinstance(m, QuantizedLayer)}
    assert set(layers) == {"0", "2", "4", "7"}
    for name in ("2", "4"):  # first and last are on 8 bits, and dense
        assert set(to_blocks(layers[name].integers != 0, 4).sum(dim=1).tolist()) == {2}, name
    exported = export_run("runs/small")
    assert {check.runtime for check in exported.checks} == {"onnxruntime", "openvino"}
    patterns = list(counted(exported.path).values())
    assert patterns.count({2}) == 2, "every block of both layers has exactly two"
    # what is loaded again, and runs in ONNX Runtime, is what was trained
    images = torch.randn(5, 1, 8, 8)
    loaded = tenfold.load("runs/small", model=nets.plain(10))
    with torch.inference_mode():
        assert torch.equal(loaded(images), run.model(images))
    found = tenfold.evaluate("runs/small", to="onnx")
    assert found.accuracy == pytest.approx(run.evaluation.accuracy, abs=0.01)
    entries = json.loads((run.path / "methods.json").read_text())["methods"]
    assert [entry["method"] for entry in entries] == ["lts", "kcd"]
    drawn = 2 * sum(condensed_sizes(256, 0.5, 3)[:3])
    assert entries[1]["forwards"] == {"student": drawn, "teacher": drawn}
    page = write_report(run.path).read_text()
    assert "What lts did" in page
    assert "What kcd did" in page


def test_an_interrupted_run_goes_on_bit_equal(dense, monkeypatch):
    whole = train(values(dense), run_dir="runs/whole")
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(values(dense), run_dir="runs/cut")
    resumed = train(values(dense), run_dir="runs/cut", resume=True)
    assert whole is not None
    assert resumed is not None
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    for ours, theirs in zip(rows(whole.path), rows(resumed.path), strict=True):
        assert ours == theirs
    assert kept(whole.path) == kept(resumed.path)


def kept(run: Path | str) -> dict[str, Any]:
    entry = next(e for e in methods_of(run) if e["method"] == "kcd")
    return {"forwards": entry["forwards"], "images": entry["images"]}


def methods_of(run: Path | str) -> list[dict[str, Any]]:
    return json.loads(Path(run, "methods.json").read_text())["methods"]


def test_two_processes_end_with_the_same_masks_codes_and_kept_sets(dense):
    """Each rank checks masks and codes against the others' as it goes; here is what came out."""
    settings = values(
        dense,
        train={"epochs": 3, "batch_size": 25, "lr": 0.01},
        data={"name": "digits", "limit": 250},
        trainer=TWO,
    )
    finish(launch("two", settings))
    model = tenfold.load("two", model=nets.plain(10))
    for name in ("2", "4"):
        integers = model.get_submodule(name).integers
        assert set(to_blocks(integers != 0, 4).sum(dim=1).tolist()) == {2}
    assert [float(row["kept"]) for row in rows("two")] == [250, 209, 168]
    assert "frozen" in rows("two")[0]
    # 250, 209 and 168 images: one of the second epoch is drawn twice to make equal shares
    assert kept("two")["forwards"] == {"student": 628, "teacher": 628}


def test_nonsense_is_refused_before_the_first_step(dense):
    both = values(dense, train={"epochs": 6, "mixup": 0.2})
    with pytest.raises(UserError, match="kcd replaces the batch's loss"):
        train(both, run_dir="runs/refused")
    short = values(dense, train={"epochs": 2})
    with pytest.raises(UserError, match="stages=3 and 2 epochs"):
        train(short, run_dir="runs/refused")
    assert not Path("runs/refused").exists()


def test_stages_decide_the_order(dense):
    made = load_recipe(values(dense)).make_methods()
    assert [method.key() for method in made] == ["lts", "lbc", "kcd"]
    assert in_order(list(reversed(made)), "classification") == made


def test_the_shipped_recipe_names_all_three():
    assert "small-resnet20" in shipped()
    made = load_recipe("small-resnet20").make_methods()
    assert [method.key() for method in made] == ["lts", "lbc", "kcd"]
