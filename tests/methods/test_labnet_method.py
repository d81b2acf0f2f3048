"""How LAB-Net is trained: its loss, its fields, its teacher, and the three lines in a loop."""

import dataclasses

import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.methods import LABNet, LABNetTraining, find, removal_loss
from tenfold.nn.lab_loss import VggCuts, lab_loss
from tenfold.nn.models import Network
from tenfold.nn.shadow_codes import lab_codes
from tenfold.nn.shadow_gain import ring_guess
from tenfold.nn.shadow_unet import ShadowUNet
from tests.removals import Affine, scene

pytestmark = pytest.mark.unit


def batch(count: int = 2):
    """Photos, masks and photos without shadow, floats."""
    scenes = [scene(number) for number in range(count)]
    images, free = (
        torch.stack([torch.from_numpy(one[at]) for one in scenes]).permute(0, 3, 1, 2).float() / 255
        for at in (0, 2)
    )
    return images, torch.stack([torch.from_numpy(one[1]) for one in scenes])[:, None].float(), free


class Constant(nn.Module):
    """Gives the same codes, whatever it is given."""

    space = "lab"

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.seen: list[torch.Tensor] = []

    def forward(self, codes, mask):
        self.seen.append(codes)
        return torch.zeros_like(codes) + self.value


def test_the_loss_is_that_of_the_sheet():
    """Ones and zeros of 4x4: L1 1, gradients 3.5, squares 1, in the weights 1, 10 and 100."""
    ones, zeros = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    found = removal_loss(ones, zeros)
    assert float(found.total) == pytest.approx(1 + 35 + 100)
    assert {name: float(value) for name, value in found.parts().items()} == {
        "perceptual": 1.0, "gradient": 3.5, "mse": 1.0}  # fmt: skip
    taught = removal_loss(ones, zeros, torch.full_like(ones, 0.25), distillation=4)
    assert float(taught.total) == pytest.approx(136 + 3)
    assert float(taught.parts()["distillation"]) == pytest.approx(0.75)
    with pytest.raises(UserError, match="the teacher's codes have shape"):
        removal_loss(ones, zeros, zeros[:, :, :2])


def test_pixels_outside_the_shadow_may_count_less():
    images, masks, targets = batch()
    output = torch.zeros_like(targets)
    far = torch.zeros_like(masks)
    far[..., :5, :5] = 1  # a corner that is far from the shadow
    wrong = output + far
    weight = 1 - far
    kept = removal_loss(wrong, output, wrong * 0.5, gradient=0, weight=weight)
    assert [float(part) for part in kept.parts().values() if part is not kept.gradient] == [0] * 3
    network = Constant(0.5)
    plain, less = (
        LABNetTraining(gradient=0, outside=outside).losses(network, images, masks, targets)
        for outside in (1.0, 0.1)
    )
    assert not torch.allclose(plain.mse, less.mse)
    with pytest.raises(UserError, match="outside=-1"):
        LABNetTraining(outside=-1)
    with pytest.raises(UserError, match="side=32: expected at least 65"):
        LABNetTraining(side=32)


def test_defaults_are_the_papers():
    fields = {field.name: field.default for field in dataclasses.fields(LABNetTraining)}
    assert (fields["perceptual"], fields["gradient"], fields["mse"]) == (1.0, 10.0, 100.0)
    assert (fields["start"], fields["guess"], fields["features"]) == ("kaiming", "none", None)
    assert find("labnet") is LABNetTraining


def test_the_loss_of_a_batch_is_between_codes():
    images, masks, targets = batch()
    network = Constant(0.5)
    training = LABNetTraining(gradient=0)
    found = training.losses(network, images, masks, targets)
    truth = lab_codes(targets)
    expected = lab_loss(torch.full_like(truth, 0.5), truth, gradient=0)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(network.seen[0], lab_codes(images))
    mapped = training.training_loss(
        network, {"image": images, "mask": masks, "target": targets}, nn.MSELoss()
    )
    torch.testing.assert_close(mapped, found.total)


def test_a_guess_is_what_the_network_is_given():
    images, masks, targets = batch()
    network = Constant(0.5)
    training = LABNetTraining(guess="ring")
    training.loss(network, images, masks, targets)
    torch.testing.assert_close(network.seen[0], lab_codes(ring_guess(images, masks)))
    assert not torch.allclose(network.seen[0], lab_codes(images))
    assert training.remover(network).guess == "ring"


def test_a_network_of_rgb_learns_in_rgb():
    images, masks, targets = batch()
    network = Constant(0.5)
    network.space = "rgb"
    found = LABNetTraining(gradient=0, mse=0).losses(network, images, masks, targets)
    torch.testing.assert_close(network.seen[0], images)
    torch.testing.assert_close(found.total, (0.5 - targets).abs().mean())


