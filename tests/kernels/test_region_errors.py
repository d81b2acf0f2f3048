"""Sums of errors and SSIM by region: compiled, plain, scikit-image, and double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch import Tensor

from tenfold.kernels import native, region_errors
from tenfold.kernels.lab import lab_of_rgb
from tenfold.kernels.region_errors import able, error_sums, region_ssim

pytestmark = pytest.mark.parity


def pictures(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Two uint8 images and a mask: photos or flat ones, masks of any share."""
    batch = draw(st.integers(1, 3))
    # Strips are 64 columns that have means, of 74.
    height = draw(st.sampled_from([11, 12, 17, 25, 40]))
    width = draw(st.sampled_from([11, 13, 26, 41, 73, 74, 75, 90, 139]))
    torch.manual_seed(draw(st.integers(0, 999)))
    made = []
    for _ in range(2):
        kind = draw(st.sampled_from(["noise", "smooth", "black", "white", "primary", "extremes"]))
        image = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
        if kind == "smooth":
            image = torch.nn.functional.interpolate(
                image[..., ::6, ::6].float(), (height, width), mode="bilinear"
            ).byte()
        elif kind in ("black", "white"):
            image = torch.full_like(image, 255 * (kind == "white"))
        elif kind == "primary":
            image = torch.zeros_like(image)
            image[:, draw(st.integers(0, 2))] = 255
        elif kind == "extremes":
            image = (image > 127).byte() * 255
        made.append(image)
    if draw(st.integers(0, 4)) == 0:
        made[1] = made[0].clone()
    mask = torch.zeros(batch, 1, height, width, dtype=torch.bool)
    kind = draw(st.sampled_from(["disc", "noise", "none", "all", "half", "rows"]))
    if kind == "disc":
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        mask[:] = (rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (height / 3) ** 2
    elif kind == "noise":
        mask = torch.rand(mask.shape) < 0.5
    elif kind == "all":
        mask[:] = True
    elif kind == "half":
        mask[..., : width // 2] = True
    elif kind == "rows":
        mask[:, :, height // 2 :] = True
    return made[0], made[1], mask


def rounding(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """What SSIM may be off by: PyTorch's differences of float32 means leave more."""
    return 1e-5 if able(a, b, mask) else 5e-4


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_equals_double_precision_and_scikit_image(data: st.DataObject) -> None:
    a, b, mask = pictures(data.draw)
    first, second = a.double() / 255, b.double() / 255
    apart = lab_of_rgb(first) - lab_of_rgb(second)
    maps = [
        torch.ones_like(apart[:, :1]),
        apart.abs().sum(1, keepdim=True),
        apart.square().sum(1, keepdim=True),
        (first - second).square().sum(1, keepdim=True),
    ]
    sums = error_sums(a, b, mask)
    found = region_ssim(a, b, mask)
    assert sums.shape == (len(a), 4, 3)
    assert sums.dtype == found.dtype == torch.float64
    for region, where in enumerate((mask, ~mask, torch.ones_like(mask))):
        expected = torch.stack([(each * where).sum((1, 2, 3)) for each in maps], dim=1)
        torch.testing.assert_close(sums[:, 0, region], expected[:, 0], atol=0, rtol=0)
        # LAB is right to 1e-4 a channel.
        apart_most = 3e-4 * expected[:, 0]
        assert ((sums[:, 1, region] - expected[:, 1]).abs() <= apart_most).all()
        torch.testing.assert_close(sums[:, 2, region], expected[:, 2], atol=1e-2, rtol=1e-5)
        torch.testing.assert_close(sums[:, 3, region], expected[:, 3], atol=1e-9, rtol=1e-6)
        for index in range(len(a)):
            x, y = (
                (image[index] * where[index]).permute(1, 2, 0).numpy() for image in (first, second)
            )
            similar = structural_similarity(
                x, y, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5,
                use_sample_covariance=False,
            )  # fmt: skip
            assert abs(float(found[index, region]) - similar) < rounding(a, b, mask)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_equal_has_no_error(data: st.DataObject) -> None:
    a, b, mask = pictures(data.draw)
    b = torch.where(mask, b, a)
    sums = error_sums(a, b, mask)
    assert (sums[:, 1:, 1] == 0).all()
    assert torch.equal(sums[:, 1:, 0], sums[:, 1:, 2])
    assert (region_ssim(a, a, mask) - 1).abs().max() < (1e-12 if able(a, a, mask) else 1e-6)
    assert (region_ssim(a, b, mask)[:, 1] - 1).abs().max() < rounding(a, b, mask)


def test_plain_pytorch_gives_the_same() -> None:
    torch.manual_seed(0)
    a = torch.randint(256, (3, 3, 60, 70), dtype=torch.uint8)
    b = (a.int() + torch.randint(-20, 20, a.shape)).clamp(0, 255).byte()
    mask = torch.rand(3, 1, 60, 70) < 0.3
    plain = region_errors._plain_sums(a, b, mask)
    torch.testing.assert_close(error_sums(a, b, mask), plain, atol=1e-3, rtol=1e-5)
    plain = region_errors._plain_ssim(a, b, mask)
    torch.testing.assert_close(region_ssim(a, b, mask), plain, atol=1e-5, rtol=0)
    for dtype in (torch.float16, torch.float32, torch.float64):
        floats = [(image / 255.0).to(dtype) for image in (a, b)]
        assert not able(*floats, mask)
        bound = 1e-3 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(region_ssim(*floats, mask), plain, atol=bound, rtol=0)
    assert able(a, b, mask) == (native.instruction_set() is not None)


@pytest.mark.parametrize("height", [11, 80, 150])
def test_large_flat_images_keep_the_precision(height: int) -> None:
    a, b = (torch.full((1, 3, height, 900), level, dtype=torch.uint8) for level in (255, 250))
    mask = torch.zeros(1, 1, height, 900, dtype=torch.bool)
    mask[..., 300:310] = True
    expected = [
        structural_similarity(
            (a[0] * where).permute(1, 2, 0).numpy() / 255.0,
            (b[0] * where).permute(1, 2, 0).numpy() / 255.0,
            channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for where in (mask[0], ~mask[0], torch.ones_like(mask[0]))
    ]  # fmt: skip
    found = region_ssim(a, b, mask)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=rounding(a, b, mask), rtol=0)


def test_any_layout_and_number_of_threads_gives_the_same_bits() -> None:
    if native.instruction_set() is None:
        pytest.skip("PyTorch's own operators add up as they like")
    before = torch.get_num_threads()
    torch.manual_seed(0)
    a, b = (torch.randint(256, (5, 3, 40, 90), dtype=torch.uint8) for _ in range(2))
    mask = torch.rand(5, 1, 40, 90) < 0.5
    try:
        torch.set_num_threads(1)
        expected = error_sums(a, b, mask), region_ssim(a, b, mask)
        last = a.contiguous(memory_format=torch.channels_last)
        wide = mask.repeat_interleave(2, dim=3)[..., ::2]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(error_sums(last, b, wide), expected[0])
            assert torch.equal(region_ssim(last, b, wide), expected[1])
    finally:
        torch.set_num_threads(before)
