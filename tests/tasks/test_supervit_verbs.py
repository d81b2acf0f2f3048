"""The verbs on a SuperViT, as a person uses them: cells, budgets, and mistakes in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import tenfold
from tenfold.cli import main
from tenfold.measure import OnnxModel
from tenfold.tasks.cells import cell_at, parse_cell
from tests.tasks.test_supervit_run import GRID, values

pytestmark = pytest.mark.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of four cells, measured."""
    folder = tmp_path_factory.mktemp("verbs")
    settings = values(
        methods={"supervit": {**GRID, "sizes": [12, 16], "keep_rates": [0.5, 1.0]}},
        train={"epochs": 1},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    run = folder / "run"
    words = ["train", str(folder / "recipe.yaml"), "--run_dir", str(run), "--no_bench"]
    assert main(words) == 0
    words = ["bench", str(run), "--runtime", "pytorch", "--seconds", "0.2", "--batch", "1", "2"]
    assert main(words) == 0
    return run


@pytest.fixture
def photo(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def table(run: Path) -> list[dict]:
    found: list[dict] = json.loads((run / "model" / "cells.json").read_text())["cells"]
    return found


def test_bench_measures_every_cell(finished):
    for row in table(finished):
        assert row["latency_ms"] > 0
        assert row["images_per_second"] > 0
        assert row["batch"] == 2
        assert row["accuracy"] is not None
    models = json.loads((finished / "bench.json").read_text())["models"]
    assert models == ["dense", "supervit", "supervit, 0.5 kept"]


def test_evaluate_cells(finished, capsys):
    assert main(["evaluate", str(finished), "--cells"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^ +1[26] +(?:0\.5|1) .* %", out, re.MULTILINE)) == 4
    assert out.splitlines()[-1].startswith("* no other cell is both")
    assert main(["evaluate", str(finished)]) == 0
    full = capsys.readouterr().out
    accuracy = next(
        r["accuracy"] for r in table(finished) if (r["size"], r["keep_rate"]) == (16, 1)
    )
    assert f"{100 * accuracy:.2f} %" in full
    assert table(finished)[0]["latency_ms"] is not None, "what bench has measured stays"


def test_export_cells_and_one_cell(finished, capsys):
    assert main(["export", str(finished), "--cells"]) == 0
    out = capsys.readouterr().out
    assert "4 cells on one file of weights" in out
    assert out.count("outputs equal within") == 4
    folder = finished / "export" / "cells"
    assert sorted(file.name for file in folder.iterdir()) == [
        "12-0.5.onnx", "12-1.onnx", "16-0.5.onnx", "16-1.onnx", "weights.bin",
    ]  # fmt: skip
    facts = OnnxModel(folder / "12-0.5.onnx").metadata
    assert facts["cell"] == {"size": 12, "keep_rate": 0.5}
    assert facts["preprocessing"]["size"] == [16, 16]
    assert main(["evaluate", str(folder / "12-0.5.onnx")]) == 0
    accuracy = table(finished)[0]["accuracy"]
    assert f"{100 * accuracy:.2f} %" in capsys.readouterr().out
    assert main(["export", str(finished), "--cell", "12,0.3"]) == 0
    assert (finished / "export" / "12-0.3.onnx").is_file()


def test_predict_within_a_budget(finished, photo, capsys):
    rows = table(finished)
    slowest = max(row["latency_ms"] for row in rows)
    fewest = min(row["images_per_second"] for row in rows)
    most = max(row["macs"] for row in rows) / 1e6
    for budget in (f"{slowest}ms", f"{fewest}img/s", f"{most}mmacs", "1gmacs"):
        assert main(["predict", str(finished), photo, "--budget", budget, "--top", "1"]) == 0
        assert capsys.readouterr().out.count("%") == 1
    model = tenfold.load(finished)
    cheapest = cell_at(model, f"{min(row['macs'] for row in rows) / 1e6}mmacs")
    assert (cheapest.size, cheapest.keep_rate) == (12, 0.5)


def test_a_measurement_of_another_machine_is_pointed_out(finished):
    model = tenfold.load(finished)
    model.table.machine = "a machine far away"
    with pytest.warns(UserWarning, match="measured on a machine far away, and this is"):
        cell_at(model, "1s")


def test_before_bench_times_are_not_known(finished, photo, capsys, tmp_path):
    model = tenfold.load(finished)
    model.table = type(model.table)(model.cells_with_macs())
    facts = json.loads((finished / "model" / "model.json").read_text())
    path = tenfold.save(
        model, tmp_path / "alone", facts["network"], preprocessing=facts["preprocessing"]
    )
    assert main(["predict", str(path), photo, "--budget", "5ms"]) == 2
    err = capsys.readouterr().err
    assert "measure them on this machine, tenfold bench RUN" in err
    assert err.count("\n") == 1
    assert main(["predict", str(path), photo, "--budget", "1gmacs"]) == 0


def test_mistakes(finished, photo, capsys):
    cases = [
        (["predict", str(finished), photo, "--budget", "5"], "expected a number with its unit"),
        (["predict", str(finished), photo, "--budget", "1e-9ms"], "less than any cell has"),
        (["predict", str(finished), photo, "--budget", "1e9img/s"], "more than any cell has"),
        (["predict", str(finished), photo, "--budget", "0.001mmacs"], "size 12, keep rate 0.5"),
        (["export", str(finished), "--cell", "x"], "expected a size and a keep rate"),
        (["export", str(finished), "--cell", "13,0.5"], "was made for 12, 16"),
        (["export", str(finished), "--cell", "12,0"], "expected a share in (0, 1]"),
        (["export", str(finished), "--cells", "--to", "torch"], "leave --to and --cell out"),
        (["export", str(finished), "--cells", "--cell", "12"], "leave --to and --cell out"),
        (["evaluate", str(finished), "--cells", "--to", "onnx"], "leave --to out"),
        (["evaluate", "nowhere", "--cells"], "nowhere is no artifact"),
    ]
    for words, text in cases:
        assert main(words) == 2, words
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1


def test_networks_without_cells(capsys, photo):
    settings = values(methods={}, train={"epochs": 1})
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "recipe.yaml", "--run_dir", "dense", "--no_bench"]) == 0
    capsys.readouterr()
    for words in (
        ["export", "dense", "--cells"],
        ["export", "dense", "--cell", "16"],
        ["evaluate", "dense", "--cells"],
        ["predict", "dense", photo, "--budget", "5ms"],
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "VisionTransformer" in err
        assert err.count("\n") == 1


def test_cells_as_people_write_them():
    assert parse_cell("192,0.7") == (192, 0.7)
    assert parse_cell(" 192 , 1") == (192, 1.0)
    assert parse_cell("192") == (192, 1.0)
