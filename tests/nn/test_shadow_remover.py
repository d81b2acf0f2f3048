"""Codes, the guess by gains, and what stands around a network that removes shadows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.errors import UserError
from tenfold.nn.labnet import LABNet
from tenfold.nn.shadow_codes import lab_codes, linear_to_srgb, rgb_of_codes, srgb_to_linear
from tenfold.nn.shadow_gain import (
    apply_gains,
    local_gains,
    mean_gains,
    ring_gains,
    ring_guess,
    soft_mask,
)
from tenfold.nn.shadow_remover import ShadowRemover, facts_of

pytestmark = pytest.mark.unit


def surface(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """One grained surface of one colour, sRGB in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    grain = torch.rand(1, 1, height, width, generator=generator) * 0.1
    return torch.tensor([0.7, 0.6, 0.5]).view(1, 3, 1, 1) + grain - 0.05


def disc(height: int, width: int, radius: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 < radius**2
    return inside[None, None].float()


def shaded(image: torch.Tensor, mask: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
    return apply_gains(image, light, mask)


def image_in_light(image: torch.Tensor, share: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
    """Take a share of the light away that a shadow takes, in linear light."""
    left = 1 - share * (1 - light[:, :, None, None])
    return linear_to_srgb(srgb_to_linear(image) * left)


LIGHT = torch.tensor([[0.25, 0.3, 0.4]])


class TestCodes:
    def test_are_those_of_scikit_image(self):
        from skimage.color import rgb2lab

        images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))
        lab = rgb2lab(images.permute(0, 2, 3, 1).double().numpy())
        expected = (lab + np.array([0, 128, 128])) / np.array([100, 255, 255])
        np.testing.assert_allclose(lab_codes(images).permute(0, 2, 3, 1), expected, atol=2e-6)

    def test_there_and_back_is_exact_in_bytes(self):
        images = torch.randint(
            0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(2)
        ).to(torch.uint8)
        back = rgb_of_codes(lab_codes(images)).mul(255).round().to(torch.uint8)
        assert torch.equal(back, images)

    def test_light_there_and_back(self):
        values = torch.linspace(0, 1, 1001, dtype=torch.float64)
        light = srgb_to_linear(values)
        assert float(light[0]) == 0
        assert abs(float(light[-1]) - 1) < 1e-12
        # The two branches of the standard meet within 1e-7.
        torch.testing.assert_close(linear_to_srgb(light), values, atol=2e-7, rtol=0)
        assert float(srgb_to_linear(torch.tensor(0.5))) == pytest.approx(0.21404, abs=1e-5)


class TestGains:
    @pytest.mark.parametrize("estimate", [ring_gains, mean_gains])
    def test_of_one_surface_are_what_the_shadow_took(self, estimate):
        image, mask = surface(96, 128), disc(96, 128, 25)
        found = estimate(shaded(image, mask, LIGHT), mask)
        torch.testing.assert_close(found, 1 / LIGHT, rtol=0.03, atol=0)

    def test_undo_a_shadow(self):
        image, mask = surface(96, 128), disc(96, 128, 25)
        dark = shaded(image, soft_mask(mask, grow=0, sigma=0.75), LIGHT)
        before, after = ((each - image).abs().mean() for each in (dark, ring_guess(dark, mask)))
        assert after < 0.08 * before

    @pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
    def test_leave_no_rim_whether_the_shadow_is_sharp_or_soft(self, sigma):
        image, mask = surface(96, 128), disc(96, 128, 25)
        dark = image_in_light(image, soft_mask(mask, grow=0, sigma=sigma), LIGHT)
        made = ring_guess(dark, mask)
        rim = (soft_mask(mask, grow=4) > 0) & (soft_mask(1 - mask, grow=4) > 0)
        rim = rim.expand_as(image)
        apart = made - image
        # On average light is neither missing nor left over along the border, and little anywhere.
        assert abs(float(apart[rim].mean())) < 0.02
        assert float(apart[rim].abs().mean()) < 0.25 * float((dark - image)[rim].abs().mean())

    def test_near_two_surfaces_are_those_of_each(self):
        # Left and right lie in light of another colour, such as that of a lamp.
        image, mask = surface(96, 192), disc(96, 192, 40)
        mask[..., 30:66, 20:172] = 1
        left, right = torch.tensor([[0.2, 0.3, 0.4]]), torch.tensor([[0.5, 0.4, 0.3]])
        half = torch.zeros_like(mask)
        half[..., :96] = 1
        dark = shaded(shaded(image, mask * half, left), mask * (1 - half), right)
        gains = local_gains(dark, mask)
        whole = ring_gains(dark, mask)[0, :, None]
        for column, light in ((24, left), (168, right)):
            near = gains[0, :, 44:52, column].mean(1, keepdim=True)
            true = 1 / light.T
            assert (near.log() - true.log()).abs().sum() < 0.6 * (
                whole.log() - true.log()
            ).abs().sum()

    def test_without_a_border_are_those_of_the_whole(self):
        image, mask = surface(256, 256), disc(256, 256, 110)
        dark = shaded(image, mask, LIGHT)
        middle = local_gains(dark, mask)[0, :, 128, 128]
        torch.testing.assert_close(middle, ring_gains(dark, mask)[0], rtol=0.02, atol=0)

    @pytest.mark.parametrize("fill", [0.0, 1.0])
    def test_with_nothing_to_compare_are_one(self, fill):
        image, mask = surface(70, 70), torch.full((1, 1, 70, 70), fill)
        assert torch.equal(ring_gains(image, mask), torch.ones(1, 3))
        assert torch.isfinite(local_gains(image, mask)).all()
        torch.testing.assert_close(ring_guess(image, mask), image, atol=1e-5, rtol=0)

    def test_a_thin_shadow_has_gains(self):
        image, mask = surface(80, 80), torch.zeros(1, 1, 80, 80)
        mask[..., 40, 10:70] = 1
        found = ring_gains(shaded(image, mask, LIGHT), mask)
        torch.testing.assert_close(found, 1 / LIGHT, rtol=0.1, atol=0)

    def test_each_image_of_a_batch_has_its_own(self):
        images = torch.cat([surface(80, 90, seed) for seed in range(2)])
        masks = torch.cat([disc(80, 90, 20), disc(80, 90, 30)])
        dark = shaded(images, masks, torch.cat([LIGHT, LIGHT.flip(1)]))
        both = ring_guess(dark, masks)
        for number in range(2):
            alone = ring_guess(dark[number : number + 1], masks[number : number + 1])
            torch.testing.assert_close(both[number : number + 1], alone, atol=1e-5, rtol=0)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 2**31))
    def test_are_finite_for_any_size_and_mask(self, height, width, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(2, 3, height, width, generator=generator)
        masks = (torch.rand(2, 1, height, width, generator=generator) > 0.7).float()
        guess = ring_guess(images, masks)
        assert torch.isfinite(guess).all()
        assert guess.shape == images.shape
        assert float(guess.min()) >= 0
        assert float(guess.max()) <= 1

    def test_a_soft_mask_grows_and_fades(self):
        mask = disc(64, 64, 12)
        soft = soft_mask(mask)
        assert float(soft[mask > 0].min()) > 0.98
        assert float(soft[0, 0, 0, 0]) == 0
        assert 0 < float(soft[0, 0, 32, 32 + 18]) < 1
        torch.testing.assert_close(soft_mask(torch.ones(1, 1, 20, 30)), torch.ones(1, 1, 20, 30))


class TestRemover:
    def network(self) -> LABNet:
        torch.manual_seed(0)
        network = LABNet(4, attention_size=16).eval()
        network.identity_start()
        return network

    def test_leaves_what_is_not_in_shadow(self):
        image, mask = surface(80, 100), disc(80, 100, 12)
        made = ShadowRemover(self.network(), guess="ring")(image, mask)
        outside = soft_mask(mask) == 0
        assert torch.equal(made[:, :, outside[0, 0]], image[:, :, outside[0, 0]])
        assert not torch.equal(made, image)

    def test_without_composition_gives_the_whole_output(self):
        image, mask = surface(80, 100), disc(80, 100, 12)
        network = self.network()
        made = ShadowRemover(network, composite=False)(image, mask)
        with torch.no_grad():
            expected = rgb_of_codes(network(lab_codes(image), mask))
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)

    def test_small_images_and_sides_of_no_multiple_are_padded(self):
        class Recording(torch.nn.Module):
            multiple = 4
            sizes: list[tuple[int, ...]] = []  # noqa: RUF012

            def forward(self, codes, mask):
                self.sizes.append(tuple(codes.shape[2:]))
                return codes

        image, mask = surface(30, 101), disc(30, 101, 9)
        made = ShadowRemover(Recording())(image, mask)
        assert Recording.sizes == [(68, 104)]
        torch.testing.assert_close(made, image, atol=1e-4, rtol=0)

    def test_spaces(self):
        class Plain(torch.nn.Module):
            space = "rgb"

            def forward(self, codes, mask):
                return 1 - codes

        image, mask = surface(70, 70), disc(70, 70, 12)
        made = ShadowRemover(Plain(), composite=False)(image, mask)
        torch.testing.assert_close(made, 1 - image)
        assert facts_of(Plain(), "ring", True) == {
            "space": "rgb", "guess": "ring", "composite": True,
        }  # fmt: skip

    def test_refusals(self):
        network = self.network()
        remover = ShadowRemover(network)
        with pytest.raises(UserError, match="uint8"):
            remover(torch.zeros(1, 3, 80, 80, dtype=torch.uint8), torch.zeros(1, 1, 80, 80))
        with pytest.raises(UserError, match="one channel of the images' size"):
            remover(torch.zeros(1, 3, 80, 80), torch.zeros(1, 1, 80, 79))
        with pytest.raises(UserError, match="guess"):
            ShadowRemover(network, guess="wring")
        with pytest.raises(UserError, match="space"):
            ShadowRemover(network, space="xyz")

    def test_autocast_lowers_no_light(self):
        """Under bf16-mixed the guess and the blend are those of float32, and of its type."""
        mask = disc(72, 80, 15)
        image = shaded(surface(72, 80), mask, LIGHT)
        remover = ShadowRemover(lambda codes, mask: codes, guess="ring")
        with torch.autocast("cpu", torch.bfloat16):
            made = remover(image, mask)
        assert made.dtype == torch.float32
        assert torch.equal(made, remover(image, mask))
