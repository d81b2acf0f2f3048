"""Data of image translation: all layouts of folders, batches, directions, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tenfold.data import (
    ArraySet,
    TranslationData,
    create,
    create_translation,
    names,
    normalize,
    translation_augmentations,
)
from tenfold.data import translation as translation_module
from tenfold.errors import UserError

pytestmark = pytest.mark.unit

HEIGHT, WIDTH = 40, 48


def coordinates(number: int, domain: int) -> np.ndarray:
    """A picture whose pixels say where they are, and of which picture: (H, W, 3)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    kind = np.full_like(y, 10 * number + 100 * domain)
    return np.stack([5 * y, 5 * x, kind], axis=-1).astype(np.uint8)


def save(picture: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)


def side_by_side(root: Path, train: int = 7, test: int = 3, held_out: str = "test") -> Path:
    for split, count, first in (("train", train, 0), (held_out, test, 7)):
        for k in range(count):
            both = [coordinates(first + k, domain) for domain in (0, 1)]
            save(np.concatenate(both, axis=1), root / split / f"{k}.png")
    return root


def two_files(root: Path, folder: Callable[[str, str], str]) -> Path:
    for split, count, first in (("train", 7, 0), ("test", 3, 7)):
        for k in range(count):
            for domain in (0, 1):
                file = root / folder(split, "AB"[domain]) / f"{k}{('.png', '.bmp')[domain]}"
                save(coordinates(first + k, domain), file)
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "side by side": side_by_side,
    "side by side, val": lambda root: side_by_side(root, held_out="val"),
    "trainA": lambda root: two_files(root, lambda split, domain: split + domain),
    "A/train": lambda root: two_files(root, lambda split, domain: f"{domain}/{split}"),
}


def two_domains(root: Path, a: int = 7, b: int = 4) -> Path:
    for folder, count, domain, first in (
        ("trainA", a, 0, 0),
        ("trainB", b, 1, 0),
        ("testA", 3, 0, 7),
        ("testB", 2, 1, 7),
    ):
        for k in range(count):
            save(coordinates(first + k, domain), root / folder / f"{'ab'[domain]}{k}.png")
    return root


def load(name: str, root: Path, **options: object) -> TranslationData:
    given = {"size": [HEIGHT - 8, WIDTH - 8], "load_size": [HEIGHT, WIDTH], **options}
    return create_translation({"name": name, "path": root, **given})


