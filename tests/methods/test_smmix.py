"""SMMix's mathematics against values worked out by hand, and loops over images and windows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.errors import UserError
from tenfold.methods import (
    SMMix,
    extreme_windows,
    paste_windows,
    region_means,
    smmix_loss,
    smooth_labels,
    window_mask,
)
from tenfold.methods.region_mixing import Windows, _by_index, _by_slices

pytestmark = pytest.mark.parity

A0 = [[1, 2, 0, 3], [2, 9, 7, 1], [0, 8, 6, 2], [4, 1, 1, 0]]
A1 = [[5, 0, 1, 1], [6, 1, 0, 2], [0, 3, 4, 4], [2, 2, 5, 9]]
SIDES = [(tokens, side) for tokens in (4, 7, 14) for side in range(1, tokens)]


def maps() -> torch.Tensor:
    return torch.tensor([A0, A1], dtype=torch.float32)


def places(windows: Windows) -> list[tuple[int, int]]:
    return list(zip(windows.row.tolist(), windows.column.tolist(), strict=True))


# -- naive references ------------------------------------------------------------------------------


def naive_windows(scores, side):
    """Return where each image is least attended to, and where its pair is most, by loops."""
    least, most = [], []
    for image in scores.tolist():
        size = range(len(image) - side + 1)
        sums = {
            (i, j): math.fsum(v for row in image[i : i + side] for v in row[j : j + side])
            for i in size
            for j in size
        }
        least.append(min(sums, key=lambda at: (sums[at], at)))
        most.append(min(sums, key=lambda at: (-sums[at], at)))
    return least, most[::-1]


def naive_mix(images, scores, side, pixels):
    least, most = naive_windows(scores, side)
    mixed, length = [], side * pixels
    for b, ((i, j), (k, m)) in enumerate(zip(least, most, strict=True)):
        image, other = images[b].clone(), images[len(images) - 1 - b]
        i, j, k, m = i * pixels, j * pixels, k * pixels, m * pixels
        for row in range(length):
            for column in range(length):
                image[:, i + row, j + column] = other[:, k + row, m + column]
        mixed.append(image)
    return torch.stack(mixed)


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "least", "most"),
    [
        (1, [(0, 2), (0, 1)], [(1, 1), (3, 3)]),
        (2, [(2, 2), (0, 1)], [(1, 1), (2, 2)]),
        (3, [(0, 0), (0, 1)], [(0, 1), (1, 1)]),  # of equal windows, the first
    ],
)
def test_windows_by_hand(side, least, most):
    target, source = extreme_windows(maps(), side)
    assert places(target) == least
    assert places(source) == most[::-1], "entry b is of image B-1-b, which is pasted into b"


def test_window_sums_by_hand():
    """The sums that decide: those of a pooled map, times the window's tokens."""
    found = torch.nn.functional.avg_pool2d(maps()[:, None], 2, stride=1)[:, 0] * 4
    assert found.tolist() == [
        [[14, 18, 11], [19, 30, 16], [13, 16, 9]],
        [[12, 2, 4], [10, 8, 10], [7, 14, 22]],
    ]


def test_all_tokens_alike_take_the_first_window():
    target, source = extreme_windows(torch.ones(2, 7, 7), 3)
    assert places(target) == places(source) == [(0, 0), (0, 0)]


# -- pasting ---------------------------------------------------------------------------------------


def test_paste_by_hand():
    images = torch.stack([torch.arange(16.0), torch.arange(100.0, 116)]).reshape(2, 1, 4, 4)
    target, source = extreme_windows(maps(), 2)
    mixed = paste_windows(images, target, source, 2)
    assert mixed[0, 0].tolist() == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 110, 111], [12, 13, 114, 115],
    ]  # fmt: skip
    assert mixed[1, 0].tolist() == [
        [100, 5, 6, 103], [104, 9, 10, 107], [108, 109, 110, 111], [112, 113, 114, 115],
    ]  # fmt: skip


