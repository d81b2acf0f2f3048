"""SuperViT's training: its losses, what it draws, which gradients flow, and what it refuses."""

from __future__ import annotations

import collections
import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tenfold.errors import StateError, UserError
from tenfold.methods import Box, SuperViTTraining, distilled, draw_box
from tenfold.methods.supervit import _mixed
from tenfold.nn.supervit import SuperViT
from tests.supervits import divergence, pictures, plain, plain_lvvit, supervit

pytestmark = pytest.mark.unit

LABELS = torch.tensor([3, 0, 6])
SHARES = torch.tensor([[0.3, 0.7, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0.5, 0, 0, 0.5]])


def attached(model: SuperViT | None = None, **fields: Any) -> tuple[SuperViTTraining, SuperViT]:
    training = SuperViTTraining(**fields)
    model = supervit() if model is None else model
    training.attach(model, total_steps=1000)
    return training, model


def gradients(model: SuperViT) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- the losses -----------------------------------------------------------------------------------


def test_the_teacher_stands_first_in_the_divergence():
    teacher, student = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    assert distilled(student, teacher).item() == pytest.approx(0.3278, abs=5e-5)
    assert distilled(teacher, student).item() == pytest.approx(0.4338, abs=5e-5)
    assert distilled(teacher, teacher).item() == pytest.approx(0, abs=1e-7)
    four = torch.tensor([[2.0, 0.0]] * 4)
    assert distilled(torch.zeros(4, 2), four).item() == pytest.approx(0.3278, abs=5e-5)


