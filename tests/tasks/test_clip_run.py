"""Runs on clips, from training to every verb, and what they have in common with runs on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.cli import main
from tenfold.data import create
from tenfold.errors import UserError
from tenfold.measure import OnnxModel
from tenfold.nn.winograd import WinogradConv3d
from tenfold.report import write_report
from tenfold.tasks.classification import as_batch, inputs_of
from tenfold.tasks.run import train
from tenfold.tasks.verbs import bench_run, export_run, predict
from tests.data.conftest import moving, write_video

pytestmark = pytest.mark.path


def recipe(**changes: Any) -> dict[str, Any]:
    """A run of seconds: a C3D of two channels on 4 x 16 x 16 motions."""
    values: dict[str, Any] = {
        "task": "classification",
        "data": {"name": "motions", "frames": 4, "size": 16, "train_clips": 64, "test_clips": 24},
        "model": {"name": "c3d", "width": 2, "hidden": 8, "batch_norm": True},
        "train": {"epochs": 1, "batch_size": 16, "lr": 0.02},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if key == "train" else value
    return values


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    finished = train(recipe(), run_dir=tmp_path_factory.mktemp("clips") / "run")
    assert finished is not None
    assert (finished.evaluation.images, finished.evaluation.unit) == (24, "clip")
    assert "of 24 held-out clips" in str(finished.evaluation)
    return finished.path


def test_the_artifact_knows_its_clips(run: Path) -> None:
    model = tenfold.load(run)
    assert model(torch.zeros(2, 3, 4, 16, 16)).shape == (2, 8)
    again = tenfold.evaluate(run)
    other = tenfold.evaluate(model, create(recipe()["data"]), batch_size=7)
    assert (again.accuracy, again.images, again.data) == (other.accuracy, 24, "motions")
    assert again.loss == pytest.approx(other.loss, rel=1e-5)
    with pytest.raises(UserError, match=r"the model doesn't take an image of 1x8x8 \(digits\)"):
        tenfold.evaluate(run, "digits")


def test_exported_it_gives_the_same_accuracy(run: Path) -> None:
    result = export_run(run)
    assert len(result.folded) == 8
    assert {check.runtime for check in result.checks} == {"onnxruntime", "openvino"}
    exported = tenfold.evaluate(run, to="onnx")
    assert exported.runtime == "onnxruntime"
    assert exported.accuracy == tenfold.evaluate(run).accuracy
    clips = torch.randn(3, 3, 4, 16, 16)
    model = tenfold.load(run)
    torch.testing.assert_close(OnnxModel(result.path)(clips), model(clips), atol=1e-4, rtol=1e-4)
    assert tenfold.evaluate(result.path).accuracy == exported.accuracy


def test_it_is_timed_and_reported(run: Path) -> None:
    result = bench_run(run, batch_sizes=[2], runtimes=["pytorch", "tenfold"], seconds=0.1)
    assert {row.runtime for row in result.latency} >= {"pytorch", "tenfold"}
    size = next(iter(result.size.values()))
    assert size.macs > 0
    page = write_report(run).read_text(encoding="utf-8")
    assert "MACs are per clip." in page
    assert "Clips/s" in page
    assert "mage" not in page.partition("</style>")[2]


def test_layers_that_a_method_replaces_come_through_every_verb(tmp_path: Path) -> None:
    methods = {"winograd3d": {"mode": "factor", "rank": 2, "keep_ratio": 0.5, "min_channels": 2}}
    finished = train(recipe(methods=methods), run_dir=tmp_path / "run")
    assert finished is not None
    rows = json.loads((finished.path / "layers.json").read_text(encoding="utf-8"))["layers"]
    treated = [row for row in rows if row["treatment"] == "Winograd 2x2x2 factor rank 2"]
    assert [row["shape"][0] for row in treated] == [32] * 7  # columns that are kept of 64
    model = tenfold.load(finished.path)
    layers = [module for module in model.modules() if isinstance(module, WinogradConv3d)]
    assert len(layers) == 7
    result = export_run(finished.path)
    assert len(result.folded) == 8
    assert {check.runtime for check in result.checks} == {"onnxruntime", "openvino"}
    assert all(check.max_difference < 1e-4 for check in result.checks)
    exported = tenfold.evaluate(finished.path, to="onnx")
    assert exported.accuracy == finished.evaluation.accuracy
    page = write_report(finished.path).read_text(encoding="utf-8")
    assert "Winograd 2x2x2 factor rank 2" in page


def test_predict_takes_videos_and_folders(run: Path, tmp_path: Path, capsys) -> None:
    from PIL import Image

    pictures = moving(0, 9, (20, 20))
    (tmp_path / "frames").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "frames" / f"{number}.png")
    video = write_video(tmp_path / "clip.mp4", pictures)
    found = predict(run, [tmp_path / "frames", video], top=8)
    for prediction in found:
        assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-5)
        assert {*prediction.classes} == {*create("motions").classes}
    # The video is the same clip, but for its compression.
    by_name = [dict(zip(p.classes, p.probabilities, strict=True)) for p in found]
    assert all(abs(by_name[0][name] - by_name[1][name]) < 0.1 for name in by_name[0])
    assert main(["predict", str(run), str(tmp_path / "gone.avi")]) == 2
    assert "can't read clip" in capsys.readouterr().err


def test_resume_equals_the_unbroken_run(monkeypatch, tmp_path: Path) -> None:
    """Frames by chance, shifts, dropout and mixing: all of it comes back."""
    from tenfold.tasks import progress

    root = tmp_path / "clips"
    folders = {"a": range(0, 6), "b": range(6, 12)}
    from PIL import Image

    for split in ("train", "val"):
        for name, numbers in folders.items():
            for number in numbers:
                folder = root / split / name / str(number)
                folder.mkdir(parents=True)
                for k, picture in enumerate(moving(number, 7, (20, 20))):
                    Image.fromarray(picture).save(folder / f"{k}.png")
    values = recipe(
        data={"name": "frames", "path": str(root), "frames": 4, "size": 16},
        train={
            "epochs": 4, "batch_size": 4, "augment": "flip_crop", "mixup": 0.2, "cutmix": 1.0,
        },
    )  # fmt: skip
    whole = train(values, run_dir="runs/whole")
    start = progress.MetricsFile.on_train_epoch_start

    def stop(self: Any, trainer: Any, task: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt
        start(self, trainer, task)

    monkeypatch.setattr(progress.MetricsFile, "on_train_epoch_start", stop)
    with pytest.raises(KeyboardInterrupt):
        train(values, run_dir="runs/broken")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    resumed = train(values, run_dir="runs/broken", resume=True)
    assert whole is not None
    assert resumed is not None
    state = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert whole.evaluation == resumed.evaluation


def test_plan_and_other_methods_see_the_convolutions() -> None:
    values = recipe(
        model={"name": "c3d", "width": 4, "hidden": 8}, methods={"lbc": {"n": 2, "m": 4}}
    )
    plan = tenfold.plan(values)
    types = [row["type"] for row in plan.layers]
    assert types == ["Conv3d"] * 8 + ["Linear"] * 3
    assert plan.macs == sum(row["macs"] for row in plan.layers)
    assert [row["kept"] for row in plan.layers][:2] == [1.0, 0.5]  # the first one stays dense


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "resnet20"}, r"model resnet20 doesn't take a clip of 3x4x16x16 \(motions\)"),
        ({"data": "digits"}, r"doesn't take an image of 1x8x8|c3d can't be built"),
        ({"model": {"name": "unet3d", "levels": 1, "width": 1}}, "for one clip: expected logits"),
        ({"train": {"augment": "flip_crop"}}, "a mirrored clip of motions is of another class"),
        (
            {"methods": {"kcd": {"teacher": "c3d"}}},
            r"methods\.kcd: it looks at training images, and motions gives clips",
        ),
    ],
)
def test_what_is_refused_before_anything_starts(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text) as error:
        train(recipe(**changes), run_dir="runs/refused")
    assert "\n" not in str(error.value)
    assert not Path("runs/refused").exists()


def test_shipped_recipes_for_clips_are_whole() -> None:
    """Parsed, and built as far as that needs neither files nor weights."""
    from tenfold.data import DataOptions
    from tenfold.nn import models
    from tenfold.tasks.recipe import load_recipe

    for name in ("motions-c3d-dense", "ucf101-r3d18-dense", "winograd-c3d-motions"):
        found = load_recipe(name)
        options = DataOptions.parse(found.data)
        with torch.device("meta"):
            model, _ = models.build(
                found.model_name,
                num_classes=4,
                size=options.size or (32, 32),
                frames=options.frames or 8,
                options=found.model_options,
            )
        assert any(isinstance(module, nn.Conv3d) for module in model.modules())
        for method in found.make_methods():
            assert any(layer.treatment for layer in method.plan(model))


def test_batches_of_clips() -> None:
    clip, label = torch.zeros(2, 3, 4, 8, 8), torch.zeros(2)
    batch = as_batch({"clip": clip, "label": label})
    assert inputs_of(batch) is clip
    assert inputs_of(as_batch((clip, label))) is clip  # a plain loader's
    with pytest.raises(UserError, match="with image or clip, label and id"):
        as_batch({"video": clip, "label": label})


def test_mixing_takes_boxes_out_of_every_frame() -> None:
    from tenfold.tasks.classification import _mixing
    from tenfold.tasks.recipe import Train

    mix = _mixing(Train(cutmix=1.0), 4)
    assert mix is not None
    torch.manual_seed(0)
    clips: Tensor = (
        torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 5, 16, 16).contiguous()
    )
    mixed, shares = mix(clips, torch.arange(4))
    assert type(mixed) is Tensor
    assert mixed.shape == clips.shape
    assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))  # the same box in all frames
    own = (mixed[:, 0, 0] == clips[:, 0, 0]).float().mean((1, 2))
    np.testing.assert_allclose(shares[torch.arange(4), torch.arange(4)], own, atol=1e-6)
    assert 0 < own[0] < 1
