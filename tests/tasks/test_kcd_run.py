"""KCD by recipe: the teacher, the data, resuming, composing with LBC, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tenfold
from tenfold.data import create
from tenfold.errors import UserError
from tenfold.methods import condensed_sizes
from tenfold.nn.blocks import nm_pattern
from tenfold.report import write_report
from tenfold.tasks.evaluation import evaluate
from tenfold.tasks.other_networks import open_network
from tenfold.tasks.recipe import load_recipe
from tenfold.tasks.run import train
from tests import nets
from tests.tasks.conftest import NETS, recipe

pytestmark = pytest.mark.path
SIZES = condensed_sizes(256, 0.5, 3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A finished run of a wider network on the same data."""
    path = tmp_path_factory.mktemp("teacher") / "run"
    values = recipe(methods={}, model={"name": f"{NETS}:small", "width": 16}, train={"epochs": 2})
    train(values, run_dir=path)
    return str(path)


def distilled(teacher: Any, *, methods: dict[str, Any] | None = None, **changes: Any):
    kcd = {"teacher": teacher, "keep_ratio": 0.5, "stages": 3, **changes.pop("kcd", {})}
    changes.setdefault("train", {"epochs": 6})
    return recipe(methods={"kcd": kcd, **(methods or {})}, **changes)


