"""Winograd3d on two processes (gloo): columns and weights agree, and equal those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tenfold.errors import StateError
from tenfold.methods import Winograd3d
from tenfold.methods.winograd_layer import WinogradTraining

pytestmark = pytest.mark.path
WORLD, STEPS = 2, 12


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(4)


def method(**fields) -> Winograd3d:
    return Winograd3d(**{"rank": 2, "keep_ratio": 0.4, "every": 2, "min_channels": 4, **fields})


def train(model, attached, winograd, rank=0, world=1, first=0, last=STEPS):
    """Train on this rank's share of each batch; return the kept columns after every removal."""
    parameters = [p for p in attached.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    layers = [m for m in attached.modules() if isinstance(m, WinogradTraining)]
    seen = []
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        winograd.step()
        kept = [layer.kept for layer in layers]
        if not seen or kept != seen[-1]:
            seen.append(kept)
    return seen


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"  # no port that another test could hold
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=store)


def ddp_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    attached = network(seed=rank)  # rank 1 starts elsewhere, and takes over rank 0's weights
    winograd = method()
    torch.manual_seed(7)
    winograd.attach(attached, total_steps=STEPS)
    model = DistributedDataParallel(attached)
    seen = train(model, attached, winograd, rank, WORLD)
    final = winograd.finalize(attached)
    torch.save(
        {"seen": seen, "weights": final.state_dict(), "buffers": len(model.modules_buffers)},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def drift_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    attached = network()
    winograd = method(score="magnitude", compensate=False)
    winograd.attach(attached, total_steps=STEPS)
    with torch.no_grad():  # a rank whose weights are others, without DDP that would notice
        attached[2].base.copy_(torch.randn_like(attached[2].base) * (1 + rank))
    try:
        train(attached, attached, winograd, rank, WORLD)
        text = "nothing was noticed"
    except StateError as error:
        text = str(error)
    torch.save(text, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def spawn(worker, tmp_path) -> list:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_two_ranks_agree(tmp_path):
    first, second = spawn(ddp_worker, tmp_path)
    assert len(first["seen"]) > 3
    assert first["seen"] == second["seen"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    assert first["buffers"] == 0  # neither masks nor frozen weights are sent ahead of each forward


def test_a_rank_that_drifts_stops_the_run_and_is_named(tmp_path):
    for text in spawn(drift_worker, tmp_path):
        assert "kept columns at step" in text
        assert "differ between rank 0 and rank 1" in text
