"""Whole runs of seconds: training, resuming, refusing, composing."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import tenfold
from tenfold.data import create
from tenfold.errors import UserError
from tenfold.nn.blocks import nm_pattern
from tenfold.tasks.run import train
from tests import nets
from tests.tasks.conftest import MADE_UP, NETS, recipe

pytestmark = pytest.mark.path


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def without_time(run: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run)]


def test_a_run_leaves_a_sparse_model_and_its_records(capsys):
    run = train(recipe(), run_dir="runs/a", command="tenfold train …")
    assert run is not None
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    assert "density 0.500" in lines[-1]
    assert sorted(os.listdir("runs/a")) == [
        "checkpoints", "layers.json", "metrics.csv", "model", "recipe.yaml", "run.json",
    ]  # fmt: skip
    assert nm_pattern(run.model[3].weight) == (2, 4)
    assert nm_pattern(run.model[0].weight) is None
    assert [int(row["epoch"]) for row in rows(run.path)] == [0, 1, 2]
    assert float(rows(run.path)[-1]["test_accuracy"]) == pytest.approx(run.evaluation.accuracy)
    layers = json.loads((run.path / "layers.json").read_text())["layers"]
    assert [layer["kept"] for layer in layers] == [1.0, 0.5, 0.5, 1.0]
    assert layers[0]["reason"] == "first convolution, kept dense"
    again = tenfold.load(run.path, model=nets.small(10))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), run.model(x))


def test_it_learns():
    """Held-out accuracy far above chance: the loop, the data and the sparsity work together."""
    values = recipe(
        data="digits",
        model={"name": "digitnet", "width": 16},
        train={"epochs": 4, "batch_size": 32},
    )
    run = train(values, run_dir="runs/learn")
    assert run is not None
    assert run.evaluation.accuracy > 0.8


def test_resume_equals_the_unbroken_run(monkeypatch):
    """Stop after two of four epochs, between prune events, and go on: every bit is the same."""
    values = recipe(train={"epochs": 4, "ema": 0.9, "mixup": 0.2, "cutmix": 1.0})
    whole = train(values, run_dir="runs/whole")

    import tenfold.tasks.progress as progress

    write = progress.MetricsFile.on_train_epoch_start

    def stop(self, trainer, module):
        if trainer.current_epoch == 2:
            raise RuntimeError("pulled the plug")
        write(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(progress.MetricsFile, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(values, run_dir="runs/broken")
    assert len(rows(Path("runs/broken"))) == 2
    resumed = train(values, run_dir="runs/broken", resume=True)
    assert whole is not None
    assert resumed is not None
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert without_time(whole.path) == without_time(resumed.path)
    assert whole.evaluation == resumed.evaluation


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    """A real kill -9 in the middle of an epoch; the command line's --resume finishes the run."""
    values = recipe(train={"epochs": 6})
    import yaml

    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "tenfold.cli", "train", "recipe.yaml", "--no_bench"]
    process = subprocess.Popen(
        [*command, "--run_dir", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not list(Path("killed/checkpoints").glob("*.ckpt")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed/model").exists()
    subprocess.run(
        [*command, "--run_dir", "killed", "--resume"],
        check=True,
        timeout=240,
        stdout=subprocess.DEVNULL,
    )
    whole = train(values, run_dir="whole")
    assert whole is not None
    again = tenfold.load("killed", model=nets.small(10))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert without_time(Path("killed")) == without_time(whole.path)


def test_an_existing_run_is_not_written_over():
    first = train(recipe(train={"epochs": 1}), run_dir="runs/a")
    assert first is not None
    before = {p: p.read_bytes() for p in Path("runs/a").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="holds a run already: pass --resume"):
        train(recipe(train={"epochs": 1}), run_dir="runs/a")
    with pytest.raises(UserError, match=r"another recipe; it differs in train\.epochs"):
        train(recipe(train={"epochs": 2}), run_dir="runs/a", resume=True)
    with pytest.raises(UserError, match="exclude each other"):
        train(recipe(), run_dir="runs/a", resume=True, overwrite=True)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is no run"):
        train(recipe(), run_dir="mine", overwrite=True)
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert {p: p.read_bytes() for p in Path("runs/a").rglob("*") if p.is_file()} == before
    done = train(recipe(train={"epochs": 1}), run_dir="runs/a", resume=True)  # nothing left to do
    assert done is not None
    assert done.evaluation == first.evaluation


def test_a_refused_recipe_does_not_throw_the_old_run_away():
    train(recipe(train={"epochs": 1}), run_dir="runs/a")
    bad = recipe(methods={"lbc": {"n": 1, "m": 16, "include": ["3"]}})
    with pytest.raises(UserError, match="layer 3 can't be made 1:16: 8 input channels"):
        train(bad, run_dir="runs/a", overwrite=True)
    assert Path("runs/a/model/model.json").is_file()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint():
    values = recipe(model={"name": f"{NETS}:Bomb", "fuse": 6})
    with pytest.raises(UserError) as error:
        train(values, run_dir="runs/bomb")
    text = str(error.value)
    # 256 images are 4 batches of 64: the 7th batch is number 2 of epoch 1
    assert "the loss became nan at step 6 (epoch 1, batch 2, first ids [" in text
    kept = list(Path("runs/bomb/checkpoints").glob("*.ckpt"))
    assert [file.name for file in kept] == ["epoch=0.ckpt"]
    state = torch.load(kept[0], weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_made_up_methods_train_by_recipe_beside_lbc():
    methods = {
        f"{MADE_UP}:Focal": {"gamma": 1.0},
        "lbc": {"n": 1, "m": 4},
        f"{MADE_UP}:Gain": {"rate": 0.02},
    }
    run = train(recipe(methods=methods), run_dir="runs/three")
    assert run is not None
    assert nm_pattern(run.model[3].weight) == (1, 4)
    assert list(run.model.state_dict()) == list(nets.small(10).state_dict())
    gains = [float(row["gain"]) for row in rows(run.path)]
    assert len(set(gains)) == 3
    assert json.loads((run.path / "run.json").read_text())["label"] == "gain+lbc+focal"


def test_a_method_may_draw_fewer_images():
    """The engine knows every epoch's length beforehand: the schedules end with the last step."""
    methods = {f"{MADE_UP}:Focal": {"share": 0.5}, "lbc": {"n": 2, "m": 4}}
    run = train(recipe(methods=methods), run_dir="runs/half")
    assert run is not None
    assert [int(row["step"]) for row in rows(run.path)] == [4, 6, 8]  # 256, 128 and 128 images
    assert float(rows(run.path)[-1]["learning_rate"]) < 0.05
    assert nm_pattern(run.model[3].weight) == (2, 4)


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.optimizer": "adamv"},
        {"train.optimizer": {"name": "sgd", "momentum": -1}},
        {"train.augment": "foo"},
        {"methods.lbc.end": 9},
        {"trainer.precision": "17"},
        {"trainer.accelerator": "gpu"}
        if not torch.cuda.is_available()
        else {"trainer.devices": 99},
        {"methods": {f"{MADE_UP}:Focal": {}}, "train.mixup": 0.5},
        {"model.checkpoint_path": "weights.pth"},
    ],
)
def test_overwriting_waits_until_everything_has_been_checked(overrides, finished_run):
    with pytest.raises(UserError):
        train(
            recipe(train={"epochs": 1}), run_dir=finished_run, overwrite=True, overrides=overrides
        )
    assert Path(finished_run, "model/model.json").is_file()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("finished") / "run"
    train(recipe(train={"epochs": 1}), run_dir=path)
    return str(path)


def test_a_limited_run_knows_its_length():
    for limit in (1, 0.5):
        values = recipe(
            train={"epochs": 2, "batch_size": 32, "accumulate": 3},
            trainer={"limit_train_batches": limit},
        )
        run = train(values, run_dir=f"runs/limit{limit}")
        assert run is not None
        assert [int(r["step"]) for r in rows(run.path)] == ([1, 2] if limit == 1 else [2, 4])


def test_killed_after_the_last_checkpoint_the_average_is_still_what_is_kept():
    values = recipe(train={"ema": 0.9})
    whole = train(values, run_dir="runs/ema")
    assert whole is not None
    os.remove("runs/ema/run.json")
    again = train(values, run_dir="runs/ema", resume=True)
    assert again is not None
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_a_failed_attempt_does_not_stand_in_the_way():
    with pytest.raises(UserError, match="the loss became nan"):
        train(recipe(model={"name": f"{NETS}:Bomb", "fuse": 0}), run_dir="runs/a")
    assert train(recipe(train={"epochs": 1}), run_dir="runs/a") is not None


def test_any_module_and_data_in_python():
    model = nets.small(10)
    plan = tenfold.plan({"task": "classification", "methods": {"lbc": {"n": 2, "m": 4}}}, model,
                        create("digits"))  # fmt: skip
    assert [layer["treatment"] for layer in plan.layers] == [None, "2:4", "2:4", None]
    assert plan.effective_macs < plan.macs
    values = {"task": "classification", "train": {"epochs": 1, "batch_size": 256}}
    run = tenfold.train(values, model=model, data=create({"name": "digits", "limit": 256}),
                        run_dir="runs/own")  # fmt: skip
    assert run is not None
    assert run.model is model
    assert tenfold.evaluate(model, "digits") == tenfold.evaluate(model, create("digits"))


def test_accumulated_steps_and_half_epochs():
    values = recipe(train={"epochs": 2, "batch_size": 48, "accumulate": 4, "clip_norm": 1.0})
    run = train(values, run_dir="runs/acc")
    assert run is not None
    assert [int(row["step"]) for row in rows(run.path)] == [2, 4]  # 6 batches: 4 + 2
    assert nm_pattern(run.model[3].weight) == (2, 4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"trainer": {"max_epochs": 3}},
            r"trainer\.max_epochs is set elsewhere: use train\.epochs",
        ),
        (
            {"trainer": {"device": 1}},
            r"unknown key 'trainer\.device': did you mean trainer\.devices",
        ),
        ({"trainer": {"precision": "17"}}, "trainer: "),
        ({"model": "resnt20"}, "did you mean resnet20"),
        ({"data": "digitz"}, "did you mean digits"),
        ({"model": f"{NETS}:wrong_outputs"}, r"returns \(1, 11\) for one image: expected logits"),
        ({"model": "torchvision/resnet18"}, "takes 3 channels, and the data has 1"),
        ({"methods": {"lbc": {"n": 2, "m": 4, "end": 9}}}, "the run has 3 epochs only"),
        ({"init": "nowhere"}, "init nowhere does not exist"),
    ],
)
def test_what_is_refused_before_anything_starts(changes, text):
    with pytest.raises(UserError, match=text):
        train(recipe(**changes), run_dir="runs/refused")
    assert not Path("runs/refused/metrics.csv").exists()


