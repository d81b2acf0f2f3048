"""KCD's cache of the teacher's answers, and its checkpoints."""

from __future__ import annotations

import pytest
import torch

from tenfold.errors import UserError
from tenfold.methods import distillation_loss
from tests.distilling import (
    SIZE,
    data,
    epoch,
    make,
    same,
    start,
    teacher,
)

pytestmark = pytest.mark.unit


# -- the cache ------------------------------------------------------------------------------------


def test_the_cache_asks_once_for_each_view_and_once_more_for_mixed_pixels():
    kcd = make(teacher_cache="memory")
    student, optimizer = start(kcd, views=1)
    for _ in range(6):
        epoch(kcd, student, optimizer)
    mixed = int((kcd._work.knowledge.versions > 0).sum())
    assert kcd.forwards["student"] == 240
    # 8 of the 48 leave in each of two condensations, and the best of their partners stays as it is
    assert 0 < mixed <= 14
    assert SIZE < kcd.forwards["teacher"] <= SIZE + 14
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


def test_runs_that_share_a_folder_are_answered_for_their_own_pixels(tmp_path):
    """Both mix the same number of times, and not the same images; each entry has one place."""
    folder = str(tmp_path / "answers")
    runs = []
    for seed in (0, 1):
        kcd = make(teacher_cache=folder, label_weight=0.0, logit_weight=1.0)
        runs.append((kcd, *start(kcd, views=1, seed=seed)))
    for _ in range(5):
        for run in runs:
            epoch(*run)
    ids = [torch.nonzero(kcd._work.knowledge.versions).flatten() for kcd, _, _ in runs]
    both = ids[0][torch.isin(ids[0], ids[1])]
    versions = [kcd._work.knowledge.versions[both] for kcd, _, _ in runs]
    assert bool((versions[0] != versions[1]).any()), "the same image, mixed with others"
    for (kcd, student, _), mixed in zip(runs, ids, strict=True):
        image = torch.stack([kcd.dataset[int(i)][0] for i in mixed])
        student.eval()
        with torch.no_grad():
            found = kcd.loss(image, torch.zeros(len(mixed)).long(), mixed)
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
