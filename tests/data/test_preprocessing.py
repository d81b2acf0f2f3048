from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from tenfold.data import create, load_image, normalize
from tenfold.data.decode import BadImage, decode, encoded_size
from tenfold.data.preprocessing import Preprocessing
from tenfold.errors import UserError

FACTS = {"channels": 3, "size": [8, 8], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.mark.parity
def test_normalize_equals_the_formula() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    got = normalize(images, FACTS)
    assert got.dtype == torch.float32
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - FACTS["mean"][channel]) / FACTS["std"][
            channel
        ]
        assert torch.allclose(got[:, channel].double(), expected, atol=1e-6)


@pytest.mark.unit
def test_method_and_function_agree_through_json() -> None:
    data = create("digits")
    images = next(iter(data.test_loader(batch_size=4)))["image"]
    facts = json.loads(json.dumps(data.preprocessing()))
    assert set(facts) == {"channels", "size", "mean", "std", "resize", "interpolation"}
    assert torch.equal(normalize(images, facts), data.normalize(images))


@pytest.mark.unit
@pytest.mark.parametrize(
    "images", [torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)]
)
def test_normalize_refuses(images: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"expected torch.uint8 \(B, 3, H, W\)"):
        normalize(images, FACTS)


@pytest.mark.unit
@pytest.mark.parametrize("given", [(30, 50), (50, 30), (8, 8), (5, 9), (3, 3)])
@pytest.mark.parametrize("resize", [None, 9, 16])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_fit_gives_the_size(given, resize, size) -> None:
    facts = Preprocessing(1, size, (0.5,), (0.5,), resize)
    out = facts.fit(torch.zeros((1, *given), dtype=torch.uint8))
    assert out.shape == (1, *size)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()


@pytest.mark.parity
def test_fit_keeps_the_centre_and_the_aspect() -> None:
    columns = torch.arange(64, dtype=torch.uint8).repeat(3, 32, 1)  # 32 high, 64 wide
    out = Preprocessing(3, (8, 8), (0.5,) * 3, (0.5,) * 3, resize=16).fit(columns)
    # Short side 32 -> 16 halves the width to 32; the middle 8 of it are columns 24 to 40.
    expected = torch.arange(24, 40).reshape(8, 2).float().mean(1)
    assert (out[0, 0].float() - expected).abs().max() <= 1
    untouched = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(Preprocessing(3, (8, 8), (0.5,) * 3, (0.5,) * 3).fit(untouched), untouched)


@pytest.mark.unit
def test_load_image_turns_as_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = (255, 0, 0)  # the left half is red
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter, clockwise: left becomes top
    image.save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png", 3, "x").shape == (3, 40, 20)
    assert encoded_size(tmp_path / "turned.png", "x") == (40, 20)
    out = load_image(tmp_path / "turned.png", FACTS)
    assert out.shape == (3, 8, 8)
    assert out[0, 0].min() > 200
    assert out[0, -1].max() < 50


@pytest.mark.unit
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_types_become_bytes_of_the_right_channels(tmp_path, mode, channels) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 128 * 256, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (128, 128, 128))
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    name = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(name)
    facts = {"channels": channels, "size": [8, 8], "mean": [0.5] * channels}
    out = load_image(name, facts | {"std": [0.5] * channels})
    assert out.shape == (channels, 8, 8)
    if mode != "1":
        assert (out.int() - 128).abs().max() <= 2


@pytest.mark.unit
@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "webp", "tif"])
def test_damaged_files_are_named(tmp_path: Path, encode, kind: str) -> None:
    path = tmp_path / f"half.{kind}"
    names = {"jpg": "JPEG", "tif": "TIFF"}
    whole = encode(0, (32, 32), names.get(kind, kind.upper()))
    path.write_bytes(whole)
    assert load_image(path, FACTS).shape == (3, 8, 8)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"can't read image .*half") as error:
        load_image(path, FACTS)
    assert "\n" not in str(error.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.unit
def test_other_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, reason in {
        "text.jpg": "not an image format",
        "empty.jpg": "the file is empty",
        "nowhere.jpg": "No such file",
        "float.tif": "no fixed range",
    }.items():
        with pytest.raises(BadImage, match=f"{name}: .*{reason}"):
            load_image(tmp_path / name, FACTS)
    with pytest.raises(UserError, match="directory"):
        load_image(tmp_path, FACTS)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mean": None}, "can't be understood"),
        ({"size": 8}, "can't be understood"),
        ({"size": [8]}, "can't be understood"),
        ({"size": [0, 8]}, "sides of at least 1"),
        ({"resize": 4}, "no smaller than the crop"),
        ({"channels": 4}, r"expected 1 \(grey\) or 3"),
        ({"mean": [0.5]}, "expected 3 numbers"),
        ({"std": [0.5, 0.5, 0]}, "expected numbers above 0"),
        ({"interpolation": "bilinar"}, "did you mean bilinear"),
    ],
)
def test_wrong_facts(change: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        Preprocessing.from_dict(FACTS | change)


@pytest.mark.unit
def test_missing_facts() -> None:
    with pytest.raises(UserError, match="preprocessing has no mean, std"):
        Preprocessing.from_dict({"channels": 3, "size": [8, 8]})
