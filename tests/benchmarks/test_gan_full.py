"""The script of the papers' full recipes: each starts, and ends in figures, on made-up data."""

from __future__ import annotations

import json

import pytest
import torch

import common
import gan_full
import resumable
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.nn import models
from tenfold.tasks.recipe import load_recipe
from tests.translations import make_pairs, make_unpaired

pytestmark = pytest.mark.path

TINY = (
    "--data datasets --iterations 1 --seeds 0 --model.ngf 4 --model.blocks 3 --gan.ndf 4 "
    "--data.size 96 --train.batch_size 1 --gan.perceptual stagenet --gan.extractor stagenet "
    "--gan.pictures 1 --trainer.accelerator cpu"
)
PLAIN = {"style": 0.0, "feature": 0.0}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (common, resumable):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for name in gan_full.RECIPES:
        make = make_unpaired if name.endswith(("zebra", "winter")) else make_pairs
        make(tmp_path / "datasets" / name, train=2, test=2)
    torch.manual_seed(0)
    network, described = models.build("stagenet", num_classes=3, channels=3, options={"width": 2})
    described_by = {"channels": 3, "size": [96, 96], "mean": [0.5] * 3, "std": [0.5] * 3}
    artifact.save(
        network.eval(), tmp_path / "stagenet", network=described,
        preprocessing={**described_by, "interpolation": "bilinear"},
    )  # fmt: skip


def command(*more: str) -> list[str]:
    return [*TINY.split(), "--gan.teacher", "{ngf: 4, blocks: 3}", *more]


def result() -> dict:
    return json.loads((common.RESULTS / "gan_full.json").read_text())


def test_first_iterations_of_every_recipe():
    assert gan_full.main(command("--variants", "dcd+crd")) == 0
    more = ["--recipes", "horse2zebra", "edges2shoes", "--variants", "none", "omgd", "dcd", "crd"]
    assert gan_full.main(command(*more)) == 0
    found = result()
    assert len(found["runs"]) == 12
    for run in found["runs"].values():
        paired = run["recipe"] in ("edges2shoes", "cityscapes")
        assert set(run["figures"]) == {"fid", "kid", *(("l1", "ssim") if paired else ())}
        assert run["extractor"].startswith("stagenet ")
    assert found["figures"]["edges2shoes"]["crd"]["l1"]["minus_plain"]["pairs"] == 1
    path = common.Path("runs/gan_full/edges2shoes-dcd-seed0")
    trained = load_recipe(path / "recipe.yaml")
    assert trained.methods == {"dcd": {}}
    assert (trained.gan.style, trained.gan.feature) == (1e4, 10)
    # What is done stays done, and trials are no runs of the whole.
    before = path.stat().st_mtime_ns
    assert gan_full.main(command(*more)) == 0
    assert path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="iterations 1, now 2"):
        gan_full.main(command("--iterations", "2"))


@pytest.mark.parametrize("recipe", gan_full.RECIPES)
def test_variants_are_the_papers(recipe):
    def made(variant):
        overrides = gan_full.overrides_of(recipe, variant, 233, "datasets", None, {})
        return load_recipe(recipe, overrides)

    shipped, both = load_recipe(recipe), made("dcd+crd")
    assert both.methods == shipped.methods
    assert both.gan == shipped.gan
    assert both.train == shipped.train
    paired = recipe in ("edges2shoes", "cityscapes")
    assert made("crd").methods == {"crd": {"weight": 10 if paired else 25}}
    assert made("none").gan.student_weights(False, paired) == {
        "adversarial": 1.0, "reconstruction": 100.0 if paired else 10.0, **PLAIN,
    }  # fmt: skip
    assert made("dcd").gan.student_weights(True, paired)["style"] == 1e4
    assert made("crd").gan.student_weights(True, paired)["style"] == (
        2e4 if recipe == "edges2shoes" else 1e4
    )
    assert made("dcd").gan.teacher_of("mobile_resnet_generator")[1] == {"ngf": 64}
    assert made("dcd").model_options == {"ngf": 16}
