"""The task shadow_synthesis from a recipe to triplets on the disk that data sets read."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tenfold
from tenfold.cli import main
from tenfold.data.registry import create_shadows
from tenfold.errors import UserError
from tenfold.methods.hqss import HQSS, synthesize
from tenfold.tasks.recipe import load_recipe, shipped
from tenfold.tasks.removal_recipe import linear_rate
from tenfold.tasks.shadow_synthesis import ShadowSynthesis
from tenfold.tasks.synthesis_evaluation import SynthesisEvaluation
from tenfold.tasks.synthesis_verbs import synthesize_files

pytestmark = pytest.mark.path

MODEL = {
    "name": "hqss", "width": 4, "blocks": 1, "feature_width": 4, "feature_blocks": 1,
    "discriminator_width": 4, "discriminator_layers": 2,
}  # fmt: skip


def recipe(**changes):
    """A run of seconds."""
    values = {
        "task": "shadow_synthesis",
        "data": {"name": "rendered_shadows", "size": 32, "samples": 8, "targets": False},
        "model": dict(MODEL),
        "methods": {"hqss": {"pool": 3}},
        "train": {"epochs": 2, "batch_size": 2, "lr": 1e-3},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run, which several tests look at."""
    return tenfold.train(recipe(), run_dir=tmp_path_factory.mktemp("runs") / "hqss")


@pytest.fixture
def photos(tmp_path):
    """Photos with a dark box, and their masks; the boxes of two are of one size."""
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    random = np.random.default_rng(0)
    for number, (top, left, side) in enumerate([(4, 4, 16), (30, 36, 16), (5, 40, 18)]):
        ground = np.kron(random.integers(90, 250, (6, 8, 3)), np.ones((9, 9, 1)))
        mask = np.zeros((54, 72), np.uint8)
        mask[top : top + side, left : left + side] = 255
        image = ground * np.where(mask, 0.4, 1.0)[..., None]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "photos" / f"p{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"p{number}.png")
    return tmp_path


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_a_run_leaves_what_paints_and_nothing_of_the_discriminators(finished):
    loaded = tenfold.load(finished.path)
    assert isinstance(loaded, HQSS)
    assert loaded.shadow_discriminator is None
    assert {name.partition(".")[0] for name in loaded.state_dict()} == {"encoder", "generator"}
    shadow, lit = torch.rand(2, 1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(shadow, lit), finished.model(shadow, lit))
    stored = json.loads((finished.path / "model" / "model.json").read_text())
    assert stored["network"]["name"] == "tenfold/hqss"
    assert stored["preprocessing"]["task"] == "shadow_synthesis"


def test_its_record_tells_losses_and_shows_pictures(finished):
    rows = list(csv.DictReader((finished.path / "metrics.csv").open()))
    assert len(rows) == 2
    for name in ("train_loss", "self_reconstruction", "self_frequency", "adversarial", "colour",
                 "cycle", "cycle_frequency", "feature_cycle", "shadow_discriminator",
                 "lit_discriminator", "test_painted_lightness"):  # fmt: skip
        assert float(rows[1][name]) >= 0
    (entry,) = json.loads((finished.path / "methods.json").read_text())["methods"]
    assert entry["method"] == "hqss"
    (group,) = entry["images"]
    assert len(group["items"]) == 4
    assert "photo, lit region, pseudo shadow" in group["items"][0]["caption"]
    assert ["photos without shadow", "none are read"] in entry["facts"]
    found = SynthesisEvaluation.from_dict(
        json.loads((finished.path / "run.json").read_text())["evaluation"]
    )
    assert found == finished.evaluation
    assert found.images > 20
    assert "with a shadow painted on" in str(found)
    assert main(["report", str(finished.path)]) == 0
    assert "pseudo shadow" in (finished.path / "report.html").read_text()