@pytest.mark.parametrize(("tokens", "side"), SIDES)
@pytest.mark.parametrize("pixels", [1, 3])
def test_vectorised_equals_the_loops(tokens, side, pixels):
    generator = torch.Generator().manual_seed(100 * tokens + side)
    # Whole numbers: sums are exact, and some of them equal.
    scores = torch.randint(0, 50, (6, tokens, tokens), generator=generator).float()
    images = torch.randn(6, 3, tokens * pixels, tokens * pixels, generator=generator)
    target, source = extreme_windows(scores, side)
    least, most = naive_windows(scores, side)
    assert places(target) == least
    assert places(source) == most
    expected = naive_mix(images, scores, side, pixels)
    assert torch.equal(paste_windows(images, target, source, side, pixels), expected)
    for paste in (_by_slices, _by_index):  # of a CPU, and of a GPU
        corners = torch.stack([*target, *source], dim=1) * pixels
        assert torch.equal(paste(images, corners, side * pixels), expected)
        like_photos = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(paste(like_photos, corners, side * pixels), expected)


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(2, 16),
    pairs=st.integers(1, 4),
    pixels=st.integers(1, 4),
    channels=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_invariants_of_mixing(seed, tokens, pairs, pixels, channels, data):
    side = data.draw(st.integers(1, tokens - 1))
    generator = torch.Generator().manual_seed(seed)
    batch = 2 * pairs
    scores = torch.rand(batch, tokens, tokens, generator=generator)
    images = torch.randn(batch, channels, tokens * pixels, tokens * pixels, generator=generator)
    before = images.clone()
    target, source = extreme_windows(scores, side)
    mixed = paste_windows(images, target, source, side, pixels)
    assert torch.equal(images, before), "the unmixed batch stays as it is"
    mask = window_mask(target, side, tokens)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [side * side] * batch
    wide = mask.reshape(batch, 1, tokens, tokens)
    wide = wide.repeat_interleave(pixels, 2).repeat_interleave(pixels, 3)
    assert torch.equal(mixed.where(~wide, 0.0), images.where(~wide, 0.0))
    length = side * pixels
    for b, ((i, j), (k, m)) in enumerate(zip(places(target), places(source), strict=True)):
        i, j, k, m = i * pixels, j * pixels, k * pixels, m * pixels
        other = images[batch - 1 - b]
        assert torch.equal(
            mixed[b, :, i : i + length, j : j + length], other[:, k : k + length, m : m + length]
        )


@given(seed=st.integers(0, 10_000), side=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_pairs_in_another_order_give_the_same_images_in_that_order(seed, side):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(8, 7, 7, generator=generator)
    images = torch.randn(8, 2, 7, 7, generator=generator)
    first = torch.randperm(4, generator=generator)
    first = torch.where(torch.rand(4, generator=generator) < 0.5, first, 7 - first)
    order = torch.cat([first, 7 - first.flip(0)])  # b and 7 - b stay a pair
    assert sorted(order.tolist()) == list(range(8))
    whole = paste_windows(images, *extreme_windows(scores, side), side)
    turned = paste_windows(images[order], *extreme_windows(scores[order], side), side)
    assert torch.equal(turned, whole[order])


def test_identical_images_are_unchanged():
    image = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1)
    scores = torch.rand(1, 4, 4).expand(4, -1, -1)
    target, _ = extreme_windows(scores, 2)
    assert torch.equal(paste_windows(image, target, target, 2, 2), image)
    # All of an image attended to alike: the square that is pasted is the one that was there.
    flat = torch.ones(4, 4, 4)
    assert torch.equal(paste_windows(image, *extreme_windows(flat, 2), 2, 2), image)


# -- labels, regions, losses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "sides", "shares"),
    [
        (14, range(3, 11), [187, 180, 171, 160, 147, 132, 115, 96]),
        (7, range(1, 6), [48, 45, 40, 33, 24]),
        (16, range(4, 13), [240, 231, 220, 207, 192, 175, 156, 135, 112]),
        (12, range(3, 10), [135, 128, 119, 108, 95, 80, 63]),
    ],
)
def test_sides_and_the_targets_share(tokens, sides, shares):
    assert SMMix().sides(tokens) == sides
    assert [tokens**2 - side**2 for side in sides] == shares


