"""BatchNorm folding: same outputs, right pairs, zeros kept."""

import copy

import pytest
import torch
from torch import nn

from tenfold.deploy.fold import fold_batch_norm
from tenfold.errors import UserError

pytestmark = pytest.mark.parity


def settled(model, seed=0):
    """Give every BatchNorm statistics and scales as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(generator=generator)
    return model


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def assert_same(model, folded, inputs, tolerance):
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(inputs)
        difference = (folded(inputs) - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance


def test_torchvision_resnet():
    import torchvision

    model = settled(torchvision.models.resnet18(num_classes=7))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fold_batch_norm(model, torch.zeros(2, 3, 32, 32))
    assert found.reason is None
    assert len(found.folded) == 20
    assert found.folded[:2] == ["bn1", "layer1.0.bn1"]
    assert norms(found.model) == []
    assert not any(module.training for module in found.model.modules())
    assert_same(model, found.model, torch.randn(2, 3, 32, 32), 1e-5)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_timm_norm_with_activation():
    import timm

    model = settled(timm.create_model("mobilenetv3_small_050", num_classes=5, drop_rate=0.5))
    found = fold_batch_norm(model, torch.zeros(1, 3, 32, 32))
    assert len(found.folded) == len(norms(model))
    assert norms(found.model) == []
    assert_same(model, found.model, torch.randn(2, 3, 32, 32), 1e-5)


def test_timm_zero_initialised_last_norm():
    import timm

    model = timm.create_model("resnet18", num_classes=5, zero_init_last=True)
    found = fold_batch_norm(model, torch.zeros(1, 3, 32, 32))
    assert len(found.folded) == 20
    assert torch.count_nonzero(found.model.layer1[0].conv2.weight) == 0
    assert_same(model, found.model, torch.randn(1, 3, 32, 32), 1e-5)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)], (2, 4, 9)),
        ([nn.Conv2d(4, 6, 3, groups=2, padding="same"), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
        ([nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (2, 2, 4, 4, 4)),
        ([nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
        ([nn.Linear(4, 6), nn.BatchNorm1d(6)], (3, 4)),
        ([nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=True)], (3, 4)),
    ],
)
def test_each_layer_type_in_double_precision(layers, shape):
    model = settled(nn.Sequential(*layers)).double()
    inputs = torch.randn(*shape, dtype=torch.float64)
    found = fold_batch_norm(model, inputs)
    assert found.folded == ["1"]
    assert isinstance(found.model[1], nn.Identity)
    assert_same(model, found.model, inputs, 1e-12)


def test_norm_without_scale():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)).double()
    model[1].running_var.fill_(4.0)
    inputs = torch.randn(3, 4, dtype=torch.float64)
    found = fold_batch_norm(model, inputs)
    assert found.folded == ["1"]
    assert_same(model, found.model, inputs, 1e-12)


class Branches(nn.Module):
    """Only the last pair may be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.forked = nn.Conv2d(4, 4, 1)
        self.norm_c = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1)
        self.twice = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)
        self.norm_d = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_a(self.shared(x)) + self.norm_b(self.shared(x))
        forked = self.forked(x)
        x = self.norm_c(forked) + forked
        x = self.twice(self.plain(x)) + self.twice(self.other(x))
        return self.norm_d(self.last(x))


def test_shared_and_forked_layers_are_left_alone():
    model = settled(Branches())
    inputs = torch.randn(2, 4, 3, 3)
    found = fold_batch_norm(model, inputs)
    assert found.folded == ["norm_d"]
    assert len(norms(found.model)) == 4
    assert_same(model, found.model, inputs, 1e-5)


def test_grouped_transposed_convolution_and_token_norm_are_left_alone():
    transposed = settled(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    assert fold_batch_norm(transposed, torch.randn(2, 4, 3, 3)).folded == []
    tokens = settled(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)))
    found = fold_batch_norm(tokens, torch.randn(2, 7, 5))
    assert (found.folded, found.reason) == ([], None)


def test_norm_under_two_names():
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.steps = nn.ModuleList([self.conv, self.norm])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.steps[1](self.steps[0](x))

    model = settled(Aliased())
    inputs = torch.randn(2, 3, 4, 4)
    found = fold_batch_norm(model, inputs)
    assert len(found.folded) == 1
    assert norms(found.model) == []
    assert_same(model, found.model, inputs, 1e-5)


def test_pattern_of_zeros_survives():
    model = settled(nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)))
    with torch.no_grad():
        blocks = model[0].weight.view(6, 2, 4, 3, 3)
        blocks[:, :, :2] = 0
    zeros = model[0].weight == 0
    found = fold_batch_norm(model, torch.randn(1, 8, 5, 5))
    assert found.folded == ["1"]
    assert torch.equal(found.model[0].weight == 0, zeros)


def test_model_that_cannot_be_traced_comes_back_unfolded_with_the_reason():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) if x.sum() > 0 else x

    found = fold_batch_norm(Branching(), torch.ones(1, 3, 2, 2))
    assert found.folded == []
    assert found.reason is not None
    assert "torch.export" in found.reason
    assert "\n" not in found.reason
    assert len(norms(found.model)) == 1
    assert not found.model.training


def test_layer_that_uses_its_weight_in_its_own_way_is_caught():
    class Absolute(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight)  # ignores the bias that folding adds

    model = settled(nn.Sequential(Absolute(3, 3, 1, bias=False), nn.BatchNorm2d(3)))
    found = fold_batch_norm(model, torch.randn(1, 3, 4, 4))
    assert found.folded == []
    assert found.reason == "the outputs would change"
    assert len(norms(found.model)) == 1


def test_wrong_inputs_are_a_user_error():
    with pytest.raises(UserError, match="fails on the example inputs"):
        fold_batch_norm(nn.Linear(4, 4), torch.zeros(1, 5))