def collected(batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = list(batches)
    return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# -- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_of_every_layout(layout: str, tmp_path: Path) -> None:
    data = load("pairs", LAYOUTS[layout](tmp_path / "set"), size=[HEIGHT, WIDTH])
    assert data.paired
    assert (data.train_size, data.test_size, data.reference_size) == (7, 3, 3)
    assert (data.channels, data.target_channels, data.direction) == (3, 3, "AtoB")
    assert data.shape == (3, HEIGHT, WIDTH)
    assert (data.key, data.described) == ("image", f"an image of 3x{HEIGHT}x{WIDTH}")
    assert data.skipped == []
    held_out = collected(data.test_loader(batch_size=2))
    assert held_out["id"].tolist() == [0, 1, 2]
    for domain, key in enumerate(("source", "target")):
        expected = np.stack([coordinates(7 + k, domain) for k in range(3)]).transpose(0, 3, 1, 2)
        assert torch.equal(held_out[key], torch.from_numpy(expected))
    assert torch.equal(torch.cat(list(data.test_targets(2))), held_out["target"])
    loader = data.train_loader(batch_size=3, seed=0, augment="none")
    assert [len(batch["id"]) for batch in loader] == [3, 3, 1]
    assert len(loader) == 3
    train = collected(loader)
    assert sorted(train["id"].tolist()) == [*range(7)]
    assert torch.equal(train["source"][:, 2, 0, 0], (10 * train["id"]).to(torch.uint8))
    assert torch.equal(train["target"][:, 2, 0, 0], (10 * train["id"] + 100).to(torch.uint8))
    assert data.name_of(1).endswith("/1.png")
    assert data.train_name_of(6).endswith("/6.png")


def test_a_pair_is_cropped_and_mirrored_as_one(tmp_path: Path) -> None:
    data = load("pairs", side_by_side(tmp_path / "set"))
    loader = data.train_loader(batch_size=4, seed=3)
    seen: set[tuple[int, int, bool]] = set()
    for epoch in range(6):
        loader.sampler.set_epoch(epoch)
        found = collected(loader)
        source, target = found["source"], found["target"]
        assert source.dtype == torch.uint8
        assert source.shape == target.shape == (7, 3, HEIGHT - 8, WIDTH - 8)
        assert torch.equal(source[:, :2], target[:, :2])
        assert torch.equal(target[:, 2] - source[:, 2], torch.full_like(source[:, 2], 100))
        for image in source.int():
            top, (left, right) = int(image[0, 0, 0]) // 5, image[1, 0, [0, -1]].tolist()
            seen.add((top, min(left, right) // 5, left > right))
            assert abs(left - right) == 5 * (WIDTH - 9)  # a window of the image, in one piece
    assert {top for top, _, _ in seen} == {*range(9)}
    assert {left for _, left, _ in seen} == {*range(9)}
    assert {mirrored for *_, mirrored in seen} == {False, True}


def test_draws_depend_on_seed_epoch_and_id_alone(tmp_path: Path) -> None:
    for name, root in (
        ("pairs", side_by_side(tmp_path / "pairs")),
        ("unpaired", two_domains(tmp_path / "unpaired")),
    ):
        loader = load(name, root).train_loader(batch_size=3, seed=5)
        assert loader.num_workers == 0  # all is kept in memory
        epochs = []
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            epochs.append(collected(loader))
        assert not same(epochs[0], epochs[1])
        resumed = load(name, root).train_loader(batch_size=3, seed=5)
        resumed.sampler.set_epoch(2)
        torch.manual_seed(123)
        assert same(collected(resumed), epochs[2])
        helped = load(name, root).train_loader(batch_size=3, seed=5, workers=2)
        for epoch in range(3):
            helped.sampler.set_epoch(epoch)
            assert same(collected(helped), epochs[epoch])
        other = load(name, root).train_loader(batch_size=3, seed=6)
        assert not same(collected(other), epochs[0])
        # Whatever the batches: an image's crop is its own.
        whole = load(name, root).train_loader(batch_size=7, seed=5)
        assert same(collected(whole), epochs[0])


def test_images_that_are_not_kept_are_the_same(tmp_path: Path, monkeypatch) -> None:
    root = side_by_side(tmp_path / "set")
    kept = collected(load("pairs", root).train_loader(batch_size=3, seed=1))
    monkeypatch.setattr(translation_module, "MEMORY_LIMIT", 0)
    data = load("pairs", root)
    assert data.train_loader(batch_size=3, seed=1).num_workers > 0
    assert same(collected(data.train_loader(batch_size=3, seed=1, workers=0)), kept)
    assert load("pairs", root, workers=1).train_loader(batch_size=3, seed=1).num_workers == 1


def test_sizes(tmp_path: Path) -> None:
    root = side_by_side(tmp_path / "set")
    data = create_translation(f"pairs:{root}")
    assert (data.size, data.load_size) == ((256, 256), (286, 286))
    for loader in (data.train_loader(batch_size=2, seed=0), data.test_loader(batch_size=2)):
        batch = next(iter(loader))
        assert batch["source"].shape == batch["target"].shape == (2, 3, 256, 256)
    data = load("pairs", root, size=32, load_size=None)
    assert (data.size, data.load_size) == ((32, 32), (36, 36))
    # Stretched by Pillow's bicubic filter, as the papers' data are.
    picture = Image.fromarray(coordinates(7, 0)).resize((32, 32), Image.Resampling.BICUBIC)
    first = next(iter(data.test_loader(batch_size=1)))["source"][0]
    assert torch.equal(first, torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    none = data.train_loader(batch_size=7, seed=0, augment="none")
    assert next(iter(none))["source"].shape == (7, 3, 32, 32)


def test_both_directions(tmp_path: Path) -> None:
    root = side_by_side(tmp_path / "set")
    forth, back = load("pairs", root), load("pairs", root, direction="BtoA")
    assert back.direction == "BtoA"
    swap = {"source": "target", "target": "source", "id": "id"}
    for one, other in (
        (forth.test_loader(batch_size=4), back.test_loader(batch_size=4)),
        (forth.train_loader(batch_size=4, seed=0), back.train_loader(batch_size=4, seed=0)),
    ):
        a, b = collected(one), collected(other)
        assert same(a, {key: b[swap[key]] for key in a})
    shown = torch.cat(list(back.test_targets(3)))
    assert torch.equal(shown, collected(forth.test_loader(batch_size=1))["source"])


def test_limit(tmp_path: Path) -> None:
    data = load("pairs", side_by_side(tmp_path / "set"), limit=2)
    assert (data.train_size, data.test_size) == (2, 3)
    data = load("unpaired", two_domains(tmp_path / "two"), limit=2)
    assert (data.train_size, data.test_size, data.reference_size) == (2, 3, 4)


# -- unpaired ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(7, 4), (3, 8)])
def test_unpaired_images(a: int, b: int, tmp_path: Path) -> None:
    data = load("unpaired", two_domains(tmp_path / "set", a, b))
    assert not data.paired
    assert (data.train_size, data.test_size) == (max(a, b), 3)
    loader = data.train_loader(batch_size=4, seed=0)
    partners: dict[int, set[int]] = {}
    crops: set[tuple[int, int]] = set()
    for epoch in range(40):
        loader.sampler.set_epoch(epoch)
        found = collected(loader)
        assert len(found["id"]) == max(a, b)
        visits = torch.bincount(found["id"], minlength=a)
        assert int(visits.max() - visits.min()) <= 1  # every source image as often as the others
        sources, targets = found["source"].int(), found["target"].int()
        assert torch.equal(sources[:, 2, 0, 0], 10 * found["id"].int())
        for number, target in zip(found["id"].tolist(), targets, strict=True):
            partners.setdefault(number, set()).add((int(target[2, 0, 0]) - 100) // 10)
        crops |= {(int(x[0, 0, 0]), int(y[0, 0, 0])) for x, y in zip(sources, targets, strict=True)}
    assert all(seen == {*range(b)} for seen in partners.values())
    assert len(crops) > 60  # of 9 x 9: the two are cropped independently
    held_out = collected(data.test_loader(batch_size=2))
    assert held_out.keys() == {"source", "id"}
    assert held_out["source"][:, 2, 0, 0].tolist() == [70, 80, 90]
    assert data.name_of(2) == "testA/a2.png"
    assert data.train_name_of(1) == "trainA/a1.png"


def kinds(images: Iterable[Tensor]) -> list[int]:
    return torch.cat(list(images))[:, 2, 0, 0].tolist()


def test_reference_images(tmp_path: Path) -> None:
    root = two_domains(tmp_path / "set")
    data = load("unpaired", root)
    assert kinds(data.test_targets(3)) == [100, 110, 120, 130, 170, 180]
    assert data.reference_size == 6
    assert next(data.test_targets(3)).shape == (3, 3, *data.size)
    data = load("unpaired", root, reference="test")
    assert kinds(data.test_targets(3)) == [170, 180]
    assert data.reference_size == 2
    back = load("unpaired", root, direction="BtoA")
    assert (back.train_size, back.test_size, back.name_of(0)) == (7, 2, "testB/b0.png")
    assert kinds(back.test_targets(5)) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    batch = next(iter(back.train_loader(batch_size=7, seed=0)))
    assert (batch["source"][:, 2] >= 100).all()
    assert (batch["target"][:, 2] < 100).all()


# -- facts ---------------------------------------------------------------------------------------


def test_networks_see_minus_one_to_one(tmp_path: Path) -> None:
    data = load("pairs", side_by_side(tmp_path / "set"))
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    scaled = data.normalize(levels)
    assert (scaled.dtype, float(scaled.min()), float(scaled.max())) == (torch.float32, -1.0, 1.0)
    assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), levels)
    facts = data.preprocessing()
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.5] * 3)
    assert facts["size"] == [HEIGHT - 8, WIDTH - 8]
    assert torch.equal(normalize(levels, facts), scaled)
    assert data.mean == data.std == (0.5, 0.5, 0.5)
    for wrong in (scaled, levels.float(), levels[:, :1]):
        with pytest.raises(UserError, match=r"expected torch.uint8 \(B, 3, H, W\)"):
            data.normalize(wrong)


def test_sets_of_ones_own_and_grey_images() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 4, 16, 16), dtype=torch.uint8, generator=generator)
    held_out = ArraySet(pixels, [0] * 6, "held out")
    data = TranslationData(
        name="own", train=[held_out], test=[held_out], size=(16, 16), channels=(1, 3)
    )
    assert (data.channels, data.target_channels, data.load_size) == (1, 3, (18, 18))
    batch = next(iter(data.test_loader(batch_size=6)))
    assert torch.equal(batch["source"], pixels[:, :1])
    assert torch.equal(batch["target"], pixels[:, 1:])
    assert data.normalize(batch["source"]).shape == (6, 1, 16, 16)
    assert data.normalize(batch["target"]).shape == (6, 3, 16, 16)
    assert next(data.test_targets(2)).shape == (2, 3, 16, 16)
    before = pixels.clone()
    for _ in range(3):
        for _ in data.train_loader(batch_size=3, seed=0):
            pass
    whole = TranslationData(
        name="own", train=[held_out], test=[held_out], size=(16, 16), load_size=(16, 16),
        channels=(1, 3),
    )  # fmt: skip
    for _ in whole.train_loader(batch_size=3, seed=0):  # mirrors, of a copy
        pass
    assert torch.equal(pixels, before)
    wrong = TranslationData(name="own", train=[held_out], test=[held_out], size=(16, 16))
    with pytest.raises(UserError, match=r"held out\[\d\] is torch.uint8 of shape \(4, 16, 16\)"):
        next(iter(wrong.test_loader(batch_size=1)))
    with pytest.raises(UserError, match="1 sets to train on and 2 held out"):
        TranslationData(name="own", train=[held_out], test=[held_out] * 2, size=(16, 16))
    with pytest.raises(UserError, match="unknown direction 'AtoC'"):
        TranslationData(
            name="own", train=[held_out], test=[held_out], size=(16, 16), direction="AtoC"
        )


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 90}, r"data.size is \[90, 90\]: expected multiples of 4, at least 16"),
        ({"size": [32, 12]}, r"data.size is \[32, 12\]: expected multiples of 4, at least 16"),
        ({"load_size": 30}, r"data.load_size is \[30, 30\]: expected at least the size"),
        ({"load_size": "x"}, "data.load_size is 'x': expected pixels"),
        ({"direction": "atob"}, "data.direction is 'atob': expected AtoB or BtoA"),
        ({"direction": ["AtoB"]}, r"data.direction is \['AtoB'\]: expected AtoB or BtoA"),
        ({"reference": "test"}, "data.reference is 'test': expected it only for unpaired data"),
        ({"mean": [0.5, 0.5, 0.5]}, "data.mean is .*expected it only for labelled data"),
        ({"std": [0.5, 0.5, 0.5]}, "data.std is .*expected it only for labelled data"),
        ({"limit": 0}, "data.limit is 0"),
        ({"classes": 3}, "data.classes is .*only for hf data, not for pairs"),
    ],
)
def test_wrong_options(options: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text) as error:
        load("pairs", side_by_side(tmp_path / "set"), **options)
    assert "\n" not in str(error.value)