def test_the_teacher_gets_no_gradient():
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0]], requires_grad=True)
    distilled(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("targets", [LABELS, SHARES], ids=["ids", "shares"])
@pytest.mark.parametrize("teacher", ["same_size", "largest"])
def test_the_loss_is_the_sum_of_four(targets, teacher):
    training, model = attached(teacher=teacher, seed=3)
    twin, _ = attached(copy.deepcopy(model), teacher=teacher, seed=3)
    images = pictures()
    loss = training.loss(model, images, targets)
    cells = twin.draw()
    with torch.no_grad():
        z = [model(images, *cell) for cell in cells]
    full = [functional.cross_entropy(z[i].double(), targets if targets.ndim == 1 else
                                     targets.double()) for i in (0, 2)]  # fmt: skip
    pruned = [divergence(z[1], z[0]), divergence(z[3], z[2 if teacher == "same_size" else 0])]
    assert loss.item() == pytest.approx(float(sum([*full, *pruned])), rel=1e-5)
    other = divergence(z[3], z[0 if teacher == "same_size" else 2])
    assert abs(float(other - pruned[1])) > 1e-3, "the two teachers say different things"


def test_a_criterion_of_ones_own_takes_the_two_full_passes():
    training, model = attached()
    seen = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return logits.sum() * 0 + 1

    loss = training.loss(model.to(torch.bfloat16), pictures().bfloat16(), LABELS,
                         criterion=criterion)  # fmt: skip
    assert seen == [torch.float32] * 2
    assert loss.item() > 2


# -- what is drawn --------------------------------------------------------------------------------


def test_draws():
    training, _ = attached(seed=1)
    sizes: collections.Counter[int] = collections.Counter()
    rates: collections.Counter[tuple[float, float]] = collections.Counter()
    for _ in range(900):
        cells = training.draw()
        assert [cells[0], cells[1][0], cells[2][1]] == [(64, 1.0), 64, 1.0]
        assert cells[2][0] == cells[3][0] < 64
        assert cells[1][1] < 1
        assert cells[3][1] < 1
        sizes[cells[2][0]] += 1
        rates[cells[1][1], cells[3][1]] += 1
    assert set(sizes) == {32, 48}
    assert max(abs(count - 450) for count in sizes.values()) < 60
    assert len(rates) == 4, "the two rates are drawn each by itself"
    assert max(abs(count - 225) for count in rates.values()) < 50


def test_draws_follow_the_seed_and_leave_the_generators_alone():
    first, second, other = (attached(seed=seed)[0] for seed in (1, 1, 2))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = [[method.draw() for _ in range(20)] for method in (first, second, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_poorer_grids_have_fewer_passes():
    one_size, _ = attached(supervit(sizes=(64,)))
    assert [size for size, _ in one_size.draw()] == [64, 64]
    no_rates, _ = attached(supervit(keep_rates=(1.0,)))
    assert [rate for _, rate in no_rates.draw()] == [1.0, 1.0]
    single, model = attached(supervit(sizes=(64,), keep_rates=(1.0,)))
    assert single.loss(model, pictures(), LABELS).item() == pytest.approx(
        functional.cross_entropy(model(pictures()), LABELS).item(), rel=1e-5
    )
    assert single.draw() == [(64, 1.0)]


# -- gradients ------------------------------------------------------------------------------------


def test_one_step_moves_everything_but_the_tables_of_other_sizes():
    base = plain(img_size=64)
    training, model = attached(SuperViT(base, (16, 32, 48, 64), drop_blocks=(1, 2)).train())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(training.parameters_for(model), lr=1e-2, weight_decay=0.5)
    loss = training.loss(model, pictures(), LABELS)
    used = set(training._used)
    assert len(used) == 2
    assert 3 in used
    loss.backward()
    for index, table in enumerate(model.pos_embed_list):
        assert (table.grad is not None) == (index in used)
    optimizer.step()
    training.step()
    assert not training._used
    for name, value in model.named_parameters():
        unused = name.startswith("pos_embed_list.") and int(name[-1]) not in used
        assert torch.equal(value, before[name]) == unused, name


def test_zero_gradients_do_not_let_unused_tables_decay():
    """As they are under DDP, or with `zero_grad(set_to_none=False)`."""
    training, model = attached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [table.detach().clone() for table in model.pos_embed_list]
    training.loss(model, pictures(), LABELS).backward()
    used = set(training._used)
    optimizer.step()
    training.step()
    for index, table in enumerate(model.pos_embed_list):
        assert torch.equal(table, before[index]) == (index not in used)


@pytest.mark.parametrize("kind", ["vit", "lvvit"])
def test_a_shared_trunk_changes_nothing(kind):
    base = plain() if kind == "vit" else plain_lvvit()
    found = []
    for share in (True, False):
        training, model = attached(supervit(copy.deepcopy(base)), share_trunk=share)
        loss = training.loss(model, pictures(), LABELS)
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (one, ours), (other, theirs) = found
    assert one == pytest.approx(other, rel=1e-5)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_shared_trunk_is_computed_once():
    calls = []
    training, model = attached()
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    training.loss(model, pictures(), LABELS)
    assert len(calls) == 2
    training, model = attached(model, share_trunk=False)
    calls.clear()
    training.loss(model, pictures(), LABELS)
    assert len(calls) == 4


@pytest.mark.parametrize("accumulate", ["sum", "pair", "pass"])
@pytest.mark.parametrize("teacher", ["same_size", "largest"])
@pytest.mark.parametrize("share", [True, False])
def test_backward_in_parts_gives_the_same_gradients(accumulate, teacher, share):
    fields = {"teacher": teacher, "share_trunk": share}
    training, model = attached(supervit().train(), **fields)
    expected = training.loss(model, pictures(), SHARES)
    expected.backward()
    ours = gradients(model)
    model.zero_grad()
    training, _ = attached(model, **fields)
    found = training.backward(model, pictures(), SHARES, accumulate=accumulate)
    assert not found.requires_grad
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = gradients(model)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_backward_scales_every_part():
    training, model = attached()
    training.backward(model, pictures(), LABELS)
    ours = gradients(model)
    model.zero_grad()
    training, _ = attached(model)
    training.backward(model, pictures(), LABELS, scale=lambda loss: 8 * loss)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, 8 * ours[name], atol=1e-4, rtol=1e-4)


# -- LV-ViT ---------------------------------------------------------------------------------------


def test_boxes_are_drawn_as_in_the_paper():
    random = np.random.default_rng(0)
    boxes = [draw_box(random, 14) for _ in range(3000)]
    for box in boxes:
        assert 0 <= box.top <= box.bottom <= 14
        assert 0 <= box.left <= box.right <= 14
        assert box.grid == 14
    # Uncut, a box takes (c // 2 * 2)**2 of 196 tokens, c = int(14 sqrt(u)); many are cut.
    assert 0.15 < float(np.mean([box.share for box in boxes])) < 0.4
    assert min(box.share for box in boxes) == 0
    assert any(box.bottom == 14 for box in boxes)


def test_mixed_targets():
    box = Box(0, 0, 2, 2, 4)  # a quarter
    expected = 0.75 * torch.eye(3) + 0.25 * torch.eye(3).flip(0)
    torch.testing.assert_close(_mixed(torch.arange(3), box, 3), expected)
    torch.testing.assert_close(_mixed(torch.eye(3), box, 3), expected)
    assert _mixed(LABELS, None, 7) is LABELS


@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["token labels", "without"])
def test_the_loss_of_lvvit(mix, given):
    training, model = attached(supervit(plain_lvvit()).train(), mix_tokens=mix, seed=4)
    twin, _ = attached(copy.deepcopy(model), mix_tokens=mix, seed=4)
    images = pictures()
    tokens = torch.rand(3, 16, 7).softmax(dim=2) if given else None
    loss = training.loss(model, images, LABELS, tokens)
    cells, box = twin.draw(), twin._box(model)
    assert (box is not None) == mix
    with torch.no_grad():
        *z, patches = model(images, cells=cells, box=box, aux=True)
    one_hot = functional.one_hot(LABELS, 7).float()
    share = 0.0 if box is None else box.share
    mixed = (1 - share) * one_hot + share * one_hot.flip(0)
    expected = functional.cross_entropy(z[0], mixed) + functional.cross_entropy(z[2], mixed)
    expected = expected + divergence(z[1], z[0]) + divergence(z[3], z[2])
    wanted = one_hot[:, None].expand(-1, 16, -1) if tokens is None else tokens
    own = -(wanted * patches.log_softmax(dim=2)).sum(dim=2).mean()
    assert loss.item() == pytest.approx((expected + own).item(), rel=1e-4)
    loss.backward()
    assert model.aux_head.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match=r"token_targets of shape \(3, 15, 7\): expected \(3, 16"):
        training.loss(model, images, LABELS, torch.zeros(3, 15, 7))


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"teacher": "biggest"}, "expected same_size or largest"), ({"seed": -1}, "at least 0")],
)
def test_fields_that_are_wrong(fields, text):
    with pytest.raises(UserError, match=text):
        SuperViTTraining(**fields)


@pytest.mark.parametrize(
    "targets",
    [
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(3),
        torch.zeros(3, 6),
        torch.zeros(3, 7, dtype=torch.int64),
        torch.zeros(3, 7, 1),
    ],
    ids=lambda t: f"{tuple(t.shape)} {t.dtype}",
)
def test_targets_that_do_not_fit(targets):
    training, model = attached()
    for run in (training.loss, training.backward):
        with pytest.raises(UserError, match=r"expected class ids \(3,\), or shares \(3, 7\)"):
            run(model, pictures(), targets)


def test_other_networks_and_moments_are_refused():
    with pytest.raises(UserError, match=r"trains a SuperViT, and this is .*: make it one first"):
        SuperViTTraining().attach(plain(), total_steps=3)
    with pytest.raises(StateError, match="attached to no model"):
        SuperViTTraining().loss(supervit(), pictures(), LABELS)
    training, model = attached(supervit(plain_lvvit()))
    with pytest.raises(UserError, match="neither for DDP nor for LV-ViT"):
        training.backward(model, pictures(), LABELS)
    with pytest.raises(UserError, match="expected sum, pair or pass"):
        training.backward(model, pictures(), LABELS, accumulate="all")  # type: ignore[arg-type]
