from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tenfold.data import ArraySet, ImageData, create
from tenfold.data import loader as loader_module
from tenfold.data.loader import ImageLoader
from tenfold.data.preprocessing import Preprocessing
from tenfold.errors import UserError

pytestmark = pytest.mark.unit

ALL_KINDS = ["none", "flip", "shift", "flip_crop", "imagenet", "randaugment"]


def epoch(loader: ImageLoader, number: int) -> dict[str, Tensor]:
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("id", "label", "image"))


@pytest.fixture
def data(packed) -> ImageData:
    return create(f"npz:{packed()}")


def test_batches_are_raw_bytes_with_labels_and_ids(data: ImageData) -> None:
    batch = next(iter(data.train_loader(batch_size=8, seed=0, augment="none")))
    assert batch["image"].shape == (8, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    assert batch["label"].dtype == batch["id"].dtype == torch.int64
    for image, label, number in zip(batch["image"], batch["label"], batch["id"], strict=True):
        assert torch.equal(image, data.train.image(int(number)))
        assert int(label) == data.train.label(int(number)) == int(number) % 3


@pytest.mark.parametrize("augment", ALL_KINDS)
def test_same_content_with_workers_in_every_epoch(data: ImageData, augment: str) -> None:
    alone = data.train_loader(batch_size=6, seed=5, augment=augment, workers=0)
    helped = data.train_loader(batch_size=6, seed=5, augment=augment, workers=2)
    for number in range(2):  # the second one by workers that stayed
        assert same(epoch(alone, number), epoch(helped, number))


@pytest.mark.parametrize("augment", ALL_KINDS)
def test_a_later_epoch_needs_no_earlier_one(data: ImageData, packed, augment: str) -> None:
    straight = data.train_loader(batch_size=6, seed=1, augment=augment, workers=0)
    epochs = [epoch(straight, number) for number in range(3)]
    resumed = create(f"npz:{packed()}").train_loader(
        batch_size=6, seed=1, augment=augment, workers=0
    )
    torch.rand(3), random.random(), np.random.rand()
    assert same(epoch(resumed, 2), epochs[2])
    assert not torch.equal(epochs[0]["id"], epochs[1]["id"])


@pytest.mark.parametrize("augment", ["shift", "flip_crop", "imagenet", "randaugment"])
def test_augmentation_belongs_to_the_sample(data: ImageData, augment: str) -> None:
    def by_id(seed: int, number: int, batch_size: int, **rank: int) -> dict[int, Tensor]:
        drawn = data.train_loader(
            batch_size=batch_size, seed=seed, augment=augment, workers=0, **rank
        )
        got = epoch(drawn, number)
        return dict(zip(got["id"].tolist(), got["image"], strict=True))

    whole = by_id(0, 0, 20)
    for part in (by_id(0, 0, 3), by_id(0, 0, 4, rank=0, world_size=2)):
        assert all(torch.equal(image, whole[i]) for i, image in part.items())
    for other in (by_id(0, 1, 20), by_id(1, 0, 20)):
        assert sum(torch.equal(other[i], whole[i]) for i in whole) < 10


def test_random_state_of_the_process_is_left_alone(data: ImageData) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for augment in ALL_KINDS:
        epoch(data.train_loader(batch_size=20, seed=0, augment=augment, workers=0), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_test_images_exactly(data: ImageData, world: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        part = data.test_loader(batch_size=2, rank=rank, world_size=world)
        ids = [i for batch in part for i in batch["id"].tolist()]
        assert ids == list(range(rank, 7, world))
        seen += ids
    assert sorted(seen) == list(range(7))


def test_training_ranks_take_equal_shares(data: ImageData) -> None:
    shares = [
        epoch(data.train_loader(batch_size=4, seed=0, rank=r, world_size=3, workers=0), 0)["id"]
        for r in range(3)
    ]
    assert [len(share) for share in shares] == [7, 7, 7]
    assert set(torch.cat(shares).tolist()) == set(range(20))


def test_evaluation_shows_images_in_order_and_unaugmented(data: ImageData) -> None:
    got = epoch(data.test_loader(batch_size=3), 4)
    assert got["id"].tolist() == list(range(7))
    assert all(torch.equal(got["image"][i], data.test.image(i)) for i in range(7))


def test_images_in_memory_are_decoded_once(data: ImageData, monkeypatch) -> None:
    decoded: list[int] = []
    image = type(data.train).image
    monkeypatch.setattr(
        type(data.train), "image", lambda self, i: decoded.append(i) or image(self, i)
    )
    loader = data.train_loader(batch_size=6, seed=0)
    assert loader.num_workers == 0
    first = epoch(loader, 0)
    first["image"].zero_()  # a batch is a copy
    again = epoch(data.train_loader(batch_size=6, seed=0), 0)
    assert sorted(decoded) == list(range(20))
    assert again["image"].any(dim=(1, 2, 3)).all()


def test_nothing_is_kept_above_the_limit(packed, monkeypatch) -> None:
    monkeypatch.setattr(loader_module, "MEMORY_LIMIT", 19 * 3 * 16 * 16)
    data = create(f"npz:{packed()}")
    assert not data._fitted_train.kept
    assert data._fitted_test.kept
    assert data.train_loader(batch_size=4, seed=0).num_workers > 0


def test_workers_option(packed) -> None:
    data = create({"name": "npz", "path": str(packed()), "workers": 1})
    loader = data.train_loader(batch_size=4, seed=0)
    assert (loader.num_workers, loader.persistent_workers) == (1, True)
    assert data.train_loader(batch_size=4, seed=0, workers=0).num_workers == 0


def test_own_sets_work() -> None:
    images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    data = ImageData(
        name="mine",
        classes=["a", "b"],
        train=ArraySet(images, [0, 1] * 4 + [0], "mine"),
        test=ArraySet(images[:4], [0, 1, 0, 1], "mine"),
        preprocessing=Preprocessing(1, (8, 8), (0.5,), (0.2,)),
    )
    got = epoch(data.train_loader(batch_size=4, seed=0), 0)
    assert torch.equal(got["image"], images[got["id"]])  # augment="auto" is "none" here
    assert data.train.name(3) == "mine[3]"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0, "seed": 0}, "batch_size is 0: expected at least 1"),
        ({"batch_size": 2.5, "seed": 0}, "batch_size is 2.5: expected a whole number"),
        ({"batch_size": 4, "seed": "0"}, "seed is '0': expected a whole number"),
        ({"batch_size": 4, "seed": 0, "workers": -1}, "workers is -1"),
        ({"batch_size": 4, "seed": 0, "rank": 1}, "rank 1 of 1"),
        ({"batch_size": 4, "seed": 0, "augment": "flipcrop"}, "did you mean flip_crop"),
    ],
)
def test_wrong_arguments(data: ImageData, arguments: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        data.train_loader(**arguments)


def test_dataset_travels_to_workers_that_are_not_forked(data: ImageData) -> None:
    loader = data.train_loader(batch_size=6, seed=0, augment="randaugment", workers=0)
    batch = next(iter(loader))
    sent = pickle.dumps(loader.dataset)
    loader.sampler.set_epoch(0)
    again = pickle.loads(sent).__getitems__(list(loader.sampler)[:6])
    assert same(batch, again)
    one = loader.dataset[int(batch["id"][2])]
    assert torch.equal(one["image"], batch["image"][2])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_in_a_loader_is_one_line(folder, workers: int) -> None:
    root: Path = folder()
    for name in ("train/cat/01.jpg", "train/dog/02.jpg"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    data = create({"name": "imagefolder", "path": root, "size": 32})
    with pytest.raises(UserError) as error:
        epoch(data.train_loader(batch_size=2, seed=0, workers=workers), 0)
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert "truncated" in text
    assert str(root / "train") in text  # names the file itself
    assert "2 of 12 train images can't be read (train/cat/01.jpg, train/dog/02.jpg)" in text
    assert text.endswith("pass --data.skip_bad true to go on without them")


# -- images that a method changes, and views -------------------------------------------------------


class Half:
    """Ids below 3 are stored black; id 5 gets half of the view of id 1."""

    def replaced(self, ids: Tensor, images: Tensor) -> Tensor:
        images[ids < 3] = 0
        return images

    def blended(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.nonzero(ids == 5).flatten()
        return at, torch.ones_like(at), torch.full((len(at),), 0.5)

    def blend(self, images: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        return (images.float() * 0.5 + partners.float() * 0.5).to(torch.uint8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", ["none", "flip_crop", "imagenet"])
def test_a_method_changes_images_ahead_of_augmentation_or_mixes_views(
    data: ImageData, augment: str, workers: int
) -> None:
    options = {"batch_size": 6, "seed": 5, "augment": augment, "workers": workers}
    plain = epoch(data.train_loader(**options), 2)
    changed = epoch(data.train_loader(**options, mixing=Half()), 2)
    assert torch.equal(plain["id"], changed["id"])
    images = dict(zip(plain["id"].tolist(), plain["image"], strict=True))
    for number, image in zip(changed["id"].tolist(), changed["image"], strict=True):
        if number == 5:
            partner = images[1].float()
            if augment != "imagenet":  # which takes images as they are stored, of any size
                partner = torch.zeros_like(partner)
            expected = (0.5 * images[5].float() + 0.5 * partner).to(torch.uint8)
            assert torch.equal(image, expected)
        elif number < 3 and augment != "imagenet":
            assert not bool(image.any())
        else:
            assert torch.equal(image, images[number])
    assert bool(data.train_images(torch.arange(3)).any()), "the data itself is as it was"


def test_batches_say_which_view_an_image_is(data: ImageData) -> None:
    options = {"batch_size": 6, "seed": 5, "augment": "flip_crop"}
    assert "view" not in epoch(data.train_loader(**options), 0)
    found = [epoch(data.train_loader(**options, views=True), number)["view"] for number in (0, 1)]
    assert data.train_views("flip_crop") == 50
    assert all(0 <= int(view) < 50 for views in found for view in views)
    assert not torch.equal(*found)
    assert data.train_views("imagenet") is None
    with pytest.raises(UserError, match="too many views of an image to number them"):
        data.train_loader(batch_size=6, seed=0, augment="imagenet", views=True)


def test_training_images_by_id(data: ImageData) -> None:
    found = data.train_images(torch.tensor([4, 0]))
    assert torch.equal(found[0], data.train.image(4))
    found.zero_()
    assert bool(data.train.image(4).any())
    assert not data.crops_stored_images("flip_crop")
    assert data.crops_stored_images("imagenet")