def test_names_of_sets(tmp_path: Path) -> None:
    assert [*names()][-6:-3] == ["pairs", "unpaired", "edges2photo"]
    for name in ("pairs", "unpaired", "edges2photo"):
        with pytest.raises(UserError, match=f"data {name} serves task translation"):
            create(name)
    with pytest.raises(UserError, match=r"data digits has labels .*expected pairs, unpaired"):
        create_translation("digits")
    for build in (create, create_translation):
        with pytest.raises(UserError, match="unknown data set 'pair': did you mean pairs"):
            build("pair")
    with pytest.raises(UserError, match=r"data pairs has no path: .*give pairs:PATH"):
        create_translation("pairs")
    with pytest.raises(
        UserError, match=r"data.load_size is \(8, 8\): expected it only for pairs or"
    ):
        create({"name": "digits", "load_size": 8})
    with pytest.raises(UserError, match=r"data.reference is 'all': expected train.test or test"):
        load("unpaired", two_domains(tmp_path / "set"), reference="all")


def test_wrong_calls(tmp_path: Path) -> None:
    data = load("pairs", side_by_side(tmp_path / "set"))
    with pytest.raises(UserError, match="unknown augmentation 'flip_crop'"):
        data.train_loader(batch_size=2, seed=0, augment="flip_crop")
    assert [*translation_augmentations()] == ["auto", "translation", "none"]
    for call in (
        lambda: data.train_loader(batch_size=0, seed=0),
        lambda: data.test_loader(batch_size=0),
        lambda: data.test_targets(0),
    ):
        with pytest.raises(UserError, match="batch_size is 0"):
            call()
    with pytest.raises(UserError, match=r"seed is 0\.5"):
        data.train_loader(batch_size=1, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="workers is -1"):
        data.test_loader(batch_size=1, workers=-1)


