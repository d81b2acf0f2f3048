"""What recipes of the task shadow_removal mean, and what they refuse before any work is done."""

from __future__ import annotations

import itertools
from importlib import resources

import pytest
import torch
import yaml

import tenfold
from tenfold.errors import UserError
from tenfold.tasks.recipe import load_recipe, shipped
from tenfold.tasks.removal_recipe import linear_rate, rate_by_step
from tests.removals import Affine, make_triplets, recipe

pytestmark = pytest.mark.unit

OURS = ("labnet-istd", "labnet-srd", "labnet-rendered", "labnet-small", "hqss-removal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_triplets(tmp_path_factory.mktemp("photos") / "istd", 2, 1)


def test_defaults_are_the_papers():
    made = load_recipe({"task": "shadow_removal", "data": "rendered_shadows", "model": "labnet"})
    train = made.train
    assert (train.epochs, train.batch_size, train.optimizer) == (300, 2, "adam")
    assert (train.lr, train.weight_decay, train.schedule) == (2e-4, 0.0, "linear")
    assert load_recipe(made.to_dict()).to_yaml() == made.to_yaml()
    assert "gan" not in made.to_yaml()


def test_the_rate_is_that_of_the_sheet():
    """LAB-Net: epochs 1, 50, 51, 175 and 300 of 300; HQSS: 0, 50, 51, 75 and 99 of 100."""
    found = [2e-4 * linear_rate(epoch - 1, 300) for epoch in (1, 50, 51, 175, 300)]
    assert found == pytest.approx([2e-4, 2e-4, 1.992032e-4, 1.003984e-4, 7.968e-7], rel=1e-4)
    found = [2e-4 * linear_rate(epoch, 100, pseudo_pairs=True) for epoch in (0, 50, 51, 75, 99)]
    assert found == pytest.approx([2e-4, 2e-4, 1.96e-4, 1e-4, 4e-6], rel=1e-4)


def test_the_rate_falls_by_steps_to_zero():
    rate = rate_by_step(lambda time: linear_rate(time, 12), [4] * 12)
    found = [rate(step) for step in range(49)]
    assert found[:5] == [1.0] * 5
    assert all(later < earlier for earlier, later in itertools.pairwise(found[5:]))
    assert found[48] == pytest.approx(0, abs=1e-9)
    assert found[40] == pytest.approx(linear_rate(10, 12)), "an epoch's first step has its rate"
    warm = rate_by_step(lambda time: linear_rate(time, 1), [10], warmup_steps=3)
    assert [warm(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 0.7])


def test_a_run_has_these_rates(folder, tmp_path):
    given = recipe(folder, train={"epochs": 3, "lr": 1e-4}, methods={})
    run = tenfold.train(given, model=Affine(), run_dir=tmp_path / "run")
    lines = (run.path / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("learning_rate")
    found = [float(line.split(",")[place]) for line in lines[1:]]
    assert found == pytest.approx([1e-4 * linear_rate(epoch, 3) for epoch in range(3)])


REFUSALS = {
    "smoothing": ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing=0.1: the task"),
    "mixup": ({"train": {"mixup": 0.2}}, "train.mixup=0.2: the task shadow_removal has none"),
    "schedule": ({"train": {"schedule": "falling"}}, "unknown train.schedule"),
    "augment": ({"train": {"augment": "randaugment"}}, "unknown augmentation 'randaugment'"),
    "generator": (
        {"model": {"name": "resnet_generator"}}, "needs one of hqss_remover, labnet, shadow_unet"),
    "classifier": ({"model": "resnet20"}, "resnet20 is a classifier"),
    "width": ({"model": {"name": "labnet", "width": 5}}, "width 5: expected an even number"),
    "argument": ({"model": {"name": "labnet", "widht": 8}}, "can't be built with widht=8"),
    "small crops": ({"data": {"size": 48}}, "got images of 48x48: expected sides of at least 65"),
    "multiple": ({"model": {"name": "shadow_unet", "width": 4}}, "multiples of 16"),
    "labelled": ({"data": {"name": "digits", "path": None, "size": None, "test_size": None}},
                 "digits"),
    "method": ({"methods": {"smmix": {}}}, "smmix doesn't serve the task 'shadow_removal'"),
    "field": ({"methods": {"labnet": {"gess": "ring"}}}, "did you mean methods.labnet.guess"),
    "guess": ({"methods": {"labnet": {"guess": "gain"}}}, "methods.labnet.guess: expected one of"),
    "features": ({"methods": {"labnet": {"features": "no.pth"}}}, "no.pth does not exist"),
    "teacher": ({"methods": {"labnet": {"teacher": "runs/none"}}},
                "methods.labnet.teacher: runs/none does not exist"),
    "synthesizer": ({"methods": {"hqss": {}}}, "methods.hqss lacks synthesizer"),
    "pretrained": ({"init": "pretrained"}, "init: pretrained is for classifiers"),
    "gan": ({"gan": {"ndf": 4}}, "gan is for the task translation"),
    "no truth": ({"data": {"targets": False}}, "no photos without shadow"),
    "layers": ({"methods": {"lbc": {"n": 2, "m": 4, "include": ["last.conv"]}}},
               "layer last.conv can't be made 2:4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_any_work(name, folder, tmp_path):
    changes, message = REFUSALS[name]
    given = recipe(folder, **changes)
    given["data"] = {key: value for key, value in given["data"].items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        tenfold.train(given, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_task_or_guess_is_refused(folder, tmp_path):
    from tenfold.nn.digitnet import DigitNet
    from tenfold.nn.labnet import LABNet

    tenfold.save(DigitNet(), tmp_path / "digits", "tenfold/digitnet",
                 recipe={"task": "classification"})  # fmt: skip
    network = {"name": "tenfold/labnet", "arguments": {"width": 4, "attention_size": 16}}
    tenfold.save(LABNet(4, 16), tmp_path / "ring", network, recipe={"task": "shadow_removal"},
                 preprocessing={"guess": "ring", "space": "lab"})  # fmt: skip
    for name, message in (
        ("digits", "is of the task classification: expected one of shadow_removal"),
        ("ring", "was trained with guess ring, and this recipe has none"),
    ):
        given = recipe(folder, methods={"labnet": {"teacher": str(tmp_path / name)}})
        with pytest.raises(UserError, match=message):
            tenfold.plan(given)


def test_a_loss_that_is_not_finite_is_named(folder, tmp_path):
    given = recipe(folder, train={"lr": 1e30, "clip_norm": None, "epochs": 3},
                   model={"name": "shadow_unet", "width": 4}, data={"size": 80})  # fmt: skip
    with pytest.raises(
        UserError, match=r"(loss became (nan|inf) at step|is not finite at the end)"
    ):
        tenfold.train(given, run_dir=tmp_path / "run")


def test_a_plan_says_what_the_loss_is_and_which_layers_are_sparse(folder):
    methods = {"labnet": {"guess": "ring"}, "lbc": {"n": 1, "m": 4}}
    found = tenfold.plan(recipe(folder, model={"name": "labnet", "width": 8}, methods=methods))
    by_name = {layer["name"]: layer for layer in found.layers}
    assert by_name["block3.y.middle.conv"]["treatment"] == "1:4"
    assert by_name["first.conv"]["reason"] == "first convolution, kept dense"
    assert "3 input channels" in by_name["last.conv"]["reason"]
    fixed = by_name["block3.attention.highpass"]
    assert (fixed["kept"], fixed["treatment"]) == (1.0, None)
    text = str(found)
    assert "losses      perceptual x 1, gradient x 10, mse x 100" in text
    assert "phi_0 alone" in text
    assert "gain of the ring" in text
    assert found.effective_macs < 0.3 * found.macs


def test_fresh_weights_do_not_hang_on_the_global_generator(folder):
    from tenfold.tasks.removal_setup import set_up_removal

    torch.manual_seed(1)
    one = set_up_removal(recipe(folder)).model.state_dict()
    torch.manual_seed(2)
    two = set_up_removal(recipe(folder)).model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", OURS)
def test_shipped_recipes_are_of_this_task_and_parse(name):
    text = (resources.files("tenfold") / "recipes" / f"{name}.yaml").read_text("utf-8")
    values = yaml.safe_load(text)
    assert values["task"] == "shadow_removal"
    assert load_recipe(values).make_methods()
    assert name in shipped()


def test_the_recipes_of_the_papers_have_the_sheets_settings():
    istd, srd = (load_recipe(name) for name in ("labnet-istd", "labnet-srd"))
    assert (istd.train.batch_size, srd.train.batch_size) == (2, 1)
    assert (istd.data["size"], srd.data["size"]) == (256, 400)
    assert istd.data["short_side"] == [256, 479]
    assert srd.data["short_side"] == [400, 479]
    assert (istd.model_options["attention_size"], srd.model_options["attention_size"]) == (256, 128)
    for one in (istd, srd):
        assert (one.train.epochs, one.train.lr, one.model_options["width"]) == (300, 2e-4, 32)
        assert {"perceptual": 1.0, "gradient": 10.0, "mse": 100.0}.items() <= (
            one.make_methods()[0].config().items()
        )


@pytest.mark.parametrize("name", ["labnet-istd", "labnet-srd"])
def test_the_recipes_of_the_papers_start_on_data_of_that_layout(name, folder):
    """All but the sizes, and VGG16's weights, which would be downloaded."""
    small = {"data.size": 68, "data.short_side": [72, 80], "model.width": 4,
             "model.attention_size": 16, "methods.labnet.features": None,
             "data.path": str(folder)}  # fmt: skip
    found = tenfold.plan(name, overrides=small)
    assert "crops       68x68 of 2 training photos" in str(found)