def test_a_teacher_is_given_the_same_codes_and_learns_nothing():
    images, masks, targets = batch()
    teacher, student = Constant(0.75), Constant(0.5)
    training = LABNetTraining(gradient=0, guess="ring", teacher=teacher, distillation=2)
    assert training.networks() == {}
    found = training.losses(student, images, masks, targets)
    plain = LABNetTraining(gradient=0, guess="ring").losses(student, images, masks, targets)
    torch.testing.assert_close(found.total, plain.total + 2 * 0.25)
    found.total.backward()
    assert teacher.value.grad is None
    assert student.value.grad is not None
    assert torch.equal(teacher.seen[0], student.seen[0])


def test_a_named_teacher_is_asked_for():
    training = LABNetTraining(teacher="runs/large")
    assert training.networks() == {"teacher": "runs/large"}
    with pytest.raises(UserError, match="teacher runs/large is a name"):
        training.attach(LABNet(4), total_steps=2)
    training.use_network("teacher", Constant(0.5))
    training.attach(LABNet(4), total_steps=2)


def test_three_lines_in_a_loop():
    """The loop of the class's example: the error falls, and the result removes shadows."""
    torch.manual_seed(0)
    images, masks, targets = batch()
    model = Affine()
    training = LABNetTraining(gradient=0)
    model = training.attach(model, total_steps=60)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = training.loss(model, images, masks, targets)
        loss.backward()
        optimizer.step()
        training.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model = training.finalize(model).eval()
    assert losses[-1] < 0.3 * losses[0]
    made = training.remover(model)(images, masks)
    before, after = (((each - targets).abs() * masks).sum() for each in (images, made))
    assert after < 0.5 * before


@pytest.mark.parametrize("network", [lambda: LABNet(4), lambda: ShadowUNet(8)])
def test_an_identity_start_is_for_fresh_weights(network):
    torch.manual_seed(0)
    training, codes, mask = LABNetTraining(start="identity"), torch.rand(1, 3, 80, 80), torch.zeros(
        1, 1, 80, 80)  # fmt: skip
    trained = network()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    training.wrap(trained, Network(None), fresh=False)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    fresh = training.wrap(network(), Network(None), fresh=True)[0].eval()
    with torch.no_grad():
        assert float((fresh(codes, mask) - codes).abs().mean()) < 0.03
    with pytest.raises(UserError, match="Constant has no identity_start"):
        training.wrap(Constant(1.0), Network(None), fresh=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mse": -1.0}, "mse=-1.0: expected a weight of at least 0"),
        ({"distillation": float("nan")}, "distillation=nan"),
        ({"perceptual": 0.0, "mse": 0.0}, "gradients alone leave colours free"),
        ({"start": "random"}, "start='random': expected kaiming or identity"),
        ({"guess": "gain"}, "guess='gain': expected none or ring"),
        ({"features": ""}, "features=''"),
        ({"teacher": 3}, "teacher=3: expected a network"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LABNetTraining(**fields)


def test_without_features_the_notes_say_so():
    assert "phi_0 alone" in " ".join(LABNetTraining().notes())
    assert "teacher x 2" in LABNetTraining(teacher="runs/large", distillation=2).notes()[0]


def test_features_of_a_file_are_phi_1_to_5(tmp_path):
    """VGG16's layers up to conv5_2, of made-up weights under torchvision's names."""
    widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256),
              (256, 512), (512, 512), (512, 512), (512, 512), (512, 512)]  # fmt: skip
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for place, (inputs, outputs) in zip(places, widths, strict=True):
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / 9 / inputs) ** 0.5
        state[f"features.{place}.weight"] = weight
        state[f"features.{place}.bias"] = torch.zeros(outputs)
    torch.save(state, tmp_path / "vgg16.pth")
    training = LABNetTraining(features=str(tmp_path / "vgg16.pth"))
    training.open_features()
    assert isinstance(training._extractor, VggCuts)
    assert torch.equal(training._extractor.features[26].weight, state["features.26.weight"])
    images, masks, targets = (each[:1] for each in batch(1))
    found = training.losses(Constant(0.5), images, masks, targets)
    plain = LABNetTraining().losses(Constant(0.5), images, masks, targets)
    assert found.perceptual > 1.1 * plain.perceptual
    torch.testing.assert_close(found.mse, plain.mse)
    del state["features.26.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"features\.26\.weight"):
        LABNetTraining(features=str(tmp_path / "short.pth")).open_features()
    with pytest.raises(UserError, match="does not exist"):
        LABNetTraining(features=str(tmp_path / "none.pth")).attach(LABNet(4), total_steps=1)
