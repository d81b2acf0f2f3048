"""OMGD's terms against direct formulas, its loop, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.methods.omgd import OMGD
from tenfold.methods.omgd_terms import structural_similarity_map, total_variation
from tenfold.methods.translation import StudentStep
from tenfold.nn.discriminators import PatchDiscriminator
from tenfold.nn.generators import MobileResNetGenerator
from tenfold.nn.taps import forward_with_taps

pytestmark = pytest.mark.unit


def generator(ngf: int, seed: int) -> MobileResNetGenerator:
    torch.manual_seed(seed)
    return MobileResNetGenerator(ngf, blocks=3)


def start(student=None, teacher=None, **fields):
    method = OMGD(**fields)
    student, teacher = student or generator(2, 1), teacher or generator(4, 2)
    method.use_network("teacher", teacher)
    method.use_network("discriminator", PatchDiscriminator(3, 4))  # which it has no use for
    torch.manual_seed(3)
    method.attach(student, total_steps=4)
    return method, student, teacher


def photo(seed: int = 0, count: int = 2, side: int = 32) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, 3, side, side, generator=made) - 1


def step_of(student: nn.Module, teacher: nn.Module, source: Tensor, names=None) -> StudentStep:
    names = student.taps if names is None else names
    made, maps = forward_with_taps(student, source, names)
    with torch.no_grad():
        wanted, wanted_maps = forward_with_taps(teacher, source, names)
    return StudentStep(
        source=source, student=made, teacher=wanted, student_maps=maps, teacher_maps=wanted_maps,
        discriminator=PatchDiscriminator(3, 4),
    )  # fmt: skip


# -- terms ----------------------------------------------------------------------------------------


@pytest.mark.parity
def test_similarity_at_one_pixel_by_the_formula():
    """At a corner, so that the padding by zeros counts, and in the middle."""
    a, b = photo(1, 1, 24).double(), photo(2, 1, 24).double()
    found = structural_similarity_map(a, b)
    window = [math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-5, 6)]
    total = sum(window)
    for row, column in ((0, 0), (12, 9), (23, 4)):

        def mean(values, row=row, column=column):
            out = 0.0
            for i, wi in enumerate(window):
                for j, wj in enumerate(window):
                    y, x = row + i - 5, column + j - 5
                    if 0 <= y < 24 and 0 <= x < 24:
                        out += wi * wj / total**2 * values[y, x].item()
            return out

        p, q = a[0, 1], b[0, 1]
        m_p, m_q = mean(p), mean(q)
        v_p, v_q, c = mean(p * p) - m_p**2, mean(q * q) - m_q**2, mean(p * q) - m_p * m_q
        expected = (2 * m_p * m_q + 1e-4) * (2 * c + 9e-4)
        expected /= (m_p**2 + m_q**2 + 1e-4) * (v_p + v_q + 9e-4)
        assert found[0, 1, row, column].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parity
def test_losses_against_direct_formulas():
    method, student, teacher = start(similarity=7.0, variation=1e-3, channel=20.0)
    step = step_of(student, teacher, photo())
    found = method.student_losses(step)
    assert set(found) == {"similarity", "variation", "channel"}
    similar = structural_similarity_map(step.student, step.teacher).mean()
    torch.testing.assert_close(found["similarity"], 7 * (1 - similar))
    y = step.student
    across, down = (y[..., 1:] - y[..., :-1]).abs(), (y[:, :, 1:] - y[:, :, :-1]).abs()
    torch.testing.assert_close(found["variation"], 1e-3 * (across.sum() + down.sum()))
    torch.testing.assert_close(total_variation(y), across.sum() + down.sum())
    expected = torch.zeros(())
    for name, adaptor in method._adaptors.items():
        assert adaptor[0].weight.shape == (16, 8, 1, 1)
        mapped = torch.einsum(
            "oi,bihw->bohw", adaptor[0].weight[:, :, 0, 0], step.student_maps[name]
        )
        centred = mapped - mapped.mean((0, 2, 3), keepdim=True)
        normed = centred / (mapped.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        means = normed.clamp(min=0).mean((2, 3))
        expected = expected + (means - step.teacher_maps[name].mean((2, 3))).square().mean()
    torch.testing.assert_close(found["channel"], 20 * expected, atol=1e-5, rtol=1e-4)


def test_terms_of_weight_zero_are_left_out():
    teacher = generator(4, 2)
    method, student, _ = start(channel=0.0)
    assert method.tap_names() == ()
    assert not method.owned_parameters()
    step = step_of(student, teacher, photo(), ())
    assert set(method.student_losses(step)) == {"similarity", "variation"}
    method = OMGD(similarity=0.0, variation=0.0)
    assert method.tap_names() is None
    method.use_network("teacher", teacher)
    method.attach(generator(2, 1), total_steps=1)
    assert set(method.student_losses(step_of(generator(2, 1), teacher, photo()))) == {"channel"}


def test_the_same_image_is_similar():
    method, student, _ = start(channel=0.0)
    step = step_of(student, student, photo(), ())
    assert method.student_losses(step)["similarity"].item() == pytest.approx(0, abs=1e-4)


# -- the loop -------------------------------------------------------------------------------------


def train(method, student, teacher, optimizer, first: int, last: int) -> list[float]:
    losses = []
    for index in range(first, last):
        optimizer.zero_grad()
        loss = torch.stack(
            list(method.student_losses(step_of(student, teacher, photo(index))).values())
        ).sum()
        loss.backward()
        optimizer.step()
        method.step()
        losses.append(loss.item())
    return losses


def test_it_trains_goes_on_bit_for_bit_and_leaves_the_plain_student():
    keys = list(generator(2, 1).state_dict())
    method, student, teacher = start()
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.Adam(method.parameters_for(student), lr=2e-3, betas=(0.5, 0.999))
    adaptor = method._adaptors["model.9"][0].weight
    drawn = adaptor.detach().clone()
    train(method, student, teacher, optimizer, 0, 2)
    assert not torch.equal(adaptor, drawn)
    saved = copy.deepcopy((student.state_dict(), method.state_dict(), optimizer.state_dict()))
    expected = train(method, student, teacher, optimizer, 2, 4)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    method2, student2, _ = start()
    optimizer2 = torch.optim.Adam(method2.parameters_for(student2), lr=2e-3, betas=(0.5, 0.999))
    student2.load_state_dict(saved[0])
    method2.load_state_dict(saved[1])
    optimizer2.load_state_dict(saved[2])
    assert train(method2, student2, teacher, optimizer2, 2, 4) == expected
    trained = {key: value.clone() for key, value in student.state_dict().items() if key in keys}
    assert method.finalize(student) is student
    assert list(student.state_dict()) == keys
    assert all(torch.equal(value, trained[key]) for key, value in student.state_dict().items())


def test_foreign_networks():
    def plain(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(True), nn.Conv2d(width, 3, 1),
                             nn.Tanh())  # fmt: skip

    method, student, teacher = start(plain(4), plain(8), taps=["1"])
    losses = method.student_losses(step_of(student, teacher, photo(), ["1"]))
    sum(losses.values()).backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert teacher[0].weight.grad is None


# -- refusals -------------------------------------------------------------------------------------


def images(student: Tensor, teacher: Tensor):
    method = OMGD(channel=0.0)
    method.attach(generator(2, 1), total_steps=1)
    return method.student_losses(
        StudentStep(source=photo(), student=student, teacher=teacher, student_maps={},
                    teacher_maps={}, discriminator=PatchDiscriminator(3, 4))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: OMGD(similarity=-1.0), "similarity=-1.0: expected at least 0"),
        (lambda: OMGD(variation=float("nan")), "variation=nan: expected at least 0"),
        (lambda: OMGD(channel=-0.5), "channel=-0.5: expected at least 0"),
        (lambda: OMGD(similarity=0, variation=0, channel=0), "all weights of OMGD are 0"),
        (lambda: OMGD(taps=[]), "taps is empty"),
        (lambda: OMGD().attach(generator(2, 1), total_steps=1), "OMGD has no teacher: call use_n"),
        (lambda: start(taps=["model.90"]), "unknown tap 'model.90': did you mean model.9"),
        (lambda: images(photo(), photo(side=16)), "made images of shapes"),
        (lambda: images(photo()[0], photo()[0]), "made images of shapes"),
        (lambda: images(100 * photo(), photo()), "student's images go from -.* in \\[-1, 1\\]"),
        (lambda: images(photo(), photo() * math.nan), "teacher's images go from nan to nan"),
        (lambda: images(photo(), photo() / 0), "teacher's images go from -inf to inf"),
        (lambda: images(photo().int(), photo().int()), "student's images are torch.int32"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(UserError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
