"""KCD against the values worked out by hand, naive references, and what must never change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenfold.errors import UserError
from tenfold.methods import (
    condense,
    condensed_sizes,
    distillation_loss,
    mix_images,
    prediction_entropy,
)
from tenfold.methods.condensation import ValueTable
from tenfold.methods.knowledge import KnowledgeSet
from tenfold.methods.mixing import CurrentMixing
from tenfold.methods.training_set import TrainingSet

pytestmark = pytest.mark.parity


# -- entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([math.log(0.7), math.log(0.2), math.log(0.1)], 0.801819),
        ([2.0, 0.0, -1.0], 0.5243),
        ([0.0] * 4, 1.386294),
        ([3.0] * 100, 4.605170),
        ([200.0, 0.0, 0.0], 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_by_hand(logits, expected, dtype):
    found = prediction_entropy(torch.tensor([logits], dtype=dtype))
    assert found.dtype == dtype
    assert found.item() == pytest.approx(expected, abs=5e-5)


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 30), scale=st.floats(0.01, 300))
@settings(max_examples=40, deadline=None)
def test_entropy_is_that_of_the_definition_and_stays_in_its_range(seed, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    found = prediction_entropy(logits)
    p = logits.softmax(dim=1)
    naive = torch.where(p > 0, -p * p.clamp(min=1e-320).log(), 0.0).sum(dim=1)
    torch.testing.assert_close(found, naive, rtol=1e-9, atol=1e-9)
    assert bool((found >= 0).all())
    assert bool((found <= math.log(classes) + 1e-9).all())


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 3, 4)])
def test_entropy_of_what_is_no_classifier(shape):
    with pytest.raises(UserError, match="at least 2 classes"):
        prediction_entropy(torch.zeros(shape))


# -- the table ------------------------------------------------------------------------------------


def test_values_are_means_of_all_visits():
    table = ValueTable(3)
    for entropy in (0.9, 0.6, 0.3):
        table.record(torch.tensor([1]), torch.tensor([entropy]))
        table.share()
    assert table.values[1].item() == pytest.approx(0.6, abs=1e-7)
    assert table.counts.tolist() == [0, 3, 0]


@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_values_do_not_depend_on_order_or_on_who_saw_a_sample(seed, ranks):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (60,), generator=generator)
    # Quarters, so that sums are exact in any order.
    entropies = torch.randint(0, 20, (60,), generator=generator) / 4
    whole = ValueTable(12)
    for one, entropy in zip(ids, entropies, strict=True):
        whole.record(one[None], entropy[None])
    whole.share()
    order = torch.randperm(60, generator=generator)
    tables = [ValueTable(12) for _ in range(ranks)]
    for number, at in enumerate(order.tolist()):
        tables[number % ranks].record(ids[at][None], entropies[at][None])
    sums = sum(table.state_dict()["sums"] for table in tables)
    counts = sum(table.state_dict()["counts"] for table in tables)
    assert torch.equal(sums, whole.sums)
    assert torch.equal(counts, whole.counts)
    naive = [
        float(entropies[ids == i].double().mean()) if (ids == i).any() else 0.0 for i in range(12)
    ]
    assert whole.values.tolist() == pytest.approx(naive)


def test_the_table_takes_twelve_bytes_a_sample_and_what_is_not_yet_shared():
    table = ValueTable(1000)
    assert table.sums.nbytes + table.counts.nbytes == 12 * 1000


def test_an_entropy_that_is_not_finite_is_found_when_the_epoch_ends():
    table = ValueTable(9)
    table.record(torch.tensor([4, 7]), torch.tensor([math.nan, 1.0]))
    with pytest.raises(UserError, match=r"not finite for 1 samples \(ids 4\)"):
        table.share()


# -- ranking --------------------------------------------------------------------------------------


def test_scores_by_hand():
    values, visits = torch.tensor([1.08, 1.00]), torch.tensor([2, 40])
    scores = values.double() * visits.double() ** 0.03
    assert scores.tolist() == pytest.approx([1.10269, 1.11702], abs=1e-5)
    assert condense(values, visits, size=1, previous=2).keep.tolist() == [1]
    # without the cost, the higher value is first
    assert condense(values, visits, size=1, previous=2, visit_power=0).keep.tolist() == [0]


@given(seed=st.integers(0, 10_000), factor=st.integers(2, 50))
@settings(max_examples=25, deadline=None)
def test_a_common_factor_of_all_visits_changes_nothing(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(30, generator=generator, dtype=torch.float64)
    visits = torch.randint(1, 40, (30,), generator=generator)
    one = condense(values, visits, size=20, previous=30)
    other = condense(values, factor * visits, size=20, previous=30)
    assert one.keep.tolist() == other.keep.tolist()


def test_ties_go_to_the_lower_id():
    found = condense(torch.ones(6), torch.ones(6), size=4, previous=6)
    assert found.keep.tolist() == [0, 1, 2, 3]
    assert found.drop.tolist() == [4, 5]


def knowledge(size: int = 8, **options) -> KnowledgeSet:
    images = torch.arange(size * 4, dtype=torch.uint8).reshape(size, 1, 2, 2)
    data = TrainingSet(
        name="made up",
        size=size,
        ids=torch.arange(size),
        labels=lambda: torch.arange(size) % 2,
        example=torch.zeros(1, 1, 2, 2),
        stored=lambda ids: images[ids],
    )
    fields = {
        "keep_ratio": 0.5,
        "stages": 2,
        "visit_power": 0.03,
        "mix_max": 0.3,
        "revive": True,
        "drop_window": "step",
        "mix_source": "current",
        "unseen": "refuse",
    }
    return KnowledgeSet(data, **{**fields, **options})


FIRST = [1.2, 0.4, 0.9, 0.1, 0.7, 1.5, 0.3, 0.6]
SECOND = {5: 0.8, 0: 0.2, 2: 0.2, 4: 0.1, 7: 0.1, 1: 0.05}


def visit(found: KnowledgeSet, entropies: dict[int, float], times: int = 2) -> None:
    for _ in range(times):
        ids = torch.tensor(list(entropies))
        found.table.record(ids, torch.tensor(list(entropies.values()), dtype=torch.float64))
    found.table.share()


def test_two_stages_by_hand():
    found = knowledge()
    assert found.sizes == [8, 6, 4]
    visit(found, dict(enumerate(FIRST)))
    first = condense(found.table.values, found.table.counts, size=6, previous=8)
    assert first.keep.tolist() == [5, 0, 2, 4, 7, 1]
    assert first.drop.tolist() == [6, 3]
    assert first.boundary.tolist() == [7, 1]
    assert first.shares.tolist() == pytest.approx([0, 0.15])
    found.condense()
    assert found.keep.tolist() == [5, 0, 2, 4, 7, 1]
    visit(found, SECOND)
    expected = {5: 1.15, 0: 0.7, 2: 0.55, 4: 0.4, 7: 0.35, 1: 0.225, 6: 0.3, 3: 0.1}
    assert found.table.values.tolist() == pytest.approx([expected[i] for i in range(8)])
    assert found.table.counts.tolist() == [4, 4, 4, 2, 4, 4, 2, 4]
    second = condense(found.table.values, found.table.counts, size=4, previous=6)
    assert second.keep.tolist() == [5, 0, 2, 4]
    assert second.drop.tolist() == [7, 6]  # 6 was out already
    assert second.boundary.tolist() == [2, 4]
    assert second.shares.tolist() == pytest.approx([0, 0.15])
    before = stored(found, [0, 1, 2, 3, 4, 5, 6, 7])
    found.condense()
    assert found.keep.tolist() == [5, 0, 2, 4]
    after = stored(found, [0, 1, 2, 3, 4, 5, 6, 7])
    mixed = (0.85 * before[4].float() + 0.15 * before[6].float()).to(torch.uint8)  # 4 <- 6
    torch.testing.assert_close(after[4], mixed, rtol=0, atol=1)
    unchanged = [i for i in range(8) if i != 4]
    assert torch.equal(after[unchanged], before[unchanged])
    assert (found.versions > 0).tolist() == [False, True, False, False, True] + 3 * [False]


def stored(found: KnowledgeSet, ids: list[int]) -> torch.Tensor:
    chosen = torch.tensor(ids)
    assert isinstance(found.mixing, CurrentMixing)
    return found.mixing.replaced(chosen, found.data.stored(chosen))


def test_a_dropped_sample_comes_back_unless_that_is_off():
    for revive in (True, False):
        found = knowledge(revive=revive)
        visit(found, dict(enumerate(FIRST)))
        found.condense()
        # all that were kept turn out to be easy: 6 and 3 are now worth more than 4, 7 and 1
        visit(found, dict.fromkeys(SECOND, 0.0), times=20)
        found.condense()
        assert ({3, 6} <= set(found.keep.tolist())) == revive
        assert found.revived == [0, 2 if revive else 0]
        assert len(found.keep) == 4


def test_what_is_out_can_count_as_leaving_again():
    values = torch.tensor(FIRST)
    visits = torch.full((8,), 2)
    found = condense(values, visits, size=4, previous=6, drop_window="all")
    assert found.keep.tolist() == [5, 0, 2, 4]
    assert found.drop.tolist() == [7, 1, 6, 3]
    assert found.boundary.tolist() == [5, 0, 2, 4]
    assert found.shares.tolist() == pytest.approx([0, 0.075, 0.15, 0.225])


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(8, 60),
    share=st.floats(0.5, 1.0),
    power=st.sampled_from([0.0, 0.03, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_invariants_of_a_condensation(seed, count, share, power):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, generator=generator)
    visits = torch.randint(1, 9, (count,), generator=generator)
    previous = count - int(torch.randint(0, 3, (), generator=generator))
    size = max(-(-previous // 2), int(previous * share))
    found = condense(values, visits, size=size, previous=previous, visit_power=power)
    keep, drop = set(found.keep.tolist()), set(found.drop.tolist())
    assert len(keep) == size
    assert not keep & drop
    assert len(keep | drop) == previous
    assert set(found.boundary.tolist()) <= keep
    assert len(found.boundary) == len(found.drop) == len(found.shares) == previous - size
    score = (values.double() * visits.double() ** power).tolist()
    naive = sorted(range(count), key=lambda i: (-score[i], i))
    assert found.keep.tolist() + found.drop.tolist() == naive[:previous]


# -- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "ratio", "sizes"),
    [
        (50_000, 0.7, [50_000, 47_500, 45_000, 42_500, 40_000, 37_500, 35_000]),
        (50_000, 0.5, [50_000, 45_834, 41_668, 37_502, 33_336, 29_170, 25_004]),
        (600, 0.9, [600, 590, 580, 570, 560, 550, 540]),
        (10, 1.0, [10] * 7),
        (10, 0.7, [10] * 7),  # a step of less than one sample is none
    ],
)
def test_sizes_by_hand(samples, ratio, sizes):
    assert condensed_sizes(samples, ratio, 6) == sizes


@given(samples=st.integers(4, 5000), ratio=st.floats(0.3, 1.0), stages=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_sizes_never_grow_and_never_fall_below_what_is_kept(samples, ratio, stages):
    sizes = condensed_sizes(samples, ratio, stages)
    assert len(sizes) == stages + 1
    assert all(after <= before for before, after in itertools.pairwise(sizes))
    assert min(sizes) >= math.floor(samples * ratio + 1e-9)
    assert sizes[-1] - math.floor(samples * ratio + 1e-9) <= stages  # what rounding down left


def test_at_the_floor_a_condensation_does_nothing():
    found = knowledge(size=9, keep_ratio=0.9, stages=3)
    assert found.sizes == [9, 9, 9, 9]
    visit(found, {i: 0.1 * i for i in range(9)})
    found.condense()
    assert found.done == 1
    assert found.keep.tolist() == list(range(9))
    assert found.mixing is None


# -- mixing ---------------------------------------------------------------------------------------


def test_mixed_pixels_by_hand():
    images = torch.full((4, 1, 2, 2), 200, dtype=torch.uint8)
    partners = torch.full((4, 1, 2, 2), 100, dtype=torch.uint8)
    mixed = mix_images(images, partners, torch.tensor([0.0, 0.075, 0.15, 0.225]))
    assert mixed.dtype == torch.uint8
    for found, expected in zip(mixed, (200, 192, 185, 177), strict=True):
        assert bool(((found.int() - expected).abs() <= 1).all())
    assert torch.equal(mixed[0], images[0])


def test_the_first_of_the_boundary_is_left_bit_identical():
    generator = torch.Generator().manual_seed(0)
    images, partners = torch.randint(
        0, 256, (2, 5, 3, 4, 4), generator=generator, dtype=torch.uint8
    )
    mixed = mix_images(images, partners, torch.zeros(5))
    assert torch.equal(mixed, images)


def test_mixes_add_up_over_stages():
    """The authors' code writes mixed pixels back, and mixes them again later."""
    mixing = CurrentMixing(size=3, capacity=2, shape=(1,))
    pixels = torch.tensor([[200], [100], [40]], dtype=torch.uint8)

    def now(ids):
        return mixing.replaced(ids, pixels[ids])

    zero, one, two = (torch.tensor([i]) for i in range(3))
    assert mixing.mix(zero, now(zero), now(one), torch.tensor([0.25])).tolist() == [0]
    assert now(zero).item() == 175
    mixing.mix(zero, now(zero), now(two), torch.tensor([0.2]))
    assert now(zero).item() == 148
    mixing.mix(two, now(two), now(zero), torch.tensor([0.5]))
    assert now(two).item() == 94  # with what stands for 0 by now
    assert now(torch.tensor([1, 2, 0])).flatten().tolist() == [100, 94, 148]
    again = CurrentMixing(size=3, capacity=2, shape=(1,))
    again.load_state_dict(mixing.state_dict())
    ids = torch.arange(3)
    assert torch.equal(again.replaced(ids, pixels[ids]), now(ids))


