"""Photos of every kind go in and come out as they were, and no file is lost."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tenfold.data.photo import check_photo_path, read_photo, write_photo
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def pixels(height=12, width=20):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_round_trip_is_exact(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    image, photo = read_photo(tmp_path / "a.png")
    assert image.shape == (1, 3, 12, 20)
    assert image.dtype == torch.float32
    assert (float(image.min()), float(image.max())) == (-1, 1)
    expected = torch.from_numpy(pixels()).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(image, expected)
    assert (photo.mode, photo.size, photo.alpha, photo.profile) == ("RGB", (12, 20), None, None)
    write_photo(tmp_path / "new" / "b.png", image, photo)
    assert np.array_equal(np.array(Image.open(tmp_path / "new" / "b.png")), pixels())
    assert os.listdir(tmp_path / "new") == ["b.png"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "I;16":
        given = Image.fromarray(np.full((8, 8), 128 * 256, np.uint16))
    else:
        given = Image.new("RGB", (8, 8), (128, 128, 128))
        given = given.quantize(4) if mode == "P" else given.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    given.save(path)
    image, photo = read_photo(path)
    assert photo.mode == mode
    assert image.shape == (1, 3, 8, 8)
    if mode != "1":
        assert float(image.abs().max()) <= 3 / 127.5
    assert (photo.alpha is not None) == (mode in ("LA", "RGBA"))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "transparent colour"])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_transparency_is_kept_aside_and_put_back(tmp_path, kind, suffix):
    opacity = np.full((12, 20), 255, np.uint8)
    opacity[:, :7] = 0
    given = Image.fromarray(pixels())
    if kind == "palette":
        colours = np.ones((12, 20), np.uint8)
        colours[:, :7] = 0
        given = Image.fromarray(colours)
        given.putpalette([0, 0, 0, 250, 120, 30])
        given.save(tmp_path / "a.png", transparency=0)
    elif kind == "transparent colour":
        colours = np.full((12, 20, 3), 200, np.uint8)
        colours[:, :7] = (1, 2, 3)
        Image.fromarray(colours).save(tmp_path / "a.png", transparency=(1, 2, 3))
    else:
        given = given.convert("L" if kind == "LA" else "RGB")
        given.putalpha(Image.fromarray(opacity))
        given.save(tmp_path / "a.png")
    image, photo = read_photo(tmp_path / "a.png")
    assert torch.equal(photo.alpha, torch.from_numpy(opacity))
    written = Image.open(write_photo(tmp_path / f"b{suffix}", image, photo))
    if suffix == ".jpg":
        assert written.mode == "RGB"
    else:
        assert np.array_equal(np.array(written.getchannel("A")), opacity)


def test_transparency_follows_an_enlarged_result(tmp_path):
    Image.fromarray(np.full((4, 6, 4), 128, np.uint8)).save(tmp_path / "a.png")
    image, photo = read_photo(tmp_path / "a.png")
    larger = torch.nn.functional.interpolate(image, scale_factor=2)
    assert Image.open(write_photo(tmp_path / "b.png", larger, photo)).size == (12, 8)


def test_rotation_and_profile(tmp_path, profile):
    colours = np.zeros((20, 40, 3), np.uint8)
    colours[:, :20] = (255, 0, 0)
    given = Image.fromarray(colours)
    exif = given.getexif()
    exif[0x0112] = 6  # turn by a quarter, clockwise: left becomes top
    given.save(tmp_path / "a.jpg", exif=exif, icc_profile=profile, quality=95)
    image, photo = read_photo(tmp_path / "a.jpg")
    assert photo.size == (40, 20)
    assert float(image[0, 0, :15].min()) > 0.9
    assert float(image[0, 0, 25:].max()) < -0.9
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        written = Image.open(write_photo(tmp_path / f"b{suffix}", image, photo))
        assert written.size == (20, 40)
        assert written.info["icc_profile"] == profile
        assert written.getexif().get(0x0112, 1) == 1


def test_profile_that_is_not_for_rgb_is_left_behind(tmp_path, profile):
    grey = profile[:16] + b"GRAY" + profile[20:]
    Image.new("L", (8, 8)).save(tmp_path / "a.png", icc_profile=grey)
    assert read_photo(tmp_path / "a.png")[1].profile is None


def test_jpeg_quality(tmp_path):
    image = torch.zeros(1, 3, 16, 16)
    tables = Image.open(write_photo(tmp_path / "a.jpg", image)).quantization
    Image.new("RGB", (16, 16)).save(tmp_path / "b.jpg", quality=95)
    assert tables == Image.open(tmp_path / "b.jpg").quantization


def test_values_are_rounded_and_clipped_and_grey_is_grey(tmp_path):
    image = torch.tensor([-1.5, -1 + 0.6 / 127.5, 1.5]).reshape(1, 1, 1, 3)
    written = Image.open(write_photo(tmp_path / "a.png", image))
    assert written.mode == "L"
    assert np.array(written).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_are_named(tmp_path, encode, kind):
    path = tmp_path / "half.img"
    whole = encode(0, (32, 32), kind)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"can't read image .*half\.img") as error:
        read_photo(path)
    assert "\n" not in str(error.value)


def test_other_unreadable_files_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, reason in {
        "text.jpg": "not an image format",
        "nowhere.jpg": "No such file",
        "float.tif": "no fixed range",
    }.items():
        with pytest.raises(UserError, match=f"{name}: .*{reason}"):
            read_photo(tmp_path / name)


def test_a_file_that_is_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    image = torch.zeros(1, 3, 4, 4)
    with pytest.raises(UserError, match=r"a\.png: the file is there"):
        write_photo(path, image)
    with pytest.raises(UserError, match="the file is there"):
        check_photo_path(path)
    # One that appears while the image is being written:
    import tenfold.data.photo as module

    monkeypatch.setattr(module, "check_photo_path", lambda path, overwrite: path)
    with pytest.raises(UserError, match="came there meanwhile"):
        write_photo(path, image)
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.png"]
    write_photo(path, image, overwrite=True)
    assert Image.open(path).size == (4, 4)
    assert os.listdir(tmp_path) == ["a.png"]


def test_nothing_is_left_after_an_error(tmp_path, monkeypatch):
    def breaks(self, file, *_, **__):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", breaks)
    with pytest.raises(UserError, match=r"a\.png: No space left"):
        write_photo(tmp_path / "a.png", torch.zeros(1, 3, 4, 4))
    assert os.listdir(tmp_path) == []


def test_permissions_are_those_of_a_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    path = write_photo(tmp_path / "a.png", torch.zeros(1, 3, 4, 4))
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_refusals(tmp_path):
    for name, text in {
        "a.gif": "ends in .gif; expected one of .jpg",
        "a": "ends in nothing",
    }.items():
        with pytest.raises(UserError, match=text):
            check_photo_path(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        check_photo_path(tmp_path / "folder.png", overwrite=True)
    for image in (
        torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 4),
    ):  # fmt: skip
        with pytest.raises(UserError, match="expected float"):
            write_photo(tmp_path / "a.png", image)
    with pytest.raises(UserError, match="aren't numbers"):
        write_photo(tmp_path / "a.png", torch.full((1, 3, 4, 4), torch.nan))
