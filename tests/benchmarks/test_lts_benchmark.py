"""The comparison of LTS: paired, resumable, and its steps timed from kept checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import common
import lts
import lts_training
import published
import tenfold
import training_tables
from tenfold.errors import UserError
from tests.benchmarks.test_lbc_accuracy import NET

pytestmark = pytest.mark.path


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (common, lts, published, training_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "net.py").write_text(NET)
    build = lts_training.build

    def small(settings, data, seed):
        return build(replace(settings, model="net.py:small"), data, seed)

    for module in (lts, lts_training):  # a ResNet-18 takes too long
        monkeypatch.setattr(module, "build", small)


def command(*more: str) -> list[str]:
    words = (
        "--data digits --images 96 --model net.py:small --float_epochs 1 --epochs 3 "
        "--batch_size 24 --step_images 48 --step_float_epochs 1 --step_epochs 6 "
        "--step_batch_size 24 --timed_batch_size 8 --rounds 2 --bits 2 --seeds 0 1 --output lts"
    )
    return [*words.split(), *more]


def result() -> dict:
    return json.loads((common.RESULTS / "lts.json").read_text())


def test_all_parts_in_one_go_and_in_pieces(monkeypatch, capsys):
    assert lts.main(command()) == 0
    assert "all done" in capsys.readouterr().out
    whole = result()
    assert set(whole["runs"]) == {
        f"{name}-seed{seed}" for name in ("float", "qat-2bit", "lts-2bit") for seed in (0, 1)
    }
    found = whole["accuracy"]["2"]["lts"]
    assert found["minus"]["pairs"] == 2
    assert found["saved"]["backward"] == pytest.approx(found["saved"]["updates"] / 2, abs=1e-6)
    assert whole["runs"]["qat-2bit-seed0"]["saved"]["updates"] == 0
    assert list(whole["step"]) == ["4/6", "5/6", "6/6"]
    assert all(row["gradient_difference"] < 1e-5 for row in whole["step"].values())
    assert whole["step"]["6/6"]["frozen"] > whole["step"]["4/6"]["frozen"]
    assert "| 2 bits | without freezing |" in training_tables.lts_accuracy()
    assert "| 6/6 of the run |" in training_tables.lts_step()

    (common.RESULTS / "lts.json").unlink()
    for file in lts.RUNS.rglob("*.pt"):
        file.unlink()
    allowed = iter([True, True, False] * 4 + [True] * 99)
    monkeypatch.setattr(lts.Clock, "allows_an_epoch", lambda self: next(allowed))
    for _ in range(5):
        assert lts.main(command("--parts", "accuracy", "--minutes", "9")) == 0
    assert "not all done" in capsys.readouterr().out
    for name, run in result()["runs"].items():
        for key in ("accuracy", "loss", "saved"):
            assert run.get(key) == whole["runs"][name].get(key), (name, key)
    assert "--minutes" not in result()["command"]


def test_a_float_network_that_is_there_is_not_trained():
    data = lts.create({"name": "digits", "limit": 96})
    settings = lts_training.Settings(**vars_of(lts.arguments(command())))
    network = lts_training.build(settings, data, 5)
    tenfold.save(network, "there")
    assert lts.main(command("--parts", "accuracy", "--start", "there", "--seeds", "0")) == 0
    runs = result()["runs"]
    assert runs["float-seed0"]["curve"] == []
    assert runs["float-seed0"]["accuracy"] == round(tenfold.evaluate(network, data).accuracy, 6)
    assert len(runs["lts-2bit-seed0"]["curve"]) == 3
    assert "3 epochs after there, batch" in training_tables.lts_accuracy()


def vars_of(given) -> dict:
    return {name: getattr(given, name) for name in lts_training.Settings.__dataclass_fields__}


def test_other_settings_are_refused():
    assert lts.main(command("--parts", "accuracy", "--seeds", "0")) == 0
    with pytest.raises(UserError, match="epochs 3, now 4"):
        lts.main([*command(), "--epochs", "4"])
    with pytest.raises(UserError, match="step_epochs 8: expected a multiple of 6"):
        lts.arguments(["--step_epochs", "8"])


def test_presets_are_those_of_the_docs():
    given = lts.arguments([])
    assert (given.images, given.seeds, given.bits) == (2000, [0, 1, 2], [2, 3, 4])
    given = lts.arguments(["--full", "--device", "cpu"])
    assert (given.images, given.epochs, given.batch_size, given.output) == (0, 400, 128, "lts_gpu")
