"""Cells of a SuperViT as artifacts and as files: one set of weights, equal outputs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tenfold
from tenfold.deploy import artifact, cells
from tenfold.deploy.cells import cell_name, export_cells
from tenfold.errors import UserError
from tenfold.measure import OnnxModel, OpenVinoModel, measure_cells
from tenfold.measure.cells import CELLS, cell_lines, read_cells, write_cells
from tenfold.nn import models
from tenfold.nn.supervit import SuperViT
from tests.supervits import pictures, plain, plain_lvvit, supervit

pytestmark = pytest.mark.path

SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
NETWORK: dict[str, Any] = {
    "name": "tenfold/supervit",
    "arguments": {
        "model": "timm/vit_tiny_patch16_224",
        "num_classes": 7,
        "channels": 3,
        "sizes": [32, 48, 64],
        "keep_rates": [0.5, 0.7, 1.0],
        "drop_blocks": [1, 2],
        "decay_pos_embed": True,
        "options": SMALL,
    },
}


@pytest.fixture(scope="module")
def model() -> SuperViT:
    made = supervit(tables="fresh")
    for number, cell in enumerate(made.cells):
        made.table.note(cell, accuracy=0.5 + number / 100)
    return made


@pytest.fixture
def saved(model, tmp_path) -> Path:
    return tenfold.save(model, tmp_path / "artifact", NETWORK)


# -- artifacts ------------------------------------------------------------------------------------


def test_an_artifact_brings_every_cell_and_the_table_back(model, saved):
    assert sorted(file.name for file in saved.iterdir()) == [
        "cells.json", "model.json", "weights.safetensors",
    ]  # fmt: skip
    loaded = tenfold.load(saved)
    assert isinstance(loaded, SuperViT)
    assert loaded.table.rows == model.table.rows
    assert loaded.drop_blocks == (1, 2)
    with torch.inference_mode():
        for cell in model.cells:
            assert torch.equal(loaded(pictures(), *cell), model(pictures(), *cell))
    assert loaded.at_budget(macs=model.macs(64, 0.7)).keep_rate in model.keep_rates


def test_an_artifact_of_lvvit(tmp_path):
    base = {"size": [64, 64], "depth": 4, "dim": 32, "heads": 2, "aux_weight": 0.5}
    made, _ = models.build("lvvit_small", num_classes=7, options=base)
    source = SuperViT(made, (32, 64), drop_blocks=(1,)).eval()
    arguments = {
        "model": "tenfold/lvvit_small",
        "num_classes": 7,
        "sizes": [32, 64],
        "drop_blocks": [1],
        "options": {key: value for key, value in base.items() if key != "size"},
    }
    path = tenfold.save(source, tmp_path, {"name": "tenfold/supervit", "arguments": arguments})
    assert torch.equal(tenfold.load(path)(pictures(), 32, 0.7), source(pictures(), 32, 0.7))


def rewrite(path: Path, change) -> None:
    """Change an artifact's description and give it the hash that fits."""
    facts = json.loads((path / "model.json").read_text())
    change(facts)
    facts["sha256"] = artifact._hash(facts, path / "weights.safetensors")
    (path / "model.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("name", ["evil.py:f", "./evil.py:f", "evil:f"])
def test_an_artifact_cannot_have_code_imported(saved, name, monkeypatch):
    monkeypatch.chdir(saved)
    monkeypatch.syspath_prepend(str(saved))
    (saved / "evil.py").write_text("open('ran', 'w').close()\nf = None\n")
    rewrite(saved, lambda facts: facts["network"]["arguments"].update(model=name))
    with pytest.raises(UserError, match="names code of your own"):
        tenfold.load(saved)
    rewrite(saved, lambda facts: facts["network"].update(name=name))
    with pytest.raises(UserError):
        tenfold.load(saved)
    assert not (saved / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model": ["evil"]},
        {"options": {"pretrained": True}},
        {"options": {**SMALL, "checkpoint_path": "x"}},
        {"options": 3},
        {"sizes": "abc"},
        {"drop_blocks": None},
        {"weights": "x"},
        {"nothing": 1},
    ],
    ids=str,
)
def test_an_artifact_with_other_nonsense_is_one_clear_error(saved, change):
    rewrite(saved, lambda facts: facts["network"]["arguments"].update(change))
    with pytest.raises(UserError) as caught:
        tenfold.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "cells": [{"size": 32}]}', "\x00"])
def test_a_table_that_was_changed_is_one_clear_error(saved, text):
    (saved / CELLS).write_text(text)
    with pytest.raises(UserError, match="measure again, tenfold bench RUN") as caught:
        tenfold.load(saved)
    assert "\n" not in str(caught.value)


def test_without_a_table_the_multiply_adds_are_known(saved):
    (saved / CELLS).unlink()
    assert read_cells(saved) is None
    loaded = tenfold.load(saved)
    assert {row.accuracy for row in loaded.table.rows} == {None}
    assert loaded.at_budget(macs=1e12).keep_rate == 1.0


