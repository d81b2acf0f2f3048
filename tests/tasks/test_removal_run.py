"""The task shadow_removal from a recipe to a remover that is evaluated, timed and told about."""

from __future__ import annotations

import base64
import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import tenfold
from tenfold.cli import main
from tenfold.data import create_shadows
from tenfold.deploy.shadow_photo import remove_shadow
from tenfold.errors import UserError
from tenfold.nn.blocks import nm_pattern
from tenfold.nn.labnet import LABNet
from tenfold.nn.shadow_remover import ShadowRemover
from tenfold.tasks.folder import RunFolder
from tenfold.tasks.removal_evaluation import (
    RemovalEvaluation,
    evaluate_remover,
    floats,
    removed,
)
from tenfold.tasks.removal_setup import removal_example
from tenfold.tasks.removal_verbs import compared_removers, remover_example
from tenfold.tasks.shadow_verbs import remover_of
from tests.removals import Affine, make_triplets, recipe

pytestmark = pytest.mark.path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_triplets(tmp_path_factory.mktemp("photos") / "istd")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """One run, which several tests look at."""
    path = tmp_path_factory.mktemp("runs") / "run"
    methods = {"labnet": {"start": "identity", "gradient": 0, "guess": "ring"}}
    return tenfold.train(recipe(folder, methods=methods), run_dir=path)


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def without_time(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run)]


def equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_leaves_a_network_that_is_loaded_anywhere(finished):
    loaded = tenfold.load(finished.path)
    codes, mask = torch.rand(1, 3, 70, 90), torch.zeros(1, 1, 70, 90)
    mask[..., 20:50, 30:60] = 1
    assert isinstance(loaded, LABNet)
    with torch.no_grad():
        assert torch.equal(loaded(codes, mask), finished.model(codes, mask))
    kept = json.loads((finished.path / "model" / "model.json").read_text())
    assert kept["network"] == {
        "name": "tenfold/labnet", "arguments": {"width": 4, "attention_size": 16}}  # fmt: skip
    facts = kept["preprocessing"]
    assert {key: facts[key] for key in ("task", "space", "guess", "composite", "size")} == {
        "task": "shadow_removal", "space": "lab", "guess": "ring", "composite": True,
        "size": [68, 68]}  # fmt: skip


def test_it_is_evaluated_by_region_beside_the_photo_as_it_is(finished):
    found = finished.evaluation
    assert tenfold.evaluate(finished.path) == found
    assert RemovalEvaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    text = str(found)
    assert "3 held-out photos" in text
    assert "LAB MAE, called RMSE" in text
    assert text.splitlines()[2].startswith("shadow")
    # It begins with the shadow brightened by its ring, in scenes that have one gain.
    assert found.result["shadow"]["lab_mae"] < 0.5 * found.untouched["shadow"]["lab_mae"]
    assert found.score == found.result["shadow"]["lab_mae"]
    last = rows(finished.path)[-1]
    # Another order of channels in memory, and results in 8 bits: a few pixels differ by one level.
    assert float(last["test_shadow_lab_mae"]) == pytest.approx(found.score, abs=0.01)
    assert set(found.figures()) <= set(last)
    assert {"loss_perceptual", "loss_gradient", "loss_mse", "train_loss"} <= set(last)


def test_the_figures_are_those_of_the_written_files(finished, folder, tmp_path):
    """The evaluator of anybody's folders finds the same, at the size that was evaluated at."""
    from tenfold.tasks.shadow_evaluation import evaluate_shadows

    data = create_shadows({"name": "triplets", "path": str(folder), "size": 68, "test_size": 72})
    facts = json.loads((finished.path / "model" / "model.json").read_text())["preprocessing"]
    remover = remover_of(finished.model, facts)
    names = {"made": None, "free": "target", "mask": "mask"}
    for name in names:
        (tmp_path / name).mkdir()
    for number, batch in enumerate(data.test_loader(batch_size=1)):
        made = remover(batch["image"].float() / 255, batch["mask"].float())
        pixels = {
            "made": made.mul(255).round().to(torch.uint8)[0],
            "free": batch["target"][0],
            "mask": batch["mask"][0] * 255,
        }
        for name, image in pixels.items():
            array = image.permute(1, 2, 0).numpy()
            Image.fromarray(array[..., 0] if name == "mask" else array).save(
                tmp_path / name / f"{number}.png"
            )
    found = evaluate_shadows(
        tmp_path / "made", tmp_path / "free", tmp_path / "mask", size=(72, 72)
    ).to_dict()
    for region, row in found["mean_of_images"]["results"].items():
        assert row == pytest.approx(finished.evaluation.result[region], abs=1e-3)


