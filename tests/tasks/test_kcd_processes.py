"""KCD on two processes (gloo): both draw and mix the same, and agree with one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.methods import KCD
from tenfold.methods.contrast import ContrastLoss
from tests import nets
from tests.tasks.conftest import NETS
from tests.tasks.test_processes import TWO, finish, launch, rows, values, weights

pytestmark = pytest.mark.path
SIZE = 42  # 21 a rank at first; later stages don't come out even


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def run(rate: float) -> dict[str, Any]:
    """Train eight epochs in four stages, in as many processes as there are."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SIZE, 1, 4, 4), generator=generator, dtype=torch.uint8)
    data = TensorDataset(images, torch.arange(SIZE) % 3)
    kcd = KCD(teacher=network(1).eval().requires_grad_(False), keep_ratio=0.5, stages=4)
    student = kcd.attach(
        network(0), dataset=data, epochs=8, transform=lambda image: image.float() / 255
    )
    wrapped = nn.parallel.DistributedDataParallel(student) if world > 1 else student
    optimizer = torch.optim.SGD(kcd.parameters_for(student), lr=rate)
    notes: dict[str, Any] = {"drawn": [], "kept": []}
    for _ in range(8):
        drawn = []
        for image, label, ids in DataLoader(kcd.dataset, 12 // world, sampler=kcd.sampler):
            optimizer.zero_grad()
            kcd.loss(image, label, ids, logits=wrapped(image)).backward()
            optimizer.step()
            drawn += ids.tolist()
        notes["drawn"].append(drawn)
        kcd.epoch_end()
        notes["kept"].append(kcd._work.knowledge.keep.tolist())
    table = kcd._work.knowledge.table
    return {
        **notes,
        "sums": table.sums,
        "counts": table.counts,
        "pixels": torch.stack([kcd.dataset[i][0] for i in range(SIZE)]),
        "forwards": kcd.forwards,
        "student": kcd.finalize(student).state_dict(),
    }


def banks(rank: int) -> dict[str, torch.Tensor]:
    """Let each of two processes see three samples of its own."""
    torch.manual_seed(0)
    loss = ContrastLoss(4, 4, torch.arange(20) % 2, negatives=6, width=3)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    mine = slice(rank * 3, rank * 3 + 3)
    loss(features[mine], features[mine], torch.tensor([3, 8, 11, 0, 19, 6])[mine])
    return loss.state_dict()


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save({"still": run(0.0), "moving": run(0.05), "banks": banks(rank)}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["still", "moving"])
def test_two_processes_condense_alike(ranks, kind):
    first, second = (rank[kind] for rank in ranks)
    assert first["kept"] == second["kept"]
    assert first["forwards"] == second["forwards"]
    for key in ("sums", "counts", "pixels"):
        assert torch.equal(first[key], second[key]), key
    for key, value in first["student"].items():
        assert torch.equal(value, second["student"][key]), key
    for ours, theirs in zip(first["drawn"], second["drawn"], strict=True):
        assert len(ours) == len(theirs), "equal shares"


def test_two_processes_count_and_choose_as_one(ranks):
    """With a student that stands still: its values depend on nothing but the samples."""
    one = run(0.0)
    first, second = (rank["still"] for rank in ranks)
    assert first["kept"] == one["kept"]
    # Padding to equal shares is no visit: each drawn sample counts once an epoch.
    assert any(len(drawn) % 2 for drawn in one["drawn"]), "a stage of uneven size"
    assert torch.equal(first["counts"], one["counts"])
    torch.testing.assert_close(first["sums"], one["sums"])
    torch.testing.assert_close(first["pixels"], one["pixels"])
    for ours, theirs, both in zip(first["drawn"], second["drawn"], one["drawn"], strict=True):
        assert set(ours) | set(theirs) == set(both)


def test_memory_banks_are_the_same_on_both(ranks):
    one, other = (rank["banks"] for rank in ranks)
    assert not torch.equal(one["student_bank"], ContrastLoss(
        4, 4, torch.arange(20) % 2, negatives=6, width=3).student_bank)  # fmt: skip
    for key in ("student_bank", "teacher_bank", "scale", "drawn"):
        assert torch.equal(one[key], other[key]), key


def test_a_recipe_on_two_processes_with_a_teacher_that_is_trained_first():
    """The engine's own loaders; the teacher is trained by both, and both wait for it."""
    kcd = {"teacher": f"{NETS}:plain", "keep_ratio": 0.5, "stages": 3}
    train = {"epochs": 3, "batch_size": 25, "augment": "shift"}
    methods = {"lbc": {"n": 2, "m": 4}, "kcd": kcd}
    out = finish(launch("two", values(methods=methods, train=train, trainer=TWO)))
    assert out.count("epoch 3/3") == 2  # one of the teacher, one of the student; one rank speaks
    assert Path("two-teacher/model/model.json").is_file()
    record = json.loads(Path("two/methods.json").read_text())["methods"][0]
    sizes = [250, 209, 168]
    assert [float(row["kept"]) for row in rows("two")] == sizes
    # 209 images are 105 on each of two ranks: one is drawn twice, and goes through the networks
    assert record["forwards"] == {"student": 628, "teacher": 628}
    one = {**train, "batch_size": 50}
    finish(launch("one", values(methods={**methods, "kcd": {**kcd, "teacher": "two-teacher"}},
                                train=one)))  # fmt: skip
    theirs = json.loads(Path("one/methods.json").read_text())["methods"][0]
    assert theirs["forwards"] == {"student": 627, "teacher": 627}
    for group, other in zip(record["images"], theirs["images"], strict=True):
        shown, expected = ({item["caption"] for item in each["items"]} for each in (group, other))
        # The same values; which of two neighbours is ahead, and who is the last, is rounding.
        assert len(shown & expected) >= len(expected) - 1
    for key, value in weights("two").items():
        expected = nets.plain(10).state_dict()[key]
        assert value.shape == expected.shape
        torch.testing.assert_close(value, weights("one")[key], rtol=1e-2, atol=1e-4)
