"""DCD: worked numbers, who gets a gradient and who doesn't, its loop, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import StateError, UserError
from tenfold.methods import DCD
from tenfold.methods.dcd import channels_of, judged
from tenfold.methods.translation import StudentStep
from tenfold.nn.adversarial import generator_loss, judging
from tenfold.nn.discriminators import PatchDiscriminator
from tenfold.nn.generators import MobileResNetGenerator, UNetGenerator
from tests.formula_weights import fill, image

pytestmark = pytest.mark.unit
SIDE = 96


def generator(ngf: int, seed: int = 0, norm: str = "instance") -> MobileResNetGenerator:
    torch.manual_seed(seed)
    return MobileResNetGenerator(ngf, norm=norm, blocks=3)


def discriminator(channels: int = 3, norm: str = "instance") -> PatchDiscriminator:
    torch.manual_seed(7)
    return PatchDiscriminator(channels, 4, norm)


def photo(seed: int, count: int = 1) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, 3, SIDE, SIDE, generator=made) - 1


def start(teacher=None, judge=None, student=None, steps: int = 4, **fields):
    """Return method, student, teacher, discriminator; all from fixed seeds."""
    method = DCD(**fields)
    teacher, judge = teacher or generator(4, 1), judge or discriminator()
    student = student or generator(2, 2)
    method.use_network("teacher", teacher)
    method.use_network("discriminator", judge)
    torch.manual_seed(3)
    method.attach(student, total_steps=steps)
    return method, student, teacher, judge


def snapshot(*networks: nn.Module) -> list[dict[str, Tensor]]:
    return [copy.deepcopy(network.state_dict()) for network in networks]


def same(network: nn.Module, before: dict[str, Tensor]) -> bool:
    now = network.state_dict()
    return set(now) == set(before) and all(torch.equal(now[key], before[key]) for key in now)


def connectors(method: DCD) -> tuple[nn.ModuleList, nn.ModuleList]:
    mine = nn.ModuleList(method._student_connectors.values())
    return mine, nn.ModuleList(method._teacher_connectors.values())


# -- numbers --------------------------------------------------------------------------------------


class OneMap(nn.Module):
    """A generator whose map at `layer` has as many channels as asked for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, channels, 1)
        self.last = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(x))
        return out


def one_tap() -> tuple[DCD, Tensor, Tensor]:
    judge = fill(PatchDiscriminator(3, 8))
    method, *_ = start(OneMap(8), judge, OneMap(4), taps=["layer"])
    for each in connectors(method):
        fill(each)
        nn.init.ones_(each[0][1].weight)
        nn.init.zeros_(each[0][1].bias)
    f = image(4, 24, 24)
    return method, 0.5 * f + 0.1 * f.square(), image(8, 24, 24)


@pytest.mark.parity
def test_one_tap_from_formulas():
    method, mine, theirs = one_tap()
    student, teacher = (each[0] for each in connectors(method))
    assert teacher(theirs).mean().item() == pytest.approx(0.054519, abs=2e-6)
    assert student(mine).mean().item() == pytest.approx(0.408059, abs=2e-6)
    loss = method.map_loss({"layer": mine}, {"layer": theirs})
    assert loss.item() == pytest.approx(0.55473, abs=2e-5)


def test_the_loss_is_the_sum_of_means_over_taps():
    method, student, teacher, judge = start()
    x = photo(0, 2)
    with torch.no_grad():
        _, mine = student.forward_with_taps(x, student.taps)
        _, theirs = teacher.forward_with_taps(x, teacher.taps)
    expected = torch.zeros(())
    for index, name in enumerate(student.taps):
        g_s, g_t = (each[index] for each in connectors(method))
        seen = [judge.model[:11](g(maps[name])) for g, maps in ((g_s, mine), (g_t, theirs))]
        assert seen[0].shape == (2, 32, 2, 2)
        expected = expected + (seen[0] - seen[1]).abs().mean()
    torch.testing.assert_close(method.map_loss(mine, theirs), expected)
    nothing = torch.zeros(1)
    step = StudentStep(
        source=x, student=nothing, teacher=nothing, student_maps=mine, teacher_maps=theirs,
        discriminator=judge,
    )  # fmt: skip
    heavy, *_ = start(weight=0.1)
    torch.testing.assert_close(heavy.student_losses(step), {"dcd": 0.1 * expected})


