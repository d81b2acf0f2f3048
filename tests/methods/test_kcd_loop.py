"""KCD in a plain loop: what is drawn, counted, mixed and compared."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.errors import StateError
from tenfold.methods import KCD, LBC, condensed_sizes, distillation_loss, find, prediction_entropy
from tenfold.methods.condensed_data import CondensedSampler
from tests.distilling import (
    CLASSES,
    SIZE,
    Pictures,
    data,
    epoch,
    images,
    make,
    network,
    same,
    scaled,
    start,
    teacher,
)

pytestmark = pytest.mark.unit


# -- the run --------------------------------------------------------------------------------------


@pytest.mark.parity
def test_counts_are_those_of_the_schedule_and_each_epoch_draws_the_kept_once():
    kcd = make()
    student, optimizer = start(kcd)
    sizes = condensed_sizes(SIZE, 0.5, 3)
    assert sizes == [48, 40, 32, 24]
    expected = [48, 48, 40, 40, 32, 32]
    assert kcd.epoch_samples(SIZE, 6) == expected
    for number in range(6):
        kept = set(kcd.kept.tolist())
        drawn = epoch(kcd, student, optimizer)
        assert len(drawn) == expected[number]
        assert set(drawn) == kept
    assert kcd.forwards == {"student": sum(expected), "teacher": sum(expected)}
    assert kcd.metrics() == {"kept": 32.0}  # no condensation after the last epoch
    keys = list(network(0).state_dict())
    finished = kcd.finalize(student)
    assert finished is student
    assert list(finished.state_dict()) == keys
    assert not any(module._forward_hooks for module in finished.modules())


@pytest.mark.parametrize(("ratio", "saved"), [(0.7, 0.125), (0.5, 1 - 237_510 / 300_000)])
def test_the_share_that_the_paper_saves(ratio, saved):
    kcd = KCD(teacher="resnet56", keep_ratio=ratio)
    drawn = kcd.epoch_samples(50_000, 240)
    assert 1 - sum(drawn) / (50_000 * 240) == pytest.approx(saved, abs=1e-6)
    assert 1 - sum(kcd.epoch_samples(10_000, 12)) / 120_000 == pytest.approx(saved, abs=2e-4)


@pytest.mark.parity
def test_values_are_what_the_training_forwards_say():
    """Recorded from the logits of the training step: train mode, ahead of the update, T = 1."""
    kcd = make(keep_ratio=1.0, augment_max=0.0)
    student, optimizer = start(kcd, epochs=3, dropout=0.3)
    sums, counts = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE)
    for _ in range(3):
        for image, label, ids in DataLoader(kcd.dataset, 8, sampler=kcd.sampler):
            student.train()
            logits = student(image)
            sums[ids] += prediction_entropy(logits.detach()).double()
            counts[ids] += 1
            optimizer.zero_grad()
            kcd.loss(image, label, ids, logits=logits).backward()
            optimizer.step()
        kcd.epoch_end()
    table = kcd._work.knowledge.table
    torch.testing.assert_close(table.sums, sums)
    assert torch.equal(table.counts, counts.int())


@pytest.mark.parity
def test_ids_that_were_not_visited_keep_their_values():
    kcd = make(augment_max=0.0)
    student, optimizer = start(kcd)
    epoch(kcd, student, optimizer)
    epoch(kcd, student, optimizer)
    table = kcd._work.knowledge.table
    out = sorted(set(range(SIZE)) - set(kcd.kept.tolist()))
    before = table.sums[out].clone(), table.counts[out].clone()
    epoch(kcd, student, optimizer)
    assert len(out) == 8
    assert torch.equal(table.sums[out], before[0])
    assert torch.equal(table.counts[out], before[1])


@pytest.mark.parity
def test_keeping_everything_is_plain_distillation_bit_for_bit():
    kcd = make(keep_ratio=1.0)
    student, optimizer = start(kcd, epochs=3)
    for _ in range(3):
        epoch(kcd, student, optimizer)
    plain, guide = network(0), teacher()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    everything = data()
    for number in range(3):
        sampler = CondensedSampler(lambda: torch.arange(SIZE), lambda n=number: n, SIZE, seed=0)
        for ids in torch.tensor(list(sampler)).split(8):
            image, label = scaled(everything.tensors[0][ids]), everything.tensors[1][ids]
            logits = plain.train()(image)
            hard = nn.functional.cross_entropy(logits, label)
            soft = distillation_loss(logits, guide(image), 4.0)
            optimizer.zero_grad()
            (0.1 * hard + 0.9 * soft).backward()
            optimizer.step()
    same(kcd.finalize(student), plain)


def test_without_a_use_for_the_teacher_it_is_not_asked():
    kcd = make(label_weight=1.0, logit_weight=0.0)
    student, optimizer = start(kcd)
    epoch(kcd, student, optimizer)
    assert kcd.forwards == {"student": 48, "teacher": 0}


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = []
    for seed in (0, 0, 1):
        kcd = make()
        student, optimizer = start(kcd, seed=seed)
        torch.randn(7)
        orders.append([epoch(kcd, student, optimizer) for _ in range(2)])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0][0] != orders[0][1]


# -- mixed images ---------------------------------------------------------------------------------


def mixed_by_hand(kcd: KCD, before: torch.Tensor) -> dict[int, torch.Tensor]:
    """Work out one condensation from the table, as the sheet has it."""
    table = kcd._work.knowledge.table
    score = table.values * table.counts.double() ** 0.03
    order = sorted(range(SIZE), key=lambda i: (-float(score[i]), i))
    keep, drop = order[:40], order[40:48]
    found = {}
    for at, (one, other) in enumerate(zip(keep[-8:], drop, strict=True)):
        share = torch.tensor(0.3 * at / 8)
        blend = (1 - share) * before[one].float() + share * before[other].float()
        found[one] = blend.to(torch.uint8)
    return found


@pytest.mark.parity
def test_mixed_images_are_served_in_place_of_the_originals():
    kcd = make()
    student, optimizer = start(kcd)
    epoch(kcd, student, optimizer)
    untouched = data().tensors[0].clone()
    epoch(kcd, student, optimizer)
    expected = mixed_by_hand(kcd, untouched)
    changed = 0
    for index in range(SIZE):
        image, _, _ = kcd.dataset[index]
        if index in expected:
            torch.testing.assert_close(image, scaled(expected[index]), rtol=0, atol=1.01 / 255)
            changed += int(not torch.equal(image, scaled(untouched[index])))
        else:
            assert torch.equal(image, scaled(untouched[index]))
    assert changed == 7  # the first of the boundary is mixed by a share of 0
    assert torch.equal(kcd.dataset.source.tensors[0], untouched), "the user's data is not touched"


@pytest.mark.parity
def test_original_images_mixed_as_they_are_loaded():
    """Two views, each transformed by itself, and never a mix of a mix."""
    kcd = make(mix_source="original")
    floats = TensorDataset(scaled(images()), torch.arange(SIZE) % CLASSES)
    student, optimizer = start(kcd, dataset=floats, transform=lambda image: 2 * image)
    for _ in range(4):
        epoch(kcd, student, optimizer)
    mixing = kcd._work.knowledge.mixing
    pairs = [i for i in range(SIZE) if mixing.partners[i] >= 0]
    assert len(pairs) > 7
    for i in pairs:
        share, other = mixing.shares[i], floats[int(mixing.partners[i])][0]
        expected = (1 - share) * 2 * floats[i][0] + share * 2 * other
        torch.testing.assert_close(kcd.dataset[i][0], expected)


@pytest.mark.parametrize("persistent", [False, True])
def test_loader_processes_see_images_that_are_mixed_later(persistent):
    kcd = make()
    student, optimizer = start(kcd)
    loader = DataLoader(
        kcd.dataset, 8, sampler=kcd.sampler, num_workers=1, persistent_workers=persistent
    )
    for _ in range(2):
        epoch(kcd, student, optimizer, loader=loader)
    served = {int(i): image for x, _, ids in loader for i, image in zip(ids, x, strict=True)}
    assert set(served) == set(kcd.kept.tolist())
    originals = scaled(data().tensors[0])
    for index, image in served.items():
        assert torch.equal(image, kcd.dataset[index][0])
    assert sum(not torch.equal(image, originals[i]) for i, image in served.items()) == 7


def test_a_copy_that_would_miss_mixed_images_is_refused_in_a_loader_process():
    kcd = make()
    start(kcd)
    loader = DataLoader(copy.deepcopy(kcd.dataset), 8, num_workers=1, persistent_workers=True)
    with pytest.raises(Exception, match="persistent workers with in-place mixing"):
        next(iter(loader))


@pytest.mark.parametrize("kind", ["pil", "numpy"])
def test_pil_images_and_arrays(kind):
    def floats(image) -> torch.Tensor:
        assert isinstance(image, Image.Image if kind == "pil" else np.ndarray)
        return scaled(torch.from_numpy(np.array(image)).unsqueeze(0))

    runs = []
    for options in ({"dataset": Pictures(kind), "transform": floats}, {}):
        kcd = make()
        student, optimizer = start(kcd, **options)
        runs.append([epoch(kcd, student, optimizer) for _ in range(4)])
        runs.append(torch.stack([kcd.dataset[i][0] for i in range(SIZE)]))
    assert runs[0] == runs[2]
    assert torch.equal(runs[1], runs[3])


# -- feature distillers ---------------------------------------------------------------------------

LAYERS = {
    "at": ["0", "3"],
    "sp": ["4"],
    "rkd": ["4"],
    "pkt": ["7"],
    "vid": ["0", "4"],
    "contrast": ["7"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_distiller_trains_and_leaves_nothing_behind(name):
    kcd = make(distiller=name, layers=LAYERS[name], negatives=16)
    student, optimizer = start(kcd, epochs=3)
    owned = [parameter.clone() for parameter in kcd.owned_parameters()]
    assert bool(owned) == (name in ("vid", "contrast"))
    before = student[0].weight.clone()
    for _ in range(3):
        epoch(kcd, student, optimizer)
    assert not torch.equal(student[0].weight, before)
    for old, new in zip(owned, kcd.owned_parameters(), strict=True):
        assert not torch.equal(old, new), "its own weights are trained too"
    keys = list(network(0).state_dict())
    assert list(kcd.finalize(student).state_dict()) == keys
    assert not any(m._forward_hooks for m in (*student.modules(), *kcd.teacher.modules()))


def test_the_loss_is_the_weighted_sum_of_its_parts():
    from tenfold.methods import attention_loss

    weights = {"label_weight": 0.5, "logit_weight": 0.25, "feature_weight": 7.0}
    kcd = make(distiller="at", layers=["0"], teacher_layers=["3"], temperature=2.0, **weights)
    student, _ = start(kcd)
    image, label, ids = next(iter(DataLoader(kcd.dataset, 8, sampler=kcd.sampler)))
    with torch.no_grad():
        logits, ours = student.train()(image), student[0](image)
        guide = kcd.teacher
        theirs = guide[:4](image)
        expected = 0.5 * nn.functional.cross_entropy(logits, label)
        expected += 0.25 * distillation_loss(logits, guide(image), 2.0)
        expected += 7 * attention_loss(ours, theirs)
    torch.testing.assert_close(kcd.loss(image, label, ids).detach(), expected)


def test_an_evaluation_in_between_leaves_no_features_behind():
    kcd = make(distiller="sp", layers=["4"])
    student, _ = start(kcd)
    image, label, ids = next(iter(DataLoader(kcd.dataset, 8, sampler=kcd.sampler)))
    with torch.no_grad():
        student.eval()(image)
    student.train()
    with pytest.raises(StateError, match="module 4 of the student did not run"):
        kcd.loss(image, label, ids, logits=torch.zeros(8, CLASSES))


def test_without_gradients_nothing_is_noted():
    kcd = make()
    start(kcd)
    image, label, ids = next(iter(DataLoader(kcd.dataset, 8, sampler=kcd.sampler)))
    with torch.no_grad():
        kcd.loss(image, label, ids)
    assert kcd.forwards["student"] == 0
    kcd.loss(image, label, ids)
    assert kcd.forwards["student"] == 8


# -- composing ------------------------------------------------------------------------------------


def test_beside_lbc_in_a_plain_loop():
    kcd, sparsity = make(), LBC(n=2, m=4, include=["3"])
    student = network(0)
    sizes = [math.ceil(count / 8) for count in kcd.epoch_samples(SIZE, 6)]
    student = sparsity.attach(student, total_steps=sum(sizes), steps_per_epoch=sizes)
    student = kcd.attach(student, dataset=data(), epochs=6, transform=scaled)
    optimizer = torch.optim.SGD(kcd.parameters_for(student), lr=0.05)
    for _ in range(6):
        for image, label, ids in DataLoader(kcd.dataset, 8, sampler=kcd.sampler):
            optimizer.zero_grad()
            kcd.loss(image, label, ids).backward()
            optimizer.step()
            sparsity.step()
            kcd.step()  # allowed, and without effect: epochs keep KCD's time
        kcd.epoch_end()
    student = sparsity.finalize(kcd.finalize(student))
    assert float((student[3].weight != 0).float().mean()) == 0.5
    assert list(student.state_dict()) == list(network(0).state_dict())


def test_the_adapters_optimizer_is_nobodys_training_step():
    """LBC in the same loop sees one step of the student's optimizer, not the feature loss's own."""
    seen = []

    class Watching(LBC):
        def on_before_step(self, optimizer):
            seen.append(type(optimizer).__name__)
            super().on_before_step(optimizer)

    kcd, sparsity = make(distiller="vid", layers=["4"]), Watching(n=2, m=4, include=["3"])
    student = sparsity.attach(network(0), total_steps=6)
    student = kcd.attach(student, dataset=data(), epochs=3, transform=scaled)
    optimizer = torch.optim.SGD(kcd.parameters_for(student), lr=0.05)
    for image, label, ids in DataLoader(kcd.dataset, 8, sampler=kcd.sampler):
        optimizer.zero_grad()
        kcd.loss(image, label, ids).backward()
        optimizer.step()
        sparsity.step()
    assert seen == ["SGD"] * 6


def test_it_is_found_and_described():
    assert find("kcd") is KCD
    kcd = KCD(teacher="resnet56", keep_ratio=0.6)
    assert kcd.config()["keep_ratio"] == 0.6
    assert KCD(**kcd.config()).config() == kcd.config()


def test_the_record_says_what_was_saved():
    kcd = make()
    student, optimizer = start(kcd)
    for _ in range(6):
        epoch(kcd, student, optimizer)
    record = kcd.record()
    assert record["forwards"] == {"student": 240, "teacher": 240}
    assert record["facts"][0] == ["forward passes, student", "240 of 288, 16.7% saved"]
    kept = next(chart for chart in record["charts"] if "trained on" in chart["title"])
    assert kept["lines"][0]["points"] == [[0, 48], [1, 48], [2, 40], [3, 40], [4, 32], [5, 32]]
    values = kcd._work.knowledge.table.values
    best, worst = (group["ids"] for group in record["images"])
    assert float(values[best].min()) >= float(values[worst].max())
    assert values[best].tolist() == sorted(values[best].tolist(), reverse=True)
    spread = next(chart for chart in record["charts"] if "Value" in chart["title"])
    assert sum(count for line in spread["lines"] for _, count in line["points"]) == SIZE
