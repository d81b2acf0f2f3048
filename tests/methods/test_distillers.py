"""The distillers against loops that follow their formulas, and their gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.errors import UserError
from tenfold.methods import (
    ContrastLoss,
    VariationalLoss,
    attention_loss,
    neighbour_loss,
    relation_loss,
    similarity_loss,
)
from tenfold.methods.distillers import as_maps, as_vectors
from tenfold.methods.feature_loss import FeatureLoss

pytestmark = pytest.mark.parity


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OURS, THEIRS = features(5, 3, 4, 4), features(5, 6, 4, 4, seed=1)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


def test_attention_by_loops():
    total = 0.0
    for b in range(5):
        maps = [unit(f[b].square().mean(dim=0).flatten()) for f in (OURS, THEIRS)]
        total += float((maps[0] - maps[1]).square().mean())
    assert attention_loss(OURS, THEIRS).item() == pytest.approx(total / 5)


def test_attention_averages_the_larger_map():
    small = torch.nn.functional.avg_pool2d(THEIRS, 2)
    torch.testing.assert_close(attention_loss(OURS, small), attention_loss(
        torch.nn.functional.avg_pool2d(OURS, 2), small))  # fmt: skip
    torch.testing.assert_close(attention_loss(small, OURS), attention_loss(OURS, small))


def test_similarity_by_loops():
    rows = []
    for f in (OURS, THEIRS):
        flat = [f[b].flatten() for b in range(5)]
        gram = [[float(x @ y) for y in flat] for x in flat]
        rows.append([[g / math.sqrt(sum(v * v for v in row)) for g in row] for row in gram])
    total = sum((rows[0][i][j] - rows[1][i][j]) ** 2 for i in range(5) for j in range(5))
    assert similarity_loss(OURS, THEIRS).item() == pytest.approx(total / 25)


def smooth_l1(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def test_relations_by_loops():
    vectors = [f.mean(dim=(2, 3)) for f in (OURS, THEIRS)]
    distances, angles = [], []
    for v in vectors:
        table = [[float((v[i] - v[j]).square().sum().sqrt()) for j in range(5)] for i in range(5)]
        positive = [d for row in table for d in row if d > 0]
        mean = sum(positive) / len(positive)
        distances.append([d / mean for row in table for d in row])
        found = []
        for i, j, k in itertools.product(range(5), repeat=3):
            a, b = v[j] - v[i], v[k] - v[i]
            length = float(a.norm() * b.norm())
            found.append(float(a @ b) / length if length else 0.0)
        angles.append(found)
    distance = sum(map(smooth_l1, *distances)) / 25
    angle = sum(map(smooth_l1, *angles)) / 125
    assert relation_loss(OURS, THEIRS).item() == pytest.approx(25 * distance + 50 * angle)
    assert relation_loss(OURS, THEIRS, 1.0, 0.0).item() == pytest.approx(distance)


def test_neighbours_by_loops():
    rows = []
    for f in (OURS, THEIRS):
        v = [unit(vector) for vector in f.mean(dim=(2, 3))]
        likeness = [[(float(x @ y) + 1) / 2 for y in v] for x in v]
        rows.append([[value / sum(row) for value in row] for row in likeness])
    total = sum(
        t * math.log((t + 1e-7) / (s + 1e-7))
        for ours, theirs in zip(*rows, strict=True)
        for s, t in zip(ours, theirs, strict=True)
    )
    assert neighbour_loss(OURS, THEIRS).item() == pytest.approx(total / 25, abs=1e-12)


def test_likelihood_by_loops():
    loss = VariationalLoss(3, 6).double()
    variance = math.log1p(math.exp(float(loss.spread[0].detach()))) + 1e-5
    assert variance == pytest.approx(5.0, abs=1e-6)
    guess = loss.guess(OURS).detach()
    total = 0.5 * float(((guess - THEIRS).square() / variance + math.log(variance)).mean())
    assert loss(OURS, THEIRS).item() == pytest.approx(total, rel=1e-6)


def test_the_likelihood_learns_what_the_student_can_say():
    torch.manual_seed(0)
    loss = VariationalLoss(4, 16)
    ours = torch.randn(64, 4, 2, 2)
    theirs = ours.repeat(1, 4, 1, 1)
    theirs[:, 15] = torch.randn(64, 2, 2)  # a channel that the student knows nothing of
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss(ours, theirs).backward()
        optimizer.step()
    spread = torch.nn.functional.softplus(loss.spread.detach())
    assert float(spread[:15].median()) < 0.3 * float(spread[15])


# -- contrast -------------------------------------------------------------------------------------


def contrast(**options) -> ContrastLoss:
    labels = torch.arange(30) % 3
    torch.manual_seed(0)
    return ContrastLoss(3, 6, labels, **{"negatives": 7, "width": 4, **options}).double()


def test_contrast_by_loops():
    loss = contrast()
    ids = torch.tensor([3, 10, 29, 0, 1])
    banks = {"s": loss.student_bank.clone(), "t": loss.teacher_bank.clone()}
    drawn = loss.draw(ids)
    loss.drawn.zero_()
    found = loss(OURS, THEIRS, ids)
    embedded = {
        "s": [unit(v) for v in loss.student_embedding(OURS.mean(dim=(2, 3)))],
        "t": [unit(v) for v in loss.teacher_embedding(THEIRS.mean(dim=(2, 3)))],
    }
    total, chance = 0.0, 7 / 30
    for anchors, bank in ((embedded["s"], banks["t"]), (embedded["t"], banks["s"])):
        entries = [[int(i), *others.tolist()] for i, others in zip(ids, drawn, strict=True)]
        raw = [
            [math.exp(float(a @ bank[e]) / 0.07) for e in row]
            for a, row in zip(anchors, entries, strict=True)
        ]
        scale = sum(map(sum, raw)) / (5 * 8) * 30
        for row in raw:
            x = [value / scale for value in row]
            total -= math.log(x[0] / (x[0] + chance + 1e-7)) / 5
            total -= sum(math.log(chance / (value + chance + 1e-7)) for value in x[1:]) / 5
    assert found.item() == pytest.approx(total, rel=1e-9)
    moved = unit(0.5 * banks["s"][3] + 0.5 * embedded["s"][0])
    torch.testing.assert_close(loss.student_bank[3], moved)
    untouched = [i for i in range(30) if i not in ids.tolist()]
    assert torch.equal(loss.teacher_bank[untouched], banks["t"][untouched])


def test_negatives_are_of_other_classes_and_all_as_likely():
    loss = contrast(negatives=6000)
    drawn = loss.draw(torch.tensor([4, 6]))
    for row, label in zip(drawn, (1, 0), strict=True):
        assert not bool((row % 3 == label).any())
        counts = torch.bincount(row, minlength=30)
        others = counts[torch.arange(30) % 3 != label]
        expected = 6000 / 20
        assert float(((others - expected) ** 2 / expected).sum()) < 50  # chi-square, 19 degrees
    assert not torch.equal(loss.draw(torch.tensor([4, 6])), drawn)


def test_contrast_resumes_with_the_same_draws():
    one, other = contrast(), contrast()
    ids = torch.tensor([3, 10, 29, 0, 1])
    one(OURS, THEIRS, ids)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(OURS, THEIRS, ids), other(OURS, THEIRS, ids))


def test_contrast_needs_two_classes():
    with pytest.raises(UserError, match="at least two classes"):
        ContrastLoss(3, 6, torch.zeros(10, dtype=torch.int64))


# -- gradients, shapes ----------------------------------------------------------------------------

PURE = [attention_loss, similarity_loss, relation_loss, neighbour_loss]


@pytest.mark.parametrize("loss", PURE, ids=lambda loss: loss.__name__)
def test_gradients_are_right_and_reach_the_student_alone(loss):
    ours = features(4, 2, 3, 3, seed=3).requires_grad_()
    theirs = features(4, 3, 3, 3, seed=4)
    assert torch.autograd.gradcheck(lambda f: loss(f, theirs), ours, eps=1e-6, atol=1e-6)
    watched = theirs.clone().requires_grad_()
    loss(ours, watched).backward()
    assert watched.grad is None


def test_gradients_of_losses_with_weights_of_their_own():
    ours = features(4, 3, 2, 2, seed=3).requires_grad_()
    theirs = features(4, 6, 2, 2, seed=4).requires_grad_()
    torch.manual_seed(0)
    likelihood = VariationalLoss(3, 6).double()
    assert torch.autograd.gradcheck(lambda f: likelihood(f, theirs.detach()), ours)
    likelihood(ours, theirs).backward()
    assert theirs.grad is None
    assert all(p.grad is not None for p in likelihood.parameters())
    loss, ids = contrast(), torch.tensor([0, 1, 2, 3])
    loss(ours, theirs, ids).backward()
    assert theirs.grad is None
    assert all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("loss", PURE, ids=lambda loss: loss.__name__)
def test_equal_features_cost_nothing_and_scale_does_not_matter(loss):
    ours = OURS.clone()
    assert loss(ours, ours).item() == pytest.approx(0, abs=1e-7)
    assert loss(3 * ours, ours).item() == pytest.approx(0, abs=1e-7)
    assert loss(ours, THEIRS).item() > 1e-5


@given(
    batch=st.integers(2, 5),
    ours=st.sampled_from([(3,), (4, 3), (3, 2, 2), (3, 5, 4)]),
    theirs=st.sampled_from([(6,), (9, 6), (6, 4, 4), (6, 2, 3)]),
    name=st.sampled_from(["sp", "rkd", "pkt", "vid", "contrast"]),
)
@settings(max_examples=40, deadline=None)
def test_any_kind_of_features(batch, ours, theirs, name):
    student, teacher = features(batch, *ours), features(batch, *theirs, seed=1)
    made = FeatureLoss(name, [student.shape], [teacher.shape], lambda: torch.arange(20) % 4, 5)
    loss = made.double()([student], [teacher], torch.arange(batch))
    assert loss.ndim == 0
    assert bool(torch.isfinite(loss))


def test_forms_of_features():
    assert as_maps(features(2, 5, 3)).shape == (2, 3, 5, 1)
    assert as_vectors(features(2, 5, 3)).shape == (2, 3)
    assert as_vectors(features(2, 3)).shape == (2, 3)
    torch.testing.assert_close(as_vectors(OURS), OURS.mean(dim=(2, 3)))
    with pytest.raises(UserError, match="name another layer"):
        as_maps(features(3))
    with pytest.raises(UserError, match="ahead of the pooling"):
        attention_loss(features(2, 3), features(2, 3))


def test_a_feature_loss_sums_over_layers():
    pairs = [(OURS, THEIRS), (features(5, 4, 2, 2, seed=7), features(5, 8, 2, 2, seed=8))]
    shapes = [[p[i].shape for p in pairs] for i in (0, 1)]
    made = FeatureLoss("at", *shapes, lambda: torch.arange(5), 1)
    found = made([p[0] for p in pairs], [p[1] for p in pairs], torch.arange(5))
    expected = sum(attention_loss(*pair) for pair in pairs)
    torch.testing.assert_close(found, expected)
