"""LBC on two processes (gloo): the masks agree, and equal those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tenfold.errors import StateError
from tenfold.methods import LBC
from tenfold.methods.ranks import check_agreement

pytestmark = pytest.mark.path
WORLD, STEPS = 2, 40


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 16, generator=generator, dtype=torch.float64), torch.arange(16) % 4


def train(model, attached, sparsity, rank=0, world=1, first=0, last=STEPS):
    """Train on this rank's share of each batch; return the masks after every removal."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    seen = []
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        before = sparsity._removed
        sparsity.step()
        if sparsity._removed != before:
            masks = [b.clone() for n, b in attached.named_buffers() if n.endswith("mask")]
            seen.append(torch.cat([mask.flatten() for mask in masks]))
    return seen


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"  # no port that another test could hold
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=store)


def ddp_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    attached = network().double()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(attached, total_steps=STEPS)
    model = DistributedDataParallel(attached)
    seen = train(model, attached, sparsity, rank, WORLD)
    final = sparsity.finalize(attached)
    torch.save(
        {"masks": seen, "weights": final.state_dict(), "buffers": len(model.modules_buffers)},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def drift_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    attached = network().double()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(attached, total_steps=STEPS)
    try:
        # no DDP: each rank goes by its own gradients, and the first removal notices
        train(attached, attached, sparsity, rank, WORLD)
        text = "nothing was noticed"
    except StateError as error:
        text = str(error)
    torch.save(text, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def spawn(worker, tmp_path) -> list:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_two_ranks_agree_and_equal_one_process(tmp_path):
    first, second = spawn(ddp_worker, tmp_path)
    assert len(first["masks"]) > 2
    for a, b in zip(first["masks"], second["masks"], strict=True):
        assert torch.equal(a, b)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    assert first["buffers"] == 0  # no mask is sent ahead of each forward

    alone = network().double()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(alone, total_steps=STEPS)
    seen = train(alone, alone, sparsity)
    for a, b in zip(first["masks"], seen, strict=True):
        assert torch.equal(a, b)
    for key, value in sparsity.finalize(alone).state_dict().items():
        torch.testing.assert_close(value, first["weights"][key], rtol=1e-9, atol=1e-12)


def test_a_rank_that_drifts_stops_the_run_and_is_named(tmp_path):
    for text in spawn(drift_worker, tmp_path):
        assert "masks at step" in text
        assert "differ between rank 0 and rank 1" in text


def test_one_process_needs_no_agreement():
    check_agreement("anything", {"layer": torch.zeros(3)})
