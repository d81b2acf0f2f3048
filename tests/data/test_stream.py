"""Streams: order, shares, resuming and bad images, with a stream made up for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise

import pytest
import torch
from torch import Tensor

from tenfold.data import ArraySet, ImageData, ImageStream, StreamSplit
from tenfold.data import stream as stream_module
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.stream import in_order, shuffled_pass
from tenfold.errors import UserError
from tests.data.conftest import encoded, noise

pytestmark = pytest.mark.unit
FACTS = Preprocessing(3, (8, 8), (0.5,) * 3, (0.2,) * 3)


class Shards(ImageStream):
    """Noise images; `lengths` says how many each shard holds, `bad` which can't be read."""

    def __init__(self, lengths: list[int], bad: tuple[int, ...] = ()) -> None:
        self.lengths, self.shards, self.bad = lengths, len(lengths), bad

    def rows(self, shard: int) -> Iterator[tuple[bytes, int]]:
        for row in range(self.lengths[shard]):
            number = row * self.shards + shard
            yield b"junk" if number in self.bad else encoded(noise(number, (8, 8))), number % 3


def data(lengths: list[int], bad: tuple[int, ...] = (), **options) -> ImageData:
    options = {"samples": sum(lengths), "buffer": 5, **options}
    return ImageData(
        name="made-up",
        classes=["a", "b", "c"],
        train=StreamSplit("train", Shards(lengths, bad), **options),
        test=StreamSplit("test", Shards(lengths, bad), **{**options, "limit": None}),
        preprocessing=FACTS,
        default_augment="flip_crop",
    )


def epoch(loader, number: int) -> dict[str, Tensor]:
    loader.sampler.set_epoch(number)
    batches = list(loader)
    assert len(batches) == len(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def ids(made: ImageData, rank: int = 0, world_size: int = 1, number: int = 0, workers: int = 0):
    loader = made.train_loader(
        batch_size=4, seed=3, rank=rank, world_size=world_size, workers=workers
    )
    return epoch(loader, number)["id"].tolist()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("id", "label", "image"))


