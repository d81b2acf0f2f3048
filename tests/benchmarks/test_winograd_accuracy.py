"""The comparison of Winograd3d with dense and vanilla Winograd training: paired and resumable."""

from __future__ import annotations

import json
import time

import pytest

import common
import published
import resumable
import winograd_accuracy
import winograd_memory
import winograd_tables
import winograd_training
from tenfold.errors import UserError
from tenfold.methods import Winograd3d
from tenfold.nn.c3d import C3D
from winograd_accuracy import compare, grid
from winograd_training import Run

pytestmark = pytest.mark.path

SMALL = [
    *("--train_clips", "16", "--test_clips", "8", "--size", "8", "--width", "16"),
    *("--batch_size", "4", "--epochs", "1", "--tune_epochs", "2", "--output", "tried"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (common, resumable, published, winograd_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")


def result() -> dict:
    return json.loads((common.RESULTS / "tried.json").read_text())


# -- which runs, and how they are compared --------------------------------------------------------


def test_the_grid_holds_what_matters_most_first_and_no_tile_with_too_few_columns():
    runs = grid([0, 1], list(winograd_training.METHODS), [0.5, 1.0, 0.25], [2, 4])
    assert [run.name for run in runs[:6]] == [
        "start-seed0", "start-seed1", "dense-seed0", "dense-seed1",
        "vanilla-tile2-keep50-seed0", "vanilla-tile2-keep50-seed1",
    ]  # fmt: skip
    names = {run.name for run in runs}
    assert len(names) == len(runs) == 2 * (2 + 9 + 2 + 4 + 1)
    outputs = {2: 8, 4: 64}
    assert all(run.keep * (run.tile + 2) ** 3 >= outputs[run.tile] for run in runs if run.tile)
    assert {"rank8-tile2-keep25-plain-seed1", "rank8-tile4-keep50-plain-seed0"} < names
    assert not any("tile4-keep25" in name or "keep100-plain" in name for name in names)
    assert grid([0], ["rank4"], [0.5], [4]) == []


def test_runs_are_compared_by_seed():
    def entry(method, seed, setting, accuracy):
        return {"method": method, "seed": seed, "setting": setting, "accuracy": accuracy}

    plain = "F(2,3) keep 0.5 without compensation"
    made = [
        entry("start", 0, None, 0.5), entry("dense", 0, None, 0.9), entry("dense", 1, None, 0.8),
        entry("vanilla", 0, "F(2,3) keep 0.5", 0.88), entry("rank8", 0, "F(2,3) keep 0.5", 0.89),
        entry("rank8", 1, "F(2,3) keep 0.5", 0.81), entry("rank8", 0, plain, 0.86),
    ]  # fmt: skip
    found = compare({str(number): each for number, each in enumerate(made)})["accuracy"]
    assert found["dense"]["start"]["minus"]["dense"]["mean"] == pytest.approx(-0.4)
    assert found["dense"]["dense"]["minus"] == {}
    best = found["F(2,3) keep 0.5"]["rank8"]
    assert (best["mean"], best["seeds"]) == (0.85, [0, 1])
    assert best["minus"]["dense"]["mean"] == pytest.approx(0)  # -0.01 and +0.01
    assert best["minus"]["dense"]["pairs"] == 2
    assert best["minus"]["vanilla"]["mean"] == pytest.approx(0.01)
    assert "compensated" not in best["minus"]
    assert found[plain]["rank8"]["minus"]["compensated"]["mean"] == pytest.approx(-0.03)


# -- runs -----------------------------------------------------------------------------------------


def test_it_stops_goes_on_and_reuses_the_trained_network(monkeypatch, capsys):
    words = [*SMALL, "--seeds", "3", "--methods", "dense", "rank4", "--keeps", "0.5"]
    assert winograd_accuracy.main([*words, "--minutes", "0"]) == 0
    assert "time is up: 0 of 2 runs done" in capsys.readouterr().out
    assert winograd_accuracy.main([*words, "--tiles", "2"]) == 0
    found = result()
    assert found["runs"].keys() == {"dense-seed3", "rank4-tile2-keep50-seed3"}
    pruned = found["runs"]["rank4-tile2-keep50-seed3"]
    assert (pruned["layers"], pruned["columns"], pruned["test_clips"]) == (7, 32, 8)
    assert found["command"].startswith("python benchmarks/winograd_accuracy.py --train_clips 16")
    (folder,) = winograd_accuracy.RUNS.iterdir()
    made = (folder / "trained-seed3.pt").stat().st_mtime_ns
    (common.RESULTS / "tried.json").unlink()
    assert winograd_accuracy.main(words) == 0
    assert (folder / "trained-seed3.pt").stat().st_mtime_ns == made
    again = result()["runs"]["rank4-tile2-keep50-seed3"]
    assert {**again, "cpu_seconds": 0} == {**pruned, "cpu_seconds": 0}
    with pytest.raises(UserError, match=r"runs of other settings \(tune_epochs 2, now 3\)"):
        winograd_accuracy.main([*words, "--tune_epochs", "3"])


def test_a_run_that_another_process_has_is_left_to_it(capsys):
    words = [*SMALL, "--seeds", "0", "--methods", "start"]
    assert winograd_accuracy.main([*words, "--minutes", "0"]) == 0
    (folder,) = winograd_accuracy.RUNS.iterdir()
    with resumable.locked(folder / "start-seed0.lock") as mine:
        assert mine
        assert winograd_accuracy.main(words) == 0
    assert "1 runs are left to the processes that have them" in capsys.readouterr().out
    assert not (common.RESULTS / "tried.json").exists()


def test_a_pause_is_not_taken_for_a_long_run(monkeypatch):
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    deadline = winograd_accuracy.Deadline(10)
    now.update(wall=400.0, cpu=60.0)  # it was stopped for 340 s
    assert deadline.allows_a_run()
    now.update(wall=541.0, cpu=61.0)
    assert not deadline.allows_a_run()  # a run of 60 s would end after 600


def test_a_layer_with_other_columns_is_no_result(monkeypatch, tmp_path):
    given = winograd_accuracy.arguments(SMALL)
    settings = winograd_training.Settings(
        **{name: getattr(given, name) for name in winograd_accuracy.DEFAULTS}
    )
    data = winograd_accuracy.open_data(settings)
    wrong = Winograd3d(tile=2, mode="dense", keep_ratio=0.75)
    monkeypatch.setattr(Run, "make_method", lambda self: wrong)
    with pytest.raises(UserError, match=r"keep \[48, .*expected 32 each"):
        winograd_training.run(Run(0, "vanilla", 2, 0.5), settings, data, tmp_path)


# -- memory ---------------------------------------------------------------------------------------


def test_optimizer_state_is_counted_as_the_optimizers_have_it(monkeypatch):
    def narrow(name):
        return C3D(4, frames=4, size=(8, 8), width=16, hidden=8)

    monkeypatch.setattr(winograd_memory, "build", narrow)
    found = {
        form: winograd_memory.count("c3d", winograd_memory.FORMS[form])
        for form in ("dense", "vanilla, tile 2", "rank 4, tile 2")
    }
    # 16 -> 32 -> 64 -> 64 -> 128 -> 128 -> 128 -> 128, all but the first layer; their biases too.
    pairs = 16 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 3 * 128 * 128
    biases = 32 + 2 * 64 + 4 * 128
    assert found["dense"]["trained"] == 27 * pairs + biases
    assert found["vanilla, tile 2"]["trained"] == 64 * pairs + biases
    assert found["rank 4, tile 2"]["trained"] == 4 * (pairs + 7 * 64) + biases
    assert found["rank 4, tile 2"]["frozen"] == 64 * pairs
    for entry in found.values():
        assert entry["layers"] == 7
        assert entry["sgd_bytes"] == 4 * entry["trained_in_all"]
        # AdamW: two moments, and a step count a tensor
        assert 0 < entry["adamw_bytes"] - 8 * entry["trained_in_all"] < 4 * 100


def test_tables_are_made_of_what_is_measured(monkeypatch):
    assert winograd_tables.accuracy().startswith("*Not measured yet: `python benchmarks/winograd_a")
    assert winograd_tables.memory().startswith("*Not measured yet: `python benchmarks/winograd_mem")
    words = [*SMALL, "--seeds", "0", "1", "--keeps", "0.5", "--tiles", "2"]
    words += ["--methods", "dense", "rank8"]
    words[words.index("tried")] = "winograd_accuracy"
    assert winograd_accuracy.main(words) == 0
    text = winograd_tables.accuracy()
    row = next(line for line in text.splitlines() if "rank 8" in line and "without" not in line)
    assert "1/2" in row
    assert row.count("not separable") + row.count("higher") + row.count("lower") >= 1