# -- the loss -------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
    label = torch.tensor([1])
    hard = nn.functional.cross_entropy(student, label)
    soft = distillation_loss(student, teacher, temperature=4.0)
    assert hard.item() == pytest.approx(0.407606, abs=1e-6)
    assert soft.item() == pytest.approx(0.948698, abs=1e-6)
    assert (0.1 * hard + 0.9 * soft).item() == pytest.approx(0.894588, abs=1e-6)


def test_no_gradient_reaches_the_teacher():
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda logits: distillation_loss(logits, fixed, 2.0), student)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "text"),
    [((4, 3), (4, 5), 4.0, "the same classes"), ((4, 3), (4, 3), 0.0, "more than 0")],
)
def test_losses_that_can_not_be(student, teacher, temperature, text):
    with pytest.raises(UserError, match=text):
        distillation_loss(torch.zeros(student), torch.zeros(teacher), temperature)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 0}, "1 <= size <= previous <= ids"),
        ({"size": 9}, "1 <= size <= previous <= ids"),
        ({"previous": 9}, "1 <= size <= previous <= ids"),
        ({"size": 2, "previous": 8}, "6 samples would leave and only 2 stay"),
        ({"mix_max": 1.0}, "mix_max=1.0"),
        ({"visit_power": -0.1}, "visit_power=-0.1"),
    ],
)
def test_a_condensation_that_can_not_be(arguments, text):
    with pytest.raises(UserError, match=text):
        condense(torch.rand(8), torch.ones(8), **{"size": 6, "previous": 8, **arguments})


def test_a_sample_that_was_never_visited_is_refused_or_kept():
    values, visits = torch.tensor([1.0, 0.5, 0.0, 0.8]), torch.tensor([1, 1, 0, 1])
    with pytest.raises(UserError, match=r"1 of 4 samples have not been visited yet \(ids 2\)"):
        condense(values, visits, size=3, previous=4)
    found = condense(values, visits, size=3, previous=4, unseen="keep")
    assert found.keep.tolist() == [2, 0, 3]


def test_a_ratio_that_keeps_nothing_or_leaves_too_much():
    with pytest.raises(UserError, match="keeps none of 3 samples"):
        condensed_sizes(3, 0.2, 1)
    with pytest.raises(UserError, match="6 samples would leave in stage 1 and only 2 stay"):
        knowledge(keep_ratio=0.25, stages=1)
    with pytest.raises(
        UserError, match=r"(?s)6 samples would leave in stage 2 .*drop_window='step'"
    ):
        knowledge(keep_ratio=0.25, stages=2, drop_window="all")
    with pytest.raises(UserError, match="stages=0"):
        condensed_sizes(10, 0.5, 0)
    with pytest.raises(UserError, match=r"keep_ratio=1\.5"):
        condensed_sizes(10, 1.5, 2)