def test_its_record_has_curves_baselines_and_pictures(finished):
    found = json.loads((finished.path / "methods.json").read_text())["methods"][0]
    facts = dict(found["facts"])
    for name in ("this network", "the photo as it is", "one affine LAB fit", "ring-matched gain",
                 "oracle gain (knows the truth)"):  # fmt: skip
        assert "shadow" in facts[name], name
    assert "phi_0 alone" in facts["perceptual"]
    assert [line["label"] for line in found["charts"][0]["lines"]] == [
        "shadow",
        "non-shadow",
        "all",
    ]
    (group,) = found["images"]
    assert [item["caption"].split(":")[0] for item in group["items"]] == ["best", "median", "worst"]
    for item in group["items"]:
        with Image.open(io.BytesIO(base64.b64decode(item["png"]))) as picture:
            assert picture.size == (3 * 72 + 4, 2 * 72 + 2)
            pixels = np.asarray(picture).astype(int)
        given, mask, before, made, truth, after = (
            pixels[top : top + 72, left : left + 72] for top in (0, 74) for left in (0, 74, 148)
        )
        assert set(np.unique(mask)) == {0, 255}
        assert np.abs(given - truth)[mask == 0].mean() < 1
        for photo, shown in ((given, before), (made, after)):
            wrong = np.abs(photo - truth).sum(2)
            levels = shown.sum(2)
            assert levels[wrong == wrong.max()].mean() > levels[wrong == 0].mean(), "bright is bad"
        assert after.sum() < before.sum()
    page = tenfold_report(finished.path)
    assert "worst: " in page
    assert "the removal of shadows" in page


def tenfold_report(path):
    from tenfold.report import write_report

    return write_report(path).read_text()


def test_bench_gives_codes_and_mask(finished, capsys):
    command = ["bench", str(finished.path), "--seconds", "0.02", "--batch", "1", "--runtime",
               "pytorch"]  # fmt: skip
    assert main(command) == 0
    found = json.loads((finished.path / "bench.json").read_text())
    assert found["models"] == ["labnet"]
    assert found["latency"][0]["median_ms"] > 0


def test_the_example_of_bench_has_a_shadow(finished):
    from tenfold.deploy import artifact

    codes, mask = remover_example(artifact.read(finished.path / "model"))
    assert codes.shape == (1, 3, 68, 68)
    assert float(mask.mean()) == pytest.approx(0.25, abs=0.01)


def test_a_run_that_is_killed_and_goes_on_equals_one_that_is_not(folder, tmp_path, monkeypatch):
    """The same weights, with a running average and N:M masks on the way."""
    from tenfold.tasks.shadow_removal import ShadowRemoval

    given = recipe(
        folder,
        data={"size": 80},
        model={"name": "shadow_unet", "width": 4},
        methods={"labnet": {"start": "identity"}, "lbc": {"n": 2, "m": 4, "exclude": ["down.0.*"]}},
        train={"epochs": 3, "ema": 0.9},
    )
    whole = tenfold.train(given, run_dir=tmp_path / "whole")
    step, calls = ShadowRemoval.training_step, []

    def killed(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ShadowRemoval, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tenfold.train(given, run_dir=tmp_path / "parts")
    monkeypatch.setattr(ShadowRemoval, "training_step", step)
    parts = tenfold.train(given, run_dir=tmp_path / "parts", resume=True)
    assert equal(whole.model, parts.model)
    assert without_time(whole.path) == without_time(parts.path)
    assert whole.evaluation == parts.evaluation
    assert nm_pattern(parts.model.down[1][0].weight) == (2, 4)
    assert nm_pattern(parts.model.down[0][0].weight) is None
    done = tenfold.train(given, run_dir=tmp_path / "parts", resume=True)
    assert done.evaluation == whole.evaluation


def test_a_small_sparse_student_learns_from_a_teacher(finished, folder, tmp_path):
    methods = {
        "labnet": {"start": "identity", "guess": "ring", "teacher": str(finished.path)},
        "lbc": {"n": 2, "m": 4, "exclude": ["block1.x.*", "block2.x.*"]},
    }
    given = recipe(folder, methods=methods, train={"epochs": 1})
    assert f"labnet      teacher: {finished.path}" in str(tenfold.plan(given))
    run = tenfold.train(given, run_dir=tmp_path / "student")
    assert float(rows(run.path)[0]["loss_distillation"]) > 0
    assert json.loads((run.path / "run.json").read_text())["label"] == "labnet+lbc"
    assert nm_pattern(run.model.block3.y.middle.conv.weight) == (2, 4)
    assert nm_pattern(run.model.block1.x.middle.conv.weight) is None
    assert equal(tenfold.load(run.path), run.model)
    compared = compared_removers(RunFolder(run.path), RunFolder(run.path).recipe())
    assert equal(compared["teacher"], finished.model)
    assert nm_pattern(compared["dense"].block3.y.middle.conv.weight) is None
    with pytest.raises(UserError, match="is this run itself"):
        tenfold.train(given, run_dir=finished.path, overwrite=True)


@pytest.mark.parametrize("name", ["labnet", "hqss_remover"])
def test_pairs_that_hqss_paints_need_no_photo_without_shadow(name, folder, tmp_path):
    """LAB-Net by its own loss, HQSS's remover by HQSS's; only the held-out photos have a truth."""
    from tenfold.methods import HQSS

    torch.manual_seed(0)
    sizes = {"width": 8, "blocks": 1, "discriminators": False}
    network = {"name": "tenfold/hqss", "arguments": sizes}
    tenfold.save(
        HQSS(**sizes).eval(), tmp_path / "hqss", network, recipe={"task": "shadow_synthesis"}
    )
    models = {
        "labnet": {"name": "labnet", "width": 4, "attention_size": 16},
        "hqss_remover": {"name": "hqss_remover", "width": 8, "blocks": 1},
    }
    own = {} if name == "hqss_remover" else {"labnet": {"start": "identity", "guess": "ring"}}
    given = recipe(
        folder,
        data={"targets": False},
        model=models[name],
        methods={"hqss": {"synthesizer": str(tmp_path / "hqss")}, **own},
        train={"epochs": 1},
    )
    text = str(tenfold.plan(given))
    assert "painted by HQSS; no photo without shadow is read" in text
    assert ("HQSS's own, of its remover" in text) == (name == "hqss_remover")
    run = tenfold.train(given, run_dir=tmp_path / "run")
    parts = {key for key in rows(run.path)[0] if key.startswith("loss_")}
    assert (
        parts
        == {
            "labnet": {"loss_perceptual", "loss_gradient", "loss_mse"},
            "hqss_remover": {"loss_removal", "loss_refinement", "loss_area"},
        }[name]
    )
    assert run.evaluation.result["shadow"]["lab_mae"] > 0
    assert equal(tenfold.load(run.path), run.model)
    assert "one affine LAB fit" not in (run.path / "methods.json").read_text()


def test_a_u_net_in_rgb_and_quantized_weights(folder, tmp_path):
    given = recipe(folder, data={"size": 80}, model={"name": "shadow_unet", "width": 4},
                   methods={"lts": {"bits": 8}}, train={"epochs": 1})  # fmt: skip
    with pytest.warns(UserWarning, match="made for a trained network"):
        run = tenfold.train(given, run_dir=tmp_path / "run")
    facts = json.loads((run.path / "model" / "model.json").read_text())["preprocessing"]
    assert (facts["space"], facts["multiple"]) == ("rgb", 16)
    loaded = tenfold.load(run.path)
    images, mask = torch.rand(1, 3, 80, 80), torch.zeros(1, 1, 80, 80)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images, mask), run.model(images, mask))
    assert (
        evaluate_remover(remover_of(loaded, facts), create_shadows(given["data"])) == run.evaluation
    )