def rows(run: Path | str) -> list[dict[str, str]]:
    with Path(run, "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def record(run: Path | str) -> dict[str, Any]:
    return json.loads(Path(run, "methods.json").read_text())["methods"][0]


def stop_at(epoch: int, monkeypatch) -> None:
    import tenfold.tasks.progress as progress

    start = progress.MetricsFile.on_train_epoch_start

    def stop(self, trainer, module):
        if trainer.current_epoch == epoch:
            raise RuntimeError("pulled the plug")
        start(self, trainer, module)

    monkeypatch.setattr(progress.MetricsFile, "on_train_epoch_start", stop)


def test_a_run_draws_what_the_schedule_says_and_tells_what_it_saved(teacher):
    run = train(distilled(teacher), run_dir="runs/a")
    assert run is not None
    assert [float(row["kept"]) for row in rows(run.path)] == [s for s in SIZES[:3] for _ in (0, 1)]
    drawn = 2 * sum(SIZES[:3])
    assert record(run.path)["forwards"] == {"student": drawn, "teacher": drawn}
    assert int(rows(run.path)[-1]["step"]) == sum(-(-s // 64) for s in SIZES[:3] for _ in (0, 1))
    assert float(rows(run.path)[-1]["learning_rate"]) < 0.02  # the schedule knew the length
    assert list(run.model.state_dict()) == list(nets.small(10).state_dict())
    page = write_report(run.path).read_text()
    assert "What kcd did" in page
    assert f"{drawn:,} of 1,536" in page
    assert page.count("data:image/png;base64,") == 24
    assert "digits[" in page


def test_every_epoch_is_validated_though_epochs_become_shorter(teacher, monkeypatch):
    """Lightning counts batches up to the length that it saw first."""
    from tenfold.tasks.classification import Classification

    seen = []
    end = Classification.on_validation_epoch_end
    monkeypatch.setattr(
        Classification,
        "on_validation_epoch_end",
        lambda self: (seen.append(self.current_epoch), end(self))[1],
    )
    train(distilled(teacher), run_dir="runs/a")
    assert seen == list(range(6))


@pytest.mark.parametrize(
    "kcd",
    [
        {},
        {"mix_source": "original"},
        {"distiller": "contrast", "layers": ["7"], "negatives": 16},
        {"teacher_cache": "answers"},
    ],
    ids=["current", "original", "contrast", "cache"],
)
def test_resume_equals_the_unbroken_run(teacher, kcd, monkeypatch):
    values = distilled(teacher, kcd=kcd, methods={"lbc": {"n": 2, "m": 4}})
    whole = train(values, run_dir="runs/whole")
    shutil.rmtree("answers", ignore_errors=True)
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(values, run_dir="runs/broken")
    resumed = train(values, run_dir="runs/broken", resume=True)
    assert whole is not None
    assert resumed is not None
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert rows(whole.path) == rows(resumed.path)
    ours, theirs = record(whole.path), record(resumed.path)
    if "teacher_cache" in kcd:  # what was answered ahead of the interruption isn't asked again
        for found in (ours, theirs):
            assert found["forwards"].pop("teacher") < found["forwards"]["student"]
            found.pop("facts")
    assert ours == theirs


def test_beside_lbc(teacher):
    run = train(distilled(teacher, methods={"lbc": {"n": 2, "m": 4}}), run_dir="runs/both")
    assert run is not None
    assert nm_pattern(run.model[3].weight) == (2, 4)
    assert json.loads((run.path / "run.json").read_text())["label"] == "lbc+kcd"
    exported = tenfold.export(run.model, "runs/both.onnx", torch.zeros(1, 1, 8, 8))
    assert all(check.max_difference < 1e-4 for check in exported.checks)


def test_workers_draw_the_kept_images_also_after_a_resume(teacher, monkeypatch):
    """Lightning starts a resumed loader's processes before it announces the epoch."""
    plain = {"name": "digits", "limit": 256}
    alone = train(distilled(teacher, data=plain), run_dir="runs/alone")
    values = distilled(teacher, data={**plain, "workers": 1})
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(values, run_dir="runs/workers")
    run = train(values, run_dir="runs/workers", resume=True)
    assert alone is not None
    assert run is not None
    for key, value in alone.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[key]), key


# -- the teacher ----------------------------------------------------------------------------------


def test_a_named_teacher_is_trained_first_and_kept(capsys):
    values = distilled({"name": f"{NETS}:small", "width": 12})
    run = train(values, run_dir="runs/a")
    assert run is not None
    assert "first the teacher" in capsys.readouterr().out
    kept = Path("runs/a-teacher")
    alone = train(
        recipe(methods={}, model={"name": f"{NETS}:small", "width": 12}, train={"epochs": 6}),
        run_dir="runs/alone",
    )
    assert alone is not None
    guide = tenfold.load(kept, model=nets.small(10, width=12))
    for key, value in alone.model.state_dict().items():
        assert torch.equal(value, guide.state_dict()[key]), key
    before = (kept / "run.json").stat().st_mtime_ns
    again = train(values, run_dir="runs/a", overwrite=True)
    assert (kept / "run.json").stat().st_mtime_ns == before, "it is not trained anew"
    named = train(distilled(str(kept)), run_dir="runs/named")
    assert again is not None
    assert named is not None
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
        assert torch.equal(value, named.model.state_dict()[key]), key
    with pytest.raises(UserError, match=r"the teacher of kcd: .*differs in train\.epochs"):
        train({**values, "train": {**values["train"], "epochs": 7}}, run_dir="runs/a",
              overwrite=True)  # fmt: skip


def test_an_interrupted_teacher_goes_on(monkeypatch):
    values = distilled(f"{NETS}:small")
    with monkeypatch.context() as patched:
        stop_at(2, patched)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(values, run_dir="runs/a")
    assert len(rows("runs/a-teacher")) == 2
    assert train(values, run_dir="runs/a") is not None
    assert len(rows("runs/a-teacher")) == 6


def test_an_artifact_and_a_run_are_the_same_teacher(teacher):
    tenfold.save(tenfold.load(teacher, model=nets.small(10, width=16)), "alone")
    with pytest.raises(UserError, match="holds a network of your own code"):
        tenfold.plan(distilled("alone"))
    plan = tenfold.plan(distilled(teacher))
    assert any("teacher" in note for note in plan.notes)


def test_a_teacher_that_knows_another_scale_is_given_its_own(teacher):
    """Its images were normalised by other constants than the student's: the answers must agree."""
    data = create({"name": "digits", "limit": 256, "mean": [0.2], "std": [0.7]})
    values = load_recipe(distilled(teacher))
    other = open_network("kcd", "teacher", teacher, values, data)
    theirs = create({"name": "digits", "limit": 256})
    original = tenfold.load(teacher, model=nets.small(10, width=16))
    images = theirs.train_images(torch.arange(5))
    with torch.no_grad():
        torch.testing.assert_close(
            other.network(data.normalize(images)), original(theirs.normalize(images))
        )
    assert not other.network.training
    assert not any(p.requires_grad for p in other.network.parameters())


def test_published_weights_by_name(monkeypatch):
    """A pretrained name is built for the data's classes, filled, and fed on its own scale."""
    from tenfold.nn import models

    def load(model: nn.Module, network) -> list[str]:
        with torch.no_grad():
            model.get_parameter("fc.bias").fill_(7.0)
        return []

    monkeypatch.setattr(models, "load_pretrained", load)
    data = create({"name": "digits", "limit": 64})
    values = load_recipe(distilled("timm/resnet10t"))
    other = open_network("kcd", "teacher", "timm/resnet10t", values, data)
    assert other.recipe is None
    assert "published" in other.origin
    assert float(other.network.fc.bias[0]) == 7.0
    assert not other.network.fc.bias.requires_grad
    monkeypatch.setattr(models, "load_pretrained", lambda *_: ["fc.weight", "fc.bias"])
    with pytest.raises(UserError, match=r"lack fc\.weight, fc\.bias for the 10 classes of digits"):
        open_network("kcd", "teacher", "timm/resnet10t", values, data)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kcd", "changes", "text"),
    [
        ({"teacher": "resnt56"}, {}, r"methods\.kcd\.teacher 'resnt56': did you mean resnet56"),
        ({"teacher": "runs/nowhere"}, {}, r"methods\.kcd\.teacher: runs/nowhere does not exist"),
        ({"teacher": {"width": 3}}, {}, "a mapping with a name"),
        ({"stages": 7}, {}, r"methods\.kcd: stages=7 and 6 epochs"),
        ({"keep_ratio": 0.0}, {}, r"methods\.kcd: keep_ratio=0\.0"),
        ({"keep_ratio": 0.2, "stages": 1}, {}, "204 samples would leave in stage 1"),
        ({"keep_ratoi": 0.2}, {}, r"did you mean methods\.kcd\.keep_ratio"),
        ({"stages": "many"}, {}, "methods.kcd.stages: expected int, got 'many'"),
        ({"distiller": "sp", "layers": ["layer3"]}, {}, "no module 'layer3'"),
        ({"teacher_cache": "memory"}, {"train": {"epochs": 6, "augment": "randaugment"}},
         "needs views that can be counted"),
        ({}, {"train": {"epochs": 6, "augment": "imagenet"}}, "mix_source: original"),
        ({}, {"train": {"epochs": 6, "mixup": 0.2}}, "kcd replaces the batch's loss"),
        ({}, {"trainer": {"limit_train_batches": 2}}, "kcd ranks them all"),
        ({}, {"methods": {f"{Path(__file__).parents[1] / 'made_up.py'}:Focal": {}}},
         "both replace the batch's loss"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_starts(teacher, kcd, changes, text):
    kcd = {"teacher": teacher, **kcd}
    with pytest.raises(UserError, match=text):
        train(distilled(kcd.pop("teacher"), kcd=kcd, **changes), run_dir="runs/refused")
    assert not Path("runs").exists()


def test_a_teacher_of_other_classes_or_sizes(teacher):
    values = distilled(teacher, data={"name": "digits", "limit": 256, "size": [12, 12]})
    with pytest.raises(UserError, match="takes images of 1x8x8, and digits gives 1x12x12"):
        tenfold.plan(values)
    facts = json.loads(Path(teacher, "model/model.json").read_text())
    own = tenfold.load(teacher, model=nets.small(10, width=16))
    tenfold.save(own, "cats", preprocessing=facts["preprocessing"], classes=["cat"] * 10)
    with pytest.raises(UserError, match=r"knows the classes cat, cat, cat, … \(10\)"):
        tenfold.plan(distilled("cats"))


def test_a_run_is_not_its_own_teacher(teacher):
    shutil.copytree(teacher, "runs/a")
    with pytest.raises(UserError, match="is this run itself"):
        train(distilled("runs/a"), run_dir="runs/a", overwrite=True)
    assert Path("runs/a/model/model.json").is_file()


def test_the_data_object_of_the_user_is_left_alone(teacher):
    """Images are mixed in a place of their own: the next run on the same object finds them new."""
    data = create({"name": "digits", "limit": 256})
    before = data.train_images(torch.arange(256)).clone()
    values = distilled(teacher)
    runs = [train(values, data=data, run_dir=f"runs/{number}") for number in (1, 2)]
    assert torch.equal(data.train_images(torch.arange(256)), before)
    assert runs[0] is not None
    assert runs[1] is not None
    assert evaluate(runs[0].model, data) == evaluate(runs[1].model, data)
    for key, value in runs[0].model.state_dict().items():
        assert torch.equal(value, runs[1].model.state_dict()[key]), key
