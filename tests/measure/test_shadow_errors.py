"""Errors of shadow removal: the sheet's worked example, PI and PP, scikit-image one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tenfold.errors import UserError
from tenfold.kernels import region_errors
from tenfold.measure.shadow_errors import (
    FIGURES,
    REGIONS,
    ShadowErrors,
    region_ssim,
    shadow_errors,
    shadow_masks,
)

pytestmark = pytest.mark.unit

TRUTH = [[(200, 150, 100), (40, 30, 25)], [(128, 128, 128), (13, 77, 201)]]
RESULT = [[(180, 140, 95), (50, 40, 30)], [(128, 128, 128), (20, 80, 190)]]


def tiled(pixels, times: int) -> torch.Tensor:
    """Each pixel as a block: the worked example has 2x2, SSIM's window needs 11."""
    planes = torch.tensor(pixels, dtype=torch.uint8).permute(2, 0, 1)[None]
    return planes.repeat_interleave(times, 2).repeat_interleave(times, 3)


def made_up(batch=3, height=70, width=90, seed=0):
    """Results, truths and masks: one with a small shadow, one that touches the border."""
    random = np.random.default_rng(seed)
    truths = random.integers(0, 256, (batch, 3, height, width))
    truths = truths.repeat(5, 2).repeat(5, 3)[:, :, :height, :width]
    results = np.clip(truths * 0.9 + random.normal(5, 12, truths.shape), 0, 255)
    rows, columns = np.mgrid[:height, :width]
    masks = np.stack(
        [
            (rows - 10 * i) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2
            for i in range(batch)
        ]
    )
    return (
        torch.from_numpy(results.astype(np.uint8)),
        torch.from_numpy(truths.astype(np.uint8)),
        torch.from_numpy(masks[:, None]),
    )


def one_by_one(result, truth, mask):
    """The figures of one image as one writes them with scikit-image."""
    result, truth = (image.permute(1, 2, 0).numpy() / 255.0 for image in (result, truth))
    mask = mask[0].numpy()
    apart = rgb2lab(result) - rgb2lab(truth)
    rows = []
    for region in (mask, ~mask, np.ones_like(mask)):
        a, b = result * region[..., None], truth * region[..., None]
        rows.append(
            [
                np.abs(apart).sum(2)[region].mean(),
                np.sqrt((apart[region] ** 2).mean()),
                peak_signal_noise_ratio(b, a, data_range=1.0),
                structural_similarity(
                    b,
                    a,
                    channel_axis=2,
                    data_range=1.0,
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                ),
            ]
        )
    return rows


def test_the_worked_example():
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[:, :, :8] = True
    figures = shadow_errors(tiled(RESULT, 8), tiled(TRUTH, 8), mask).per_image()[0]
    torch.testing.assert_close(
        figures[:, 0], torch.tensor([10.3261, 6.2027, 8.2644]).double(), atol=1e-4, rtol=0
    )
    assert figures[0, 1].item() == pytest.approx(3.652, abs=5e-4)
    assert FIGURES[:2] == ("lab_mae", "lab_rmse")
    assert REGIONS == ("shadow", "non-shadow", "all")


def test_means_of_images_and_of_pixels():
    """100 pixels at 10 and 300 at 20: 15 per image, 17.5 pooled."""
    pixels = torch.tensor([[100.0, 0, 100], [300, 100, 400]]).double()
    absolute = torch.tensor([[1000.0, 0, 1000], [6000, 0, 6000]]).double()
    squared = torch.tensor([[3 * 100 * 4.0, 0, 1200], [3 * 300 * 16, 0, 14400]]).double()
    errors = ShadowErrors(pixels, absolute, squared, squared / 1e4, torch.ones(2, 3).double() / 2)
    per_image, pooled = errors.mean_of_images(), errors.pooled()
    assert per_image[0, 0] == 15
    assert pooled[0, 0] == 17.5
    assert per_image[0, 1] == 3
    assert pooled[0, 1].item() == pytest.approx(13**0.5)
    assert pooled[2, 0] == 14
    # Only the second image has pixels outside: its error there is 0, and the first counts nowhere.
    assert per_image[1].tolist() == [0, 0, float("inf"), 0.5]
    assert pooled[1].tolist() == [0, 0, float("inf"), 0.5]
    assert errors.empty().tolist() == [0, 1, 0]
    mse = (1200 + 14400) / 1e4 / (3 * 500)
    assert pooled[0, 2].item() == pytest.approx(-10 * np.log10(mse))


