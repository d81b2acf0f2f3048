"""The large rival in RGB: its size, its form, and what it refuses."""

import pytest
import torch

from tenfold.errors import UserError
from tenfold.nn import models
from tenfold.nn.labnet import LABNet
from tenfold.nn.shadow_remover import ShadowRemover
from tenfold.nn.shadow_unet import ShadowUNet

pytestmark = pytest.mark.unit


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_it_has_ten_times_the_parameters_of_every_lab_net():
    with torch.device("meta"):
        large, ours = ShadowUNet(), LABNet(32)
    assert parameters(large) == 10_926_075
    assert parameters(large) >= 10 * parameters(ours)


def test_photos_keep_their_shape_and_the_mask_counts():
    torch.manual_seed(0)
    network = ShadowUNet(8).eval()
    images, mask = torch.rand(2, 3, 32, 48), torch.zeros(2, 1, 32, 48)
    with torch.no_grad():
        plain = network(images, mask)
        mask[:, :, 8:16, 8:16] = 1
        masked = network(images, mask)
        alone = network(images[1:], mask[1:])
    assert plain.shape == images.shape
    assert not torch.allclose(plain, masked)
    torch.testing.assert_close(alone[0], masked[1])


def test_an_identity_start_gives_the_photo_back():
    torch.manual_seed(0)
    network, images = ShadowUNet(8), torch.rand(1, 3, 64, 64)
    mask = torch.ones(1, 1, 64, 64)
    with torch.no_grad():
        before = (network(images, mask) - images).abs().mean()
        network.identity_start()
        after = (network(images, mask) - images).abs().mean()
    assert after < 0.1 * before
    assert after < 0.03


def test_a_remover_pads_to_its_multiple():
    torch.manual_seed(0)
    network = ShadowUNet(8).eval()
    network.identity_start()
    remover = ShadowRemover(network, composite=False)
    images, mask = torch.rand(1, 3, 70, 83), torch.zeros(1, 1, 70, 83)
    assert remover.space == "rgb"
    made = remover(images, mask)
    assert made.shape == images.shape
    assert float((made - images).abs().mean()) < 0.03


def test_it_is_built_again_from_its_name():
    network, described = models.build("shadow_unet", task="shadow_removal", options={"width": 8})
    assert described.arguments == {"width": 8}
    assert models.rebuild(described).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        ((1, 4, 32, 32), (1, 1, 32, 32), r"expected RGB \(B, 3, H, W\)"),
        ((1, 3, 33, 32), (1, 1, 33, 32), "multiples of 16"),
        ((1, 3, 32, 32), (1, 3, 32, 32), r"got a mask of shape \(1, 3, 32, 32\)"),
    ],
)
def test_what_it_refuses(images, mask, message):
    with pytest.raises(UserError, match=message):
        ShadowUNet(8)(torch.zeros(images), torch.zeros(mask))


def test_a_width_that_no_group_fits_is_refused():
    with pytest.raises(UserError, match="width 10: expected a multiple of 4"):
        ShadowUNet(10)


@pytest.mark.parametrize("name", ["labnet", "shadow_unet"])
def test_removers_are_for_their_task_alone(name):
    with pytest.raises(UserError, match=f"model {name} .*for the task shadow_removal"):
        models.build(name, num_classes=10)
    with pytest.raises(UserError, match=f"model {name} is for the task shadow_removal"):
        models.build(name, channels=3, outputs=3)
    with pytest.raises(UserError, match=r"needs one of .*labnet"):
        models.build("resnet_generator", task="shadow_removal")
    with pytest.raises(UserError, match=r"is a classifier: the task shadow_removal needs"):
        models.build("resnet20", task="shadow_removal")
