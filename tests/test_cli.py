"""The command line as a person uses it: verbs, one-line errors, nothing written over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tenfold.cli import main
from tenfold.tasks.recipe import load_recipe
from tests.tasks.conftest import NETS, recipe

pytestmark = pytest.mark.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run by the command line, in a folder of its own; read only."""
    folder = tmp_path_factory.mktemp("cli")
    values = recipe(model={"name": "digitnet", "width": 8})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    run = folder / "run"
    words = ["train", str(folder / "recipe.yaml"), "--run_dir", str(run), "--train.epochs=2"]
    assert main(words) == 0
    return run


def test_training_ends_with_a_measurement_and_a_report(finished):
    found = json.loads((finished / "bench.json").read_text())
    assert found["models"] == ["dense", "lbc"]
    assert {row["runtime"] for row in found["latency"]} >= {"pytorch", "onnxruntime", "openvino"}
    assert {row["batch"] for row in found["latency"]} == {1, 16}
    assert found["size"]["lbc"]["effective_macs"] < found["size"]["dense"]["effective_macs"]
    assert found["size"]["lbc"]["packed_bytes"] < found["size"]["dense"]["dense_bytes"]
    assert found["accuracy"].keys() == {"lbc"}  # no baseline was named
    assert "<html" in (finished / "report.html").read_text()
    assert load_recipe(finished / "recipe.yaml").train.epochs == 2


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
def test_export_evaluate_and_predict(finished, to, capsys, tmp_path):
    assert main(["export", str(finished), "--to", to]) == 0
    out = capsys.readouterr().out
    assert "outputs equal within" in out
    exports = json.loads((finished / "export" / "export.json").read_text())["exports"]
    assert to in [entry["format"] for entry in exports]
    assert main(["evaluate", str(finished)]) == 0
    plain = capsys.readouterr().out
    assert "of 355 held-out images" in plain
    if to != "torch":
        assert main(["evaluate", str(finished), "--to", to]) == 0
        assert capsys.readouterr().out.split("(")[0] == plain.split("(")[0]
        file = finished / "export" / ("model.onnx" if to == "onnx" else "model.xml")
        assert main(["evaluate", str(file)]) == 0
        assert capsys.readouterr().out.split("(")[0] == plain.split("(")[0]
    pixels = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    assert main(["predict", str(finished), str(tmp_path / "photo.png"), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "photo.png" in out
    assert out.count("%") == 2


def test_bench_and_report_can_be_asked_for_again(finished, capsys, tmp_path):
    words = ["bench", str(finished), "--batch", "2", "--runtime", "pytorch", "--seconds", "0.2"]
    before = (finished / "bench.json").read_text()
    assert main(words) == 0
    assert "vs dense" in capsys.readouterr().out
    (finished / "bench.json").write_text(before)
    assert main(["report", str(finished), "--output", str(tmp_path / "page.html")]) == 0
    assert "<html" in (tmp_path / "page.html").read_text()


def test_plan_trains_nothing(finished, capsys):
    assert main(["plan", str(finished / "recipe.yaml"), "--methods.lbc.n", "1"]) == 0
    out = capsys.readouterr().out
    assert "first convolution, kept dense" in out
    assert "1:4" in out
    assert "effective" in out


@pytest.mark.parametrize("words", [["list"], ["list", "recipes"], ["doctor"]])
def test_listings(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


BAD = [
    (["trian", "x"], "unknown 'trian': did you mean train?"),
    ([], "the following arguments are required"),
    (["list", "modles"], "did you mean models"),
    (["train", "digits-lbx"], "unknown recipe 'digits-lbx': did you mean digits-lbc"),
    (["train", "digits-lbc", "--train.epoch", "3"], "did you mean train.epochs"),
    (["train", "digits-lbc", "--train.epochs", "many"], "train.epochs: expected int, got 'many'"),
    (["train", "digits-lbc", "--methods.lbc.n", "4"], "expected 1 <= n < m"),
    (["train", "digits-lbc", "--methods.lbc.m", "7"], "no layer is left to be made 1:7"),
    (["train", "digits-lbc", "--methods.lbc.include", "[features.0]"], "layer features.0 can't be"),
    (["train", "digits-lbc", "--model", "resnt20"], "did you mean resnet20"),
    (["train", "digits-lbc", "--data", "digit"], "did you mean digits"),
    (["train", "digits-lbc", "--data", "npz:nowhere"], "nowhere"),
    (["train", "digits-lbc", "--trainer.gpus", "1"], "unknown key 'trainer.gpus'"),
    (["plan", "digits-lbc", "--trainer.max_epochs", "1"], "use train.epochs"),
    (["train", "--train.epochs", "2.5", "digits-lbc"], "train.epochs: expected int, got 2.5"),
    (["train", "digits-lbc", "--overwrit"], "did you mean --overwrite"),
    (["train", "digits-lbc", "--seed", "99999999999999999999"], "expected 0 to 2**63 - 1"),
    (["bench", "nowhere"], "nowhere is no run"),
    (["bench", "nowhere", "--runtimes", "x"], "bench has no --runtimes: did you mean --runtime?"),
    (["bench", "nowhere", "--batch", "0"], "expected a whole number of at least 1"),
    (["export", "nowhere"], "nowhere is no artifact"),
    (["export", "nowhere", "--to", "onxx"], "did you mean onnx"),
    (["evaluate", "nowhere"], "nowhere is no artifact"),
    (["evaluate", "nowhere.onnx"], "nowhere.onnx"),
    (["evaluate-shadows", "nowhere", "x", "y"], "nowhere is no folder"),
    (["evaluate-shadows", "x", "y", "z", "--size", "big"], "expected a side such as 256"),
    (["evaluate-shadows", "x", "y", "z", "--mask_above", "1"], "expected 0 <= above < 1"),
    (["report", "nowhere"], "nowhere"),
    (["predict", "nowhere", "x.png"], "nowhere is no artifact"),
]


@pytest.mark.parametrize(("words", "text"), BAD)
def test_mistakes_are_one_line_and_exit_code_2(words, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tenfold: ")
    assert text in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_mistakes_on_a_run(finished, capsys, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*"))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    cases = [
        (["train", "digits-lbc", "--run_dir", str(finished)], "holds a run already"),
        (["predict", str(finished), str(tmp_path / "broken.png")], "broken.png"),
        (["bench", str(finished), "--runtime", "tensorrt"], "tensorrt"),
        (["bench", str(finished), "--baseline", "nowhere"], "nowhere is no run"),
        (["evaluate", str(finished), "--data", "digitz"], "did you mean digits"),
    ]
    for words, text in cases:
        assert main(words) == 2
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*")) == before


def folder_of_images(root: Path, classes=("cat", "dog"), count=12) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


def test_bad_data_from_folder_to_exit_code(tmp_path, capsys, monkeypatch):
    """A truncated file stops the run by name and count; skip_bad goes on without it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "cache"))
    data = folder_of_images(tmp_path / "pets")
    values = recipe(
        data={"name": "imagefolder", "path": str(data), "size": 16, "workers": 0},
        model={"name": f"{NETS}:small", "channels": 3},
        train={"epochs": 1, "batch_size": 8, "augment": "none"},
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    bad = data / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    train = ["train", "recipe.yaml", "--no_bench", "--run_dir"]
    assert main([*train, "a"]) == 2
    err = capsys.readouterr().err
    assert "3.png" in err
    assert "1 of 24" in err
    assert "--data.skip_bad" in err
    assert err.count("\n") == 1
    assert main([*train, "b", "--data.skip_bad", "true"]) == 0
    assert "3.png" in json.loads(Path("b/run.json").read_text())["skipped"][0]
    (data / "train" / "bird").mkdir()
    assert main([*train, "c"]) == 2
    assert "bird" in capsys.readouterr().err


def test_labels_outside_the_classes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = folder_of_images(tmp_path / "pets", count=2)
    for split in ("train", "val"):
        encoded = [p.read_bytes() for p in sorted((data / split).rglob("*.png"))]
        offsets = np.cumsum([0, *(len(e) for e in encoded)]).astype(np.int64)
        np.savez(
            tmp_path / f"{split}.npz",
            bytes=np.frombuffer(b"".join(encoded), np.uint8),
            offsets=offsets,
            labels=np.array([0, 0, 1, 7]),
            classes=np.array(["cat", "dog"]),
        )
    assert main(["plan", "digits-lbc", "--data", f"npz:{tmp_path}", "--model", "resnet20"]) == 2
    err = capsys.readouterr().err
    assert "7" in err
    assert "2 classes" in err


def test_an_exported_file_of_ones_own_and_wrong_data(finished, capsys, tmp_path):
    from tenfold import export

    torch.manual_seed(0)
    path = export(torch.nn.Flatten(), tmp_path, torch.zeros(1, 1, 8, 8)).path
    assert main(["evaluate", str(path)]) == 2
    assert "give --data NAME" in capsys.readouterr().err
    assert main(["evaluate", str(path), "--data", "digits"]) == 2
    assert "has 10 classes" in capsys.readouterr().err


def test_the_installed_command_and_its_help():
    command = Path(sys.executable).with_name("tenfold")
    out = subprocess.run(
        [command, "train", "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    for key in ("--run_dir", "--resume", "--train.epochs", "passes over the training data"):
        assert key in out
    wrong = subprocess.run([command, "nosuch"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
