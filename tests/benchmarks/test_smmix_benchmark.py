"""The comparison of SMMix: paired, resumable, its forms of mixing alike, its tables."""

from __future__ import annotations

import json

import pytest
import torch

import common
import published
import resumable
import smmix
import vit_tables
from tenfold.errors import UserError

pytestmark = pytest.mark.path


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (common, published, resumable, smmix, vit_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")


def command(*more: str) -> list[str]:
    words = (
        "--parts accuracy --data digits --images 63 --patch 2 --dim 12 --depth 2 --heads 2 "
        "--epochs 2 --batch_size 16 --augment none --seeds 0 1 --output smmix"
    )
    return [*words.split(), *more]


def result(name: str) -> dict:
    return json.loads((common.RESULTS / f"{name}.json").read_text())


def test_accuracy_in_one_go_and_in_pieces(monkeypatch, capsys):
    assert "Not measured yet" in vit_tables.smmix_accuracy()
    assert smmix.main(command()) == 0
    assert "all done" in capsys.readouterr().out
    whole = result("smmix_accuracy")
    assert set(whole["runs"]) == {
        f"{m}-seed{s}" for m in ("none", "cutmix", "smmix") for s in (0, 1)
    }
    found = whole["accuracy"]["smmix"]
    assert found["minus"]["cutmix"]["pairs"] == found["minus"]["none"]["pairs"] == 2
    assert whole["accuracy"]["none"]["minus"]["smmix"]["mean"] == -found["minus"]["none"]["mean"]
    losses = {run["curve"][0] for run in whole["runs"].values()}
    assert len(losses) == 6, "each run mixes in its own way"
    table = vit_tables.smmix_accuracy()
    assert "| Mixup and CutMix |" in table
    assert "on 63 training images, 2 epochs, batch 16" in table

    (common.RESULTS / "smmix_accuracy.json").unlink()
    allowed = iter([True, False] * 6 + [True] * 99)
    monkeypatch.setattr(smmix.Clock, "allows_an_epoch", lambda self: next(allowed))
    for _ in range(8):
        assert smmix.main(command("--minutes", "9")) == 0
    assert "not all done" in capsys.readouterr().out
    for name, run in result("smmix_accuracy")["runs"].items():
        for key in ("accuracy", "loss", "curve"):
            assert run[key] == whole["runs"][name][key], (name, key)
    assert "--minutes" not in result("smmix_accuracy")["command"]
    with pytest.raises(UserError, match="epochs 2, now 3"):
        smmix.main(command("--epochs", "3"))


def test_times_of_steps_and_of_mixing(monkeypatch):
    assert "Not measured yet" in vit_tables.smmix_time()
    assert "Not measured yet" in vit_tables.smmix_mixing()
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(smmix, "TIMED", (("tiny", "vit_tiny_patch16_224", tiny, 4),))
    mixing = smmix.time_mixing
    monkeypatch.setattr(smmix, "time_mixing", lambda *_: mixing(4, 2, 7, rounds=3))
    assert smmix.main(["--parts", "time", "--rounds", "3"]) == 0
    assert smmix.main(["--parts", "mixing", "--rounds", "3"]) == 0
    found = result("smmix")
    assert set(found["time"]["tiny"]["to_cutmix"]) == {
        "plain", "cutmix", "mixup step", "smmix step", "average",
    }  # fmt: skip
    assert list(found["mixing"]["sides"]) == ["1", "2", "3", "4", "5"]
    assert "| tiny | nothing mixed |" in vit_tables.smmix_time()
    assert "geometric mean" in vit_tables.smmix_mixing()


@pytest.mark.parametrize("tokens", [4, 7, 14])
def test_the_textbook_form_and_the_loop_mix_the_same(tokens):
    generator = torch.Generator().manual_seed(tokens)
    images = torch.randn(6, 3, 4 * tokens, 4 * tokens, generator=generator)
    scores = torch.randint(0, 4096, (6, tokens, tokens), generator=generator).float()
    for side in range(1, tokens):
        expected = smmix.by_pooling(images, scores, side, 4)
        assert torch.equal(smmix.by_unfolding(images, scores, side, 4), expected)
        assert torch.equal(smmix.by_looping(images, scores, side, 4), expected)


def test_presets_are_those_of_the_docs():
    given = smmix.arguments([])
    assert (given.images, given.seeds, given.epochs) == (4000, [0, 1, 2], 14)
    given = smmix.arguments(["--full", "--device", "cpu"])
    assert (given.images, given.epochs, given.size, given.output) == (0, 300, 224, "smmix_gpu")
    assert given.parts == ["accuracy"]
