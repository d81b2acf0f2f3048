from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.data import EpochSampler
from tenfold.errors import UserError

pytestmark = pytest.mark.unit

sizes = st.integers(1, 60)
worlds = st.integers(1, 7)
seeds = st.integers(-(2**63), 2**63)
epochs = st.integers(0, 1000)


def keys(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@given(n=sizes, world=worlds, seed=seeds, epoch=epochs)
def test_training_ranks_get_the_same_number_and_cover_all(
    n: int, world: int, seed: int, epoch: int
) -> None:
    ranks = [EpochSampler(n, seed, True, rank, world) for rank in range(world)]
    drawn = [keys(sampler, epoch) for sampler in ranks]
    each = -(-n // world)
    assert [len(part) for part in drawn] == [len(s) for s in ranks] == [each] * world
    ids = [key - epoch * n for part in drawn for key in part]
    assert set(ids) == set(range(n))
    repeats = [ids.count(i) for i in range(n)]
    assert max(repeats) - min(repeats) <= 1  # padded by wrapping around


@given(n=sizes, world=worlds, seed=seeds, epoch=epochs)
def test_repeats_are_what_makes_shares_equal(n: int, world: int, seed: int, epoch: int) -> None:
    drawn: list[int] = []
    for rank in range(world):
        sampler = EpochSampler(n, seed, True, rank, world)
        ids = [key - epoch * n for key in keys(sampler, epoch)]
        repeats = sampler.repeats().tolist()
        assert set(repeats) <= set(ids)
        drawn += [i for i in ids if i not in repeats]
    assert sorted(drawn) == list(range(n)), "every id counts once"
    assert len(EpochSampler(n, seed, False, 0, world).repeats()) == 0


@given(n=sizes, world=worlds, epoch=epochs)
def test_evaluation_ranks_share_without_padding(n: int, world: int, epoch: int) -> None:
    for rank in range(world):
        sampler = EpochSampler(n, 0, False, rank, world)
        got = [divmod(key, n) for key in keys(sampler, epoch)]
        assert got == [(epoch, i) for i in range(rank, n, world)]
        assert len(sampler) == len(got)


@given(n=sizes, seed=seeds, epoch=epochs, data=st.data())
def test_restricted_sampler_draws_just_those_ids(
    n: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    sampler = EpochSampler(n, seed, True)
    sampler.restrict(torch.tensor(sorted(chosen)))
    assert len(sampler) == len(chosen)
    assert sorted(keys(sampler, epoch)) == [epoch * n + i for i in sorted(chosen)]
    assert sampler.pool.tolist() == list(range(n))
    sampler.restrict(None)
    assert len(sampler) == n


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [key % 50 for key in keys(EpochSampler(50, seed, True), epoch)]

    assert order(3, 4) == order(3, 4)
    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16  # (0, 1) and (1, 0) differ too


def test_global_random_state_plays_no_part_and_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = list(EpochSampler(30, 0, True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert list(EpochSampler(30, 0, True)) == first


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_wrong_rank(rank: int, world: int) -> None:
    with pytest.raises(UserError, match=f"rank {rank} of {world}"):
        EpochSampler(10, 0, True, rank, world)


def test_wrong_ids_and_epoch() -> None:
    sampler = EpochSampler(10, 0, True)
    with pytest.raises(UserError, match="expected 0 to 9"):
        sampler.restrict(torch.tensor([3, 10]))
    with pytest.raises(UserError, match="at least one id"):
        sampler.restrict(torch.tensor([], dtype=torch.int64))
    with pytest.raises(UserError, match="epoch -1"):
        sampler.set_epoch(-1)