def test_no_photo_without_shadow_reaches_training(monkeypatch, tmp_path):
    seen = []
    step = ShadowSynthesis.training_step

    def watched(self, batch, batch_idx):
        seen.append(sorted(batch))
        step(self, batch, batch_idx)

    monkeypatch.setattr(ShadowSynthesis, "training_step", watched)
    tenfold.train(recipe(data={"targets": True}, train={"epochs": 1}), run_dir=tmp_path / "run")
    assert seen == [["id", "image", "lit", "mask"]] * 4


def test_synthesize_writes_triplets_that_a_data_set_reads(finished, photos, capsys):
    out = photos / "pseudo"
    command = ["synthesize", str(finished.path), str(photos / "photos"), "--masks",
               str(photos / "masks"), "--out", str(out)]  # fmt: skip
    assert main(command) == 0
    assert f"{out}: 3 pseudo triplets" in capsys.readouterr().out
    names = ["p0.png", "p1.png", "p2.png"]
    for letter in "ABC":
        assert sorted(file.name for file in (out / f"train_{letter}").iterdir()) == names
    for name in names:
        pseudo, lit, photo = (pixels(out / f"train_{letter}" / name) for letter in "ABC")
        own = pixels(photos / "masks" / name)
        assert np.array_equal(photo, pixels(photos / "photos" / name))
        assert set(np.unique(lit)) == {0, 255}
        assert not (lit & own).any(), "lit ground alone"
        assert 0.7 < (lit > 0).sum() / (own > 0).sum() < 1.3
        assert np.array_equal(pseudo[lit == 0], photo[lit == 0]), "the photo itself elsewhere"
        assert not np.array_equal(pseudo[lit > 0], photo[lit > 0])
    assert main(command) == 2
    assert "p0.png: the file is there" in capsys.readouterr().err
    before = pixels(out / "train_A" / "p0.png")
    assert main([*command, "--overwrite"]) == 0
    assert np.array_equal(pixels(out / "train_A" / "p0.png"), before), "the same seed, the same"
    assert main([*command, "--split", "test"]) == 0
    data = create_shadows({"name": "triplets", "path": str(out), "size": 32})
    assert (data.train_size, data.test_size, data.has_targets) == (3, 3, True)
    batch = next(iter(data.train_loader(batch_size=3, seed=0)))
    assert batch["target"].shape == (3, 3, 32, 32)


def test_what_is_written_is_what_the_network_paints(finished, photos):
    synthesize_files(finished.path, photos / "photos", photos / "masks", photos / "out")
    photo, lit, own = (
        torch.from_numpy(pixels(file).copy())
        for file in (photos / "photos" / "p1.png", photos / "out" / "train_B" / "p1.png",
                     photos / "masks" / "p1.png")
    )  # fmt: skip
    expected = synthesize(
        finished.model,
        photo.permute(2, 0, 1)[None],
        *((mask > 127).to(torch.uint8)[None, None] for mask in (own, lit)),
    )
    made = torch.from_numpy(pixels(photos / "out" / "train_A" / "p1.png").copy())
    assert torch.equal(made.permute(2, 0, 1)[None], (expected * 255).round().to(torch.uint8))
    other = synthesize_files(
        finished.path, photos / "photos", photos / "masks", photos / "small", largest=36
    )
    assert len(other.names) == 3
    assert pixels(photos / "small" / "train_A" / "p1.png").shape == (27, 36, 3)


