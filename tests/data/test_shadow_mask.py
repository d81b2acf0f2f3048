"""A user's own mask: what counts as shadow, what is refused or warned of; the automatic one."""

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.data.photo import read_photo_pixels, without_alpha, write_photo_pixels
from tenfold.data.shadow_mask import (
    automatic_mask,
    mask_of_values,
    otsu,
    read_mask,
    write_mask,
)
from tenfold.errors import UserError

pytestmark = pytest.mark.unit

HEIGHT, WIDTH = 40, 60


def square():
    levels = np.zeros((HEIGHT, WIDTH), np.uint8)
    levels[10:30, 20:50] = 255
    return levels


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def expected():
    return torch.from_numpy(square() // 255)


# -- files ----------------------------------------------------------------------------------------


def test_a_mask_is_read_as_zeros_and_ones(tmp_path):
    mask = read_mask(saved(tmp_path / "m.png", square()), (HEIGHT, WIDTH))
    assert mask.pixels.dtype == torch.uint8
    assert torch.equal(mask.pixels, expected())
    assert (mask.source, mask.warnings) == (str(tmp_path / "m.png"), ())


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_the_luminance_counts_and_not_the_alpha(tmp_path, alpha):
    pixels = np.dstack([square()] * 3 + [np.full((HEIGHT, WIDTH), alpha, np.uint8)])
    mask = read_mask(saved(tmp_path / "m.png", pixels))
    assert torch.equal(mask.pixels, expected())
    assert mask.warnings == ()
    # The alpha holds the shape, and the colours nothing: that is no mask.
    pixels = np.dstack([np.zeros_like(square())] * 3 + [square()])
    with pytest.raises(UserError, match="is empty"):
        read_mask(saved(tmp_path / "n.png", pixels))


@pytest.mark.parametrize("kind", ["0 and 1", "1 bit", "16 bit", "palette", "jpeg"])
def test_masks_of_other_kinds(tmp_path, kind):
    path = tmp_path / ("m.jpg" if kind == "jpeg" else "m.png")
    if kind == "palette":
        picture = Image.fromarray(square() // 255)
        picture = picture.convert("P")
        picture.putpalette([0, 0, 0, 255, 255, 255])
        picture.save(path)
    elif kind == "1 bit":
        Image.fromarray(square()).convert("1").save(path)
    else:
        pixels = {
            "0 and 1": square() // 255, "16 bit": square().astype(np.uint16) * 257,
            "jpeg": square(),
        }[kind]  # fmt: skip
        saved(path, pixels)
    mask = read_mask(path)
    assert mask.warnings == ()
    apart = (mask.pixels != expected()).float().mean()
    assert apart <= (0.01 if kind == "jpeg" else 0)


def test_grey_masks_are_cut_in_the_middle_with_a_warning(tmp_path):
    levels = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
    mask = read_mask(saved(tmp_path / "m.png", levels))
    assert torch.equal(mask.pixels, torch.from_numpy((levels >= 128).astype(np.uint8)))
    assert len(mask.warnings) == 1
    grey = ((levels[0] >= 26) & (levels[0] < 230)).mean()
    assert f"has {grey:.0%} grey pixels" in mask.warnings[0]
    few = square()
    few[:2, :20] = 128  # 40 of 2400 pixels
    assert read_mask(saved(tmp_path / "few.png", few)).warnings == ()


def test_masks_that_are_refused(tmp_path):
    path = saved(tmp_path / "m.png", square())
    with pytest.raises(
        UserError, match=r"m\.png is 40x60, and p\.jpg 30x60 .*: expected one size$"
    ):
        read_mask(path, (30, 60), "p.jpg")
    with pytest.raises(UserError, match="that size turned: rotate it"):
        read_mask(path, (60, 40), "p.jpg")
    with pytest.raises(UserError, match=r"empty\.png is empty: expected light pixels"):
        read_mask(saved(tmp_path / "empty.png", np.zeros_like(square())))
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        read_mask(tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"can't read image .*broken\.png"):
        read_mask(tmp_path / "broken.png")


def test_a_mask_of_nearly_all_is_warned_of(tmp_path):
    levels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    levels[0] = 0
    mask = read_mask(saved(tmp_path / "m.png", levels))
    assert "covers 97.5% of the photo" in mask.warnings[0]
    levels[:3] = 0
    assert read_mask(saved(tmp_path / "n.png", levels)).warnings == ()


def test_what_is_written_is_read_again(tmp_path):
    mask = read_mask(saved(tmp_path / "m.png", square()))
    path = write_mask(tmp_path / "new" / "m.png", mask)
    assert torch.equal(read_mask(path).pixels, mask.pixels)
    with pytest.raises(UserError, match="the file is there"):
        write_mask(path, mask)
    write_mask(path, 1 - mask.pixels, overwrite=True)
    assert torch.equal(read_mask(path).pixels, 1 - mask.pixels)


# -- the automatic mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(90, 120), (700, 900)])
def test_the_automatic_mask_finds_a_shadow_on_a_plain_ground(size):
    height, width = size
    generator = np.random.default_rng(0)
    photo = generator.normal(170, 8, (height, width, 3))
    inside = np.zeros(size, bool)
    inside[height // 4 : height // 2, width // 4 : 3 * width // 4] = True
    photo[inside] *= 0.5
    photo[5:7, 5:7] = 0  # a speck
    pixels = torch.from_numpy(photo.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)[None]
    mask = automatic_mask(pixels)
    found = mask.pixels.numpy() > 0
    assert (found & inside).sum() / (found | inside).sum() > 0.9
    assert not found[:10, :10].any()
    assert "often fails: look at it, correct it" in mask.warnings[0]


def test_a_photo_without_contrast_has_no_automatic_mask():
    with pytest.raises(UserError, match="made automatically is empty"):
        automatic_mask(torch.full((1, 3, 80, 80), 128, dtype=torch.uint8))


def test_otsu_parts_two_groups():
    from skimage.filters import threshold_otsu

    generator = np.random.default_rng(1)
    values = np.concatenate([generator.normal(0.3, 0.05, 600), generator.normal(0.7, 0.08, 400)])
    values = values.astype(np.float32)
    assert (
        abs(otsu(values) - threshold_otsu(values)) < 4 * np.ptp(values) / 256
    )  # two of its steps, and two of ours
    # An empty stretch between the groups: the middle of it.
    assert otsu(np.array([0.0] * 5 + [1.0] * 5, np.float32)) == pytest.approx(0.5, abs=0.01)


# -- detectors' maps ------------------------------------------------------------------------------


def test_maps_of_every_kind_become_masks():
    wanted = expected()
    logits = torch.where(wanted > 0, 3.0, -2.0)
    kinds = {
        "booleans": wanted > 0,
        "0 and 1": wanted,
        "0 and 255": wanted * 255,
        "probabilities": torch.sigmoid(logits),
        "logits": logits,
        "an array with further axes": logits[None, None].numpy(),
    }
    for kind, values in kinds.items():
        found = mask_of_values(values, (HEIGHT, WIDTH), "a.onnx")
        assert torch.equal(found.pixels, wanted), kind
    larger = mask_of_values(logits, (2 * HEIGHT, 2 * WIDTH), "a.onnx").pixels
    assert larger.shape == (2 * HEIGHT, 2 * WIDTH)
    assert (larger[::2, ::2] != wanted).float().mean() < 0.03


def test_maps_that_are_refused():
    size = (HEIGHT, WIDTH)
    for values, text in (
        (torch.zeros(3, 4, 4), r"a map of shape \(3, 4, 4\): expected one"),
        (torch.full(size, torch.nan), "aren't numbers"),
        (torch.full(size, -1.0), "the mask of f is empty"),
    ):
        with pytest.raises(UserError, match=text):
            mask_of_values(values, size, "f")


# -- photos as bytes ------------------------------------------------------------------------------


def test_photos_as_bytes_go_round(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    given, facts = read_photo_pixels(saved(tmp_path / "a.png", pixels))
    assert given.dtype == torch.uint8
    assert given.is_contiguous(memory_format=torch.channels_last)
    written = write_photo_pixels(tmp_path / "b.png", given, facts)
    assert np.array_equal(np.asarray(Image.open(written)), pixels)
    with pytest.raises(UserError, match=r"expected uint8 \(1, 3, H, W\)"):
        write_photo_pixels(tmp_path / "c.png", given.float())


def test_transparency_needs_a_background(tmp_path):
    pixels = np.full((8, 12, 4), 200, np.uint8)
    pixels[..., 3] = 255
    given, facts = read_photo_pixels(saved(tmp_path / "a.png", pixels))
    opaque, plain = without_alpha(given, facts)
    assert torch.equal(opaque, given)
    assert plain.alpha is None
    pixels[:2, :, 3] = 0
    pixels[2, :, 3] = 51  # a fifth
    given, facts = read_photo_pixels(saved(tmp_path / "b.png", pixels))
    with pytest.raises(UserError, match=r"b\.png is transparent in 37\.5% of its pixels"):
        without_alpha(given, facts)
    with pytest.raises(UserError, match="background 'green': expected white"):
        without_alpha(given, facts, "green")
    on_colour = without_alpha(given, facts, "#0a64ff")[0]
    assert on_colour[0, :, 0, 0].tolist() == [10, 100, 255]
    assert on_colour[0, :, 2, 0].tolist() == [48, 120, 244]
    assert on_colour[0, :, 3, 0].tolist() == [200] * 3
    assert without_alpha(given, facts, "white")[0][0, :, 0, 0].tolist() == [255] * 3