def test_connectors_start_as_specified():
    method, student, *_ = start(generator(32, 1), student=generator(16, 2))
    mine, theirs = connectors(method)
    for each, channels in ((mine, 64), (theirs, 128)):
        assert len(each) == len(student.taps) == 4
        weights = torch.cat([connector[0].weight.flatten() for connector in each])
        gains = torch.cat([connector[1].weight for connector in each])
        assert each[0][0].weight.shape == (3, channels, 1, 1)
        assert each[0][0].bias is None
        assert isinstance(each[0][2], nn.ReLU)
        assert weights.std().item() == pytest.approx(0.02, rel=0.15)
        assert weights.mean().item() == pytest.approx(0, abs=3e-3)
        assert 0 < gains.std().item() < 0.06
        assert gains.mean().item() == pytest.approx(1, abs=0.03)
    student.train()
    assert modes(mine) == {True}
    assert modes(theirs) == {False}
    student.eval()
    assert modes(mine) == modes(theirs) == {False}
    student.train()
    assert modes(mine) == {True}


def modes(each: nn.ModuleList) -> set[bool]:
    return {module.training for connector in each for module in connector.modules()}


# -- who gets a gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_step_touches_student_and_its_connectors_alone(norm):
    judge, teacher = discriminator(norm=norm), generator(4, 1, norm)
    student = generator(2, 2, norm)
    method, *_ = start(teacher, judge, student)
    mine, theirs = connectors(method)
    untouched = [teacher, judge, theirs]
    before, connected = snapshot(*untouched), snapshot(mine)[0]
    optimizer = torch.optim.Adam(method.parameters_for(student), lr=2e-4, betas=(0.5, 0.999))
    weight = student.model[1].weight.detach().clone()
    made, loss = method.loss(photo(0, 2))
    assert made.shape == (2, 3, SIDE, SIDE)
    loss.backward()
    for network in untouched:
        assert all(parameter.grad is None for parameter in network.parameters())
    # The maps end at the last tap: what comes after it hears of the image's losses alone.
    for name, parameter in student.named_parameters():
        if name.startswith(("model.1.", "model.4.", "model.7.", "model.12.conv_block.6.conv.2.w")):
            assert parameter.grad is not None
    assert student.model[1].weight.grad.abs().sum() > 0
    assert student.model[12].conv_block[6].conv[2].weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in mine.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in mine.parameters()) > 0
    optimizer.step()
    method.step()
    assert not torch.equal(student.model[1].weight, weight)
    assert all(same(network, state) for network, state in zip(untouched, before, strict=True))
    moved = mine.state_dict()
    assert not torch.equal(moved["0.0.weight"], connected["0.0.weight"])
    assert moved["0.1.num_batches_tracked"] == 1


def test_the_adversarial_loss_reaches_the_student():
    """In the authors' released code it was that of the teacher's image, without a gradient."""
    method, student, _, judge = start()
    made, _ = method.loss(photo(0))
    with judging(judge):
        generator_loss("lsgan", judge(made)).backward()
    gradients = [parameter.grad for parameter in method.parameters_for(student)]
    assert sum(g.abs().sum() for g in gradients if g is not None) > 0
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_equal_maps_and_connectors_cost_nothing_and_swapping_changes_nothing():
    method, student, teacher, _ = start(generator(2, 1), student=generator(2, 2))
    mine, theirs = connectors(method)
    theirs.load_state_dict(mine.state_dict())
    mine.eval()
    x = photo(0)
    _, a = student.forward_with_taps(x, student.taps)
    _, b = teacher.forward_with_taps(x, teacher.taps)
    assert method.map_loss(a, a).item() == 0
    there, back = method.map_loss(a, b), method.map_loss(b, a)
    assert there.item() > 0
    torch.testing.assert_close(there, back)
    mine.train()  # other modes: batch statistics against running ones
    assert method.map_loss(a, a).item() > 0


def test_the_teachers_maps_get_no_gradient():
    method, mine, theirs = one_tap()
    mine.requires_grad_()
    theirs.requires_grad_()
    method.map_loss({"layer": mine}, {"layer": theirs}).backward()
    assert mine.grad.abs().sum() > 0
    assert theirs.grad is None


