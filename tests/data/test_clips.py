"""What all kinds of clips have in common: which frames, batches, augmentation, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tenfold.data import ArrayClips, ClipData, create
from tenfold.data.clips import chosen_frames
from tenfold.data.preprocessing import Preprocessing
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def preprocessing(frames: int | None = 4, stride: int = 2, size: int = 16) -> Preprocessing:
    return Preprocessing(3, (size, size), (0.5,) * 3, (0.25,) * 3, frames=frames, stride=stride)


def numbered(count: int = 6, length: int = 20, size: int = 16) -> ArrayClips:
    """Clips whose pixels say clip, frame, row and column: `10 * clip + frame` and noise."""
    clips = torch.randint(0, 256, (count, 3, length, size, size), dtype=torch.uint8)
    clips[:, 0] = torch.arange(count)[:, None, None, None]
    clips[:, 1] = torch.arange(length)[:, None, None]
    return ArrayClips(clips, [i % 3 for i in range(count)], "mine")


def clip_data(**changes: object) -> ClipData:
    arguments = {
        "name": "mine",
        "classes": ["a", "b", "c"],
        "train": numbered(),
        "test": numbered(4),
        "preprocessing": preprocessing(),
        **changes,
    }
    return ClipData(**arguments)  # type: ignore[arg-type]


def epoch(loader: object, number: int) -> dict[str, Tensor]:
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


# -- which frames ----------------------------------------------------------------------------------


@given(
    length=st.integers(1, 200),
    frames=st.integers(1, 32),
    stride=st.integers(1, 6),
    word=st.none() | st.integers(0, 2**64 - 1),
)
def test_frames_lie_in_the_clip_in_order(length, frames, stride, word) -> None:
    chosen = chosen_frames(length, frames, stride, word)
    assert len(chosen) == frames
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < length
    if length >= (frames - 1) * stride + 1:
        assert {*np.diff(chosen)} <= {stride}
    if length >= frames:
        assert len({*chosen}) == frames  # none twice


def test_random_frames_start_anywhere_and_the_middle_is_the_middle() -> None:
    words = np.random.default_rng(0).integers(2**64, size=400, dtype=np.uint64).tolist()
    starts = [chosen_frames(12, 4, 2, word)[0] for word in words]
    assert {*starts} == {0, 1, 2, 3, 4, 5}
    assert chosen_frames(12, 4, 2)[0] == 2
    assert chosen_frames(13, 4, 2) == [3, 5, 7, 9]  # as many before as after


# -- batches ---------------------------------------------------------------------------------------


def test_batches_are_raw_bytes_with_labels_and_ids() -> None:
    data = clip_data()
    batch = next(iter(data.test_loader(batch_size=4)))
    assert sorted(batch) == ["clip", "id", "label"]
    assert batch["clip"].shape == (4, 3, 4, 16, 16)
    assert batch["clip"].dtype == torch.uint8
    assert batch["label"].tolist() == [0, 1, 2, 0]
    assert batch["clip"][:, 0, 0, 0, 0].tolist() == batch["id"].tolist()
    assert batch["clip"][0, 1, :, 0, 0].tolist() == [6, 8, 10, 12]  # the middle of 20
    assert data.shape == (3, 4, 16, 16)
    assert (data.frames, data.train_size, data.eval_batch_size) == (4, 6, 32)


def test_training_starts_elsewhere_in_every_epoch() -> None:
    loader = clip_data().train_loader(batch_size=6, seed=0, augment="none", workers=0)
    seen = []
    for number in range(4):
        got = epoch(loader, number)
        frames = got["clip"][:, 1, :, 0, 0]
        assert torch.equal(frames - frames[:, :1], torch.tensor([[0, 2, 4, 6]]).expand(6, 4).byte())
        seen.append(dict(zip(got["id"].tolist(), frames[:, 0].tolist(), strict=True)))
    assert len({frozenset(starts.items()) for starts in seen}) == 4
    assert max(s for starts in seen for s in starts.values()) > 8


@pytest.mark.parametrize(
    "augment", ["none", "flip", "shift", "flip_crop", "imagenet", "randaugment"]
)
def test_only_seed_epoch_and_id_decide(augment: str) -> None:
    data = clip_data(train=(clips := numbered()))

    def got(workers: int = 0, seed: int = 3, number: int = 1, **kinds: int) -> dict[int, Tensor]:
        again = clip_data(train=clips) if workers else data
        batch = {"batch_size": 4, **kinds}
        loader = again.train_loader(seed=seed, augment=augment, workers=workers, **batch)
        found = epoch(loader, number)
        return dict(zip(found["id"].tolist(), found["clip"], strict=True))

    whole = got()
    for part in (got(workers=2), got(batch_size=5), got(rank=1, world_size=2)):
        assert all(torch.equal(clip, whole[i]) for i, clip in part.items())
    for other in (got(seed=4), got(number=2)):
        assert not all(torch.equal(other[i], whole[i]) for i in whole)


@pytest.mark.parametrize("augment", ["shift", "flip_crop", "imagenet", "randaugment"])
def test_all_frames_of_a_clip_go_the_same_way(augment: str) -> None:
    """A clip that stands still still does after its augmentation."""
    still = torch.randint(0, 256, (5, 3, 1, 24, 24), dtype=torch.uint8).expand(-1, -1, 8, -1, -1)
    clips = ArrayClips(still, [0] * 5, "still")
    data = clip_data(train=clips, test=clips, preprocessing=preprocessing(stride=1))
    for number in range(3):
        got = epoch(data.train_loader(batch_size=5, seed=0, augment=augment, workers=0), number)
        assert torch.equal(got["clip"], got["clip"][:, :, :1].expand_as(got["clip"]))
        assert not torch.equal(got["clip"], epoch(data.test_loader(batch_size=5), 0)["clip"])


def test_flip_mirrors_whole_clips_left_and_right() -> None:
    pixels = torch.randint(0, 256, (12, 3, 4, 16, 16), dtype=torch.uint8)
    clips = ArrayClips(pixels, [0] * 12, "noise")
    data = clip_data(train=clips, test=clips, preprocessing=preprocessing(stride=1))
    got = epoch(data.train_loader(batch_size=12, seed=0, augment="flip", workers=0), 0)
    ways = [
        (torch.equal(clip, pixels[i]), torch.equal(clip, pixels[i].flip(-1)))
        for i, clip in zip(got["id"].tolist(), got["clip"], strict=True)
    ]
    assert {*ways} == {(True, False), (False, True)}


def test_clips_that_fit_are_decoded_once(monkeypatch) -> None:
    clips = numbered(length=4)
    clips.keep_decoded = True
    data = clip_data(train=clips, preprocessing=preprocessing(stride=1, size=8))
    loader = data.train_loader(batch_size=6, seed=0)
    assert loader.num_workers == 0
    first = epoch(loader, 0)
    monkeypatch.setattr(clips, "clip", lambda *_: pytest.fail("decoded again"))
    again = epoch(loader, 0)
    assert torch.equal(first["clip"], again["clip"])
    assert first["clip"].shape == (6, 3, 4, 8, 8)
    monkeypatch.undo()
    other = numbered(length=5)  # one frame more: something is chosen, so nothing is kept
    other.keep_decoded = True
    data = clip_data(train=other, preprocessing=preprocessing(stride=1, size=8))
    loader = data.train_loader(batch_size=6, seed=0, augment="none", workers=0)
    starts = torch.stack([epoch(loader, number)["clip"][:, 1, 0, 0, 0] for number in range(4)])
    assert {*starts.flatten().tolist()} == {0, 1}


def test_pixels_are_resized_and_normalised_frame_by_frame() -> None:
    data = clip_data(train=numbered(size=20), test=numbered(size=20))
    batch = next(iter(data.test_loader(batch_size=2)))
    assert batch["clip"].shape == (2, 3, 4, 16, 16)
    got = data.normalize(batch["clip"])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (batch["clip"] / 255 - 0.5) / 0.25)
    for wrong in (batch["clip"].float(), batch["clip"].transpose(1, 2), batch["clip"][:, :, 0]):
        with pytest.raises(UserError, match=r"expected torch.uint8 \(B, 3, T, H, W\)"):
            data.normalize(wrong)


def test_preprocessing_travels_and_that_of_images_is_as_it_was() -> None:
    facts = preprocessing(frames=7, stride=3)
    assert Preprocessing.from_dict(facts.to_dict()) == facts
    assert facts.shape == (3, 7, 16, 16)
    images = preprocessing(frames=None, stride=1)
    assert sorted(images.to_dict()) == [
        "channels", "interpolation", "mean", "resize", "size", "std",
    ]  # fmt: skip
    assert images.shape == (3, 16, 16)
    for wrong in ({"frames": 0}, {"stride": 0}):
        with pytest.raises(UserError, match="expected whole numbers of at least 1"):
            Preprocessing.from_dict({**facts.to_dict(), **wrong})


# -- what is refused -------------------------------------------------------------------------------


def test_flips_are_refused_where_they_change_the_class() -> None:
    data = clip_data(mirror=False)
    for augment in ("flip", "flip_crop", "imagenet"):
        with pytest.raises(UserError, match="a mirrored clip of mine is of another class"):
            data.train_loader(batch_size=2, seed=0, augment=augment)
    for augment in ("none", "shift", "auto", "randaugment"):
        data.train_loader(batch_size=2, seed=0, augment=augment, workers=0)


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match="has no frames: expected the number of a clip's frames"):
        clip_data(preprocessing=preprocessing(frames=None))
    with pytest.raises(UserError, match="batch_size is 0"):
        clip_data().train_loader(batch_size=0, seed=0)
    with pytest.raises(UserError, match="workers is -1"):
        clip_data().test_loader(batch_size=1, workers=-1)
    with pytest.raises(UserError, match="mine gives clips: expected images"):
        clip_data().train_loader(batch_size=2, seed=0, views=True)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"name": "digits", "frames": 8}, "only for frames or video or clips_npz or motions data"),
        ({"name": "motions", "stride": 2}, "only for frames or video or clips_npz data"),
        ({"name": "frames", "path": "x", "train_clips": 8}, "only for motions data"),
        ({"name": "motions", "frames": 0}, "data.frames is 0: expected a whole number"),
        ({"name": "motions", "seed": -1}, "data.seed is -1"),
        ({"name": "motions", "test_clips": 2.5}, "data.test_clips is 2.5"),
        ({"name": "motions", "path": "x"}, "motions are made here"),
        ({"name": "motions", "frames": 1}, "expected at least 2"),
        ({"name": "frames", "streaming": True}, "only for hf data"),
    ],
)
def test_wrong_options(spec: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text) as error:
        create(spec)
    assert "\n" not in str(error.value)


# -- clips that can't be read ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_stops_with_one_line_or_is_skipped(frame_folders, workers: int) -> None:
    root: Path = frame_folders()
    (root / "train/walk/clip1/7.png").write_bytes(b"junk")
    spec = {"name": "frames", "path": root, "size": 16, "frames": 12}
    data = create(spec)
    with pytest.raises(UserError) as error:
        epoch(data.train_loader(batch_size=2, seed=0, workers=workers), 0)
    text = str(error.value)
    assert "can't read clip train/walk/clip1: 7.png: not an image format" in text
    assert "1 of 6 train clips can't be read" in text
    assert "--data.skip_bad true" in text
    assert "\n" not in text
    data = create({**spec, "skip_bad": True})
    assert data.skipped == ["train/walk/clip1"]
    assert data.train_size == 5
    got = epoch(data.train_loader(batch_size=2, seed=0, workers=workers), 0)
    assert sorted(got["id"].tolist()) == data.train_ids.tolist() == [0, 1, 2, 4, 5]
    (root / "train/walk/clip1/7.png").unlink()  # the folder has changed: looked at anew
    assert create({**spec, "skip_bad": True}).skipped == []
