"""What the task translation refuses, in one line and before any work is done."""

import pytest
import torch

import tenfold
from tenfold.cli import main
from tenfold.errors import UserError
from tenfold.tasks.recipe import load_recipe
from tests.translations import make_pairs, make_unpaired, recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("images")
    return {"pairs": make_pairs(made / "pairs", 2, 1), "unpaired": make_unpaired(made / "un", 2, 1)}


REFUSALS = {
    "n_dis": ({"gan": {"student_epochs": 0}}, "gan.student_epochs=0: expected at least 1"),
    "f": ({"gan": {"round_epochs": 0}}, "gan.round_epochs=0: expected at least 1"),
    "pool": ({"gan": {"pool": -1}}, "gan.pool=-1: expected at least 0"),
    "weight": ({"gan": {"adversarial": -1.0}}, "gan.adversarial=-1.0"),
    "loss": ({"gan": {"loss": "wgan"}}, "unknown gan.loss 'wgan'"),
    "keep": ({"gan": {"keep": "worst"}}, "unknown gan.keep"),
    "typo": ({"gan": {"ndff": 4}}, "did you mean gan.ndf"),
    "decay": ({"gan": {"decay_epochs": 3}}, "gan.decay_epochs=3: expected at most the 2 epochs"),
    "no loss": (
        {"gan": {"adversarial": 0.0, "student_reconstruction": 0.0}},
        "all weights of the student's losses are 0",
    ),
    "mixup": ({"train": {"mixup": 0.2}}, "train.mixup=0.2: the task translation has none"),
    "schedule": ({"train": {"schedule": "cosine"}}, "train.schedule=cosine: expected linear"),
    "pretrained": ({"init": "pretrained"}, "init: pretrained is for classifiers"),
    "classifier": ({"model": "resnet20"}, "model resnet20 is a classifier"),
    "timm": ({"model": "timm/resnet18"}, "the task translation needs a generator"),
    "method": ({"methods": {"smmix": {}}}, "smmix doesn't serve the task 'translation'"),
    "labelled": ({"data": {"name": "digits", "path": None, "size": None}}, "digits"),
    "small crops": ({"data": {"size": 64}, "methods": {"dcd": {}}}, "at least 96"),
    "patch": ({"data": {"size": 100}, "methods": {"crd": {}}}, "32"),
    "side": ({"data": {"size": 98}}, "multiples? of 4"),
    "u-net": (
        {"model": {"name": "unet_generator", "ngf": 4}, "gan": {"teacher": {"ngf": 4}}},
        "multiples of 256"),
    "tap": ({"methods": {"dcd": {"taps": ["model.99"]}}}, "unknown tap 'model.99'"),
    "dcd": ({"methods": {"dcd": {"weight": 0}}}, "methods.dcd: weight=0"),
    "perceptual": (
        {"methods": {"crd": {}}, "gan": {"style": 1.0, "perceptual": "nowhere"}}, "nowhere"),
    "checkpoint": ({"gan": {"teacher_init": "no.pth"}}, "no.pth does not exist"),
    "half": ({"trainer": {"precision": "16-mixed"}}, "trainer.precision"),
    "devices": ({"trainer": {"devices": 2, "accelerator": "cpu"}}, "trains on one device"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_any_work(name, folders, tmp_path):
    changes, message = REFUSALS[name]
    given = recipe(folders["pairs"], **changes)
    given["data"] = {key: value for key, value in given["data"].items() if value is not None}
    with pytest.raises(UserError, match=message):
        tenfold.train(given, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_weights_of_vgg_stop_a_run_at_its_start(folders, tmp_path, monkeypatch):
    from urllib.error import URLError

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    given = recipe(folders["pairs"], methods={"dcd": {}}, gan={"style": None, "feature": None})
    with pytest.raises(UserError, match="vgg16"):
        tenfold.train(given, run_dir=tmp_path / "run")
    given = recipe(folders["pairs"], gan={"extractor": "inception"})
    with pytest.raises(UserError, match=r"(?i)inception"):
        tenfold.train(given, run_dir=tmp_path / "run")


def test_gan_is_for_this_task_alone():
    with pytest.raises(UserError, match="gan is for the task translation"):
        load_recipe({"task": "classification", "data": "digits", "model": "resnet20",
                     "gan": {"ndf": 4}})  # fmt: skip
    with pytest.raises(UserError, match="dcd doesn't serve the task"):
        load_recipe({"task": "classification", "data": "digits", "model": "resnet20",
                     "methods": {"dcd": {}}})  # fmt: skip
    with pytest.raises(UserError, match="makes images: it is for the task translation"):
        tenfold.plan({"task": "classification", "data": "digits",
                      "model": "mobile_resnet_generator"})  # fmt: skip


def test_a_loss_that_is_not_finite_is_named_and_says_where(folders, tmp_path):
    given = recipe(folders["pairs"], train={"lr": 1e30, "epochs": 3})
    with pytest.raises(UserError, match=r"epoch \d+, batch \d+, first ids .* not finite"):
        tenfold.train(given, run_dir=tmp_path / "run")


def test_the_command_line_gives_one_line(folders, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        f"task: translation\ndata: pairs:{tmp_path / 'nothing'}\nmodel: mobile_resnet_generator\n"
    )
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing" in error


def test_defaults_are_the_papers():
    made = load_recipe({"task": "translation", "data": "edges2photo",
                        "model": {"name": "mobile_resnet_generator", "ngf": 16}})  # fmt: skip
    assert made.train.optimizer == {"name": "adam", "betas": [0.5, 0.999]}
    assert (made.train.lr, made.train.batch_size, made.train.epochs) == (2e-4, 1, 200)
    assert made.gan.teacher_of(made.model_name) == ("mobile_resnet_generator", {"ngf": 64})
    assert made.gan.student_weights(True, True) == {
        "adversarial": 1.0, "style": 1e4, "feature": 10.0, "reconstruction": 0.0}  # fmt: skip
    again = load_recipe(made.to_dict())
    assert again.to_yaml() == made.to_yaml()


def test_the_optimizer_is_adam_of_the_sheet(folders):
    from tenfold.tasks.translation import gan_optimizer

    made = load_recipe(recipe(folders["pairs"]))
    found = gan_optimizer(made.train, [torch.nn.Parameter(torch.zeros(2, 2))])
    assert isinstance(found, torch.optim.Adam)
    assert found.param_groups[0]["betas"] == (0.5, 0.999) or found.param_groups[0]["betas"] == [
        0.5, 0.999]  # fmt: skip
    assert found.param_groups[0]["weight_decay"] == 0.0