def test_labels_by_hand():
    y1 = smooth_labels(torch.tensor([1, 3]), 5, 0.1)
    torch.testing.assert_close(y1[0], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    mixed = 0.75 * y1 + 0.25 * y1.flip(0)
    expected = [[0.02, 0.695, 0.02, 0.245, 0.02], [0.02, 0.245, 0.02, 0.695, 0.02]]
    torch.testing.assert_close(mixed, torch.tensor(expected))
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(2))
    thousand = smooth_labels(torch.tensor([7]), 1000, 0.1)
    assert thousand[0, 7].item() == pytest.approx(0.9001, abs=1e-7)
    assert thousand[0, 8].item() == pytest.approx(1e-4, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer(dtype):
    found = smooth_labels(torch.tensor([1, 0], dtype=dtype), 2, 0.0)
    assert found.tolist() == [[0, 1], [1, 0]]


def parts(output, target, source, labels, unmixed, lam):
    """L_cls, L_fine and L_con by their definitions, in float64."""
    output, target, source, unmixed = (x.double() for x in (output, target, source, unmixed))
    labels = labels.double()

    def cross_entropy(logits, wanted):
        rows = [
            -sum(
                float(w) * (float(z) - float(row.logsumexp(0))) for w, z in zip(y, row, strict=True)
            )
            for y, row in zip(wanted, logits, strict=True)
        ]
        return sum(rows) / len(rows)

    others = labels.flip(0)
    cls = cross_entropy(output, lam * labels + (1 - lam) * others)
    fine = (cross_entropy(target, labels) + cross_entropy(source, others)) / 2
    soft = (lam * unmixed + (1 - lam) * unmixed.flip(0)).softmax(dim=1)
    con = float((soft * (soft.log() - output.log_softmax(dim=1))).sum(dim=1).mean())
    return cls, fine, con


def test_losses_by_hand():
    y = torch.eye(2)
    z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    o = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cls, fine, con = parts(o, o, o, y, z, 0.75)
    assert cls == pytest.approx(0.5633, abs=5e-5)
    assert fine == pytest.approx(0.8133, abs=5e-5)
    assert con == pytest.approx(0.0, abs=1e-9)
    found = smmix_loss(o, o, o, y, z, 0.75).item()
    assert found == pytest.approx(0.5633 + 0.8133, abs=1e-4)


def test_logits_are_mixed_not_probabilities():
    """Mixed probabilities would leave a difference of 0.0041 where mixed logits leave none."""
    y = torch.eye(2)
    z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    o = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    soft = 0.75 * z.softmax(dim=1) + 0.25 * z.softmax(dim=1).flip(0)
    other = (soft * (soft.log() - o.log_softmax(dim=1))).sum(dim=1).mean()
    assert other.item() == pytest.approx(0.0041, abs=5e-5)
    without_it = sum(parts(o, o, o, y, z, 0.75)[:2])
    assert smmix_loss(o, o, o, y, z, 0.75).item() == pytest.approx(without_it, abs=1e-6)


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 9), lam=st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_the_loss_is_that_of_the_definition(seed, classes, lam):
    generator = torch.Generator().manual_seed(seed)
    output, target, source, unmixed = torch.randn(4, 6, classes, generator=generator)
    labels = smooth_labels(torch.randint(0, classes, (6,), generator=generator), classes, 0.1)
    found = smmix_loss(output, target, source, labels, unmixed, lam)
    assert found.item() == pytest.approx(
        sum(parts(output, target, source, labels, unmixed, lam)), rel=1e-5
    )


def test_constants_get_no_gradient():
    output, target, source, unmixed = (torch.randn(4, 3, requires_grad=True) for _ in range(4))
    labels = smooth_labels(torch.arange(4) % 3, 3, 0.1)
    smmix_loss(output, target, source, labels, unmixed, 0.7).backward()
    assert unmixed.grad is None
    assert all(bool(x.grad.abs().sum() > 0) for x in (output, target, source))


@given(seed=st.integers(0, 10_000), tokens=st.integers(2, 14), data=st.data())
@settings(max_examples=40, deadline=None)
def test_both_regions_make_up_the_whole(seed, tokens, data):
    side = data.draw(st.integers(1, tokens - 1))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, tokens**2, 5, generator=generator, dtype=torch.float64)
    target, _ = extreme_windows(torch.rand(4, tokens, tokens, generator=generator), side)
    mask = window_mask(target, side, tokens)
    means = region_means(values, mask)
    for b in range(4):
        torch.testing.assert_close(means[b, 0], values[b][~mask[b]].mean(dim=0))
        torch.testing.assert_close(means[b, 1], values[b][mask[b]].mean(dim=0))
    lam = (tokens**2 - side**2) / tokens**2
    torch.testing.assert_close(lam * means[:, 0] + (1 - lam) * means[:, 1], values.mean(dim=1))


def test_a_mean_in_bfloat16_is_one_of_equal_weights():
    """A share of 1/187 is no number of bfloat16: sums are divided, not tokens weighted."""
    values = torch.ones(2, 196, 3, dtype=torch.bfloat16)
    target, _ = extreme_windows(torch.rand(2, 14, 14), 3)
    assert bool((region_means(values, window_mask(target, 3, 14)) == 1).all())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"switch_prob": -0.1}, r"switch_prob=-0\.1: expected a share in \[0, 1\]"),
        ({"switch_prob": 1.5}, "switch_prob"),
        ({"switch_prob": math.nan}, "switch_prob"),
        ({"mixup_alpha": 0.0}, r"mixup_alpha=0\.0: expected more than 0"),
        ({"mixup_alpha": math.inf}, "mixup_alpha"),
        ({"least_side": 0.0}, "0 < least_side <= largest_side < 1"),
        ({"largest_side": 1.0}, "0 < least_side <= largest_side < 1"),
        ({"least_side": 0.6, "largest_side": 0.5}, "0 < least_side <= largest_side < 1"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"score": "class token"}, "expected image or class"),
        ({"token_head": "second"}, "expected shared or own"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_fields_that_make_no_sense(fields, text):
    with pytest.raises(UserError, match=text):
        SMMix(**fields)


@pytest.mark.parametrize(
    ("tokens", "fields"), [(3, {}), (1, {}), (14, {"least_side": 0.05}), (2, {"least_side": 0.4})]
)
def test_sides_of_no_token(tokens, fields):
    with pytest.raises(UserError, match=f"of {tokens} tokens a side: expected 1 to {tokens - 1}"):
        SMMix(**fields).sides(tokens)
