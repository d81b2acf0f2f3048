"""The comparison of LBC with its rivals: paired, resumable, and honest about noise."""

from __future__ import annotations

import json

import pytest
import torch

import common
import lbc
import published
import resumable
import tables
import training
from paired import difference, spread
from tenfold.errors import UserError
from training import Clock, Run, Settings

pytestmark = pytest.mark.path

NET = """
from torch import nn

def small(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(resumable, "RESULTS", tmp_path / "results")
    for module in (tables, published):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "net.py").write_text(NET)


def command(*more: str) -> list[str]:
    words = "--data digits --images 128 --model net.py:small --epochs 4 --lr 0.1 --output tried"
    return [*words.split(), *more]


def settings() -> Settings:
    given = lbc.arguments(command())
    return Settings(**{key: getattr(given, key) for key in Settings.__dataclass_fields__})


def result() -> dict:
    return json.loads((common.RESULTS / "tried.json").read_text())


class Epochs(Clock):
    """Allows so many epochs."""

    def __init__(self, count: int):
        super().__init__()
        self.left = count

    def allows_an_epoch(self) -> bool:
        self.left -= 1
        return self.left >= 0


# -- statistics ---------------------------------------------------------------------------------


@pytest.mark.unit
def test_interval_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.302653: half width 4.302653 / sqrt(3) = 2.484138
    found = difference({0: 11, 1: 22, 2: 33, 7: 5}, {0: 10, 1: 20, 2: 30, 9: 5})
    assert found == {
        "mean": 2,
        "low": pytest.approx(-0.484138, abs=1e-6),
        "high": pytest.approx(4.484138, abs=1e-6),
        "pairs": 3,
        "verdict": "not separable",
    }


@pytest.mark.unit
@pytest.mark.parametrize(("sign", "verdict"), [(1, "higher"), (-1, "lower")])
def test_a_steady_difference_is_separable_though_seeds_differ_more(sign, verdict):
    dense = {0: 10.0, 1: 50.0, 2: 90.0}
    noise = {0: 1.0, 1: 1.1, 2: 0.9}
    other = {seed: value + sign * noise[seed] for seed, value in dense.items()}
    assert difference(other, dense)["verdict"] == verdict


@pytest.mark.unit
def test_one_seed_has_no_interval_and_none_no_difference():
    assert difference({0: 1.0}, {0: 0.5})["verdict"] == "one seed, no interval"
    assert difference({0: 1.0}, {1: 0.5}) is None
    assert spread({0: 1.0}) == {"mean": 1.0, "sd": None, "seeds": [0]}


# -- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "magnitude", "srste", "lbc"])
def test_a_run_in_pieces_is_the_unbroken_run(method, tmp_path):
    data, run = lbc.open_data(settings()), Run(0, method, 2, 4)
    whole = training.train(run, settings(), data, tmp_path / "whole", Clock())
    for _ in range(3):
        assert training.train(run, settings(), data, tmp_path / "pieces", Epochs(1)) is None
    pieces = training.train(run, settings(), data, tmp_path / "pieces", Clock())
    last = [torch.load(tmp_path / f / f"{run.name}.pt")["model"] for f in ("whole", "pieces")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])
    assert pieces["accuracy"] == whole["accuracy"]
    blocks = {"3": {"layers": 1, "least": 2, "most": 2}}
    assert whole["blocks"] == ({} if method == "dense" else blocks)


def test_magnitude_from_the_dense_half_is_magnitude_from_the_start(tmp_path):
    data, run = lbc.open_data(settings()), Run(1, "magnitude", 1, 4)
    alone = training.train(run, settings(), data, tmp_path / "alone", Clock())
    training.train(Run(1, "dense"), settings(), data, tmp_path / "shared", Clock())
    clock = Epochs(2)  # the second half is all that is left to do
    shared = training.train(run, settings(), data, tmp_path / "shared", clock)
    assert shared is not None
    last = [torch.load(tmp_path / f / f"{run.name}.pt")["model"] for f in ("alone", "shared")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])
    assert shared["accuracy"] == alone["accuracy"]


def test_runs_of_a_seed_start_from_the_same_weights_and_data(tmp_path, monkeypatch):
    seen = {}

    def note(model, loader, epoch, data, settings, optimizer, schedule, method):
        weights = [value for key, value in model.state_dict().items() if "mask" not in key]
        loader.sampler.set_epoch(epoch)
        batch = next(iter(loader))
        seen[name, epoch] = [w.clone() for w in weights], batch["image"], batch["id"]
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_epoch", note)
    data = lbc.open_data(settings())
    for name in ("dense", "srste", "lbc"):
        with pytest.raises(KeyboardInterrupt):
            training.train(Run(5, name, 2, 4), settings(), data, tmp_path, Clock())
    weights, images, ids = seen["dense", 0]
    for name in ("srste", "lbc"):
        other, other_images, other_ids = seen[name, 0]
        assert torch.equal(images, other_images)
        assert torch.equal(ids, other_ids)
        assert sum(float(w.double().sum()) for w in weights) == pytest.approx(
            sum(float(w.double().sum()) for w in other), abs=1e-9
        )


def test_a_block_that_is_too_full_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "count_blocks", lambda *_: {"3": {"least": 2, "most": 3}})
    with pytest.raises(UserError, match="a block of 4 has 3 weights"):
        training.train(
            Run(0, "srste", 2, 4), settings(), lbc.open_data(settings()), tmp_path, Clock()
        )


# -- the command --------------------------------------------------------------------------------


def test_the_command_in_pieces(capsys):
    more = ["--seeds", "0", "1", "--patterns", "2:4", "1:4"]
    assert lbc.main(command(*more, "--minutes", "0")) == 0
    assert "time is up: 0 of 14 runs done" in capsys.readouterr().out
    assert lbc.main(command("--seeds", "0", "--patterns", "2:4")) == 0
    finished = result()["runs"]
    assert set(finished) == {
        "dense-seed0",
        "magnitude-2of4-seed0",
        "srste-2of4-seed0",
        "lbc-2of4-seed0",
    }
    assert lbc.main(command(*more)) == 0
    found = result()
    assert len(found["runs"]) == 14
    assert all(found["runs"][name] == entry for name, entry in finished.items()), "kept, not redone"
    assert found["seed"] == [0, 1]
    assert "--minutes" not in found["command"]
    minus = found["accuracy"]["1:4"]["lbc"]["minus"]
    runs = found["runs"]
    by_hand = [
        runs[f"lbc-1of4-seed{seed}"]["accuracy"] - runs[f"srste-1of4-seed{seed}"]["accuracy"]
        for seed in (0, 1)
    ]
    assert minus["srste"]["mean"] == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    assert set(minus) == {"dense", "magnitude", "srste"}
    table = tables.accuracy_table("tried", "")
    assert table.count("\n| 1:4 | ") == 3
    assert "128 training images, 4 epochs" in table
    assert "seeds 0, 1" in table


def test_a_run_that_another_process_has_is_left_to_it(capsys):
    given = ["--seeds", "0", "--methods", "dense"]
    assert lbc.main(command(*given, "--minutes", "0")) == 0
    folder = next(iter((lbc.RUNS).iterdir()))
    with resumable.locked(folder / "dense-seed0.lock") as mine:
        assert mine
        assert lbc.main(command(*given)) == 0
    assert "1 runs are left to the processes that have them" in capsys.readouterr().out
    assert not (common.RESULTS / "tried.json").exists()


def test_other_settings_do_not_mix():
    assert lbc.main(command("--seeds", "0", "--methods", "dense")) == 0
    with pytest.raises(UserError, match="epochs 4, now 5"):
        lbc.main([*command("--seeds", "0"), "--epochs", "5"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patterns", "2-4"], "expected N:M"),
        (["--methods", "lcb"], "did you mean lbc"),
        (["--epochs", "1"], "expected at least 2"),
    ],
)
def test_wrong_arguments(words, message):
    with pytest.raises(UserError, match=message):
        lbc.main([*command(), *words])


def test_the_full_preset_is_the_papers_length_and_yields_to_arguments():
    given = lbc.arguments(["--full", "--epochs", "3", "--device", "cpu"])
    assert (given.images, given.epochs, given.output) == (None, 3, "lbc_accuracy_gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            lbc.arguments(["--full"])


def test_smoke_shows_the_blocks(capsys):
    lbc.main([*command("--smoke", "vit"), "--preset", "resnet", "--optimizer", "sgd"])
    assert "1 layers, weights kept in a block of 4: 2 to 2" in capsys.readouterr().out
