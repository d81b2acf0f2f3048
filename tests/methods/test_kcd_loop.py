"""KCD in a plain loop: what is drawn, counted, mixed, kept in checkpoints, and refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tenfold.errors import StateError, UserError
from tenfold.methods import KCD, LBC, condensed_sizes, distillation_loss, find, prediction_entropy
from tenfold.methods.condensed_data import CondensedSampler

pytestmark = pytest.mark.unit
SIZE, CLASSES = 48, 3


def network(seed: int, width: int = 8, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


def teacher(seed: int = 1) -> nn.Module:
    return network(seed, width=12).eval().requires_grad_(False)


def images(size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 1, 6, 6), generator=generator, dtype=torch.uint8)


def data(size: int = SIZE) -> TensorDataset:
    return TensorDataset(images(size), torch.arange(size) % CLASSES)


def scaled(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 255 - 0.5


def start(kcd: KCD, *, epochs: int = 6, seed: int = 0, dropout: float = 0.0, **options):
    student = network(0, dropout=dropout)
    options = {"dataset": data(), "transform": scaled, **options}
    student = kcd.attach(student, epochs=epochs, seed=seed, **options)
    optimizer = torch.optim.SGD(kcd.parameters_for(student), lr=0.05, momentum=0.9)
    return student, optimizer


def epoch(kcd: KCD, student: nn.Module, optimizer, workers: int = 0, **loader) -> list[int]:
    """Train one epoch and return the ids that were drawn."""
    drawn: list[int] = []
    loader = loader.get("loader") or DataLoader(kcd.dataset, 8, sampler=kcd.sampler)
    student.train()
    for image, label, ids in loader:
        optimizer.zero_grad()
        kcd.loss(image, label, ids).backward()
        optimizer.step()
        drawn += ids.tolist()
    kcd.epoch_end()
    return drawn


def make(**options) -> KCD:
    return KCD(**{"teacher": teacher(), "keep_ratio": 0.5, "stages": 3, **options})


def same(one: nn.Module, other: nn.Module) -> None:
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


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
        sampler = CondensedSampler(lambda: torch.arange(SIZE), lambda n=number: n, seed=0)
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


class Pictures(Dataset):
    """As torchvision has them: PIL images, transformed afterwards."""

    def __init__(self, kind: str):
        self.kind = kind

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int):
        pixels = images()[index, 0].numpy()
        image = Image.fromarray(pixels) if self.kind == "pil" else pixels
        return image, index % CLASSES


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


# -- the cache ------------------------------------------------------------------------------------


def test_the_cache_asks_once_for_each_view_and_once_more_for_mixed_pixels():
    kcd = make(teacher_cache="memory")
    student, optimizer = start(kcd, views=1)
    for _ in range(6):
        epoch(kcd, student, optimizer)
    mixed = int((kcd._work.knowledge.versions > 0).sum())
    assert kcd.forwards["student"] == 240
    assert SIZE < kcd.forwards["teacher"] <= SIZE + int(kcd._work.knowledge.versions.sum())
    assert mixed > 0
    plain = make(keep_ratio=1.0, teacher_cache="memory")
    student, optimizer = start(plain, views=1)
    for _ in range(6):
        epoch(plain, student, optimizer)
    assert plain.forwards["teacher"] == SIZE


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("source", ["current", "original"])
def test_the_cache_changes_nothing_but_the_count(place, source, tmp_path):
    runs = []
    for cache in ("off", place if place == "memory" else str(tmp_path / "answers")):
        kcd = make(teacher_cache=cache, mix_source=source)
        student, optimizer = start(kcd, views=1)
        drawn = [epoch(kcd, student, optimizer) for _ in range(6)]
        runs.append((drawn, kcd.finalize(student).state_dict(), kcd.forwards))
    assert runs[0][0] == runs[1][0]
    for key, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][key], value, rtol=1e-4, atol=1e-5)
    assert runs[1][2]["teacher"] < 0.6 * runs[0][2]["teacher"]


def test_views_are_told_apart():
    """Mirrored or not: the answer to one view is never served for the other."""
    kcd = make(keep_ratio=1.0, teacher_cache="memory", label_weight=0.0, logit_weight=1.0)
    student, _ = start(kcd, views=2)
    student.eval()
    pixels = torch.stack([kcd.dataset[i][0] for i in range(8)])
    ids, guide = torch.arange(8), kcd.teacher
    for mirrored in (0, 1, 0, 1):
        image = pixels.flip(-1) if mirrored else pixels
        views = torch.full((8,), mirrored)
        found = kcd.loss(image, torch.zeros(8).long(), ids, views=views)
        torch.testing.assert_close(found, distillation_loss(student(image), guide(image)))
    assert kcd.forwards["teacher"] == 16
    with pytest.raises(UserError, match=r"views from 2 to 2: expected 0 to 1"):
        kcd.loss(pixels, torch.zeros(8).long(), ids, views=torch.full((8,), 2))
    with pytest.raises(UserError, match="views=0: expected at least 1"):
        start(make(teacher_cache="memory"), views=0)


def test_a_cache_on_disk_serves_the_next_run_but_no_other_teacher(tmp_path):
    folder = str(tmp_path / "answers")
    counts = []
    for _ in range(2):
        kcd = make(keep_ratio=1.0, teacher_cache=folder)
        student, optimizer = start(kcd, epochs=3, views=1)
        epoch(kcd, student, optimizer)
        counts.append(kcd.forwards["teacher"])
    assert counts == [48, 0]
    other = make(teacher=teacher(7), teacher_cache=folder)
    student, optimizer = start(other, views=1)
    with pytest.raises(UserError, match=r"another teacher or data set; it differs in teacher"):
        epoch(other, student, optimizer)


def test_mixed_images_of_an_earlier_run_are_not_served(tmp_path):
    folder = str(tmp_path / "answers")
    for seed in (0, 1):
        kcd = make(teacher_cache=folder, label_weight=0.0, logit_weight=1.0)
        student, optimizer = start(kcd, views=1, seed=seed)
        for _ in range(4):
            epoch(kcd, student, optimizer)
    ids = torch.nonzero(kcd._work.knowledge.versions).flatten()
    image = torch.stack([kcd.dataset[int(i)][0] for i in ids])
    student.eval()
    with torch.no_grad():
        found = kcd.loss(image, torch.zeros(len(ids)).long(), ids)
        torch.testing.assert_close(found, distillation_loss(student(image), kcd.teacher(image)))


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mix_source": "original"},
        {"distiller": "contrast", "layers": ["7"], "negatives": 8},
        {"distiller": "vid", "layers": ["4"]},
    ],
    ids=lambda options: options.get("distiller") or options.get("mix_source") or "kd",
)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_the_unbroken_one(options, stop, tmp_path):
    def run(epochs, state=None):
        kcd = make(**options)
        student, optimizer = start(kcd)
        if state is not None:
            student.load_state_dict(state["student"])
            kcd.load_state_dict(state["kcd"])
            optimizer.load_state_dict(state["optimizer"])
        drawn = [epoch(kcd, student, optimizer) for _ in range(epochs)]
        saved = {
            "student": student.state_dict(),
            "kcd": kcd.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        return kcd, student, drawn, saved

    whole, student, drawn, _ = run(6)
    state = run(stop)[3]
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, other, rest, _ = run(6 - stop, state)
    assert rest == drawn[stop:]
    assert resumed.forwards == whole.forwards
    assert torch.equal(resumed._work.knowledge.table.sums, whole._work.knowledge.table.sums)
    assert whole.kept.tolist() == resumed.kept.tolist()
    same(whole.finalize(student), resumed.finalize(other))


@pytest.mark.parametrize(
    ("other", "options", "text"),
    [
        ({"keep_ratio": 0.6}, {}, r"keep_ratio=0\.5, and this KCD has 0\.6"),
        ({"stages": 2}, {}, "stages=3, and this KCD has 2"),
        ({}, {"dataset": data(40)}, "samples=48, and this KCD has 40"),
        ({"teacher": teacher(5)}, {}, "teacher="),
        ({}, {"epochs": 7}, "epochs=6, and this KCD has 7"),
        ({"augment_max": 0.0}, {}, "another augment_max or mix_source"),
    ],
)
def test_the_state_of_another_run_is_refused(other, options, text):
    kcd = make()
    student, optimizer = start(kcd)
    epoch(kcd, student, optimizer)
    again = make(**other)
    start(again, **options)
    with pytest.raises(UserError, match=text):
        again.load_state_dict(kcd.state_dict())


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


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio=0\.0"),
        ({"keep_ratio": 1.1}, r"keep_ratio=1\.1"),
        ({"stages": 0}, "stages=0"),
        ({"augment_max": 1.0}, r"augment_max=1\.0"),
        ({"augment_max": -0.1}, r"augment_max=-0\.1"),
        ({"visit_power": -1.0}, r"visit_power=-1\.0"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"distiller": "att"}, "did you mean at"),
        ({"distiller": "at"}, r"name the modules they come from, such as layers: \[layer1"),
        ({"distiller": "sp", "layers": ["a", "b"]}, "sp compares one layer"),
        ({"layers": ["4"]}, "kd compares logits alone"),
        ({"distiller": "vid", "layers": ["a"], "teacher_layers": ["a", "b"]}, "layers names 1"),
        ({"distiller": "sp", "layers": "layer3"}, "expected a list of module names"),
        ({"drop_window": "most"}, "drop_window='most': expected step or all"),
        ({"mix_source": "new"}, "mix_source='new'"),
        ({"unseen": "drop"}, "unseen='drop'"),
        ({"label_weight": 0.0, "logit_weight": 0.0}, "nothing would be learned"),
        ({"label_weight": -1.0}, r"label_weight=-1\.0"),
        ({"feature_weight": 2.0}, "compares no features"),
        ({"teacher_cache": ""}, "teacher_cache=''"),
        ({"teacher_cache": "memory", "distiller": "sp", "layers": ["4"]}, "teacher_cache keeps"),
        ({"teacher": 3}, "teacher=3"),
        ({"teacher": ""}, "teacher=''"),
        ({"negatives": 0}, "negatives=0"),
    ],
)
def test_fields_that_can_not_be(fields, text):
    with pytest.raises(UserError, match=text):
        make(**fields)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 6, 6), 0


class Odd(Pictures):
    """One image is larger than the others."""

    def __getitem__(self, index: int):
        side = 7 if index == 5 else 6
        return torch.zeros(1, side, side, dtype=torch.uint8), index % CLASSES


FLOATS = TensorDataset(scaled(images()), torch.arange(SIZE) % CLASSES)


@pytest.mark.parametrize(
    ("fields", "options", "text"),
    [
        ({}, {"dataset": Stream()}, "Stream is a stream"),
        ({}, {"dataset": TensorDataset(torch.zeros(0, 1), torch.zeros(0))}, "dataset is empty"),
        ({}, {"dataset": [torch.zeros(1)]}, r"item 0 of the dataset is Tensor"),
        ({}, {"epochs": 2}, "stages=3 and 2 epochs"),
        ({"teacher": network(1)}, {}, "the teacher is in training mode"),
        ({"teacher": network(1).eval()}, {}, "want gradients"),
        ({"teacher": "resnet56"}, {}, "give the network itself"),
        ({"distiller": "sp", "layers": ["44"]}, {}, "the (student|teacher) has no module '44'"),
        ({"distiller": "at", "layers": ["7"]}, {}, "these layers give vectors"),
        ({"teacher_cache": "memory"}, {}, r"attach\(…, views=…\)"),
        ({}, {"dataset": FLOATS, "transform": None}, "image 0 of the dataset is torch.float32"),
        ({}, {"dataset": Pictures("pil"), "transform": None}, "images as Image: expected tensors"),
        ({}, {"total_steps": 5}, "gives it both"),
        ({}, {"dataset": None}, "gives it both"),
        ({"keep_ratio": 0.01, "stages": 1}, {}, "keeps none of 48|48 samples would leave"),
        ({"keep_ratio": 0.2, "stages": 1}, {}, "38 samples would leave in stage 1"),
    ],
)
def test_runs_that_can_not_be_are_refused_ahead_of_the_first_step(fields, options, text):
    kcd = make(**fields)
    with pytest.raises(UserError, match=text):
        start(kcd, **options)


def test_an_odd_image_is_named_when_it_is_to_be_mixed():
    kcd = make()
    start(kcd, dataset=Odd("odd"))
    kcd.epoch_end()
    values = torch.arange(SIZE, 0, -1.0)
    values[5], values[36] = values[36].clone(), values[5].clone()  # among the last that stay
    kcd._work.knowledge.table.record(torch.arange(SIZE), values)
    with pytest.raises(UserError, match=r"\(id 5\): expected one shape"):
        kcd.epoch_end()


def test_a_student_that_is_its_own_teacher():
    net = teacher()
    with pytest.raises(UserError, match="share parameters"):
        KCD(teacher=net).attach(net, dataset=data(), epochs=6, transform=scaled)


def test_a_teacher_that_begins_to_train_is_noticed():
    kcd = make()
    student, optimizer = start(kcd)
    kcd.teacher.train()
    with pytest.raises(UserError, match="the teacher is in training mode"):
        epoch(kcd, student, optimizer)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (None, "one id a sample; let the loader give"),
        (torch.arange(5), r"ids are \(5,\)"),
        (torch.arange(8.0), "ids are torch.float32: expected integers"),
        (torch.arange(8) + 41, "ids from 41 to 48: expected 0 to 47"),
        (torch.arange(8) - 1, "ids from -1 to 6"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 2]), "ids 2 occur twice in a batch"),
    ],
)
def test_ids_that_can_not_be(ids, text):
    kcd = make()
    start(kcd)
    with pytest.raises(UserError, match=text):
        kcd.loss(torch.zeros(8, 1, 6, 6), torch.zeros(8).long(), ids)


@pytest.mark.parametrize(
    ("logits", "text"),
    [
        (torch.zeros(8), "at least 2 classes"),
        (torch.zeros(8, 1), "at least 2 classes"),
        (torch.zeros(8, CLASSES + 1), "the teacher knows 3 classes and the student 4"),
        (torch.tensor([[0.0, 0, 0]] * 6 + [[math.nan] * 3, [0, math.inf, 0]]), "ids 6, 7"),
    ],
)
def test_logits_that_can_not_be(logits, text):
    kcd = make()
    start(kcd)
    with pytest.raises(UserError, match=text):
        kcd.loss(torch.zeros(8, 1, 6, 6), torch.zeros(8).long(), torch.arange(8), logits=logits)


def test_samples_that_were_never_seen_stop_the_condensation():
    kcd = make()
    student, optimizer = start(kcd)
    half = DataLoader(kcd.dataset, 8, sampler=range(24))
    epoch(kcd, student, optimizer, loader=half)
    with pytest.raises(UserError, match=r"24 of 48 samples have not been visited yet \(ids 24, 25"):
        epoch(kcd, student, optimizer, loader=half)


def test_a_dataset_that_changes_its_length_is_noticed():
    growing = [(image, index % CLASSES) for index, image in enumerate(images())]
    kcd = make()
    student, optimizer = start(kcd, dataset=growing)
    growing.append(growing[0])
    with pytest.raises(UserError, match="the dataset has 49 samples and had 48"):
        epoch(kcd, student, optimizer)


def test_moments_that_come_too_early_or_too_late():
    kcd = make()
    with pytest.raises(StateError, match="attach"):
        kcd.epoch_end()
    with pytest.raises(StateError, match=r"attach\(student, dataset=…, epochs=…\) first"):
        _ = kcd.dataset
    student, optimizer = start(kcd, epochs=3)
    with pytest.raises(StateError, match=r"call epoch_end\(\) after each"):
        kcd.finalize(student)
    with pytest.raises(StateError, match="one object serves one model once"):
        start(kcd, epochs=3)
    for _ in range(3):
        epoch(kcd, student, optimizer)
    with pytest.raises(StateError, match="all 3 epochs are done"):
        kcd.epoch_end()


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
