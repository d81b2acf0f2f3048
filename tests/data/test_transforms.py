from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.data import augmentations
from tenfold.data.randomness import below, mix, mix_one
from tenfold.data.transforms import BatchTransform, SampleTransform, resolve, shift_and_flip
from tenfold.errors import UserError

COUNT, SIDE, PAD = 1000, 16, 2


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (1, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def moves(
    images: torch.Tensor, flip: bool, seed: int = 0, epoch: int = 0
) -> list[tuple[int, int, bool]]:
    """Find by search what `shift_and_flip` did to each image."""
    many = images.expand(COUNT, -1, -1, -1)
    out = shift_and_flip(many, seed, np.full(COUNT, epoch), np.arange(COUNT), flip)
    assert out.shape == many.shape
    assert out.is_contiguous()
    padded = torch.nn.functional.pad(images[0], (PAD, PAD, PAD, PAD))
    known = {}
    for top in range(2 * PAD + 1):
        for left in range(2 * PAD + 1):
            window = padded[:, top : top + SIDE, left : left + SIDE]
            known[window.contiguous().numpy().tobytes()] = (top, left, False)
            known[window.flip(-1).contiguous().numpy().tobytes()] = (top, left, True)
    return [known[image.numpy().tobytes()] for image in out]


@pytest.mark.parity
def test_every_result_is_a_window_of_the_padded_image_and_all_are_as_likely(images) -> None:
    found = moves(images, flip=True)
    assert len(set(found)) == 50
    counts = np.bincount([10 * t + 2 * x + f for t, x, f in found], minlength=50)
    expected = COUNT / 50
    assert ((counts - expected) ** 2 / expected).sum() < 94  # chi-square, 49 degrees, p = 1e-4


@pytest.mark.parity
def test_shift_alone_never_mirrors_and_moves_as_with_flip(images) -> None:
    plain, mirrored = moves(images, flip=False), moves(images, flip=True)
    assert not any(flipped for _, _, flipped in plain)
    assert [m[:2] for m in plain] == [m[:2] for m in mirrored]


@pytest.mark.parity
def test_each_part_of_a_move_is_drawn_anew_for_every_seed_and_epoch(images) -> None:
    draws = [moves(images, True, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    columns = [column for found in draws for column in zip(*found, strict=True)]
    for i, one in enumerate(columns):
        for other in columns[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 0.6 * COUNT


@pytest.mark.unit
def test_input_is_not_changed_and_tiny_images_move_by_one() -> None:
    images = torch.arange(5 * 4, dtype=torch.uint8).reshape(5, 1, 2, 2)
    kept = images.clone()
    shift_and_flip(images, 0, np.zeros(5, np.int64), np.arange(5), True)
    assert torch.equal(images, kept)


@pytest.mark.unit
def test_hash_spreads_neighbouring_inputs() -> None:
    ids = np.arange(20_000)
    words = np.concatenate([mix(0, np.zeros_like(ids) + e, ids, 0) for e in range(3)])
    assert len(np.unique(words)) == len(words)
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.02
    drawn = below(7, words)
    assert drawn.min() == 0
    assert drawn.max() == 6
    follows = np.corrcoef(drawn[:-1], drawn[1:])[0, 1]
    assert abs(follows) < 0.02
    assert mix_one(1, 2) != mix_one(2, 1)
    assert 0 <= mix_one(-1, 2**70) < 2**63


@pytest.mark.unit
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["imagenet", "randaugment"])
def test_sample_transforms(name: str, channels: int) -> None:
    transform = SampleTransform(resolve(name, "imagenet"), (24, 32))
    image = torch.randint(0, 256, (channels, 50, 40), dtype=torch.uint8)
    out = transform(image, 0, 0, 7)
    assert out.shape == (channels, 24, 32)
    assert out.dtype == torch.uint8
    assert torch.equal(out, transform(image, 0, 0, 7))
    assert not torch.equal(out, transform(image, 0, 1, 7))
    assert not torch.equal(out, transform(image, 0, 0, 8))


@pytest.mark.unit
def test_names_resolve() -> None:
    assert set(augmentations()) == {
        "auto", "none", "flip", "shift", "flip_crop", "imagenet", "randaugment"
    }  # fmt: skip
    for name, description in augmentations().items():
        assert description
        resolve(name, "shift")
    assert resolve("auto", "flip_crop") == resolve("flip_crop", "imagenet")
    digits, photos = resolve("randaugment", "shift"), resolve("randaugment", "imagenet")
    assert (digits.flip, digits.shift, digits.policy) == (False, True, True)
    assert (photos.resized_crop, photos.flip, photos.policy) == (True, True, True)


@pytest.mark.unit
def test_unknown_name_suggests() -> None:
    with pytest.raises(UserError, match="unknown augmentation 'randaug': did you mean randaugment"):
        resolve("randaug", "none")


# -- views ----------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("name", ["none", "flip", "shift", "flip_crop"])
def test_equal_views_are_equal_images_and_others_differ(images, name) -> None:
    augmentation = resolve(name, "none")
    transform = BatchTransform(augmentation, (SIDE, SIDE), seed=3)
    epochs, ids = np.arange(COUNT), np.zeros(COUNT, np.int64)
    out = transform(
        epochs, ids, stored=lambda _: images[0],
        fitted=lambda: images.expand(COUNT, -1, -1, -1).clone(),
    )  # fmt: skip
    views = transform.views(epochs, ids)
    number = augmentation.views((SIDE, SIDE))
    assert number == {"none": 1, "flip": 2, "shift": 25, "flip_crop": 50}[name]
    assert views.dtype == np.int64
    assert sorted(set(views.tolist())) == list(range(number))
    seen: dict[int, bytes] = {}
    for view, image in zip(views.tolist(), out, strict=True):
        assert seen.setdefault(view, image.numpy().tobytes()) == image.numpy().tobytes()
    assert len(set(seen.values())) == number


@pytest.mark.parity
def test_mirroring_alone_mirrors_what_mirroring_after_a_crop_does(images) -> None:
    crops = [mirrored for _, _, mirrored in moves(images, flip=True)]
    transform = BatchTransform(resolve("flip", "none"), (SIDE, SIDE), seed=0)
    views = transform.views(np.zeros(COUNT, np.int64), np.arange(COUNT))
    assert views.tolist() == [int(flipped) for flipped in crops]


@pytest.mark.parametrize("name", ["imagenet", "randaugment"])
def test_views_that_can_not_be_counted(name) -> None:
    assert resolve(name, "flip_crop").views((32, 32)) is None