def test_start_from_a_run_an_artifact_or_a_file():
    first = train(recipe(methods={}, train={"epochs": 1}), run_dir="runs/first")
    assert first is not None
    torch.save({"state_dict": first.model.state_dict()}, "weights.pth")
    accuracies = []
    for start in ("runs/first", "runs/first/model", "weights.pth"):
        values = recipe(init=start, methods={}, train={"epochs": 1, "lr": 1e-9})
        run = train(values, run_dir="runs/second", overwrite=True)
        assert run is not None
        torch.testing.assert_close(run.model[0].weight, first.model[0].weight)
        accuracies.append(run.evaluation.accuracy)
    assert accuracies == [accuracies[0]] * 3
    torch.save(nn.Linear(3, 3), "pickled.pth")
    with pytest.raises(UserError, match="can't be read as weights"):
        train(recipe(init="pickled.pth"), run_dir="runs/third")
    torch.save({"other.weight": torch.zeros(3)}, "other.pth")
    with pytest.raises(UserError, match="holds another network"):
        train(recipe(init="other.pth"), run_dir="runs/third")


def test_the_average_of_the_weights_is_what_is_kept():
    plain = train(recipe(), run_dir="runs/plain")
    averaged = train(recipe(train={"ema": 0.9}), run_dir="runs/ema")
    assert plain is not None
    assert averaged is not None
    assert nm_pattern(averaged.model[3].weight) == (2, 4)
    assert not torch.equal(plain.model[3].weight, averaged.model[3].weight)
    last = float(rows(averaged.path)[-1]["test_accuracy"])
    assert averaged.evaluation.accuracy == pytest.approx(last)
    assert math.isfinite(averaged.evaluation.loss)