def spoil_pairs(root: Path, what: str) -> str:
    if what == "odd":
        save(np.zeros((HEIGHT, 2 * WIDTH - 1, 3), np.uint8), root / "train" / "3.png")
        return r"train/3\.png is 95 pixels wide, an odd number: expected A and B side by side"
    if what == "no train":
        shutil.rmtree(root / "train")
        return r"set has no folder train, trainA or A: expected"
    if what == "no test":
        shutil.rmtree(root / "test")
        return r"set has no folder test or val or validation: expected images .* in .*set/test"
    if what == "empty":
        for file in (root / "train").iterdir():
            file.unlink()
        return r"set/train has no images: expected files ending in \.jpg"
    if what == "two layouts":
        (root / "trainA").mkdir()
        return "set has folders train and trainA: expected one layout"
    (root / "test" / "1.png").write_bytes(b"no image")
    return r"can't read pair .*test/1\.png: .*1 of 3 test pairs can't be read \(test/1\.png\)"


@pytest.mark.parametrize("what", ["odd", "no train", "no test", "empty", "two layouts", "header"])
def test_pairs_that_are_wrong(what: str, tmp_path: Path) -> None:
    root = side_by_side(tmp_path / "set")
    text = spoil_pairs(root, what)
    with pytest.raises(UserError, match=text) as error:
        load("pairs", root)
    assert "\n" not in str(error.value)


