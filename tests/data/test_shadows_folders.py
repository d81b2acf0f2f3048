"""Folders of triplets: the layouts of known sets, and whatever can be wrong with their files."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.data import ShadowData, create, create_shadows, create_translation
from tenfold.errors import UserError

pytestmark = pytest.mark.unit

SIZE = (40, 56)
Change = Callable[[Path], None]


def photo(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(30, 226, (5, 7, 3), dtype=np.uint8))
    return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))


def block(size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[10:30, 8:40] = 255
    return mask


def save(path: Path, pixels: np.ndarray | Image.Image, **settings: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **settings)


def write_set(
    root: Path,
    folders: dict[str, tuple[str, str, str]],
    names: tuple[str, str, str] = ("{}.png",) * 3,
    count: int = 4,
) -> Path:
    """Write photos, masks and targets of `count` scenes for each split."""
    for number, (split, places) in enumerate(folders.items()):
        for k in range(count if split == "train" else 2):
            truth, mask = photo(100 * number + k), block()
            dark = np.where(mask[..., None] > 0, truth // 2, truth)
            for place, name, part in zip(places, names, (dark, mask, truth), strict=True):
                if place:
                    save(root / place / name.format(f"s{k}"), part)
    return root


def istd(root: Path, inside: bool = True, free: tuple[str, str] = ("C", "C")) -> Path:
    return write_set(
        root,
        {
            split: tuple(
                f"{split}/{split}_{part}" if inside else f"{split}_{part}"
                for part in ("A", "B", last)
            )
            for split, last in zip(("train", "test"), free, strict=True)
        },
    )


def opened(root: Path, **options: object) -> ShadowData:
    return create_shadows({"name": "triplets", "path": root, "size": 32, **options})


def batch_of(data: ShadowData) -> dict[str, torch.Tensor]:
    return next(iter(data.test_loader()))


@pytest.mark.parametrize("inside", [True, False])
def test_istd(tmp_path: Path, inside: bool) -> None:
    data = opened(istd(tmp_path, inside), test_size="native")
    assert (data.train_size, data.test_size, data.has_targets) == (4, 2, True)
    assert (data.size, data.short_side, data.test_size_px) == ((32, 32), (32, 60), None)
    assert data.name_of(1) == "test_A/s1.png"
    assert data.train_name_of(0) == "train_A/s0.png"
    batch = batch_of(data)
    truth = torch.from_numpy(photo(100).copy()).permute(2, 0, 1)
    assert torch.equal(batch["target"][0], truth)
    assert torch.equal(batch["mask"][0, 0], torch.from_numpy(block() // 255))
    inside_mask = batch["mask"][0].bool().expand(3, -1, -1)
    assert torch.equal(batch["image"][0][inside_mask], truth[inside_mask] // 2)
    assert torch.equal(batch["image"][0][~inside_mask], truth[~inside_mask])
    assert [mask.tolist() for mask in data.train_masks()] == [(block() // 255).tolist()] * 4
    assert opened(tmp_path, limit=3).train_size == 3


def test_adjusted_targets_are_taken_where_they_are(tmp_path: Path) -> None:
    istd(tmp_path, free=("C", "C"))
    for split, name in (("train", "train_C_fixed_ours"), ("test", "test_C_fixed_official")):
        shutil.copytree(tmp_path / split / f"{split}_C", tmp_path / split / name)
        for file in (tmp_path / split / name).iterdir():
            save(file, np.asarray(Image.open(file)) // 2 + 100)
    data = opened(tmp_path, test_size="native")
    assert torch.equal(
        batch_of(data)["target"][0], torch.from_numpy(photo(100) // 2 + 100).permute(2, 0, 1)
    )
    assert int(next(iter(data.train_loader(batch_size=4, seed=0)))["target"].min()) >= 100


@pytest.mark.parametrize("masks", ["mask", "train_B"])
def test_srd(tmp_path: Path, masks: str) -> None:
    other = {"mask": "mask", "train_B": "test_B"}[masks]
    write_set(
        tmp_path,
        {
            "train": ("train/shadow", f"train/{masks}", "train/shadow_free"),
            "test": ("test/shadow", f"test/{other}", "test/shadow_free"),
        },
        ("{}.jpg", "{}.png", "{}_no_shadow.jpg"),
    )
    data = opened(tmp_path)
    assert (data.train_size, data.test_size) == (4, 2)
    assert data.short_side == (400, 479)
    assert opened(tmp_path, short_side=[32, 40]).short_side == (32, 40)
    assert set(batch_of(data)) == {"image", "mask", "target", "id"}


def test_without_targets(tmp_path: Path) -> None:
    istd(tmp_path)
    shutil.rmtree(tmp_path / "train" / "train_C")
    with pytest.raises(UserError, match=r"shadow-free photos of train.*data\.targets: false"):
        opened(tmp_path)
    data = opened(tmp_path, targets=False)
    assert (data.has_targets, data.test_has_targets) == (False, True)
    assert set(next(iter(data.train_loader(batch_size=2, seed=0)))) == {"image", "mask", "id"}
    assert "target" in batch_of(data)
    shutil.rmtree(tmp_path / "test" / "test_C")
    assert set(batch_of(opened(tmp_path, targets=False))) == {"image", "mask", "id"}
    # A folder that isn't looked at may hold anything.
    save(tmp_path / "train" / "train_C" / "else.png", photo(0))
    assert opened(tmp_path, targets=False).train_size == 4


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        ("train/train_A", "no folder of shadow photos of train: expected train/train_A"),
        ("train/train_B", "no folder of masks of train.*SRD comes without"),
        ("test", "no folder of shadow photos and masks of test"),
    ],
)
def test_folders_that_are_missing(tmp_path: Path, gone: str, text: str) -> None:
    shutil.rmtree(istd(tmp_path) / gone)
    with pytest.raises(UserError, match=text) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_files_without_partners_are_named(tmp_path: Path) -> None:
    istd(tmp_path)
    for k in range(7):
        save(tmp_path / "train" / "train_A" / f"x{k}.png", photo(k))
    (tmp_path / "train" / "train_B" / "s1.png").unlink()
    with pytest.raises(UserError) as error:
        opened(tmp_path)
    text = str(error.value)
    assert "8 without partners: s1.png of shadow photos (not in masks), x0.png" in text
    assert "x3.png" in text
    assert "x4.png" not in text
    assert "and 3 more" in text
    assert "--data.skip_bad true" in text
    data = opened(tmp_path, skip_bad=True)
    assert data.train_size == 3
    assert len(data.skipped) == 8


def test_sizes_that_differ(tmp_path: Path) -> None:
    istd(tmp_path)
    save(tmp_path / "train" / "train_C" / "s2.png", photo(0, (30, 56)))
    with pytest.raises(UserError, match=r"train_A/s2\.png is 40x56, and .*s2\.png 30x56"):
        opened(tmp_path)
    # Upright they may be of one size.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(photo(2)).transpose(Image.Transpose.ROTATE_90)
    save(tmp_path / "train" / "train_C" / "s2.png", turned, exif=exif)
    data = opened(tmp_path, size=40, short_side=[40, 40])
    batch = next(iter(data.train_loader(batch_size=4, seed=0, augment="none")))
    lit = (batch["mask"] == 0).expand(-1, 3, -1, -1)
    assert torch.equal(batch["image"][lit], batch["target"][lit])


def test_masks_that_are_empty_full_or_grey(tmp_path: Path) -> None:
    istd(tmp_path)
    masks = tmp_path / "train" / "train_B"
    save(masks / "s0.png", np.zeros(SIZE, np.uint8))
    save(masks / "s1.png", np.full(SIZE, 255, np.uint8))
    save(masks / "s2.png", np.linspace(0, 255, 40 * 56).reshape(SIZE).astype(np.uint8))
    save(tmp_path / "test" / "test_B" / "s0.png", np.zeros(SIZE, np.uint8))
    with pytest.warns(UserWarning, match="masks are") as warned:
        data = opened(tmp_path)
    texts = [str(one.message) for one in warned]
    assert len(texts) == 4
    for part in (
        "1 of 4 train masks are empty: left out (train_A/s0.png)",
        "white on more than 95%, perhaps inverted: kept (train_A/s1.png)",
        "between black and white on more than 5%",
        "1 of 2 test masks are empty: kept (test_A/s0.png)",
    ):
        assert any(part in text for text in texts), part
    assert (data.train_size, data.test_size) == (3, 2)
    assert data.train_ids.tolist() == [1, 2, 3]
    assert data.skipped == ["train_A/s0.png (empty mask)"]
    loader = data.train_loader(batch_size=3, seed=0)
    assert sorted(next(iter(loader))["id"].tolist()) == [1, 2, 3]
    # The threshold decides about levels between.
    shares = []
    for above in (0.5, 0.9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grey = opened(tmp_path, mask_above=above).train_masks()[1]
        shares.append(float(grey.double().mean()))
    assert shares == pytest.approx([0.5, 0.1], abs=0.01)
    for k in range(4):
        save(masks / f"s{k}.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(UserError, match="none of 4 masks to train on"), pytest.warns(match="empty"):
        opened(tmp_path)


def test_photos_of_every_kind(tmp_path: Path) -> None:
    istd(tmp_path)
    place = tmp_path / "train" / "train_C"
    plain = Image.fromarray(photo(1))
    expected = [
        torch.from_numpy(np.array(plain.convert(kind).convert("RGB"))) for kind in ("P", "CMYK")
    ]
    for kind, colours in zip(("P", "CMYK"), expected, strict=True):
        (place / "s1.png").unlink(missing_ok=True)
        save(place / "s1.tif", plain.convert(kind))
        data = opened(tmp_path, size=40, short_side=[40, 40])
        batch = next(iter(data.train_loader(batch_size=4, seed=0, augment="none")))
        found = batch["target"][batch["id"] == 1][0].permute(1, 2, 0)
        assert torch.equal(found, colours[:, 8:48])
    (place / "s1.tif").unlink()
    opaque = plain.copy()
    opaque.putalpha(255)
    save(place / "s1.png", opaque)
    assert opened(tmp_path).train_size == 4
    opaque.putalpha(Image.new("L", opaque.size, 254))
    save(place / "s1.png", opaque)
    with pytest.raises(UserError, match=r"train_C/s1\.png: it is transparent in part"):
        opened(tmp_path)
    assert opened(tmp_path, skip_bad=True).skipped == ["train_A/s1.png"]
    for grey in (plain.convert("L"), Image.fromarray(photo(1)[..., 0].astype(np.uint16) * 257)):
        save(place / "s1.png", grey)
        with pytest.raises(UserError, match=r"train_C/s1\.png is grey: expected photos in colour"):
            opened(tmp_path)
    save(place / "s1.png", plain)
    # For a held-out one grey will do; 16 bits are scaled, not clipped.
    save(tmp_path / "test" / "test_A" / "s0.png", photo(1)[..., 0].astype(np.uint16) * 257)
    image = batch_of(opened(tmp_path, test_size="native"))["image"][0]
    assert torch.equal(image[0], torch.from_numpy(photo(1)[..., 0].copy()))
    assert torch.equal(image[0], image[2])


def test_masks_with_alpha_or_of_one_bit(tmp_path: Path) -> None:
    istd(tmp_path)
    expected = opened(tmp_path).train_masks()
    white = block()
    for mask in (
        np.dstack([white] * 3 + [255 - white]),  # luminance counts, not alpha
        white // 255,
        white.astype(np.uint16) * 257,
        Image.fromarray(white).convert("1"),
    ):
        save(tmp_path / "train" / "train_B" / "s1.png", mask)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(opened(tmp_path).train_masks()[1], expected[1])


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    istd(tmp_path)
    for part, left in (("A", 0), ("B", 60)):
        bad = tmp_path / "train" / f"train_{part}" / "s2.png"
        whole = bad.read_bytes()
        bad.write_bytes(whole[:left])
        with pytest.raises(UserError, match=r"s2\.png.*skip_bad true") as error:
            opened(tmp_path)
        assert "\n" not in str(error.value)
        data = opened(tmp_path, skip_bad=True)
        assert (data.train_size, data.skipped) == (3, ["train_A/s2.png"])
        bad.write_bytes(whole)
    # One whose header is whole is found while it is read, in a worker too.
    photo_file = tmp_path / "train" / "train_A" / "s2.png"
    photo_file.write_bytes(photo_file.read_bytes()[:-400])
    data = opened(tmp_path)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"s2\.png.*1 of 4 train photos can't be read"):
            list(data.train_loader(batch_size=2, seed=0, workers=workers))


def test_the_set_belongs_to_its_tasks(tmp_path: Path) -> None:
    for call in (create, create_translation):
        with pytest.raises(UserError, match="triplets"):
            call(f"triplets:{tmp_path}")
    for name, text in (
        ("digits", "has no photos with shadows: expected triplets"),
        ("edges2photo", "has no photos with shadows"),
        ("triplet", "did you mean triplets"),
    ):
        with pytest.raises(UserError, match=text):
            create_shadows(name)
    for option, text in (
        ({"mean": [0.5] * 3}, r"data\.mean .*from 0\.\.255 to 0\.\.1"),
        ({"short_side": [16, 20]}, r"data\.short_side is \[16, 20\]: expected at least 32"),
        ({"short_side": [64, 40]}, "the larger number last"),
        ({"mask_above": 1.0}, r"data\.mask_above is 1\.0: expected a share"),
        ({"test_size": "own"}, r"data\.test_size is 'own'"),
        ({"targets": 1}, r"data\.targets is 1: expected true or false"),
        ({"threshold": 40}, r"data\.threshold is 40: expected it only for shadow_frames"),
        ({"samples": 40}, r"data\.samples is 40: expected it only for hf or rendered_shadows"),
    ):
        with pytest.raises(UserError, match=text):
            opened(istd(tmp_path), **option)
    with pytest.raises(UserError, match=r"data\.targets is False: expected it only for triplets"):
        create({"name": "digits", "targets": False})
