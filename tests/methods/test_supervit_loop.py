"""SuperViT in a loop of one's own: training, resuming, LBC, optimize, LTS, two processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import tenfold
from tenfold.errors import UserError
from tenfold.methods import LBC, LTS, SuperViTTraining
from tenfold.nn.blocks import nm_pattern
from tenfold.nn.supervit import SuperViT
from tests.supervits import pictures, plain, plain_lvvit, supervit

pytestmark = pytest.mark.path
LABELS = torch.tensor([3, 0, 6, 1])


def start(model: SuperViT | None = None, steps: int = 6, **fields: Any):
    training = SuperViTTraining(**fields)
    model = training.attach((model or supervit()).train(), total_steps=steps)
    optimizer = torch.optim.AdamW(training.parameters_for(model), lr=1e-3)
    return training, model, optimizer


def go(training, model, optimizer, steps, others=()) -> list[float]:
    losses = []
    for index in steps:
        optimizer.zero_grad()
        loss = training.loss(model, pictures(4, seed=index % 2), LABELS)
        loss.backward()
        optimizer.step()
        for method in (training, *others):
            method.step()
        losses.append(loss.item())
    return losses


def test_a_loop_learns_and_ends_with_the_network_itself():
    training, model, optimizer = start(steps=60)
    keys = list(model.state_dict())
    losses = go(training, model, optimizer, range(60))
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    done = training.finalize(model)
    assert done is model
    assert list(done.state_dict()) == keys
    done.eval()
    for size, rate in done.cells:
        assert done(pictures(4, seed=1), size, rate).argmax(1).tolist() == LABELS.tolist()


def test_a_resumed_loop_is_bit_equal():
    torch.manual_seed(0)
    training, model, optimizer = start(copy.deepcopy(BASE), seed=3)
    go(training, model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    assert saved[2]["draws"] == 3
    go(training, model, optimizer, range(3, 6))
    other, twin, second = start(supervit(), seed=3)
    twin.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    go(other, twin, second, range(3, 6))
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


BASE = supervit()


def test_a_skipped_update_begins_anew():
    training, model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    loss = training.loss(model, pictures(4), LABELS) * 1e30
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    training.step()
    assert not training._used


def test_lvvit_learns_too():
    training, model, optimizer = start(supervit(plain_lvvit(), drop_blocks=(1,)), steps=30)
    losses = go(training, model, optimizer, range(30))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    model = training.finalize(model).eval()
    with torch.inference_mode():
        fast = tenfold.optimize(model.cell(32, 0.5), pictures(2))  # its batch norms are folded
        torch.testing.assert_close(
            fast(pictures()), model(pictures(), 32, 0.5), atol=1e-4, rtol=1e-4
        )


# -- with other methods ---------------------------------------------------------------------------


def sparse() -> SuperViT:
    """A SuperViT whose blocks are 2:4, after ten steps."""
    sparsity = LBC(n=2, m=4, preset="deit")
    training = SuperViTTraining()
    model = training.attach(supervit().train(), total_steps=10)
    model = sparsity.attach(model, total_steps=10)
    optimizer = torch.optim.AdamW(sparsity.parameters_for(model), lr=1e-3)
    go(training, model, optimizer, range(10), [sparsity])
    model = sparsity.finalize(training.finalize(model))
    assert isinstance(model, SuperViT)
    return model.eval()


def test_with_lbc_and_packed_for_this_machine(tmp_path):
    model = sparse()
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for block in range(4):
        for part in parts:
            weight = model.get_submodule(f"blocks.{block}.{part}").weight
            assert nm_pattern(weight) == (2, 4)
    images, cell = pictures(16), model.cell(48, 0.5)
    with torch.inference_mode():
        expected = model(images, 48, 0.5)
        fast = tenfold.optimize(cell, images)
        torch.testing.assert_close(fast(images), expected, atol=1e-5, rtol=1e-5)
        assert sum(layer.pattern == "2:4" for layer in fast.plan.layers) == 16
        # The artifact names no network: what the cell is of has to be built for it.
        path = tenfold.save(fast, tmp_path / "fast")
        loaded = tenfold.load(path, model=supervit().cell(48, 0.5))
        torch.testing.assert_close(loaded(images), fast(images), atol=1e-6, rtol=1e-6)


def test_a_cell_is_saved_and_loaded(tmp_path):
    cell = supervit().cell(48, 0.7)
    path = tenfold.save(cell, tmp_path / "cell")
    loaded = tenfold.load(path, model=supervit(plain(depth=4)).cell(48, 0.7))
    assert torch.equal(loaded(pictures()), cell(pictures()))
    with pytest.raises(UserError, match="network of your own code: pass a fresh instance"):
        tenfold.load(path)


def test_with_lts():
    quantization = LTS(bits=4)
    training = SuperViTTraining()
    model = training.attach(supervit().train(), total_steps=10)
    model = quantization.attach(model, total_steps=10)
    optimizer = torch.optim.SGD(quantization.parameters_for(model), lr=1e-3)
    losses = go(training, model, optimizer, range(10), [quantization])
    assert all(loss == loss for loss in losses)
    expected = model.eval()(pictures(), 48, 0.5)
    model = quantization.finalize(training.finalize(model)).eval()
    torch.testing.assert_close(model(pictures(), 48, 0.5), expected, atol=1e-4, rtol=1e-4)


# -- two processes --------------------------------------------------------------------------------


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for same in (True, False):
        training = SuperViTTraining(same_on_ranks=same, seed=2)
        model = training.attach(supervit(sizes=(16, 32, 48, 64)).train(), total_steps=6)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        cells, still = [], []
        for index in range(6):
            draw = training.draw
            drawn: list[Any] = []
            training.draw = lambda draw=draw, drawn=drawn: drawn.extend(draw()) or drawn  # type: ignore[method-assign]
            tables = [table.detach().clone() for table in model.pos_embed_list]
            optimizer.zero_grad()
            images = pictures(4, seed=10 * index + rank)
            training.loss(wrapped, images, LABELS).backward()
            optimizer.step()
            training.step()
            training.draw = draw  # type: ignore[method-assign]
            cells.append(list(drawn))
            still.append(
                [
                    bool(torch.equal(before, after))
                    for before, after in zip(tables, model.pos_embed_list, strict=True)
                ]
            )
        found[same] = {"state": model.state_dict(), "cells": cells, "still": still}
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[bool, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


@pytest.mark.parametrize("same", [True, False])
def test_two_processes_stay_one(ranks, same):
    first, second = (rank[same] for rank in ranks)
    assert (first["cells"] == second["cells"]) == same
    states: list[dict[str, Tensor]] = [first["state"], second["state"]]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    sizes = (16, 32, 48, 64)
    for step in range(6):
        used = {size for rank in (first, second) for size, _ in rank["cells"][step]}
        expected = [size not in used for size in sizes]
        assert first["still"][step] == second["still"][step] == expected
    assert any(True in step for step in first["still"])
