"""Phases and rates, the pool of images, and whom each step of teacher and student teaches."""

import copy

import pytest
import torch

from tenfold.errors import UserError
from tenfold.methods import CRD, DCD
from tenfold.methods.translation import StudentStep
from tenfold.nn.discriminators import PatchDiscriminator
from tenfold.nn.generators import MobileResNetGenerator
from tenfold.nn.taps import forward_with_taps
from tenfold.tasks.gan_phases import learning_rate, phases
from tenfold.tasks.gan_recipe import Gan
from tenfold.tasks.gan_teachers import CycleTeacher, PairedTeacher, check_losses
from tenfold.tasks.image_pool import ImagePool


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- time ----------------------------------------------------------------------------------------


def test_rates_of_the_sheet():
    """Oracle 7: constant for 100 epochs, then falling over 100 more."""
    rates = [learning_rate(2e-4, epoch, 200, 100, True) for epoch in range(1, 201)]
    assert rates[:100] == [2e-4] * 100
    assert rates[100] == pytest.approx(1.980198e-4, rel=1e-6)
    assert rates[199] == pytest.approx(1.980198e-6, rel=1e-6)
    assert learning_rate(2e-4, 200, 200, None, True) == rates[199], "half is the default"
    assert learning_rate(2e-4, 200, 200, 100, False) == 2e-4


@pytest.mark.parametrize(
    ("every", "rounds", "length"), [(10, 20, 40), (6, 34, 24)], ids=["horse2zebra", "summer2winter"]
)
def test_rounds_of_the_sheet(every, rounds, length):
    found = phases(Gan(round_epochs=every), 200, paired=False)
    begins = [phase.epoch for phase in found if phase.begins_round]
    assert len(begins) == rounds
    assert begins[0] == every
    assert begins[-1] == 200
    assert sum(phase.learns == "student" for phase in found) == rounds * length
    assert sum(phase.learns == "teacher" for phase in found) == 200
    ends = [phase for phase in found if phase.evaluates]
    assert [phase.epoch for phase in ends] == begins, "the student is evaluated once a round"


def test_pairs_are_learned_jointly():
    found = phases(Gan(evaluate_every=5), 12, paired=True)
    assert {phase.learns for phase in found} == {"joint"}
    assert [phase.epoch for phase in found if phase.evaluates] == [5, 10, 12]
    assert [phase.epoch for phase in phases(Gan(), 20, True) if phase.evaluates] == [
        *range(2, 21, 2)
    ]


# -- the pool --------------------------------------------------------------------------------------


def test_a_pool_fills_up_then_shows_old_images_half_the_time():
    pool = ImagePool(50)
    first = [torch.full((1, 1, 2, 2), float(number)) for number in range(50)]
    for image in first:
        assert torch.equal(pool.exchange(image), image), "new ones while there is room"
    old = 0
    for number in range(50, 1050):
        given = torch.full((1, 1, 2, 2), float(number), requires_grad=True)
        shown = pool.exchange(given)
        assert not shown.requires_grad
        value = float(shown[0, 0, 0, 0])
        if value != number:
            old += 1
            assert number in {float(each[0, 0, 0]) for each in pool.images}, "it took its place"
            assert value not in {float(each[0, 0, 0]) for each in pool.images}
        assert len(pool.images) == 50
    assert 430 < old < 570


def test_a_pool_of_none_hands_images_on_and_a_negative_one_is_refused():
    image = torch.rand(2, 3, 4, 4)
    pool = ImagePool(0)
    assert torch.equal(pool.exchange(image), image)
    assert pool.state() is None
    with pytest.raises(UserError, match="pool size -1"):
        ImagePool(-1)


def test_a_pool_goes_on_from_its_state():
    one, two = ImagePool(3), ImagePool(3)
    for _ in range(5):
        one.exchange(torch.rand(1, 1, 2, 2))
    two.restore(one.state(), torch.device("cpu"))
    image = torch.rand(4, 1, 2, 2)
    torch.manual_seed(5)
    expected = one.exchange(image)
    torch.manual_seed(5)
    assert torch.equal(two.exchange(image), expected)


# -- who learns ------------------------------------------------------------------------------------


def images(count=2):
    return torch.rand(count, 3, 96, 96) * 2 - 1


def paired():
    return PairedTeacher(MobileResNetGenerator(4), PatchDiscriminator(6, 4))


def cycle(**options):
    nets = [MobileResNetGenerator(4), MobileResNetGenerator(4)]
    return CycleTeacher(*nets, PatchDiscriminator(3, 4), PatchDiscriminator(3, 4), **options)


def optimizers(teacher):
    # Not Adam, whose first step is a sign: where a gradient is rounding, so would be the step.
    return tuple(
        torch.optim.SGD(parameters, lr=2e-4)
        for parameters in (
            teacher.parameters_of_generators(), teacher.parameters_of_discriminators(),
        )
    )  # fmt: skip


def snapshot(*networks):
    return [copy.deepcopy(network.state_dict()) for network in networks]


def changed(before, *networks):
    return [
        any(not torch.equal(old[key], value) for key, value in network.state_dict().items())
        for old, network in zip(before, networks, strict=True)
    ]


