"""Rendered shadows follow the illumination model, and the embedded set is made of them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tenfold.data import create_shadows, render_shadow
from tenfold.data.rendered_shadows import TEST_PHOTOS, TRAIN_PHOTOS
from tenfold.data.shadow_rendering import shadow_factors, shadow_mattes
from tenfold.errors import UserError
from tenfold.nn.shadow_codes import srgb_to_linear

pytestmark = pytest.mark.unit

NUMBERS = np.arange(200)


@pytest.fixture(scope="module")
def mattes() -> torch.Tensor:
    return shadow_mattes((72, 96), NUMBERS)


def test_mattes_cover_what_they_should(mattes: torch.Tensor) -> None:
    assert mattes.shape == (200, 1, 72, 96)
    assert float(mattes.min()) >= 0
    assert float(mattes.max()) <= 1
    share = (mattes > 0.5).double().mean((1, 2, 3))
    assert 0.05 < float(share.min()) < 0.12
    assert 0.40 < float(share.max()) < 0.48
    # Penumbras of 0.3 to 3 % of the shorter side: most pixels are lit or in the umbra.
    between = ((mattes > 0.05) & (mattes < 0.95)).double().mean((1, 2, 3))
    assert float(between.min()) < 0.01
    assert 0.05 < float(between.max()) < 0.5


def test_shapes_are_of_three_kinds(mattes: torch.Tensor) -> None:
    """Noise comes in several pieces at times, ellipses and polygons never."""
    from skimage.measure import label

    pieces = [int(label(one[0].numpy() > 0.5).max()) for one in mattes]
    assert 0.5 < np.mean([count == 1 for count in pieces]) < 0.95
    assert min(pieces) == 1


def test_light_is_multiplied_as_the_model_says(mattes: torch.Tensor) -> None:
    factors = shadow_factors(torch.ones_like(mattes), NUMBERS)
    green = factors[:, 1].mean((1, 2))
    assert 0.17 < float(green.min()) < 0.22
    assert 0.5 < float(green.max()) < 0.57
    red, blue = (factors[:, k].mean((1, 2)) / green for k in (0, 2))
    torch.testing.assert_close(red + blue, torch.full_like(red, 2.0))
    assert float(red.min()) > 0.74
    assert float(red.max()) <= 1
    ramps = factors / factors.mean((2, 3), keepdim=True)
    assert 0.08 < float((ramps - 1).abs().max()) < 0.151
    assert torch.equal(
        shadow_factors(torch.zeros_like(mattes), NUMBERS), torch.ones(200, 3, 72, 96)
    )


def test_an_image_gets_the_factors_and_little_noise(mattes: torch.Tensor) -> None:
    images = torch.full((200, 3, 72, 96), 0.8)
    shadowed, masks = render_shadow(images, NUMBERS)
    assert torch.equal(masks, (mattes > 0.5).float())
    expected = srgb_to_linear(images) * shadow_factors(mattes, NUMBERS)
    ratio = srgb_to_linear(shadowed) / expected
    assert float((ratio.log().abs() > 0.12).double().mean()) < 1e-3
    noise = (ratio - 1)[:, 0][masks[:, 0] > 0]
    assert 0.004 < float(noise.std()) < 0.03
    assert torch.equal(
        shadowed[(mattes < 1e-6).expand_as(shadowed)],
        torch.tensor([204 / 255]).expand(int((mattes < 1e-6).sum()) * 3),
    )
    assert torch.allclose(shadowed * 255, (shadowed * 255).round(), atol=1e-4)


def test_a_number_decides_whatever_the_batch(mattes: torch.Tensor) -> None:
    images = torch.rand(4, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    together = render_shadow(images, [5, 6, 7, 5])
    alone = render_shadow(images[2:3], [7])
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[2:3], one)
    assert torch.equal(together[1][0], together[1][3])
    assert not torch.equal(together[1][0], together[1][1])
    drawn = [render_shadow(images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert render_shadow(images.double(), [1, 2, 3, 4])[0].dtype == torch.float64
    for wrong, numbers, text in (
        (images.to(torch.uint8), [1, 2, 3, 4], "expected float RGB"),
        (images[:, :1], [1, 2, 3, 4], "expected float RGB"),
        (images, [1, 2], "2 numbers for 4 images"),
    ):
        with pytest.raises(UserError, match=text):
            render_shadow(wrong, numbers)


def test_the_set_as_it_should_be() -> None:
    data = create_shadows("rendered_shadows")
    assert (data.train_size, data.test_size, data.shape, data.size) == (
        400,
        32,
        (3, 96, 96),
        (96, 96),
    )
    assert (data.has_targets, data.test_has_targets, data.skipped) == (True, True, [])
    assert not {file for *_, file in TRAIN_PHOTOS} & {file for *_, file in TEST_PHOTOS}
    assert data.train_name_of(9) == "chelsea[1]"
    assert [data.name_of(i) for i in range(3)] == ["china[0]", "flower[0]", "china[1]"]
    loader = data.train_loader(batch_size=64, seed=1)
    assert loader.num_workers == 0
    batches = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        batches.append(next(iter(loader)))
    for batch in batches:
        assert batch["image"].shape == batch["target"].shape == (64, 3, 96, 96)
        assert batch["mask"].shape == (64, 1, 96, 96)
        assert {batch[key].dtype for key in ("image", "mask", "target")} == {torch.uint8}
        assert set(batch["mask"].unique().tolist()) == {0, 1}
        assert batch["id"].dtype == torch.int64
        inside = batch["mask"].bool().expand(-1, 3, -1, -1)
        lost = batch["target"].double() - batch["image"].double()
        assert float(lost[inside].mean()) > 15
        assert float(lost[~inside].mean()) < 3
    seen = {int(i): k for k, i in enumerate(batches[0]["id"])}
    again = [(seen[int(i)], k) for k, i in enumerate(batches[1]["id"]) if int(i) in seen]
    assert again
    assert not any(torch.equal(batches[0]["mask"][a], batches[1]["mask"][b]) for a, b in again)
    held_out = next(iter(data.test_loader(batch_size=32)))
    assert torch.equal(held_out["image"], next(iter(data.test_loader(batch_size=32)))["image"])
    shares = held_out["mask"].double().mean((1, 2, 3))
    assert 0.05 < float(shares.min()) <= float(shares.max()) < 0.48


def test_options_of_the_set() -> None:
    data = create_shadows(
        {"name": "rendered_shadows", "size": [48, 64], "samples": 12, "targets": False}
    )
    assert (data.train_size, data.short_side, data.has_targets) == (12, (64, 192), False)
    batch = next(iter(data.train_loader(batch_size=12, seed=0, augment="relight")))
    assert set(batch) == {"image", "mask", "id"}
    assert batch["image"].shape == (12, 3, 48, 64)
    assert next(iter(data.test_loader()))["target"].shape == (1, 3, 48, 64)
    training, choosing = data.holding_out(4)
    assert (training.train_size, choosing.test_size) == (8, 4)
    assert [tuple(mask.shape) for mask in training.train_masks()] == [(48, 64)] * 8
    fixed = data.train_loader(batch_size=12, seed=0, augment="none")
    first = next(iter(fixed))
    fixed.sampler.set_epoch(1)
    second = next(iter(fixed))
    assert torch.equal(
        first["image"][first["id"].argsort()], second["image"][second["id"].argsort()]
    )
    with pytest.raises(UserError, match="leave it out"):
        create_shadows("rendered_shadows:somewhere")
    with pytest.raises(UserError, match=r"data\.short_side is \[64, 80\]: expected at least 96"):
        create_shadows({"name": "rendered_shadows", "short_side": [64, 80]})


def test_it_is_fast() -> None:
    images = torch.rand(32, 3, 96, 96)
    render_shadow(images, range(32))
    best = min(_seconds(images) for _ in range(3))
    assert best / 32 < 0.005


def _seconds(images: torch.Tensor) -> float:
    start = time.process_time()
    render_shadow(images, range(32))
    return time.process_time() - start