def test_teacher_connectors_learn_only_when_asked_to():
    method, student, teacher, judge = start(train_teacher_connectors=True)
    _, theirs = connectors(method)
    before = snapshot(teacher, judge, theirs)
    optimizer = torch.optim.Adam(method.parameters_for(student))
    assert modes(theirs) == {True}
    method.loss(photo(0))[1].backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())
    optimizer.step()
    method.step()
    assert same(teacher, before[0])
    assert same(judge, before[1])
    assert not torch.equal(theirs[0][0].weight, before[2]["0.0.weight"])


# -- the discriminator ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_images_together_are_as_one_by_one(norm):
    """In value and gradient; a batch norm must not mix them, nor remember them."""
    judge = discriminator(norm=norm)
    before = snapshot(judge)[0]
    torch.manual_seed(0)
    images = [(k + 1) * torch.randn(2, 3, 24, 32) + k for k in range(3)]
    together = [each.clone().requires_grad_() for each in images]
    alone = [each.clone().requires_grad_() for each in images]
    found = judged(judge, together)
    assert same(judge, before)
    weights = [torch.randn_like(each) for each in found]
    sum((w * y).sum() for w, y in zip(weights, found, strict=True)).backward()
    copied = copy.deepcopy(judge)
    for w, y, x, other in zip(weights, found, together, alone, strict=True):
        expected = copied.model[:11](other)
        (w * expected).sum().backward()
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_maps_of_different_sizes_go_one_by_one():
    judge = discriminator()
    images = [torch.randn(1, 3, 24, 24), torch.randn(1, 3, 32, 24)]
    found = judged(judge, images)
    assert [tuple(each.shape[2:]) for each in found] == [(2, 2), (3, 2)]
    torch.testing.assert_close(found[1], judge.features(images[1]))


