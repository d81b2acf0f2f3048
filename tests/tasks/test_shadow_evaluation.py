"""Folders of results are matched, read, resized and compared; what can't be is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.cli import main
from tenfold.errors import UserError
from tenfold.tasks.shadow_evaluation import (
    evaluate_shadows,
    parse_size,
    write_json,
)
from tests.measure.test_shadow_errors import one_by_one

pytestmark = pytest.mark.path


def photo(seed: int, height=60, width=80) -> np.ndarray:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def disc(height=60, width=80) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 4) ** 2


def save(path: Path, pixels, **settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **settings)


@pytest.fixture
def folders(tmp_path):
    """Three photos: darkened discs as input, half way back as results."""
    for index, name in enumerate(("a", "b", "c")):
        truth, mask = photo(index), disc()
        dark = np.where(mask[..., None], truth * 0.4, truth).astype(np.uint8)
        better = np.where(mask[..., None], truth * 0.8 + 7, truth).astype(np.uint8)
        save(tmp_path / "truth" / f"{name}.png", truth)
        save(tmp_path / "input" / f"{name}.png", dark)
        save(tmp_path / "results" / f"{name}.png", better)
        save(tmp_path / "masks" / f"{name}.png", (255 * mask).astype(np.uint8))
    return tmp_path


def evaluated(root: Path, **options):
    return evaluate_shadows(root / "results", root / "truth", root / "masks", **options)


def test_equals_scikit_image_at_native_size(folders):
    found = evaluated(folders, size=None)
    expected = []
    for name in found.names:
        result, truth = (
            torch.from_numpy(np.array(Image.open(folders / role / f"{name}.png"))).permute(2, 0, 1)
            for role in ("results", "truth")
        )
        expected.append(one_by_one(result, truth, torch.from_numpy(disc())[None]))
    figures, expected = found.errors.per_image().numpy(), np.array(expected)
    # Outside nothing differs, which scikit-image gives as a PSNR of infinity too.
    np.testing.assert_allclose(figures, expected, atol=1e-3)


def test_photos_are_resized_to_256_by_pillow(folders):
    found = evaluated(folders)
    assert found.protocol["size"].startswith("256x256")
    name = found.names[1]
    result, truth = (
        np.array(
            Image.open(folders / role / f"{name}.png").resize((256, 256), Image.Resampling.BICUBIC)
        )
        for role in ("results", "truth")
    )
    mask = Image.open(folders / "masks" / f"{name}.png").resize(
        (256, 256), Image.Resampling.BICUBIC
    )
    for above in (0.0, 0.5):
        region = np.array(mask) > 255 * above
        planes = [torch.from_numpy(image).permute(2, 0, 1) for image in (result, truth)]
        figures = evaluated(folders, mask_above=above).errors.per_image()[1]
        expected = one_by_one(*planes, torch.from_numpy(region)[None])
        np.testing.assert_allclose(figures.numpy(), expected, atol=1e-3)


def test_the_output_says_how_and_ends_with_the_table(folders, capsys, tmp_path):
    words = [str(folders / name) for name in ("results", "truth", "masks")]
    out = tmp_path / "new" / "figures.json"
    options = ["--input", str(folders / "input"), "--json", str(out), "--dilate", "3"]
    assert main(["evaluate-shadows", *words, *options]) == 0
    text = capsys.readouterr().out
    for said in (
        *words,
        "256x256",
        "bicubic",
        "> 0, grown by 3 pixels",
        "|dL| + |da| + |db|",
        "D65",
    ):
        assert said in text
    lines = text.splitlines()
    assert lines[-5] == "results, mean of 3 images (PI)"
    assert 'LAB MAE ("RMSE" in papers)' in lines[-4]
    assert [line.split()[0] for line in lines[-3:]] == ["shadow", "non-shadow", "all"]
    assert "the untouched input, mean of 3 images (PI)" in lines
    values = json.loads(out.read_text())
    figures = values["mean_of_images"]
    assert float(lines[-3].split()[1]) == pytest.approx(
        figures["results"]["shadow"]["lab_mae"], abs=0.006
    )
    assert figures["input"]["shadow"]["lab_mae"] > figures["results"]["shadow"]["lab_mae"]
    assert [one["name"] for one in values["per_image"]] == ["a", "b", "c"]
    assert values["command"].startswith("tenfold evaluate-shadows ")
    assert main(["evaluate-shadows", *words, *options]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["evaluate-shadows", *words, *options, "--overwrite"]) == 0
    assert sorted(file.name for file in out.parent.iterdir()) == ["figures.json"]


def test_infinite_and_missing_figures_are_null(folders, tmp_path):
    save(folders / "masks" / "b.png", np.zeros((60, 80), np.uint8))
    save(folders / "results" / "b.png", photo(1))
    found = evaluated(folders)
    assert any("empty masks" in note and ", b" in note for note in found.notes)
    written = write_json(found, tmp_path / "x.json")
    second = json.loads(written.read_text())["per_image"][1]["results"]
    assert second["shadow"]["lab_mae"] is None
    assert second["all"]["lab_mae"] == 0
    assert second["all"]["psnr"] is None
    assert any("infinite PSNR" in note for note in found.notes)


@pytest.mark.parametrize("suffix", ["_no_shadow", "_free"])
def test_names_of_srd_and_masks_of_two_endings(folders, suffix):
    expected = evaluated(folders).errors.per_image()
    for file in list((folders / "truth").iterdir()):
        file.rename(file.with_stem(file.stem + suffix))
    save(folders / "masks" / "a.jpg", np.full((60, 80), 255, np.uint8))  # the PNG is taken
    (folders / "results" / "Thumbs.db").write_bytes(b"x")
    found = evaluated(folders)
    assert found.names == ("a", "b", "c")
    assert torch.equal(found.errors.per_image(), expected)


def test_orphans_are_named_and_left_out_on_request(folders):
    for number in range(7):
        save(folders / "results" / f"extra{number}.png", photo(number))
    (folders / "masks" / "b.png").unlink()
    with pytest.raises(UserError) as error:
        evaluated(folders)
    assert "8 without partners: b.png of results (not in masks)" in str(error.value)
    assert "extra3.png" in str(error.value)
    assert "extra4.png" not in str(error.value)
    assert "and 3 more" in str(error.value)
    assert "--skip_unmatched" in str(error.value)
    found = evaluated(folders, skip_unmatched=True)
    assert found.names == ("a", "c")
    assert any("extra0.png" in note for note in found.notes)
    words = [str(folders / name) for name in ("results", "truth", "masks")]
    assert main(["evaluate-shadows", *words, "--skip-unmatched"]) == 0


def test_folders_that_do_not_fit(folders):
    (folders / "none").mkdir()
    for change, text in [
        ({"results": "nowhere"}, "nowhere is no folder"),
        ({"masks": "none"}, "has no images"),
    ]:
        given = {role: folders / change.get(role, role) for role in ("results", "truth", "masks")}
        with pytest.raises(UserError, match=text):
            evaluate_shadows(*given.values())
    save(folders / "results" / "a.jpg", photo(0))
    with pytest.raises(UserError, match="both stand for a"):
        evaluated(folders)
    for role in ("results", "truth"):
        for file in (folders / role).iterdir():
            file.rename(file.with_stem(role + file.stem + file.suffix[1:]))
    with pytest.raises(UserError, match="no name is in all"):
        evaluated(folders, skip_unmatched=True)


def test_sizes_that_differ(folders):
    save(folders / "results" / "b.png", photo(1, 30, 40))
    with pytest.raises(UserError, match=r"b\.png is 30x40, and .*b\.png 60x80"):
        evaluated(folders, size=None)
    found = evaluated(folders, size=(48, 64))
    assert any("of another size than the ground truth" in note for note in found.notes)
    assert found.errors.pixels[:, 2].tolist() == [48 * 64] * 3
    # Photos may differ from each other, as long as each has files of one size.
    for role, pixels in (("results", photo(5, 30, 41)), ("truth", photo(6, 30, 41))):
        save(folders / role / "b.png", pixels)
    save(folders / "masks" / "b.png", (255 * disc(30, 41)).astype(np.uint8))
    assert evaluated(folders, size=None).errors.pixels[:, 2].tolist() == [4800, 1230, 4800]
    with pytest.raises(UserError, match="at least 11"):
        evaluated(folders, size=8)
    assert [parse_size(text) for text in ("256", "480x640", "native")] == [256, (480, 640), None]
    for text in ("", "x", "1x2x3", "-4", "big"):
        with pytest.raises(UserError, match="expected a side"):
            parse_size(text)


@pytest.mark.parametrize("level", [1, 7, 128])
def test_any_non_zero_value_of_a_mask_is_shadow(folders, level):
    expected = evaluated(folders, size=None).errors.per_image()
    for name in ("a", "b", "c"):
        save(folders / "masks" / f"{name}.png", (level * disc()).astype(np.uint8))
    assert torch.equal(evaluated(folders, size=None).errors.per_image(), expected)


def test_masks_of_every_kind(folders):
    expected = evaluated(folders).errors.per_image()
    white = (255 * disc()).astype(np.uint8)
    colours = np.stack([white] * 3, axis=2)
    opposite = 255 - white
    for kind in (
        Image.fromarray(np.dstack([colours, np.full_like(white, 255)])),  # opaque RGBA
        Image.fromarray(np.dstack([colours, opposite])),  # luminance counts, not alpha
        Image.fromarray(np.dstack([white, opposite]), "LA"),
        Image.fromarray(colours),
        Image.fromarray(disc()),  # one bit
        Image.fromarray(white).convert("P"),
        Image.fromarray(white.astype(np.uint16) * 257),
        Image.fromarray(disc().astype(np.uint16)),  # labels 0 and 1 in 16 bits
        Image.fromarray(disc().astype(np.uint8)),
    ):
        for name in ("a", "b", "c"):
            save(folders / "masks" / f"{name}.png", kind)
        found = evaluated(folders)
        assert torch.equal(found.errors.per_image(), expected), kind.mode


def test_photos_of_every_kind(folders):
    expected = evaluated(folders).errors.per_image()
    better = Image.open(folders / "results" / "b.png")
    opaque = better.copy()
    opaque.putalpha(255)
    save(folders / "results" / "b.png", opaque)
    found = evaluated(folders)
    assert torch.equal(found.errors.per_image(), expected)
    assert "results: opaque alpha dropped (1 photo)" in found.notes
    opaque.putalpha(Image.new("L", opaque.size, 254))
    save(folders / "results" / "b.png", opaque)
    with pytest.raises(UserError, match=r"b\.png is transparent in part"):
        evaluated(folders)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = better.transpose(Image.Transpose.ROTATE_90)
    save(folders / "results" / "b.png", turned, exif=exif)
    assert torch.equal(evaluated(folders).errors.per_image(), expected)
    for kind in ("L", "P", "CMYK", "I;16"):
        grey = better.convert("L")
        image = (
            Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
            if kind == "I;16"
            else better.convert(kind)
        )
        (folders / "results" / "b.png").unlink(missing_ok=True)
        (folders / "results" / "b.tif").unlink(missing_ok=True)
        save(folders / "results" / "b.tif", image)
        found = evaluated(folders)
        assert any("made 8-bit RGB (1 photo)" in note for note in found.notes)
        if kind == "I;16":
            wide = found.errors.per_image()
            save(folders / "results" / "b.tif", grey)
            assert torch.equal(evaluated(folders).errors.per_image(), wide)


def test_what_can_not_be_read_is_named(folders, capsys):
    bad = folders / "results" / "b.png"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(UserError, match=r"b\.png.*--skip_bad"):
        evaluated(folders)
    found = evaluated(folders, skip_bad=True)
    assert found.names == ("a", "c")
    assert any("left out, unreadable: 1, " in note for note in found.notes)
    words = [str(folders / name) for name in ("results", "truth", "masks")]
    assert main(["evaluate-shadows", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for name in ("a", "c"):
        (folders / "masks" / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 3 photos could be read"):
        evaluated(folders, skip_bad=True)


def test_jpeg_masks_are_remarked_on(folders):
    for file in list((folders / "masks").iterdir()):
        Image.open(file).save(file.with_suffix(".jpg"), quality=60)
        file.unlink()
    assert any("3 masks are JPEG" in note for note in evaluated(folders).notes)
    strict = evaluated(folders, mask_above=0.5)
    assert not any("JPEG" in note for note in strict.notes)
    assert strict.shadow_share < evaluated(folders).shadow_share


def test_more_photos_than_threads(folders):
    for index in range(20):
        for role in ("results", "truth", "masks"):
            source = folders / role / f"{'abc'[index % 3]}.png"
            (folders / role / f"n{index:02}.png").write_bytes(source.read_bytes())
    found = evaluated(folders, workers=3)
    assert len(found.names) == 23
    figures = found.errors.per_image()
    for index, name in enumerate(found.names[3:]):
        assert name == f"n{index:02}"
        torch.testing.assert_close(
            figures[3 + index].nan_to_num(posinf=99),
            figures[index % 3].nan_to_num(posinf=99),
            atol=1e-6,
            rtol=0,
        )
