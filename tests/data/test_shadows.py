"""`ShadowData`: what is in a batch, whoever makes it and whenever."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.data import ArrayTriplets, ShadowData, ShadowSet, Triplet, shadow_augmentations
from tenfold.data.preprocessing import Preprocessing
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def made(seed: int, size: tuple[int, int], target: bool = True) -> Triplet:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    truth = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))
    levels = np.zeros(size, np.uint8)
    levels[5:25, 8:30] = 255
    dark = np.where(levels[..., None] > 0, truth // 2, truth)
    return Triplet(dark, levels, truth if target else None)


SIZES = [(40, 60), (50, 44), (64, 64), (40, 60), (90, 50), (47, 61), (40, 60)]


def data(**options: object) -> ShadowData:
    return ShadowData(
        name="mine",
        train=ArrayTriplets([made(k, size) for k, size in enumerate(SIZES)], "train"),
        test=ArrayTriplets([made(50 + k, (40, 60)) for k in range(3)], "test"),
        **{"size": (32, 32), "short_side": (36, 60), "test_size_px": (24, 32), **options},
    )


def by_id(loader) -> dict[int, dict[str, torch.Tensor]]:
    found = {}
    for batch in loader:
        for k, index in enumerate(batch["id"].tolist()):
            found[index] = {name: values[k] for name, values in batch.items()}
    return found


@pytest.mark.parametrize("augment", list(shadow_augmentations()))
def test_a_batch(augment: str) -> None:
    loader = data().train_loader(batch_size=4, seed=0, augment=augment)
    sizes = []
    for batch in loader:
        count = len(batch["id"])
        sizes.append(count)
        assert set(batch) == {"image", "mask", "target", "id"}
        assert batch["image"].shape == batch["target"].shape == (count, 3, 32, 32)
        assert batch["mask"].shape == (count, 1, 32, 32)
        assert {batch[key].dtype for key in ("image", "mask", "target")} == {torch.uint8}
        assert batch["id"].dtype == torch.int64
        assert set(batch["mask"].unique().tolist()) <= {0, 1}
        assert all(batch[key].is_contiguous() for key in batch)
    assert sizes == [4, 3]


def test_lit_pixels_stay_those_of_the_target() -> None:
    """Photo, mask and target are cut, turned and resized alike."""
    for batch in data().train_loader(batch_size=7, seed=4):
        lit = 1 - torch.nn.functional.max_pool2d(batch["mask"].float(), 5, 1, 2)
        deep = -torch.nn.functional.max_pool2d(-batch["mask"].float(), 5, 1, 2)
        for region in (lit, deep):  # what lies beyond a crop's border is not known
            region[..., :3, :] = region[..., -3:, :] = region[..., :3] = region[..., -3:] = 0
        apart = batch["image"].int() - batch["target"].int()
        assert int((apart * lit).abs().max()) <= 1
        halved = batch["image"].int() - batch["target"].int() // 2
        assert int((halved * deep).abs().max()) <= 2
        assert float(lit.mean()) > 0.2
        assert float(deep.mean()) > 0.05


@pytest.mark.parametrize("augment", ["shadows", "relight"])
def test_seed_epoch_and_id_decide_and_nothing_else(augment: str) -> None:
    def seen(batch_size: int, seed: int, epoch: int, workers: int = 0, **rank: int):
        loader = data().train_loader(
            batch_size=batch_size, seed=seed, augment=augment, workers=workers, **rank
        )
        loader.sampler.set_epoch(epoch)
        return by_id(loader)

    first = seen(4, 1, 2)
    assert sorted(first) == list(range(7))
    for other in (seen(3, 1, 2), seen(4, 1, 2, workers=2)):
        for index, sample in first.items():
            assert all(torch.equal(sample[name], other[index][name]) for name in sample)
    for other in (seen(4, 2, 2), seen(4, 1, 3)):
        changed = [not torch.equal(first[i]["image"], other[i]["image"]) for i in first]
        assert sum(changed) >= 6
    shares = [seen(4, 1, 2, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 4
    for share in shares:
        for index, sample in share.items():
            assert torch.equal(sample["image"], first[index]["image"])


def test_held_out_photos_come_in_order() -> None:
    loader = data().test_loader(batch_size=2)
    batches = list(loader)
    assert [batch["id"].tolist() for batch in batches] == [[0, 1], [2]]
    assert batches[0]["image"].shape == (2, 3, 24, 32)
    expected = Image.fromarray(made(50, (40, 60)).image).resize((32, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(batches[0]["image"][0].permute(1, 2, 0).numpy(), np.asarray(expected))
    native = data(test_size_px=None)
    assert next(iter(native.test_loader()))["image"].shape == (1, 3, 40, 60)
    assert next(iter(native.test_loader(batch_size=3)))["image"].shape == (3, 3, 40, 60)
    own = ShadowData(
        name="mine",
        train=ArrayTriplets([made(0, (40, 60))], "train"),
        test=ArrayTriplets([made(k, size) for k, size in enumerate(SIZES)], "test"),
        size=(32, 32),
        test_size_px=None,
    )
    with pytest.raises(UserError, match="2 sizes in one batch"):
        next(iter(own.test_loader(batch_size=2)))
    ranks = [own.test_loader(rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(by_id(loader)) for loader in ranks] == [[0, 2, 4, 6], [1, 3, 5]]


def test_holding_out_keeps_ids_and_names() -> None:
    whole = data()
    training, choosing = whole.holding_out(2)
    assert (training.train_size, choosing.test_size, whole.train_size) == (5, 2, 7)
    assert training.train_ids.tolist() == [0, 1, 2, 3, 4]
    batches = by_id(choosing.test_loader(batch_size=2))
    assert sorted(batches) == [5, 6]
    assert choosing.name_of(5) == "train[5]"
    assert batches[5]["image"].shape == (3, 24, 32)
    assert (choosing.train_size, training.test_size) == (7, 3)
    assert len(training.train_masks()) == 5
    assert training.train_masks()[1].tolist() == (made(1, (50, 44)).levels // 255).tolist()
    for count in (0, 7):
        with pytest.raises(UserError, match=f"{count} of 7 training photos"):
            whole.holding_out(count)


def test_facts() -> None:
    mine = data()
    facts = mine.preprocessing()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["task"] == "shadow_removal"
    assert Preprocessing.from_dict(facts).shape == mine.shape == (3, 32, 32)
    assert Preprocessing.from_dict(facts).normalize(torch.full((1, 3, 2, 2), 51)
        .to(torch.uint8)).unique().item() == pytest.approx(0.2)  # fmt: skip
    assert mine.described == "an image of 3x32x32"
    assert data(targets=False).has_targets is False
    batch = next(iter(data(targets=False).train_loader(batch_size=2, seed=0, augment="relight")))
    assert set(batch) == {"image", "mask", "id"}


def test_what_can_not_be_is_refused() -> None:
    for options, text in (
        ({"short_side": (20, 60)}, r"short_side is \[20, 60\]"),
        ({"mask_above": 1.5}, "mask_above is 1.5"),
        ({"train": [made(0, (40, 60))]}, "expected a ShadowSet"),
    ):
        with pytest.raises((UserError, AttributeError), match=text):
            ShadowData(
                **{
                    "name": "mine",
                    "train": ArrayTriplets([made(0, (40, 60))], "train"),
                    "test": ArrayTriplets([made(0, (40, 60))], "test"),
                    "size": (32, 32),
                    **options,
                }
            )
    with pytest.raises(UserError, match="unknown augmentation 'flips'"):
        data().train_loader(batch_size=2, seed=0, augment="flips")
    with pytest.raises(UserError, match="batch_size"):
        data().train_loader(batch_size=0, seed=0)
    good = made(0, (40, 60))
    for bad, text in (
        (
            Triplet(good.image, good.levels[:30], good.target),
            r"levels is uint8 of shape \(30, 60\)",
        ),
        (Triplet(good.image / 255, good.levels, good.target), "image is float64"),
    ):
        with pytest.raises(UserError, match=text):
            ArrayTriplets([bad], "train")
    with pytest.raises(UserError, match="a target for every photo, or for none"):
        ArrayTriplets([good, made(1, (40, 60), target=False)], "train")


class Counted(ShadowSet):
    """Counts how often a triplet is made."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.visits = 0

    def __len__(self) -> int:
        return 4

    def triplet(self, index: int) -> Triplet:
        self.visits += 1
        return made(index, (40, 60))

    def name(self, index: int) -> str:
        return str(index)

    def byte_count(self) -> int | None:
        return self.size


@pytest.mark.parametrize(("size", "visits"), [(1000, 4), (2 << 30, 8), (None, 8)])
def test_what_fits_in_memory_is_read_once(size: int | None, visits: int) -> None:
    counted = Counted(size)
    mine = ShadowData(name="mine", train=counted, test=Counted(1), size=(32, 32))
    loader = mine.train_loader(batch_size=2, seed=0, workers=0)
    for _ in range(2):
        assert len(list(loader)) == 2
    assert counted.visits == visits
    kept = size == 1000
    assert (mine.train_loader(batch_size=2, seed=0).num_workers == 0) == kept