def test_a_step_of_pix2pix_equals_the_sheet_written_out():
    """Both gradients are of the weights ahead of the step; the images are detached for the one."""
    teacher, x, y = paired().double(), images().double(), images().double()
    written = copy.deepcopy(teacher)
    made = teacher.step(x, y, optimizers(teacher))
    opt_g, opt_d = optimizers(written)
    g, d = written.generator, written.discriminator
    fake = g(x)
    real_logits, fake_logits = d(torch.cat([x, y], 1)), d(torch.cat([x, fake.detach()], 1))
    loss_d = 0.5 * (torch.relu(1 - real_logits).mean() + torch.relu(1 + fake_logits).mean())
    grads_d = torch.autograd.grad(loss_d, list(d.parameters()))
    loss_g = -d(torch.cat([x, fake], 1)).mean() + 100 * (fake - y).abs().mean()
    grads_g = torch.autograd.grad(loss_g, list(g.parameters()))
    for network, gradients, optimizer in ((d, grads_d, opt_d), (g, grads_g, opt_g)):
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert torch.allclose(made.image, fake, atol=1e-6)
    assert not made.image.requires_grad
    for key, value in written.state_dict().items():
        assert torch.allclose(teacher.state_dict()[key], value, atol=1e-10), key


def test_a_teacher_that_waits_only_makes_images():
    teacher, x = paired(), images()
    before = snapshot(teacher)
    made = teacher.step(x, images(), optimizers(teacher), ("model.9",), learns=False)
    assert made.losses == {}
    assert made.maps["model.9"].shape == (2, 16, 24, 24)
    assert changed(before, teacher) == [False]


def test_a_step_of_cyclegan_equals_the_sheet_written_out():
    teacher = cycle(pool=0).double()
    a, b = images(1).double(), images(1).double()
    written = copy.deepcopy(teacher)
    losses = teacher.step(a, b, optimizers(teacher))
    opt_g, opt_d = optimizers(written)
    forth, back = written.generator, written.back
    d_b, d_a = written.discriminator, written.discriminator_back
    fake_b, fake_a = forth(a), back(b)
    distance = torch.nn.functional.l1_loss
    adversarial = (d_b(fake_b) - 1).square().mean() + (d_a(fake_a) - 1).square().mean()
    around = 10 * distance(back(fake_b), a) + 10 * distance(forth(fake_a), b)
    alone = 5 * distance(forth(b), b) + 5 * distance(back(a), a)
    assert float(losses["teacher_adversarial"]) == pytest.approx(adversarial.item(), rel=1e-4)
    assert float(losses["teacher_cycle"]) == pytest.approx(around.item(), rel=1e-4)
    assert float(losses["teacher_identity"]) == pytest.approx(alone.item(), rel=1e-4)
    parameters = written.parameters_of_generators()
    gradients = torch.autograd.grad(adversarial + around + alone, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    opt_g.step()
    judged = sum(
        0.5 * ((d(real) - 1).square().mean() + d(fake.detach()).square().mean())
        for d, real, fake in ((d_b, b, fake_b), (d_a, a, fake_a))
    )
    opt_d.zero_grad()
    judged.backward()
    opt_d.step()
    assert float(losses["discriminator"]) == pytest.approx(judged.item(), rel=1e-4)
    for name in ("generator", "back", "discriminator", "discriminator_back"):
        expected = getattr(written, name).state_dict()
        for key, value in getattr(teacher, name).state_dict().items():
            assert float((value - expected[key]).abs().max()) < 1e-10, (name, key)


def test_students_imitate_the_snapshot():
    teacher, a = cycle(), images(1)
    before = teacher.make(a).image
    teacher.step(a, images(1), optimizers(teacher))
    assert torch.equal(teacher.make(a).image, before), "the generator has moved, the snapshot not"
    teacher.take_snapshot()
    assert not torch.equal(teacher.make(a).image, before)
    assert teacher.make(a, ("model.12",)).maps.keys() == {"model.12"}


@pytest.mark.parametrize("teacher", [paired(), cycle()], ids=["pairs", "unpaired"])
def test_a_students_step_touches_neither_teacher_nor_discriminators(teacher):
    """Sheet oracle 8: and the adversarial loss does reach the student (the released code's bug)."""
    student, x = MobileResNetGenerator(4), images()
    dcd, crd = DCD(), CRD()
    dcd.use_network("teacher", teacher.generator)
    dcd.use_network("discriminator", teacher.discriminator)
    student = crd.attach(dcd.attach(student, total_steps=1), total_steps=1)
    optimizer = torch.optim.Adam(dcd.parameters_for(student), lr=1e-3)
    made = (
        teacher.step(x, images(), optimizers(teacher), student.taps, learns=False)
        if teacher.paired
        else teacher.make(x, student.taps)
    )
    teacher.zero_grad(set_to_none=True)
    before = snapshot(teacher)
    image, maps = forward_with_taps(student, x, student.taps)
    step = StudentStep(source=x, student=image, teacher=made.image, student_maps=maps,
                       teacher_maps=made.maps, discriminator=teacher.discriminator,
                       paired=teacher.paired)  # fmt: skip
    adversarial = teacher.judge(x, image)
    alone = torch.autograd.grad(adversarial, student.model[1].weight, retain_graph=True)[0]
    assert float(alone.abs().max()) > 0
    losses = dcd.student_losses(step) | crd.student_losses(step) | {"adversarial": adversarial}
    sum(losses.values()).backward()
    optimizer.step()
    assert changed(before, teacher) == [False]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(p.grad is not None for p in dcd.parameters_for(student) if p.requires_grad)


def test_losses_that_are_not_finite_are_named():
    with pytest.raises(UserError, match=r"teacher_cycle nan, discriminator inf"):
        check_losses({"a": torch.tensor(1.0), "teacher_cycle": torch.tensor(float("nan")),
                      "discriminator": torch.tensor(float("inf"))})  # fmt: skip
