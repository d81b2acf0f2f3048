"""The task translation from a recipe to a student that is exported, timed and used on a photo."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import tenfold
from tenfold.cli import main
from tenfold.errors import UserError
from tenfold.measure import OnnxModel, OpenVinoModel
from tenfold.nn.generators import MobileResNetGenerator
from tenfold.nn.stagenet import StageNet
from tenfold.tasks.translation_evaluation import TranslationEvaluation
from tests.translations import make_pairs, make_unpaired, picture, recipe

ALL = {"dcd": {}, "crd": {"weight": 5}, "omgd": {"channel": 10}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("images")
    return {"pairs": make_pairs(made / "pairs"), "unpaired": make_unpaired(made / "unpaired")}


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """An extractor of random weights: what it measures means nothing, and is the same each time."""
    path = tmp_path_factory.mktemp("extractor") / "stagenet"
    torch.manual_seed(0)
    facts = {"channels": 3, "size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    network = {"name": "tenfold/stagenet", "arguments": {"width": 4, "num_classes": 3}}
    tenfold.save(StageNet(width=4, num_classes=3).eval(), path, network, preprocessing=facts)
    return str(path)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """One run of pairs by all methods, which several tests look at."""
    path = tmp_path_factory.mktemp("runs") / "pairs"
    return tenfold.train(recipe(folders["pairs"], methods=ALL), run_dir=path)


def test_a_run_leaves_a_student_that_is_loaded_anywhere(finished):
    loaded = tenfold.load(finished.path)
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    assert isinstance(loaded, MobileResNetGenerator)
    assert torch.equal(loaded(x), finished.model(x))
    assert not [name for name in loaded.state_dict() if "tenfold" in name]
    teacher = tenfold.load(finished.path / "teacher")
    assert teacher.ngf == 6
    again = tenfold.evaluate(finished.path)
    assert again == finished.evaluation
    assert finished.evaluation.l1 < 1
    assert "3 held-out images" in str(again)


def test_its_record_tells_every_loss_and_shows_pictures(finished):
    rows = (finished.path / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    for name in ("dcd", "relations", "similarity", "variation", "channel", "adversarial",
                 "teacher_adversarial", "teacher_reconstruction", "discriminator", "test_l1",
                 "test_ssim", "train_loss"):  # fmt: skip
        assert name in columns
    assert "style" not in columns
    assert len(rows) == 3
    for epoch in (1, 2):
        with Image.open(finished.path / "samples" / f"epoch_{epoch:04d}.png") as grid:
            assert grid.size == (4 * 96, 2 * 96), "input, teacher, student, target; two rows"
    page = (finished.path / "report.html").read_text()
    assert "epoch 2: input, teacher, student, target" in page
    facts = json.loads((finished.path / "run.json").read_text())
    assert facts["macs"]["paper"] > facts["macs"]["true"]


def test_the_exported_student_takes_any_size_and_is_the_same(finished, capsys):
    assert main(["export", str(finished.path)]) == 0
    assert "outputs equal" in capsys.readouterr().out
    file = finished.path / "export" / "model.onnx"
    for size in ((96, 96), (64, 120)):
        x = torch.rand(1, 3, *size) * 2 - 1
        with torch.no_grad():
            expected = finished.model(x)
        for runtime in (OnnxModel(file), OpenVinoModel(file)):
            assert float((runtime(x) - expected).abs().max()) < 1e-4
    found = tenfold.evaluate(file)
    assert found.runtime == "onnxruntime"
    assert found.l1 == pytest.approx(finished.evaluation.l1, abs=1e-5)


def test_predict_translates_a_photo_of_any_size(finished, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.concatenate([picture(3), picture(4)], axis=1)[:90, :150]).save(photo)
    command = ["predict", str(finished.path), str(photo), "--out", str(tmp_path / "made")]
    assert main(command) == 0
    target = tmp_path / "made" / "photo.png"
    assert str(target) in capsys.readouterr().out
    with Image.open(target) as made:
        assert made.size == (150, 90)
        whole = np.asarray(made).astype(int)
    assert main(command) == 2
    assert "exists: pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--tile", "64"]) == 0
    with Image.open(target) as made:
        assert np.abs(np.asarray(made).astype(int) - whole).max() <= 1, "tiles leave no seams"


def test_bench_sets_it_beside_its_teacher_and_the_original(finished, capsys):
    command = ["bench", str(finished.path), "--seconds", "0.05", "--batch", "1", "--runtime",
               "pytorch", "onnxruntime"]  # fmt: skip
    assert main(command) == 0
    found = json.loads((finished.path / "bench.json").read_text())
    assert found["models"] == ["ResNet-9", "teacher", "dcd+crd+omgd"]


def test_plan_says_what_networks_cost_and_who_teaches(folders, capsys):
    text = str(tenfold.plan(recipe(folders["unpaired"], methods={"crd": {}})))
    assert "as the papers count" in text
    assert "student     learns by adversarial x 1, crd" in text
    assert "epochs      2 teacher, 2 student" in text


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
def test_a_run_that_is_killed_and_goes_on_equals_one_that_is_not(
    kind, folders, extractor, tmp_path, monkeypatch
):
    """The same weights, though pools, best teachers and methods have a state of their own."""
    from tenfold.tasks.translation import Translation

    given = recipe(
        folders[kind],
        methods={"dcd": {}, "crd": {"weight": 5}},
        gan={"extractor": extractor, "keep": "best", "pool": 2},
    )
    whole = tenfold.train(given, run_dir=tmp_path / "whole")
    step, calls = Translation.training_step, []

    def killed(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Translation, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tenfold.train(given, run_dir=tmp_path / "parts")
    monkeypatch.setattr(Translation, "training_step", step)
    parts = tenfold.train(given, run_dir=tmp_path / "parts", resume=True)
    for name in ("model", "teacher"):
        one, two = (tenfold.load(run.path / name).state_dict() for run in (whole, parts))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert parts.evaluation == whole.evaluation
    text = str(parts.evaluation)
    assert "FID[stagenet " in text or "FID[" in text
    assert TranslationEvaluation.from_dict(whole.evaluation.to_dict()) == whole.evaluation
    assert tenfold.evaluate(parts.path) == whole.evaluation


def test_perceptual_losses_by_a_run_of_our_own_extractor(folders, extractor, tmp_path):
    given = recipe(folders["pairs"], methods={"crd": {}}, train={"epochs": 1},
                   gan={"style": None, "feature": None, "perceptual": extractor})  # fmt: skip
    run = tenfold.train(given, run_dir=tmp_path / "run")
    columns = (run.path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"style", "feature"} <= set(columns)
    assert "stagenet" in (run.path / "methods.json").read_text()


def test_a_unet_with_batch_norm_learns_and_is_evaluated(folders, tmp_path):
    given = recipe(folders["pairs"], model={"name": "unet_generator", "ngf": 4, "levels": 5},
                   gan={"teacher": {"ngf": 4, "levels": 5}}, methods={"crd": {}})  # fmt: skip
    run = tenfold.train(given, run_dir=tmp_path / "run")
    assert run.evaluation.images == 3


def test_a_plain_student_learns_from_targets_or_from_the_teacher(folders, tmp_path):
    for kind in ("pairs", "unpaired"):
        run = tenfold.train(recipe(folders[kind], train={"epochs": 1}), run_dir=tmp_path / kind)
        columns = (run.path / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"adversarial", "reconstruction"} <= set(columns)


def test_the_teacher_starts_from_a_checkpoint_of_the_authors_code(folders, tmp_path):
    torch.manual_seed(3)
    source = MobileResNetGenerator(6, blocks=3)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    state |= {"module.model.2.running_mean": torch.zeros(6)}  # of old checkpoints
    torch.save(state, tmp_path / "latest_net_G.pth")
    from tenfold.tasks.translation_setup import set_up_translation

    given = recipe(folders["pairs"], gan={"teacher_init": str(tmp_path / "latest_net_G.pth")})
    made = set_up_translation(given).teacher.generator.state_dict()
    assert all(torch.equal(made[key], value) for key, value in source.state_dict().items())
    given["gan"]["teacher"] = {"ngf": 8, "blocks": 3}
    with pytest.raises(
        UserError, match=r"gan.teacher_init .* model.1.weight \(6, 3, 7, 7\) instead"
    ):
        set_up_translation(given)
    given["gan"] |= {"teacher": {"ngf": 6, "blocks": 4}}
    with pytest.raises(UserError, match=r"missing model.13.conv_block.1.conv.0.weight"):
        set_up_translation(given)


def test_a_student_with_sparse_weights(folders, tmp_path):
    """LBC beside DCD and CRD: half of every block of four weights of the pointwise layers."""
    given = recipe(folders["pairs"], methods={"lbc": {"n": 2, "m": 4}, "dcd": {}, "crd": {}})
    assert "2:4" in str(tenfold.plan(given))
    run = tenfold.train(given, run_dir=tmp_path / "run")
    weight = tenfold.load(run.path).model[10].conv_block[1].conv[2].weight
    blocks = weight.flatten(1).unflatten(1, (-1, 4))
    assert torch.equal((blocks != 0).sum(2), torch.full(blocks.shape[:2], 2))


def test_the_best_is_chosen_by_images_that_are_not_reported(folders, extractor, tmp_path):
    given = recipe(folders["pairs"], train={"epochs": 3},
                   gan={"validation": 2, "keep": "best", "extractor": extractor})  # fmt: skip
    run = tenfold.train(given, run_dir=tmp_path / "run")
    rows = list(csv.DictReader((run.path / "metrics.csv").open()))
    assert {"validation_fid", "validation_l1", "test_l1"} <= set(rows[0])
    best = min(rows, key=lambda row: float(row["validation_fid"]))
    assert run.evaluation.l1 == pytest.approx(float(best["test_l1"]), abs=1e-5)
    given["gan"]["validation"] = 6
    with pytest.raises(UserError, match="6 of 6 training images"):
        tenfold.train(given, run_dir=tmp_path / "other")


def test_half_precision_trains(folders, tmp_path):
    given = recipe(folders["pairs"], methods={"dcd": {}, "crd": {}}, train={"epochs": 1},
                   trainer={"precision": "bf16-mixed"})  # fmt: skip
    run = tenfold.train(given, run_dir=tmp_path / "run")
    assert run.evaluation.l1 < 1
    assert next(run.model.parameters()).dtype == torch.float32
