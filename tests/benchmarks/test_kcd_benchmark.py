"""The comparison of KCD: paired, in turns, resumable, its counts exact."""

from __future__ import annotations

import json

import pytest
import torch

import common
import kcd
import kcd_training
import published
import training_tables
from kcd_training import RandomSet, Run, Training
from tenfold.errors import UserError
from tenfold.methods import condensed_sizes
from tenfold.tasks.setup import training_set
from tests.benchmarks.test_lbc_accuracy import NET

pytestmark = pytest.mark.path
SIZES = condensed_sizes(120, 0.5, 3)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (common, kcd, published, training_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "net.py").write_text(NET)


def command(*more: str) -> list[str]:
    words = (
        "--data digits --images 120 --student net.py:small --teacher net.py:small --epochs 3 "
        "--teacher_images 90 --teacher_epochs 2 --stages 3 --batch_size 40 --ratios 0.5 --seeds 0 "
        "--output tried"
    )
    return [*words.split(), *more]


def result() -> dict:
    return json.loads((common.RESULTS / "tried.json").read_text())


def test_all_parts_in_one_go_and_in_pieces(monkeypatch, capsys):
    both = ("--parts", "accuracy", "time")
    assert kcd.main(command(*both)) == 0
    whole = result()
    drawn = sum(SIZES[:3])
    runs = whole["runs"]
    assert runs["kd-asking-seed0"]["forwards"] == {"student": 360, "teacher": 360}
    assert runs["kcd-0.5-asking-seed0"]["forwards"] == {"student": drawn, "teacher": drawn}
    assert runs["student-asking-seed0"]["forwards"] == {"student": 360, "teacher": 0}
    assert runs["random-0.5-seed0"]["forwards"]["student"] == drawn
    assert runs["kd-seed0"]["forwards"]["teacher"] <= 240  # two views of each image
    assert set(whole["comparison"]["accuracy"]) == {"student", "kd", "kcd 0.5", "random 0.5"}
    assert set(whole["comparison"]["time"]) == {"kd", "kcd 0.5"}
    assert len(runs["kcd-0.5-seed0"]["seconds"]) == 3
    table = training_tables.kcd_table("tried", "")
    assert "| KCD, 0.5 kept |" in table
    assert f"| {drawn:,} |" in table
    saved = 1 - drawn / 360
    assert f"| {saved:.1%} |" in training_tables.kcd_time_table("tried", "")

    (common.RESULTS / "tried.json").unlink()
    epochs = iter([True, True, True] + 3 * [True, True, True, False] + 99 * [True])
    monkeypatch.setattr(kcd.Clock, "allows_an_epoch", lambda self: next(epochs))
    for folder in kcd.RUNS.iterdir():
        for file in folder.glob("*.pt"):
            file.unlink()
    for _ in range(4):
        assert kcd.main(command(*both, "--minutes", "9")) == 0
    assert "time is up" in capsys.readouterr().out
    for name, run in result()["runs"].items():
        for key in ("accuracy", "loss", "forwards"):
            assert run[key] == runs[name][key], (name, key)
    assert "--minutes" not in result()["command"]


def test_parts_and_methods_can_be_chosen():
    assert kcd.main(command("--parts", "time", "--methods", "kcd")) == 0
    assert set(result()["runs"]) == {"kcd-0.5-asking-seed0"}
    with pytest.raises(UserError, match="epochs 3, now 6"):
        kcd.main([*command(), "--epochs", "6"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--methods", "kdc"], "did you mean"), (["--device", "cuda"], "no GPU")],
)
def test_wrong_arguments(words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        kcd.arguments(words)


def test_presets_are_those_of_the_docs():
    given = kcd.arguments([])
    assert (given.images, given.epochs, given.seeds, given.parts) == (
        4000,
        12,
        [0, 1, 2],
        ["accuracy"],
    )
    given = kcd.arguments(["--time"])
    assert (given.images, given.epochs, given.parts) == (1000, 12, ["time"])
    given = kcd.arguments(["--full", "--device", "cpu"])
    assert (given.images, given.epochs, given.augment, given.cache) == (
        None,
        240,
        "flip_crop",
        False,
    )
    assert given.output == "kcd_gpu"


def test_without_a_cache_each_run_serves_both_parts():
    runs = kcd.grid(["accuracy", "time"], [0], list(kcd.METHODS), [0.7], cache=False)[0]
    assert len(runs) == len({run.name for run in runs}) == 4
    assert not any(run.cached for run in runs)


def test_random_dropping_keeps_as_many_and_none_comes_back():
    data = kcd.create({"name": "digits", "limit": 120})
    found = RandomSet(training_set(data), 0.5, 3, seed=1)
    before = set(found.ids.tolist())
    for size in SIZES[1:]:
        found.condense()
        kept = set(found.ids.tolist())
        assert len(kept) == size
        assert kept <= before
        before = kept
    assert found.ids.tolist() != list(range(60))
    other = RandomSet(training_set(data), 0.5, 3, seed=2)
    other.condense()
    assert other.ids.tolist() != RandomSet(training_set(data), 0.5, 3, seed=1).ids.tolist()


def test_a_count_that_is_not_the_schedules_is_no_result(monkeypatch, tmp_path):
    given = kcd.arguments(command())
    fields = kcd_training.Settings.__dataclass_fields__
    settings = kcd_training.Settings(**{key: getattr(given, key) for key in fields})
    data = kcd.create({"name": "digits", "limit": 120})
    teacher = kcd_training.build("net.py:small", data).eval().requires_grad_(False)
    training = Training(Run(0, "kcd", 0.5), settings, data, tmp_path / "runs", teacher)
    training.epoch()
    with pytest.raises(
        UserError, match=f"120 forward passes of the student: expected {sum(SIZES[:3])}"
    ):
        training.result()
