"""Photos of any size: the light is right, detail stays, no border shows, the rest is untouched."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from tenfold.deploy import shadow_photo
from tenfold.deploy.shadow_photo import remove_shadow
from tenfold.errors import UserError
from tenfold.nn.lab import rgb_to_lab
from tenfold.nn.labnet import LABNet
from tenfold.nn.shadow_codes import lab_codes, linear_to_srgb, srgb_to_linear
from tenfold.nn.shadow_remover import ShadowRemover

pytestmark = pytest.mark.unit

LEFT = torch.tensor([0.26, 0.3, 0.36])[:, None, None]  # of the light, in the shadow


def photo(name="coffee"):
    from skimage import data

    return torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None]


def ellipse(height, width, shift=0):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = ((columns - shift - width * 0.5) / (width * 0.3)) ** 2
    return (across + ((rows - height * 0.5) / (height * 0.3)) ** 2 < 1).to(torch.uint8)


def shaded(lit, mask, penumbra):
    """Return a photo in shadow: the light falls as a Gaussian of that sigma has it."""
    matte = Image.fromarray(mask.mul(255).numpy())
    if penumbra:
        matte = matte.filter(ImageFilter.GaussianBlur(penumbra))
    matte = torch.from_numpy(np.array(matte)).float() / 255
    light = srgb_to_linear(lit.float() / 255) * (1 - matte * (1 - LEFT))
    shadow = linear_to_srgb(light).mul(255).round().to(torch.uint8)
    return shadow.contiguous(memory_format=torch.channels_last)


def knowing(lit, side):
    """Return a remover whose network knows the answer, at the size of the small copy."""
    height, width = lit.shape[-2:]
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    small = shadow_photo._reduced(lit[0].permute(1, 2, 0).contiguous().numpy(), size)

    def network(codes, mask):
        right, bottom = codes.shape[-1] - size[1], codes.shape[-2] - size[0]
        return functional.pad(lab_codes(small), (0, right, 0, bottom), "replicate")

    return ShadowRemover(network)


def errors(found, lit):
    return (rgb_to_lab(found) - rgb_to_lab(lit)).abs().sum(1)[0]


def border_of(mask, pixels):
    grown = functional.max_pool2d(mask[None, None].float(), 2 * pixels + 1, 1, pixels)
    shrunk = 1 - functional.max_pool2d(1 - mask[None, None].float(), 2 * pixels + 1, 1, pixels)
    return (grown > shrunk)[0, 0]


@pytest.mark.parametrize(("penumbra", "most"), [(1, 1.8), (2, 1.6), (4, 1.5), (8, 1.6), (16, 1.5)])
def test_the_border_is_right_whatever_its_width(penumbra, most):
    lit = photo()
    mask = ellipse(*lit.shape[-2:])
    given = shaded(lit, mask, penumbra)
    removal = remove_shadow(knowing(lit, 50), given, mask, side=50)
    assert removal.seen == (50, 75)  # a pixel of the copy is 8 of the photo
    border = border_of(mask, 16)
    before, after = errors(given, lit), errors(removal.pixels, lit)
    assert before[border].mean() > 15
    assert after[border].mean() < most
    inside = mask.bool() & ~border
    assert after[inside].mean() < 1.8  # bytes lose as much in the dark
    # No rim: along the border what is too light and what is too dark is small, too.
    apart = (rgb_to_lab(removal.pixels) - rgb_to_lab(lit))[0, 0]
    rim = border_of(mask, 2)
    assert abs(apart[rim].mean()) < 1


def test_the_photo_tells_how_sharp_the_border_is():
    lit = photo("astronaut")
    mask = ellipse(*lit.shape[-2:])
    given = shaded(lit, mask, 1)
    border = border_of(mask, 16)
    scale = 64 / 512
    learned = remove_shadow(knowing(lit, 64), given, mask, side=64)
    shares, _ = shadow_photo._shares(knowing(lit, 64), given, mask, (64, 64))
    zero = torch.zeros_like(shares)
    edge = shadow_photo._blurred_mask(mask, shadow_photo.EDGE / scale)
    plain = shadow_photo._applied(given, edge, zero, shares, 1)
    assert errors(learned.pixels, lit)[border].mean() < 0.5 * errors(plain, lit)[border].mean()


def test_a_mask_that_is_off_by_a_little_does_no_worse_than_no_mask_at_the_border():
    lit = photo()
    given = shaded(lit, ellipse(*lit.shape[-2:]), 4)
    off = ellipse(*lit.shape[-2:], shift=4)
    border = border_of(off, 16)
    found = remove_shadow(knowing(lit, 50), given, off, side=50).pixels
    assert errors(found, lit)[border].mean() < 2.2


def test_detail_is_kept():
    # A texture far finer than the small copy, in full shadow.
    generator = torch.Generator().manual_seed(0)
    lit = torch.randint(90, 200, (1, 3, 320, 320), generator=generator, dtype=torch.uint8)
    mask = ellipse(320, 320)
    given = shaded(lit, mask, 3)
    found = remove_shadow(knowing(lit, 40), given, mask, side=40).pixels
    inside = mask.bool() & ~border_of(mask, 8)
    a, b = (x[0, :, inside].float() for x in (found, lit))
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.97
    assert abs(a.std() / b.std() - 1) < 0.08


def test_outside_the_photo_stays_to_the_last_bit():
    lit = photo("astronaut")
    mask, near = (torch.zeros(512, 512, dtype=torch.uint8) for _ in range(2))
    mask[200:300, 180:320] = 1
    near[80:420, 60:440] = 1  # 15 pixels of the copy around: grown by 5, and blurred
    given = shaded(lit, mask, 2)
    removal = remove_shadow(ShadowRemover(lambda c, m: 0.9 * c), given, mask, side=64)
    far = near == 0
    assert torch.equal(removal.pixels[0, :, far], given[0, :, far])
    # Without compositing the whole output is the result, as the paper has it.
    whole = ShadowRemover(lambda c, m: 0.9 * c, composite=False)
    found = remove_shadow(whole, given, mask, side=64)
    assert (found.pixels[0, :, far] != given[0, :, far]).float().mean() > 0.8


def test_a_network_that_changes_nothing_changes_nothing():
    lit = photo("astronaut")
    mask = ellipse(512, 512)
    for composite in (True, False):
        remover = ShadowRemover(lambda c, m: c, composite=composite)
        found = remove_shadow(remover, lit, mask, side=64).pixels
        assert int((found.int() - lit.int()).abs().max()) <= 1


def test_tables_of_light_are_exact_on_all_levels():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    shares = torch.ones(1, 3, 4, 4)
    shares[..., 0, 0] = 1 - 1e-7  # so that no tile is skipped
    edge = np.zeros((16, 16), np.uint8)
    found = shadow_photo._applied(levels, edge, torch.zeros_like(shares), shares, 1)
    assert torch.equal(found, levels)


def test_bands_and_threads_make_no_difference(monkeypatch):
    lit = photo()
    mask = ellipse(*lit.shape[-2:])
    given = shaded(lit, mask, 3)
    expected = remove_shadow(knowing(lit, 50), given, mask, side=50, threads=1).pixels
    monkeypatch.setattr(shadow_photo, "ROWS", 37)
    monkeypatch.setattr(shadow_photo, "COLUMNS", 101)
    found = remove_shadow(knowing(lit, 50), given, mask, side=50, threads=3).pixels
    assert torch.equal(found, expected)


def test_enlarging_is_bilinear():
    x = torch.rand(1, 3, 5, 7)
    edge = np.zeros((40, 50), np.uint8)
    given = torch.full((1, 3, 40, 50), 120, dtype=torch.uint8)
    shares = 0.5 + 0.5 * x
    found = shadow_photo._applied(given, edge, torch.zeros_like(x), shares, 1)
    wide = functional.interpolate(shares, (40, 50), mode="bilinear")
    e = shadow_photo.EPSILON
    wanted = linear_to_srgb((srgb_to_linear(given.float() / 255) + e) / wide - e)
    assert int((found.int() - wanted.mul(255).round().int()).abs().max()) <= 1


def test_gains_are_limited_and_that_is_told():
    dark = torch.full((1, 3, 128, 128), 30, dtype=torch.uint8)
    mask = ellipse(128, 128)
    removal = remove_shadow(ShadowRemover(lambda c, m: c + 0.8), dark, mask, side=64)
    assert removal.notes == ("gains were limited to 8 in 100% of the shadow",)
    light = srgb_to_linear(torch.tensor(30 / 255))
    e = shadow_photo.EPSILON
    wanted = 255 * linear_to_srgb((light + e) * 8 - e)
    assert abs(int(removal.pixels[0, 0, 64, 64]) - wanted) <= 1


def test_a_ring_guess_that_needs_more_gets_more():
    given = torch.full((1, 3, 256, 256), 230, dtype=torch.uint8)
    mask = ellipse(256, 256)
    given[:, :, mask.bool()] = 70  # a light of 0.06, beside one of 0.79
    removal = remove_shadow(ShadowRemover(lambda c, m: c, guess="ring"), given, mask, side=128)
    assert "12.9 times as bright as the shadow: gains of up to 16" in removal.notes[0]
    middle = removal.pixels[0, :, 128, 128].int()
    assert (middle - 230).abs().max() <= 3


def test_small_photos_are_worked_on_whole():
    torch.manual_seed(0)
    network = LABNet(4, 16).eval()
    network.identity_start()
    lit = photo("astronaut")[..., :150:2, :140:2].contiguous()
    mask = ellipse(75, 70)
    remover = ShadowRemover(network, guess="ring")
    given = shaded(lit, mask, 1)
    removal = remove_shadow(remover, given, mask)
    assert removal.seen == (75, 70)
    expected = remover(given.float() / 255, mask[None, None].float()).mul(255).round()
    assert torch.equal(removal.pixels, expected.to(torch.uint8))
    tiny = remove_shadow(remover, given[..., :30, :40], ellipse(30, 40))
    assert tiny.pixels.shape == (1, 3, 30, 40)


def test_a_shadow_thinner_than_the_copys_pixels_is_seen():
    lit = torch.full((1, 3, 400, 400), 200, dtype=torch.uint8)
    mask = torch.zeros(400, 400, dtype=torch.uint8)
    mask[200:202, 100:300] = 1
    seen = []

    def network(codes, by):
        seen.append(int(by.sum()))
        return codes

    remove_shadow(ShadowRemover(network), shaded(lit, mask, 0), mask, side=65)
    assert seen[0] > 0


def test_refusals():
    lit = photo()
    mask = ellipse(*lit.shape[-2:])
    remover = ShadowRemover(lambda c, m: c)
    for pixels, by, options, text in (
        (lit.float(), mask, {}, r"expected uint8 \(1, 3, H, W\)"),
        (lit[:, :1], mask, {}, r"expected uint8 \(1, 3, H, W\)"),
        (lit, mask[1:], {}, r"a mask is torch.uint8 of shape \(399, 600\): expected uint8"),
        (lit, mask.bool(), {}, "a mask is torch.bool"),
        (lit, mask * 255, {}, "largest value is 255: expected zeros, and ones"),
        (lit, mask * 0, {}, "largest value is 0: expected zeros, and ones"),
        (lit, mask, {"side": 0}, "side 0: expected at least 1"),
    ):
        with pytest.raises(UserError, match=text):
            remove_shadow(remover, pixels, by, **options)