@pytest.mark.parity
@pytest.mark.parametrize("size", [(70, 90), (51, 51), (35, 140), (15, 20)])
def test_a_batch_equals_scikit_image_one_by_one(size):
    results, truths, masks = made_up(2, *size)
    found = shadow_errors(results, truths, masks)
    expected = [one_by_one(*each) for each in zip(results, truths, masks, strict=True)]
    np.testing.assert_allclose(found.per_image().numpy(), expected, atol=2e-4, rtol=0)
    as_float = shadow_errors(results.double() / 255, truths.double() / 255, masks)
    np.testing.assert_allclose(as_float.per_image().numpy(), expected, atol=1e-9, rtol=0)


def test_many_at_a_time_are_what_each_is_alone(monkeypatch):
    results, truths, masks = made_up(5)
    alone = [
        shadow_errors(results[i : i + 1], truths[i : i + 1], masks[i : i + 1]) for i in range(5)
    ]
    monkeypatch.setattr(region_errors, "PIXELS_AT_ONCE", 2 * 70 * 90)
    together = shadow_errors(results, truths, masks)
    assert len(together) == 5
    joined = ShadowErrors.joined(alone).per_image()
    torch.testing.assert_close(together.per_image(), joined, atol=1e-6, rtol=0)


def test_what_is_equal_outside_has_no_error_there():
    results, truths, masks = made_up()
    kept = torch.where(masks, results, truths)
    found = shadow_errors(kept, truths, masks)
    assert found.lab_absolute[:, 1].tolist() == [0, 0, 0]
    assert found.per_image()[:, 1, 2].tolist() == [float("inf")] * 3
    assert found.infinite().tolist() == [0, 3, 0]
    torch.testing.assert_close(
        found.per_image()[:, 1, 3], torch.ones(3).double(), atol=1e-6, rtol=0
    )
    mixed = ShadowErrors.joined([found, shadow_errors(results, truths, masks)])
    psnr = mixed.per_image()[3:, 1, 2].mean()
    # Infinite ones are left out.
    assert mixed.mean_of_images()[1, 2].item() == pytest.approx(psnr.item(), rel=1e-12)


def test_a_region_without_pixels_has_no_figures():
    results, truths, masks = made_up(2)
    masks[0] = False
    masks[1] = True
    figures = shadow_errors(results, truths, masks).per_image()
    assert figures[0, 0].isnan().all()
    assert figures[1, 1].isnan().all()
    torch.testing.assert_close(figures[0, 1], figures[0, 2], atol=1e-6, rtol=0)
    torch.testing.assert_close(figures[1, 0], figures[1, 2], atol=1e-6, rtol=0)
    empty = shadow_errors(results[:1], truths[:1], masks[:1])
    assert empty.mean_of_images()[0].isnan().all()
    assert empty.pooled()[0].isnan().all()


def test_a_region_is_flattered_by_zeros_elsewhere():
    results, truths, masks = made_up()
    figures = shadow_errors(results, truths, masks).per_image()
    assert (figures[:, 0, 2] > figures[:, 2, 2]).all()
    found = region_ssim(results.double() / 255, truths.double() / 255, masks)
    torch.testing.assert_close(found, figures[..., 3], atol=1e-5, rtol=0)


def test_rules_and_growth_of_masks():
    levels = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    levels[0, 0, 4, 4], levels[0, 0, 0, 0] = 128, 1
    assert shadow_masks(levels).sum() == 2
    assert shadow_masks(levels, above=0.5).nonzero().tolist() == [[0, 0, 4, 4]]
    grown = shadow_masks(levels, above=0.5, dilate=2)
    assert grown.sum() == 25
    assert grown[0, 0, 2:7, 2:7].all()
    assert shadow_masks(levels * 0 + 127, above=0.5).sum() == 0
    # A pixel grows by 5 to 121, at a corner to 36.
    levels = torch.zeros(2, 1, 30, 40, dtype=torch.uint8)
    levels[0, 0, 15, 15] = levels[1, 0, 0, 0] = 255
    assert shadow_masks(levels, dilate=5).sum((1, 2, 3)).tolist() == [121, 36]


def test_what_does_not_fit_is_refused():
    results, truths, masks = made_up(1)
    for given, text in [
        ((results, truths[..., :-1], masks), "expected both"),
        ((results, truths, masks.float()), "expected bool"),
        ((results, truths, masks[..., 1:]), "expected bool"),
        ((results[..., :10], truths[..., :10], masks[..., :10]), "at least 11"),
    ]:
        with pytest.raises(UserError, match=text):
            shadow_errors(*given)
    for rule in ({"above": 1.0}, {"above": -0.1}, {"above": float("nan")}, {"dilate": -1}):
        with pytest.raises(UserError, match="expected 0 <= above < 1"):
            shadow_masks(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), **rule)
    with pytest.raises(UserError, match="expected uint8"):
        shadow_masks(torch.zeros(1, 1, 4, 4))
    with pytest.raises(UserError, match="no images"):
        ShadowErrors.joined([])