def test_bad_files_stop_it_by_name_or_are_left_out(finished, photos, capsys):
    folders = (finished.path, photos / "photos", photos / "masks", photos / "out")
    (photos / "photos" / "alone.png").write_bytes((photos / "photos" / "p0.png").read_bytes())
    with pytest.raises(UserError, match=r"alone.png of photos \(not in masks\)"):
        synthesize_files(*folders)
    Image.new("L", (72, 54), 0).save(photos / "masks" / "alone.png")
    with pytest.raises(UserError, match=r"masks/alone.png is white on 0%: expected white"):
        synthesize_files(*folders)
    (photos / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    Image.fromarray(pixels(photos / "masks" / "p1.png")).save(photos / "masks" / "broken.png")
    Image.new("RGB", (40, 40)).save(photos / "photos" / "small.png")
    Image.fromarray(pixels(photos / "masks" / "p1.png")).save(photos / "masks" / "small.png")
    found = synthesize_files(*folders, skip_bad=True)
    assert found.names == ["p0", "p1", "p2"]
    assert [text.partition(" ")[0] for text in found.left_out] == ["alone", "broken", "small"]
    assert "left out 3: alone" in str(found)
    assert not (photos / "out" / "train_A" / "broken.png").exists()
    assert not [file for file in (photos / "out").rglob("*") if file.name.startswith(".")]
    for file in (photos / "photos" / "alone.png", photos / "masks" / "alone.png"):
        file.unlink()
    (photos / "photos" / "broken.png").unlink()
    with pytest.raises(UserError, match=r"broken\.png of masks"):
        synthesize_files(*folders, overwrite=True)
    with pytest.raises(UserError, match=r"small\.png is 40x40, and .*small\.png 54x72"):
        synthesize_files(*folders, overwrite=True, skip_unmatched=True)
    assert main(["synthesize", str(photos), str(photos), "--masks", "x", "--out", "y"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_photos_that_are_read_are_not_written_over(finished, photos):
    for source, name in (("photos", "train_A"), ("masks", "train_B")):
        (photos / source).rename(photos / name)
    before = pixels(photos / "train_A" / "p0.png")
    folders = (photos / "train_A", photos / "train_B", photos)
    with pytest.raises(UserError, match=r"p0\.png is a file that is read: give another folder"):
        synthesize_files(finished.path, *folders, overwrite=True)
    assert np.array_equal(pixels(photos / "train_A" / "p0.png"), before)


def test_a_run_that_is_killed_and_goes_on_equals_one_that_is_not(tmp_path, monkeypatch):
    given = recipe()
    whole = tenfold.train(given, run_dir=tmp_path / "whole")
    step, calls = ShadowSynthesis.training_step, []

    def killed(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 6:
            raise KeyboardInterrupt
        step(self, batch, batch_idx)

    monkeypatch.setattr(ShadowSynthesis, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tenfold.train(given, run_dir=tmp_path / "parts")
    monkeypatch.setattr(ShadowSynthesis, "training_step", step)
    parts = tenfold.train(given, run_dir=tmp_path / "parts", resume=True)
    one, two = (run.model.state_dict() for run in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert parts.evaluation == whole.evaluation
    rows = [(r.path / "metrics.csv").read_text().splitlines() for r in (whole, parts)]
    assert [row.rpartition(",")[0] for row in rows[0]] == [
        row.rpartition(",")[0] for row in rows[1]
    ]
    again = tenfold.train(given, run_dir=tmp_path / "parts", resume=True)
    assert again.evaluation == whole.evaluation


def test_the_learning_rate_is_that_of_the_sheet(tmp_path):
    rates = [2e-4 * linear_rate(epoch, 100, pseudo_pairs=True) for epoch in (0, 50, 51, 75, 99)]
    assert rates == pytest.approx([2e-4, 2e-4, 1.96e-4, 1e-4, 4e-6])
    run = tenfold.train(
        recipe(data={"samples": 4}, train={"epochs": 4, "batch_size": 4, "lr": 0.01}),
        run_dir=tmp_path / "run",
    )
    rows = list(csv.DictReader((run.path / "metrics.csv").open()))
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.01, 0.01, 0.01, 0.005])


def test_a_loss_that_is_not_finite_stops_with_step_and_ids(tmp_path, monkeypatch):
    from tenfold.methods import hqss

    found = hqss.generator_losses
    calls = []

    def broken(*given):
        calls.append(1)
        losses = found(*given)
        if len(calls) == 3:
            losses["cycle"] = losses["cycle"] * float("nan")
        return losses

    monkeypatch.setattr(hqss, "generator_losses", broken)
    with pytest.raises(
        UserError, match=r"cycle not finite at step 2 \(epoch 0, batch 2, first ids \[\d, \d\]\)"
    ):
        tenfold.train(recipe(), run_dir=tmp_path / "run")


def test_training_darkens_lit_regions(tmp_path):
    """Forty steps: what is painted is darker than what was there."""
    run = tenfold.train(
        recipe(data={"samples": 40}, train={"epochs": 1, "batch_size": 1, "lr": 2e-3},
               model={"width": 8}),
        run_dir=tmp_path / "run",
    )  # fmt: skip
    assert run.evaluation.painted < run.evaluation.lit - 2


@pytest.mark.parametrize("name", ["hqss-istd", "hqss-srd", "hqss-rendered"])
def test_shipped_recipes_are_whole(name):
    assert name in shipped()
    found = load_recipe(name)
    assert found.task == "shadow_synthesis"
    if name != "hqss-rendered":
        assert (found.train.epochs, found.train.batch_size, found.train.lr) == (100, 1, 2e-4)
        assert found.train.optimizer == {"name": "adam", "betas": [0.5, 0.999]}
        assert found.data["targets"] is False


def test_a_recipe_of_triplets_starts_without_shadow_free_photos(photos, tmp_path):
    root = photos / "istd"
    for split in ("train", "test"):
        for letter, folder in (("A", "photos"), ("B", "masks")):
            target = root / split / f"{split}_{letter}"
            target.mkdir(parents=True)
            for file in (photos / folder).iterdir():
                (target / file.name).write_bytes(file.read_bytes())
    values = {"data.path": str(root), "data.size": 32, "data.short_side": [32, 48],
              "train.epochs": 1, "model": MODEL}  # fmt: skip
    run = tenfold.train("hqss-istd", overrides=values, run_dir=tmp_path / "run")
    assert run.evaluation.images == 3


def test_plan_says_what_is_learned_from_what(capsys):
    text = str(tenfold.plan({"task": "shadow_synthesis", "data": {"name": "rendered_shadows",
               "size": 64, "samples": 4}, "model": "hqss", "methods": {"hqss": {}}}))  # fmt: skip
    assert "parameters  2,427,907" in text
    assert "two discriminators of 2,764,737 parameters each" in text
    assert "no photo without shadow is read" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": None}, "methods lacks hqss"),
        ({"methods": {"hqss": {"synthesizer": "runs/other"}}}, "is for the task shadow_removal"),
        ({"methods": {"lbc": {"n": 2, "m": 4}}}, "lbc doesn't serve the task .shadow_synthesis."),
        ({"methods": {"kcd": {"teacher": "resnet20"}}}, "kcd doesn't serve the task"),
        ({"model": {"name": "hqss_remover"}}, "hqss_remover is for the task shadow_removal"),
        ({"model": {"name": "resnet20"}}, "resnet20 is a classifier: the task shadow_synthesis"),
        ({"data": {"size": 30}}, "crops of rendered_shadows: HQSS got images of 30x30"),
        ({"data": {"samples": 1}}, "1 photo with its mask: expected at least 2"),
        ({"train": {"ema": 0.9}}, "train.ema=0.9: the task shadow_synthesis has none"),
        ({"train": {"schedule": "cosine"}}, "train.schedule=cosine: expected linear"),
        ({"train": {"augment": "flip"}}, "augmentation"),
        ({"trainer": {"precision": "16-mixed"}}, "use bf16-mixed"),
        ({"trainer": {"limit_train_batches": 2}}, "use data.limit"),
    ],
)
def test_what_cannot_work_is_refused_ahead_of_the_run(changes, message, tmp_path):
    values = recipe()
    for key, value in changes.items():
        if key in ("model",) and value["name"] != "hqss":
            values[key] = value
        elif value is None:
            del values[key]
        else:
            values[key] = {**values.get(key, {}), **value}
    with pytest.raises(UserError, match=message):
        tenfold.train(values, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_verbs_of_other_tasks_say_what_it_is_for(finished, photos, capsys):
    run, file = str(finished.path), str(photos / "photos" / "p0.png")
    for command in (["bench", run], ["export", run], ["evaluate", run], ["predict", run, file]):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert "tenfold synthesize" in error, command
