import re
from pathlib import Path

import pytest

from tenfold.errors import UserError
from tenfold.report.inputs import read_run

pytestmark = pytest.mark.unit


def test_an_empty_folder_is_a_run_without_results(run: Path) -> None:
    found = read_run(run)
    assert found.name == "lbc"
    assert (found.recipe, found.metrics, found.bench, found.layers, found.exports) == (None,) * 5
    assert found.commands == ()


def test_a_complete_folder(save, contents) -> None:
    found = read_run(save(contents))
    assert found.name == "lbc-run"
    assert found.bench is not None
    assert found.bench.size["lbc"].packed_bytes == 634_512
    assert found.bench.latency[1].verdict == "no gain"
    assert found.metrics is not None
    assert found.metrics.curves["density"] == ((0, 1.0), (1, 0.75), (2, 0.5))
    assert found.metrics.last("test_accuracy") == 0.9654
    assert "note" not in found.metrics.curves
    assert found.layers is not None
    assert found.layers[0].reason == "first convolution"
    assert found.exports is not None
    assert found.exports[0].checks[0].max_difference == 1.2e-7
    # The bench's own command is not forgotten where the run doesn't list it.
    assert found.commands[-1] == "tenfold bench runs/lbc --seed 0"


def test_empty_cells_nan_and_split_rows_of_an_epoch(save) -> None:
    text = "epoch,train_loss,test_loss,density\n0,1.0,,\n0,,0.9,\n\n1,nan,inf,\n2,0.5\n,0.1,0.1,\n"
    metrics = read_run(save({"metrics.csv": text})).metrics
    assert metrics is not None
    assert metrics.curves["train_loss"] == ((0, 1.0), (1, None), (2, 0.5))
    assert metrics.curves["test_loss"] == ((0, 0.9), (1, None), (2, None))
    assert "density" not in metrics.curves
    assert metrics.last("test_loss") == 0.9
    assert metrics.last("density") is None


@pytest.mark.parametrize("given", ["runs/dense", "dense", "{root}/runs/dense"])
def test_the_baseline_is_found(save, contents, run: Path, given: str) -> None:
    baseline = run.parent / "dense"
    baseline.mkdir()
    (baseline / "metrics.csv").write_text("epoch,test_accuracy\n0,0.9702\n", encoding="utf-8")
    contents["run.json"]["baseline"] = given.format(root=run.parent.parent)
    found = read_run(save(contents))
    assert found.baseline_metrics is not None
    assert found.baseline_metrics.last("test_accuracy") == 0.9702


def test_the_bench_may_name_the_baseline_and_it_may_be_gone(save, contents) -> None:
    contents["bench.json"]["baseline"] = "runs/gone"
    found = read_run(save(contents))
    assert found.baseline == "runs/gone"
    assert found.baseline_metrics is None


def test_numbers_that_are_not_finite_are_missing(save, contents) -> None:
    contents["bench.json"]["accuracy"] = {"dense": float("nan"), "lbc": None}
    contents["bench.json"]["threads"] = float("inf")
    contents["bench.json"]["seed"] = 10**400
    bench = read_run(save(contents)).bench
    assert bench is not None
    assert bench.accuracy == {"dense": None, "lbc": None}
    assert (bench.threads, bench.seed) == (None, None)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone is not a folder.*runs/<name>"):
        read_run(tmp_path / "gone")


@pytest.mark.parametrize("name", ["bench.json", "layers.json", "run.json", "export/export.json"])
@pytest.mark.parametrize(
    ("text", "said"),
    [('{"format": 1,', "not JSON"), ("[1, 2]", "an object"), ("[" * 99999, "JSON")],
)
def test_broken_json_names_the_file(save, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*{said}") as caught:
        read_run(save({name: text}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [2, "1", None])
def test_another_format_is_refused(save, contents, number: object) -> None:
    contents["bench.json"]["format"] = number
    with pytest.raises(UserError, match=r"bench\.json has format .*reads format 1.*tenfold bench"):
        read_run(save(contents))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("models", [], "at least one name"),
        ("models", ["dense", 3], "a list of strings"),
        ("latency", [{"runtime": "pytorch", "batch": 1}], r"latency\[0\]\.model"),
        ("latency", [{"runtime": "pytorch", "batch": 1.5, "model": "dense"}], "whole number"),
        ("latency", [{"runtime": "pytorch", "batch": 1, "model": "other"}], "one of the models"),
        ("latency", {}, "a list"),
        ("accuracy", {"dense": "high"}, r"accuracy\.dense"),
        ("size", {"lbc": {"macs": True}}, r"size\.lbc\.macs"),
        ("summary", "text", "a list"),
        ("machine", [], "an object"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(save, contents, key, value, said) -> None:
    contents["bench.json"][key] = value
    with pytest.raises(UserError, match=rf"bench\.json.*{said}"):
        read_run(save(contents))


def test_broken_metrics_name_line_and_column(save) -> None:
    with pytest.raises(UserError, match=r"metrics\.csv, line 3, column test_loss: 'abc'"):
        read_run(save({"metrics.csv": "epoch,test_loss\n0,1\n1,abc\n"}))
    with pytest.raises(UserError, match=r"metrics\.csv has no column epoch"):
        read_run(save({"metrics.csv": "step,loss\n1,2\n"}))
    with pytest.raises(UserError, match=r"metrics\.csv has no column epoch"):
        read_run(save({"metrics.csv": ""}))


def test_bytes_that_are_not_text(run: Path) -> None:
    (run / "recipe.yaml").write_bytes(b"\xff\xfe\x00task")
    with pytest.raises(UserError, match=r"recipe\.yaml can't be read as text"):
        read_run(run)
