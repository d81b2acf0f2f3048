"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tenfold.nn.blocks import nm_pattern

pytestmark = pytest.mark.path
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_example_is_tested():
    tested = {"quickstart.py", "lbc_lightning.py", "smmix_timm.py", "gan_distillation.py"}
    tested |= {f"{key}_plain_pytorch.py" for key in ("lbc", "lts", "kcd")}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_plain_pytorch(capsys):
    accuracy = runpy.run_path(str(EXAMPLES / "lbc_plain_pytorch.py"))["main"]()
    assert accuracy > 0.9
    assert "weights kept by layer: 100%, 50%, 50%, 100%" in capsys.readouterr().out


def test_plain_pytorch_distilled(capsys):
    accuracy = runpy.run_path(str(EXAMPLES / "kcd_plain_pytorch.py"))["main"]()
    assert accuracy > 0.85
    out = capsys.readouterr().out
    assert "epoch 1: 1437 samples" in out
    assert "epoch 12: 842 samples" in out
    assert "instead of 17,244" in out


def test_plain_pytorch_to_two_bits(capsys):
    accuracy = runpy.run_path(str(EXAMPLES / "lts_plain_pytorch.py"))["main"]()
    assert accuracy > 0.9
    out = capsys.readouterr().out
    assert "of the weights' gradients left out" in out
    assert "openvino, batch 3: equal within" in out


def test_smmix_in_a_script_of_timm(capsys):
    file = EXAMPLES / "smmix_timm.py"
    marked = [line for line in file.read_text().splitlines() if line.endswith("  # SMMix")]
    assert len(marked) == 6
    accuracy = runpy.run_path(str(file))["main"]()
    assert accuracy > 0.6
    assert "epoch 15: loss" in capsys.readouterr().out


def test_a_student_in_a_script_of_pix2pix(capsys):
    file = EXAMPLES / "gan_distillation.py"
    marked = [line for line in file.read_text().splitlines() if line.endswith("  # student")]
    assert len(marked) == 12
    before, after = runpy.run_path(str(file))["main"]()
    assert after < 0.8 * before
    assert "before, 0." in capsys.readouterr().out


def test_own_lightning_trainer(capsys):
    network = runpy.run_path(str(EXAMPLES / "lbc_lightning.py"))["main"]()
    assert nm_pattern(network[0].weight) == (2, 4)
    assert nm_pattern(network[4].weight) is None
    assert "layer 0: 50% of the weights kept" in capsys.readouterr().out


def test_quickstart_twice(capsys, monkeypatch):
    """The main job, shortened: same path, fewer epochs and rounds; a second run replaces it."""
    import tenfold.tasks.run as run
    import tenfold.tasks.verbs as verbs

    train, bench = run.train, verbs.bench_run

    def short_train(recipe, **keywords):
        overrides = {
            **(keywords.pop("overrides", None) or {}),
            "train.epochs": 2,
            "model.width": 8,
            "data.limit": 256,
        }
        return train(recipe, overrides=overrides, **keywords)

    def short_bench(path, **keywords):
        return bench(path, **{**keywords, "runtimes": ("pytorch", "onnxruntime"), "seconds": 0.1})

    monkeypatch.setattr(run, "train", short_train)
    monkeypatch.setattr(verbs, "bench_run", short_bench)
    for _ in range(2):
        runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]()
        out = capsys.readouterr().out
        assert "outputs equal within" in out
        assert "vs dense" in out
        assert Path("runs/quickstart/report.html").stat().st_size > 10_000