# -- measuring ------------------------------------------------------------------------------------


def test_measured_cells(model, tmp_path):
    made = supervit()
    made.train()
    ratios = measure_cells(made, pictures(1), batch=2, threads=1, seconds=0.2, reference=plain())
    assert made.training
    assert set(ratios) == set(made.cells)
    for row in made.table.rows:
        assert row.latency_ms > 0
        assert row.images_per_second > 0
        assert row.batch == 2
    assert made.table.machine
    write_cells(tmp_path, made.table)
    assert read_cells(tmp_path) == made.table.to_dict()
    lines = cell_lines(made.table.rows, made.table.rows[:1])
    assert len(lines) == 10
    assert lines[1].endswith("*")
    assert "ms" in lines[1]
    assert len(measure_cells(made, pictures(1), batch=1, seconds=0.1)) == 0
    with pytest.raises(UserError, match="has no cells: expected a SuperViT"):
        measure_cells(plain(), pictures(1))  # type: ignore[arg-type]


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = supervit(sizes=(32, 64), keep_rates=(0.5, 1.0), tables="fresh")
    folder = tmp_path_factory.mktemp("cells")
    return made, export_cells(made, folder, pictures(1), metadata={"classes": ["a"]})


def test_no_graph_tells_where_it_was_made(exported):
    _, written = exported
    for name in written.files.values():
        assert b"supervit.py" not in (written.path / name).read_bytes()


def initializers(path: Path) -> list[Any]:
    import onnx

    return list(onnx.load(str(path), load_external_data=False).graph.initializer)


def test_all_cells_lie_on_one_file_of_weights(exported):
    made, written = exported
    assert sorted(file.name for file in written.path.iterdir()) == [
        "32-0.5.onnx", "32-1.onnx", "64-0.5.onnx", "64-1.onnx", "weights.bin",
    ]  # fmt: skip
    assert written.files == {cell: cell_name(*cell) for cell in made.cells}
    assert written.bytes == sum(file.stat().st_size for file in written.path.iterdir())
    weights = sum(p.numel() * 4 for p in made.parameters())
    assert written.bytes < 1.4 * weights < 4 * weights < written.separate_bytes
    places = set()
    for name in written.files.values():
        for tensor in initializers(written.path / name):
            facts = {entry.key: entry.value for entry in tensor.external_data}
            if facts:
                assert facts["location"] == "weights.bin"
                assert int(facts["offset"]) % 4096 == 0
                places.add((int(facts["offset"]), int(facts["length"])))
    ordered = sorted(places)
    for (start, length), (following, _) in itertools.pairwise(ordered):
        assert start + length <= following
    data = (written.path / "weights.bin").read_bytes()
    tensors = [data[start : start + length] for start, length in ordered]
    assert len(set(tensors)) == len(tensors), "each tensor lies there once"


@pytest.mark.parametrize("engine", [OnnxModel, OpenVinoModel])
def test_every_file_computes_what_its_cell_does(exported, engine):
    made, written = exported
    for cell, name in written.files.items():
        runner = engine(written.path / name)
        with torch.inference_mode():
            expected = made(pictures(5), *cell)
        torch.testing.assert_close(runner(pictures(5)), expected, atol=1e-4, rtol=1e-4)
        assert {check.runtime for check in written.checks[cell]} == {"onnxruntime", "openvino"}
    assert OnnxModel(written.path / "64-0.5.onnx").metadata["cell"] == {
        "size": 64, "keep_rate": 0.5,
    }  # fmt: skip


def test_cells_of_another_time_make_room(tmp_path):
    """They would read the new weights by the old offsets."""
    made = supervit(sizes=(32, 64), keep_rates=(0.5, 1.0))
    (tmp_path / "32-0.5.onnx").write_text("old")
    (tmp_path / "my-own.onnx").write_text("kept")
    written = export_cells(made, tmp_path, pictures(1), cells=[(64, 0.3)])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "64-0.3.onnx", "my-own.onnx", "weights.bin",
    ]  # fmt: skip
    assert list(written.files) == [(64, 0.3)]


def test_a_wrong_file_never_takes_its_place(tmp_path, monkeypatch):
    made = supervit(sizes=(32, 64), keep_rates=(0.5, 1.0))

    def wrong(*_: Any) -> None:
        raise UserError("outputs differ")

    monkeypatch.setattr(cells, "check_runtimes", wrong)
    with pytest.raises(UserError, match="outputs differ"):
        export_cells(made, tmp_path / "new", pictures(1), cells=[(32, 0.5)])
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match="has no cells: expected a SuperViT; use"):
        export_cells(plain(), tmp_path, pictures(1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="size=40"):
        export_cells(made, tmp_path, pictures(1), cells=[(40, 0.5)])


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_one_cell_is_exported_like_any_network(to, tmp_path):
    made = supervit(plain_lvvit())
    result = tenfold.export(made.cell(32, 0.5), tmp_path, pictures(1), to=to)
    assert all(check.max_difference < 1e-4 for check in result.checks)
    assert result.folded, "the stem's batch norms"