class Sequence(nn.Module):
    """A PatchGAN as other code has it: a Sequential named model, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True),
            nn.Conv2d(4, 8, 4, 2, 1), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2, True),
            nn.Conv2d(8, 16, 4, 2, 1), nn.InstanceNorm2d(16), nn.LeakyReLU(0.2, True),
            nn.Conv2d(16, 32, 4, 1, 1), nn.InstanceNorm2d(32), nn.LeakyReLU(0.2, True),
            nn.Conv2d(32, 1, 4, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


def test_networks_that_are_not_ours():
    ours, theirs = discriminator(), Sequence()
    theirs.load_state_dict(ours.state_dict())
    x = [torch.randn(1, 3, 24, 24) for _ in range(2)]
    torch.testing.assert_close(judged(theirs, x), judged(ours, x))

    def plain(width: int) -> nn.Sequential:
        torch.manual_seed(width)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(True),
            nn.Upsample(scale_factor=4), nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh(),
        )  # fmt: skip

    student, teacher = plain(4), plain(8)
    method, *_ = start(teacher, theirs, student, taps=["1", "4"], steps=2)
    before, keys = snapshot(teacher, theirs), list(plain(4).state_dict())
    optimizer = torch.optim.Adam(method.parameters_for(student))
    for index in range(2):
        made, loss = method.loss(photo(index, 2))
        optimizer.zero_grad()
        (loss + made.square().mean()).backward()
        optimizer.step()
        method.step()
    assert same(teacher, before[0])  # its batch norm's statistics too
    assert same(theirs, before[1])
    assert list(method.finalize(student).state_dict()) == keys

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 1, 4)

    with pytest.raises(UserError, match=r"Opaque has neither features\(x\) nor a Sequential"):
        judged(Opaque(), x)
    with pytest.raises(UserError, match="Identity has no convolution: expected a PatchGAN"):
        channels_of(nn.Identity())


def test_a_conditional_discriminator_reads_maps_of_six_channels():
    method, student, *_ = start(judge=discriminator(6))
    mine, theirs = connectors(method)
    assert {connector[0].out_channels for each in (mine, theirs) for connector in each} == {6}
    loss = method.loss(photo(0))[1]
    loss.backward()
    assert student.model[1].weight.grad.abs().sum() > 0


def test_default_taps_of_the_unet():
    torch.manual_seed(0)
    student, teacher = UNetGenerator(2), UNetGenerator(4)
    method = DCD()
    method.use_network("teacher", teacher)
    method.use_network("discriminator", discriminator(norm="batch"))
    method.use_setting(paired=True, size=(256, 256))
    method.attach(student, total_steps=1)
    for each, ngf in zip(connectors(method), (2, 4), strict=True):
        assert [g[0].in_channels for g in each] == [2 * ngf, 8 * ngf, 16 * ngf, 4 * ngf]
    before = snapshot(teacher)[0]
    loss = method.loss(2 * torch.rand(2, 3, 256, 256) - 1)[1]
    loss.backward()
    assert torch.isfinite(loss)
    assert same(teacher, before)
    # Maps of 16 pixels leave one pixel after the fourth block: no instance norm takes that.
    method = DCD()
    method.use_network("teacher", teacher)
    method.use_network("discriminator", discriminator())
    method.use_setting(paired=True, size=(256, 256))
    with pytest.raises(UserError, match=r"maps of \(16, 16\) pixels: .* needs 24 or more"):
        method.attach(UNetGenerator(2), total_steps=1)


# -- the loop -------------------------------------------------------------------------------------


def train(method, student, optimizer, first: int, last: int) -> list[float]:
    losses = []
    for index in range(first, last):
        optimizer.zero_grad()
        made, loss = method.loss(photo(index))
        (loss + made.square().mean()).backward()
        optimizer.step()
        method.step()
        losses.append(loss.item())
    return losses


def adam(method, student, lr: float = 2e-3) -> torch.optim.Adam:
    return torch.optim.Adam(method.parameters_for(student), lr=lr, betas=(0.5, 0.999))


def test_it_trains_and_leaves_the_plain_student():
    keys = list(generator(2, 2).state_dict())
    method, student, *_ = start(steps=3)
    assert any(key.startswith("tenfold_dcd") for key in student.state_dict())
    assert all(not name.startswith("tenfold_") for name, p in student.named_parameters()
               if any(p is q for q in method.parameters_for(student)))  # fmt: skip
    assert len(method.parameters_for(student)) == len(keys)
    train(method, student, adam(method, student), 0, 3)
    trained = {k: v.clone() for k, v in student.state_dict().items() if k in keys}
    result = method.finalize(student)
    assert result is student
    assert list(student.state_dict()) == keys
    assert not any(name.startswith("tenfold_") for name, _ in student.named_modules())
    assert same(student, trained)
    assert not any(module._forward_hooks for module in student.modules())
    with pytest.raises(StateError, match="attached to no model"):
        method.loss(photo(0))


def test_the_loss_goes_down():
    method, student, *_ = start(steps=12)
    optimizer = adam(method, student, 5e-3)
    first = method.loss(photo(0))[1].item()
    for _ in range(12):
        train(method, student, optimizer, 0, 1)
    assert method.loss(photo(0))[1].item() < 0.7 * first


def test_it_goes_on_bit_for_bit():
    method, student, *_ = start()
    optimizer = adam(method, student)
    train(method, student, optimizer, 0, 2)
    saved = copy.deepcopy((student.state_dict(), method.state_dict(), optimizer.state_dict()))
    expected = train(method, student, optimizer, 2, 4)
    method2, student2, *_ = start()
    connectors(method2)[1][0][0].weight.data.zero_()  # comes from the checkpoint
    optimizer2 = adam(method2, student2)
    nn.Module.load_state_dict(student2, saved[0])
    method2.load_state_dict(saved[1])
    optimizer2.load_state_dict(saved[2])
    assert train(method2, student2, optimizer2, 2, 4) == expected
    assert same(student2, student.state_dict())


def test_connectors_share_the_students_adam():
    """As one Adam over student and connectors would move them, its rate changing."""
    method, student, *_ = start()
    optimizer = adam(method, student)
    reference, student2, *_ = start()
    mine = connectors(reference)[0]
    shared = torch.optim.Adam(
        [*reference.parameters_for(student2), *mine.parameters()], lr=2e-3, betas=(0.5, 0.999)
    )
    for index in range(4):
        rate = 2e-3 / (index + 1)
        optimizer.param_groups[0]["lr"] = shared.param_groups[0]["lr"] = rate
        train(method, student, optimizer, index, index + 1)
        made, loss = reference.loss(photo(index))
        shared.zero_grad()
        (loss + made.square().mean()).backward()
        # The hook would refuse an optimizer that holds owned parameters; this is the textbook.
        torch.optim.Adam.step.__wrapped__(shared)
    torch.testing.assert_close(student2.state_dict(), student.state_dict(), atol=1e-6, rtol=1e-5)


def test_an_overflow_moves_no_connector():
    method, student, *_ = start()
    optimizer = adam(method, student)
    mine = connectors(method)[0]
    before = snapshot(mine)[0]
    loss = method.loss(photo(0))[1]
    loss.backward()
    mine[0][0].weight.grad[0, 0] = float("inf")
    optimizer.step()
    for index in range(4):
        assert torch.equal(mine[index][0].weight, before[f"{index}.0.weight"])
    assert all(parameter.grad is None for parameter in mine.parameters())


def test_an_optimizer_over_everything_is_refused():
    method, student, *_ = start()
    optimizer = torch.optim.Adam(student.parameters())
    method.loss(photo(0))[1].backward()
    with pytest.raises(UserError, match=r"build it with dcd\.parameters_for\(model\)"):
        optimizer.step()


# -- refusals -------------------------------------------------------------------------------------


def map_loss_of(method: DCD, side: int, drop: str = "", norm: str = "instance") -> Tensor:
    names = [f"model.{place}" for place in (9, 10, 11, 12)]
    mine = {name: torch.randn(2, 8, side, side) for name in names if name != drop}
    theirs = {name: torch.randn(2, 16, side, side) for name in names}
    return method.map_loss(mine, theirs, discriminator(norm=norm))


def attach_without(role: str) -> None:
    method = DCD()
    for other, network in (("teacher", generator(2)), ("discriminator", discriminator())):
        if other != role:
            method.use_network(other, network)
    method.attach(generator(2), total_steps=1)


def strided() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 1))


def unstrided() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Identity(), nn.Conv2d(4, 3, 1))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: DCD(weight=0), "weight=0: expected more than 0"),
        (lambda: DCD(weight=-1.0), "weight=-1.0: expected more than 0"),
        (lambda: DCD(weight=float("nan")), "weight=nan: expected more than 0"),
        (lambda: DCD(taps=[]), "taps is empty"),
        (lambda: DCD(taps=["a", "a"]), "taps names a twice"),
        (lambda: start(taps=["model.9", "model.99"]), "unknown tap 'model.99': did you mean model"),
        (lambda: start(student=strided()), "Sequential doesn't say where to tap it"),
        (
            lambda: start(strided(), student=unstrided(), taps=["0"]),
            r"tap 0: student and teacher have maps of \(32, 32\) and \(16, 16\) pixels",
        ),
        (lambda: attach_without("teacher"), "DCD has no teacher: call use_network"),
        (lambda: attach_without("discriminator"), "DCD has no discriminator: call use_network"),
        (lambda: map_loss_of(start()[0], 23), r"model.9 has maps of \(23, 23\) pixels: .* 24 or"),
        (lambda: map_loss_of(start()[0], 15, norm="batch"), r"\(15, 15\) pixels: .* needs 16 or"),
        (lambda: map_loss_of(start()[0], 24, drop="model.10"), "there is no map of tap model.10"),
        (lambda: map_loss_of(DCD(), 24), "attached to no model"),
        (lambda: DCD().use_setting(False, (256, 92)), "images of 256x92 are too small: .* 96"),
        (lambda: start()[0].loss(torch.zeros(1, 3, 96, 98)), "96x98: expected sides"),
    ],
)  # fmt: skip
def test_refusals(call, text):
    with pytest.raises(UserError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_is_just_large_enough_is_taken():
    DCD().use_setting(False, (96, 96))
    DCD(taps=["model.1"]).use_setting(False, (32, 32))
    method = start()[0]
    assert torch.isfinite(map_loss_of(method, 24))
    assert torch.isfinite(map_loss_of(method, 16, norm="batch"))


def test_too_small_maps_are_refused_ahead_of_training_where_the_size_is_known():
    method = DCD(taps=["model.9"])
    method.use_network("teacher", generator(4))
    method.use_network("discriminator", discriminator())
    method.use_setting(False, (64, 128))
    with pytest.raises(UserError, match=r"model\.9 has maps of \(16, 32\) pixels"):
        method.attach(generator(2), total_steps=1)


def test_what_it_asks_of_a_task():
    assert DCD().tap_names() is None
    assert DCD(taps=["model.9"]).tap_names() == ["model.9"]
    assert DCD.tasks == {"translation"}
    method, _, _, judge = start()
    method.use_network("critic", nn.Identity())  # of another method
    assert method._discriminator is judge