def spoil_matched(root: Path, what: str) -> str:
    if what == "orphans":
        for k in range(5):
            (root / "trainA" / f"{k}.png").unlink()
        return (
            r"no partner in .*trainA for .*trainB/0.bmp, .*trainB/1.bmp, .*trainB/2.bmp "
            r"\(and 2 more\)"
        )
    if what == "twice":
        shutil.copy(root / "testA" / "1.png", root / "testA" / "1.webp")
        return r"testA/1\.png and .*testA/1\.webp have the same name"
    if what == "sizes":
        save(np.zeros((HEIGHT, WIDTH + 2, 3), np.uint8), root / "trainB" / "2.bmp")
        return r"trainA/2\.png is 40x48, and .*trainB/2\.bmp 40x50: expected a pair of one size"
    if what == "empty trainA":
        for file in (root / "trainA").iterdir():
            file.unlink()
        return r"set/trainA has no images"
    if what == "no trainA":
        shutil.rmtree(root / "trainA")
        return r"set has no folder trainA: expected image files in .*set/trainA"
    shutil.rmtree(root / "testB")
    return r"set has no folder testB or valB or validationB"


@pytest.mark.parametrize(
    "what", ["orphans", "twice", "sizes", "empty trainA", "no trainA", "no testB"]
)
def test_matched_pairs_that_are_wrong(what: str, tmp_path: Path) -> None:
    root = LAYOUTS["trainA"](tmp_path / "set")
    text = spoil_matched(root, what)
    with pytest.raises(UserError, match=text) as error:
        load("pairs", root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["trainA", "trainB", "testA", "testB"])
