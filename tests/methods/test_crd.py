"""CRD in a loop: what it adds up, whom it teaches, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tenfold.errors import StateError, UserError
from tenfold.methods import CRD, Kind, find, in_order, pairwise_distance_angle_loss
from tenfold.methods.relations import column_strips, patches, row_strips
from tenfold.methods.translation import StudentStep

pytestmark = pytest.mark.unit


def generator(width: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh()
    )


def image_pair(batch: int = 1, height: int = 64, width: int = 96) -> tuple:
    random = torch.Generator().manual_seed(0)
    teacher = torch.rand(batch, 3, height, width, generator=random) * 1.6 - 0.8
    return teacher + 0.1 * torch.rand(teacher.shape, generator=random), teacher


def formula_pair() -> tuple:
    c = torch.arange(3.0)[:, None, None]
    i, j = torch.arange(64.0)[None, :, None], torch.arange(96.0)[None, None, :]
    teacher = torch.sin(0.13 * (c + 1) * i + 0.07 * (c + 2) * j + c)
    student = 0.8 * teacher + 0.2 * torch.cos(0.05 * (c + 1) * i - 0.11 * j)
    return student[None], teacher[None]


# -- the loss -------------------------------------------------------------------------------------


def test_formula_image():
    student, teacher = formula_pair()
    expected = {"rows": 0.00834274, "columns": 0.00271266, "patches": 0.00036691}
    terms = CRD().terms(student, teacher)
    assert list(terms) == list(expected)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(expected, abs=2e-7)
    total = sum(expected.values())
    assert CRD(weight=1.0).loss(student, teacher).item() == pytest.approx(total, abs=6e-7)


def test_weights():
    student, teacher = formula_pair()
    terms = CRD().terms(student, teacher)
    crd = CRD(weight=2.0, rows=0.5, columns=0.0, patches=3.0)
    assert set(crd.terms(student, teacher)) == {"rows", "patches"}
    expected = 2 * (0.5 * terms["rows"] + 3 * terms["patches"])
    torch.testing.assert_close(crd.loss(student, teacher), expected)

    angles = CRD(distance_weight=0.0, angle_weight=1.0).terms(student, teacher)
    assert angles["rows"].item() == pytest.approx(0.00375307, abs=2e-7)


def test_strips_and_patches_of_other_sizes():
    student, teacher = image_pair()
    terms = CRD(strip=4, patch=16).terms(student, teacher)
    cuts = {
        "rows": lambda x: row_strips(x, 4),
        "columns": lambda x: column_strips(x, 4),
        "patches": lambda x: patches(x, 16),
    }
    for name, cut in cuts.items():
        torch.testing.assert_close(
            terms[name], pairwise_distance_angle_loss(cut(student), cut(teacher))
        )


def test_the_data_says_which_preset():
    student, teacher = image_pair()
    total = torch.stack(list(CRD().terms(student, teacher).values())).sum()
    torch.testing.assert_close(CRD().loss(student, teacher), 25 * total)
    for paired, given, weight in ((False, None, 25), (True, None, 10), (True, 3.0, 3)):
        crd = CRD(weight=given)
        crd.use_setting(paired, (64, 96))
        torch.testing.assert_close(crd.loss(student, teacher), weight * total)


def test_a_batch_is_the_mean_of_its_images():
    student, teacher = image_pair(batch=2)
    each = [CRD().loss(student[b : b + 1], teacher[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(CRD().loss(student, teacher), torch.stack(each).mean())


def test_remainders_by_request():
    student, teacher = image_pair(height=70, width=100)
    with pytest.raises(UserError, match="height of 70 is no multiple of patch=32"):
        CRD().loss(student, teacher)
    found = CRD(drop_remainder=True).terms(student, teacher)["patches"]
    inside = CRD().terms(student[..., :64, :96], teacher[..., :64, :96])["patches"]
    torch.testing.assert_close(found, inside)


def test_an_image_of_one_colour():
    student, teacher = image_pair(batch=2)
    teacher[0] = 1.0
    student.requires_grad_()
    with pytest.warns(UserWarning, match="counts as 0"):
        loss = CRD().loss(student, teacher)
    loss.backward()
    assert torch.isfinite(student.grad).all()
    assert not student.grad[0].any()
    assert student.grad[1].any()


def test_a_white_border_gives_finite_gradients():
    student, teacher = image_pair()
    student[..., :10, :] = teacher[..., :10, :] = 1.0
    student.requires_grad_()
    CRD().loss(student, teacher).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    student, teacher = image_pair(batch=2)
    gradients = []
    for device in ("cpu", "cuda"):
        leaf = student.to(device, copy=True).requires_grad_()
        loss = CRD().loss(leaf, teacher.to(device))
        loss.backward()
        gradients += [loss.detach().cpu(), leaf.grad.cpu()]
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], gradients[3], rtol=1e-4, atol=1e-8)


# -- whom it teaches ------------------------------------------------------------------------------


def test_gradients_reach_the_student_alone():
    student, teacher, judge = generator(seed=1), generator(8), generator(2)
    networks = {"teacher": teacher, "judge": judge}
    before = {name: copy.deepcopy(net.state_dict()) for name, net in networks.items()}
    photo = image_pair()[0]
    step = StudentStep(
        source=photo,
        student=student(photo),
        teacher=teacher(photo),  # with a graph, which must not be used
        student_maps={},
        teacher_maps={},
        discriminator=judge,
        paired=False,
        target=None,
    )
    losses = CRD().student_losses(step)
    assert list(losses) == ["relations"]
    torch.testing.assert_close(losses["relations"], CRD().loss(step.student, step.teacher))
    losses["relations"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student[0].parameters())
    for name, network in networks.items():
        assert all(p.grad is None for p in network.parameters())
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[name][key])


@pytest.mark.path
def test_in_a_loop_of_ones_own():
    student, teacher = generator(seed=1), generator(8).requires_grad_(False)
    keys, crd, total = list(student.state_dict()), CRD(), 12
    photos = image_pair(batch=2, height=64, width=64)[0]
    expected = teacher(photos)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    student = crd.attach(student, total_steps=total)
    seen = []
    for _ in range(total):
        loss = crd.loss(student(photos), expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        crd.step()
        seen.append(loss.item())
    assert seen[-1] < 0.6 * seen[0]
    with pytest.raises(StateError, match="another model"):
        crd.finalize(teacher)
    student = crd.finalize(student)
    assert list(student.state_dict()) == keys
    optimizer.step()  # no hook is left behind


def test_compiled_it_gives_the_same():
    student, teacher = image_pair()
    # The graph that dynamo sees is run as it is: no compiler is needed, and none is tested here.
    compiled = torch.compile(CRD(columns=0.0).loss, backend="eager", fullgraph=True)
    leaf, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    found, expected = compiled(leaf, teacher), CRD(columns=0.0).loss(plain, teacher)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(leaf.grad, plain.grad)


# -- the contract ---------------------------------------------------------------------------------


def test_what_it_is():
    assert find("crd") is CRD
    crd = CRD(patch=16)
    assert (crd.kind, crd.tasks) == (Kind.LOSS, frozenset({"translation"}))
    assert CRD(**crd.config()).config() == crd.config()
    assert "weight" not in crd.config()
    with pytest.raises(UserError, match="doesn't serve the task 'classification'"):
        in_order([crd], "classification")


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0: expected more than 0"),
        ({"weight": 0.0}, "weight=0.0: expected more than 0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"rows": -1.0}, "rows=-1.0, columns=1.0, patches=1.0: expected finite weights"),
        ({"rows": 0.0, "columns": 0.0, "patches": 0.0}, "expected one of them above 0"),
        ({"distance_weight": 0.0, "angle_weight": 0.0}, "expected one of them above 0"),
        ({"angle_weight": float("inf")}, "angle_weight=inf: expected finite weights"),
        ({"strip": 0}, "strip=0: expected at least 1 pixel"),
        ({"patch": -32}, "patch=-32: expected at least 1 pixel"),
    ],
)
def test_refuses_fields(options, message):
    with pytest.raises(UserError, match=message):
        CRD(**options)


def test_refuses_sizes_ahead_of_the_run():
    with pytest.raises(UserError, match="height of 90 is no multiple of patch=32"):
        CRD().use_setting(True, (90, 96))
    with pytest.raises(UserError, match="width of 96 is no multiple of strip=5"):
        CRD(strip=5, rows=0.0).use_setting(True, (64, 96))
    with pytest.raises(UserError, match="images of 32x64 have 2 patches"):
        CRD().use_setting(True, (32, 64))
    CRD(patches=0.0).use_setting(True, (90, 97))
    CRD(drop_remainder=True).use_setting(True, (90, 97))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: (s[..., :32], t), r"\(1, 3, 64, 32\)"),
        (lambda s, t: (s[0], t[0]), r"\(B, C, H, W\)"),
        (lambda s, t: ((s * 127.5 + 127.5).byte(), (t * 127.5 + 127.5).byte()), "torch.uint8"),
        (lambda s, t: (s * 127.5 + 127.5, t), r"student.* expected .*\[-1, 1\]"),
        (lambda s, t: (s, t * 2), r"teacher.* expected .*\[-1, 1\]"),
        (lambda s, t: (s.index_fill(3, torch.tensor([5]), torch.nan), t), "student.*nan"),
        (lambda s, t: (s, t.index_fill(3, torch.tensor([5]), torch.inf)), "teacher.*inf"),
    ],
)
def test_refuses_images(change, message):
    with pytest.raises(UserError, match=message):
        CRD().loss(*change(*image_pair()))