def test_one_reader_sees_every_image_once_in_another_order_each_epoch() -> None:
    made = data([7, 4, 6])
    expected = sorted(row * 3 + s for s, n in enumerate([7, 4, 6]) for row in range(n))
    orders = [ids(made, number=n) for n in range(3)]
    assert all(sorted(order) == expected for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert made.train_size == 17


def test_an_id_belongs_to_its_image() -> None:
    loader = data([7, 4, 6]).train_loader(batch_size=4, seed=0, augment="none", workers=0)
    for number in range(2):
        got = epoch(loader, number)
        assert got["image"].dtype == torch.uint8
        assert got["label"].dtype == got["id"].dtype == torch.int64
        for image, label, position in zip(got["image"], got["label"], got["id"], strict=True):
            expected = torch.from_numpy(noise_pixels(int(position)))
            assert torch.equal(image, expected)
            assert int(label) == int(position) % 3


def noise_pixels(number: int):
    import numpy as np

    return np.array(noise(number, (8, 8))).transpose(2, 0, 1).copy()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_epoch_needs_no_earlier_one(workers: int) -> None:
    def loader():
        return data([9, 9]).train_loader(
            batch_size=4, seed=1, augment="randaugment", workers=workers
        )

    straight = loader()
    epochs = [epoch(straight, number) for number in range(3)]
    assert same(epoch(loader(), 2), epochs[2])
    assert same(epoch(straight, 0), epochs[0])  # by workers that stayed
    assert not torch.equal(epochs[0]["id"], epochs[1]["id"])


def test_breaking_off_starts_anew() -> None:
    loader = data([9, 9]).train_loader(batch_size=4, seed=1, workers=0)
    whole = epoch(loader, 0)
    for _ in zip(range(2), loader, strict=False):
        pass
    assert same(epoch(loader, 0), whole)
    later = loader.dataset[(0, 2)]  # in the middle
    assert torch.equal(later["id"], whole["id"][8:12])


@pytest.mark.parametrize(
    ("lengths", "world", "complete"),
    [([6, 6, 6, 6], 2, True), ([12], 3, True), ([8, 8], 4, True), ([9, 2, 5], 2, False)],
)
def test_ranks_get_equal_shares(lengths: list[int], world: int, complete: bool) -> None:
    made = data(lengths)
    for number in range(2):
        shares = [ids(made, rank, world, number) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-sum(lengths) // world)}
        if complete:
            assert sorted(chain(*shares)) == list(range(sum(lengths)))


def test_workers_share_a_rank() -> None:
    made = data([8, 8])
    one_by_one = ids(made, workers=2)
    assert sorted(one_by_one) == list(range(16))
    assert one_by_one != ids(made, workers=0)  # another order, as the guide says


def test_who_reads_which_shards_changes_with_the_epoch() -> None:
    split = StreamSplit("train", Shards([1] * 64), 64)
    shares = [{i for i, _, _ in shuffled_pass(split, 0, 4, 0, e, 0)} for e in range(3)]
    assert len(shares[0]) == 16
    assert shares[0] != shares[1] != shares[2]


@pytest.mark.parametrize(
    ("shards", "readers", "parts"),
    [(1, 1, 1), (8, 2, 1), (1, 4, 4), (3, 2, 2), (64, 4, 1), (65, 4, 1), (5, 4, 4)],
)
def test_shards_are_cut_only_where_they_are_few(shards: int, readers: int, parts: int) -> None:
    assert stream_module._parts(shards, readers) == parts


@pytest.mark.parametrize("size", [1, 4, 100])
def test_buffer_shuffles_as_far_as_it_reaches(size: int) -> None:
    split = StreamSplit("train", Shards([30]), 30, buffer=size)
    order = [i for i, _, _ in shuffled_pass(split, 0, 1, 0, 0, 0)]
    assert sorted(order) == list(range(30))
    assert all(i - place <= size for place, i in enumerate(order))  # not read before it is held
    assert (order == list(range(30))) == (size == 1)


def test_limit_takes_the_first_positions() -> None:
    made = data([7, 4, 6], limit=8)
    assert made.train_size == 8
    assert sorted(ids(made)) == list(range(8))


def test_a_reader_that_runs_out_starts_anew_in_another_order() -> None:
    drawn = ids(data([6], samples=18))
    rounds = [drawn[k : k + 6] for k in (0, 6, 12)]
    assert all(sorted(part) == list(range(6)) for part in rounds)
    assert all(a != b for a, b in pairwise(rounds))


@pytest.mark.parametrize("samples", [17, None])
@pytest.mark.parametrize("world", [1, 3])
def test_held_out_images_are_seen_once(samples: int | None, world: int) -> None:
    lengths = [7, 4, 6]
    made = data([9])
    split = StreamSplit("test", Shards(lengths), samples)
    made = ImageData(
        name="x", classes=["a", "b", "c"], train=made._train, test=split, preprocessing=FACTS
    )
    stored = [i for i, _, _ in in_order(split)]
    for rank in range(world):
        loader = made.test_loader(batch_size=2, rank=rank, world_size=world, workers=0)
        if samples is None:
            with pytest.raises(TypeError):
                len(loader)
        for _ in range(2):
            got = [i for batch in loader for i in batch["id"].tolist()]
            assert got == stored[rank::world]


def test_held_out_images_with_workers() -> None:
    made = data([7, 4, 6], samples=17)
    alone, helped = (made.test_loader(batch_size=3, workers=w) for w in (0, 2))
    for _ in range(2):
        assert same(epoch(alone, 0), epoch(helped, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_is_one_line(workers: int) -> None:
    loader = data([9, 9], bad=(4,)).train_loader(batch_size=4, seed=0, workers=workers)
    with pytest.raises(UserError) as error:
        list(loader)
    text = str(error.value)
    assert text.startswith("can't read image train: image 2 of shard 0 of the stream: not an image")
    assert text.endswith("pass --data.skip_bad true to go on without such images")
    assert "\n" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_can_be_left_out(workers: int) -> None:
    made = data([9, 9], bad=(4, 5, 11), skip_bad=True)
    drawn = ids(made, workers=workers)
    assert len(drawn) == 18  # as many steps as planned
    assert not {4, 5, 11} & set(drawn)
    held_out = [b["id"].tolist() for b in made.test_loader(batch_size=2, workers=workers)]
    assert sorted(chain(*held_out)) == sorted({*range(18)} - {4, 5, 11})


def test_nothing_to_read_is_an_error_and_no_endless_loop() -> None:
    made = data([4], bad=(0, 1, 2, 3), skip_bad=True)
    with pytest.raises(UserError, match="reader 0 of 1 finds no train image"):
        ids(made)
    assert list(made.test_loader(batch_size=2, workers=0)) == []
    with pytest.raises(UserError, match=r"reader . of 3 finds no train image"):
        [ids(data([2], samples=6), rank, 3) for rank in range(3)]


def test_what_a_stream_cannot_do_is_refused() -> None:
    made = data([9], samples=None)
    with pytest.raises(UserError, match="doesn't say how many train images"):
        made.train_loader(batch_size=2, seed=0)
    with pytest.raises(UserError, match=r"give data\.samples"):
        made.train_size  # noqa: B018
    for name in ("train", "test", "train_ids", "test_ids"):
        with pytest.raises(UserError, match="are a stream"):
            getattr(made, name)
    with pytest.raises(UserError, match="rank 2 of 2"):
        data([9]).train_loader(batch_size=2, seed=0, rank=2, world_size=2)
    with pytest.raises(UserError, match="epoch -1"):
        data([9]).train_loader(batch_size=2, seed=0).sampler.set_epoch(-1)


def test_a_stream_beside_an_indexed_set() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    made = ImageData(
        name="mixed",
        classes=["a", "b", "c"],
        train=data([9])._train,
        test=ArraySet(images, [0, 1, 2, 0, 1], "held"),
        preprocessing=FACTS,
    )
    assert len(made.test) == 5
    assert len(ids(made)) == made.train_size == 9