def test_a_network_of_ones_own_and_data_as_an_object(folder, tmp_path):
    given = recipe(folder, train={"epochs": 2}, methods={})
    data = create_shadows(given.pop("data"))
    del given["model"]
    run = tenfold.train(given, model=Affine(), data=data, run_dir=tmp_path / "run")
    assert rows(run.path)[-1]["test_shadow_lab_mae"]
    plain = tenfold.evaluate(run.model, data)
    assert plain.score == pytest.approx(run.evaluation.score, abs=1e-6)
    # An exported file is evaluated by what it tells about itself.
    facts = {"task": "shadow_removal", "space": "lab", "guess": "none", "composite": True}
    told = {"preprocessing": facts, "recipe": {"data": recipe(folder)["data"]}}
    file = tmp_path / "model.onnx"
    tenfold.export(run.model, file, removal_example((68, 68)), metadata=told, dynamic_size=1)
    found = tenfold.evaluate(file)
    assert (found.runtime, found.images) == ("onnxruntime", 3)
    assert found.score == pytest.approx(plain.score, abs=1e-3)


def test_held_out_photos_are_made_as_predict_makes_them(folder):
    """With `side` the network sees a small copy of each photo, and the photo keeps its detail."""
    data = create_shadows({"name": "triplets", "path": str(folder), "size": 68, "test_size": 72})
    images, masks, _ = floats(next(iter(data.test_loader(batch_size=2))))
    images = functional.interpolate(images, (160, 176), mode="bilinear").clamp(0, 1)
    images = images.mul(255).round().div(255)
    masks = functional.interpolate(masks, (160, 176))
    masks[1] = 0
    torch.manual_seed(0)
    network = LABNet(4, attention_size=16).eval()
    network.identity_start()
    small = ShadowRemover(network, guess="ring", side=80)
    made = removed(small, images, masks)
    pixels = images[:1].mul(255).round().to(torch.uint8)
    one = remove_shadow(small, pixels, masks[0, 0].to(torch.uint8), side=80)
    assert one.seen == (80, 88)
    torch.testing.assert_close(made[:1], one.pixels / 255)
    assert torch.equal(made[1], images[1])
    whole = removed(ShadowRemover(network, guess="ring"), images, masks)
    assert not torch.equal(whole[0], made[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_copies_reach_a_network_on_a_gpu():
    torch.manual_seed(0)
    images, masks = torch.rand(1, 3, 100, 120).cuda(), torch.zeros(1, 1, 100, 120).cuda()
    masks[..., 30:70, 40:80] = 1
    network = LABNet(4, attention_size=16).eval()
    network.identity_start()
    expected = removed(ShadowRemover(network, guess="ring", side=80), images.cpu(), masks.cpu())
    made = removed(ShadowRemover(network.cuda(), guess="ring", side=80), images, masks)
    assert made.is_cuda
    torch.testing.assert_close(made.cpu(), expected, atol=2 / 255, rtol=0)