def test_unpaired_folders_that_are_missing_or_empty(folder: str, tmp_path: Path) -> None:
    root = two_domains(tmp_path / "set")
    for file in (root / folder).iterdir():
        file.unlink()
    with pytest.raises(UserError, match=f"set/{folder} has no images"):
        load("unpaired", root)
    (root / folder).rmdir()
    with pytest.raises(UserError, match=f"set has no folder {folder}"):
        load("unpaired", root)


def cut_off(file: Path) -> None:
    """Leave the header, which says nothing about the pixels' loss."""
    save(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), file)
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize("workers", [0, 1])
def test_cut_off_images_are_named_or_skipped(workers: int, tmp_path: Path) -> None:
    root = two_domains(tmp_path / "set")
    cut_off(root / "trainB" / "b2.png")
    data = load("unpaired", root)
    loaders = [data.train_loader(batch_size=2, seed=k, workers=workers) for k in range(9)]
    with pytest.raises(UserError, match=r"can't read image .*trainB/b2\.png.*1 of 4") as error:
        collected(batch for loader in loaders for batch in loader)
    assert "--data.skip_bad true" in str(error.value)
    with pytest.raises(UserError, match=r"trainB/b2\.png"):
        list(data.test_targets(2))
    (root / "trainA" / "a0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"trainA/a0\.png: the file is empty"):
        load("unpaired", root)
    data = load("unpaired", root, skip_bad=True)
    assert data.skipped == ["trainA/a0.png", "trainB/b2.png"]
    assert (data.train_size, data.reference_size) == (6, 5)
    found = collected(data.train_loader(batch_size=2, seed=0, workers=workers))
    assert sorted(found["id"].tolist()) == [1, 2, 3, 4, 5, 6]
    assert kinds(data.test_targets(2)) == [100, 110, 130, 170, 180]


def test_a_pair_without_one_half_is_skipped(tmp_path: Path) -> None:
    root = LAYOUTS["trainA"](tmp_path / "set")
    cut_off(root / "testB" / "1.bmp")
    data = load("pairs", root, skip_bad=True)
    assert data.skipped == ["testA/1.png"]
    held_out = collected(data.test_loader(batch_size=2))
    assert held_out["id"].tolist() == [0, 2]
    assert len(torch.cat(list(data.test_targets(2)))) == 2


def test_files_that_change_are_looked_at_again(tmp_path: Path) -> None:
    root = side_by_side(tmp_path / "set")
    load("pairs", root)
    save(np.zeros((HEIGHT, 51, 3), np.uint8), root / "train" / "3.png")
    with pytest.raises(UserError, match=r"train/3\.png is 51 pixels wide"):
        load("pairs", root)


def test_images_to_choose_by_are_taken_from_training(tmp_path: Path) -> None:
    from tests.translations import make_pairs, make_unpaired

    for folder, kind in (
        (make_pairs(tmp_path / "p"), "pairs"),
        (make_unpaired(tmp_path / "u"), "unpaired"),
    ):
        data = create_translation({"name": kind, "path": str(folder), "size": 32})
        training, choosing = data.holding_out(2)
        count = len(data._train[0].split.ids)
        kept = {
            int(i)
            for _ in range(3)
            for b in training.train_loader(batch_size=2, seed=0)
            for i in b["id"]
        }
        assert kept == set(range(count - 2))
        held = list(choosing.test_loader(batch_size=2))
        assert torch.cat([b["id"] for b in held]).tolist() == [count - 2, count - 1]
        assert held[0]["source"].shape == (2, 3, 32, 32)
        assert ("target" in held[0]) == (kind == "pairs")
        assert data.test_size == training.test_size
        with pytest.raises(UserError, match="some that are left to train on"):
            data.holding_out(count)
