"""Ring attention against the reference's loop over images with boolean gathers."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.nn.ring_attention import (
    RingAttention,
    attention_macs,
    dilate,
    gathered_attention,
    masked_softmax_attention,
    ring_attention,
    ring_of,
)

pytestmark = pytest.mark.unit
FORMS = (ring_attention, masked_softmax_attention, gathered_attention)


def loop(queries: Tensor, keys: Tensor, shadow: Tensor, ring: Tensor) -> Tensor:
    """Do as the released code does, image by image."""
    results = []
    for q, k, inside, around in zip(queries, keys, shadow, ring, strict=True):
        out = k.clone()
        if inside.any():
            scores = q[inside] @ k[around].T / math.sqrt(k.shape[1])
            # A softmax over nothing times no keys: zeros.
            out[inside] = torch.softmax(scores, 1) @ k[around]
        results.append(out)
    return torch.stack(results)


def masks(side: int = 16) -> Tensor:
    """Draw a disc, a strip at the border, nothing, everything, and one corner."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack(
        [
            (y - 6) ** 2 + (x - 7) ** 2 < 12,
            x < 3,
            torch.zeros(side, side, dtype=torch.bool),
            torch.ones(side, side, dtype=torch.bool),
            (x == 0) & (y == 0),
        ]
    )[:, None].float()


def drawn(side: int = 16, channels: int = 6, dtype=torch.float32):
    torch.manual_seed(3)
    mask = masks(side)
    shadow, ring = mask.flatten(1) > 0.5, ring_of(mask).flatten(1) > 0.5
    queries, keys = (torch.randn(5, side * side, channels, dtype=dtype) for _ in range(2))
    return 2 * queries, keys, shadow, ring


# -- the ring -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "count"), [((20, 20), 121), ((0, 0), 36), ((0, 20), 66)])
def test_dilation_of_one_pixel(place, count):
    mask = torch.zeros(1, 1, 40, 40)
    mask[(0, 0, *place)] = 1
    assert dilate(mask).sum() == count
    assert ring_of(mask).sum() == count - 1


def test_a_dilation_is_the_morphological_one():
    from scipy.ndimage import binary_dilation

    mask = (torch.rand(1, 1, 30, 41, generator=torch.Generator().manual_seed(1)) > 0.995).float()
    expected = binary_dilation(mask[0, 0].numpy() > 0, structure=torch.ones(11, 11).numpy())
    assert torch.equal(dilate(mask)[0, 0], torch.from_numpy(expected).float())
    with pytest.raises(UserError, match="size 4: expected an odd size"):
        dilate(mask, 4)


# -- the function ---------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize(
    ("dtype", "within"),
    [(torch.float32, {"rtol": 1e-6, "atol": 1e-6}), (torch.float64, {"rtol": 0, "atol": 1e-13})],
)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_loop_over_images(form, dtype, within):
    inputs = drawn(dtype=dtype)
    result = form(*inputs)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, loop(*inputs), **within)


@pytest.mark.parametrize("form", FORMS)
def test_shadow_pixels_get_convex_combinations_and_others_stay(form):
    queries, keys, shadow, ring = drawn()
    result = form(queries, keys, shadow, ring)
    assert torch.equal(result[~shadow], keys[~shadow])
    for item in (0, 1, 4):
        around, found = keys[item][ring[item]], result[item][shadow[item]]
        assert (found >= around.amin(0) - 1e-6).all()
        assert (found <= around.amax(0) + 1e-6).all()
    assert torch.equal(result[2], keys[2])  # no shadow
    assert not result[3].any()  # no ring


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_the_same_alone(form):
    inputs = drawn()
    together = form(*inputs)
    for item in range(5):
        alone = form(*(each[item : item + 1] for each in inputs))
        torch.testing.assert_close(alone[0], together[item], rtol=0, atol=1e-6)


def test_blocks_of_queries_change_nothing(monkeypatch):
    inputs = drawn()
    whole = masked_softmax_attention(*inputs)
    blocks = masked_softmax_attention(*inputs, scores=16 * 16 * 7)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-6)

    queries, keys = (each.clone().requires_grad_() for each in inputs[:2])
    ring_attention(queries, keys, *inputs[2:]).square().sum().backward()
    monkeypatch.setitem(ring_attention.__globals__["_BLOCK_SCORES"], "cpu", 100)
    again = [each.detach().clone().requires_grad_() for each in inputs[:2]]
    ring_attention(*again, *inputs[2:]).square().sum().backward()
    for one, other in zip((queries, keys), again, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_is_right(form):
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, 0, 1, 1:3] = 1
    mask[1] = 1
    shadow = mask.flatten(1) > 0.5
    ring = ring_of(mask, 3).flatten(1) > 0.5
    torch.manual_seed(0)
    queries, keys = (torch.randn(3, 16, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: form(q, k, shadow, ring), (queries, keys))


def test_gradients_are_those_of_the_loop():
    *inputs, shadow, ring = drawn()
    gradients = []
    for form in (*FORMS, loop):
        queries, keys = (each.clone().requires_grad_() for each in inputs)
        form(queries, keys, shadow, ring).sin().sum().backward()
        gradients.append((queries.grad, keys.grad))
    for found in gradients[:-1]:
        for one, expected in zip(found, gradients[-1], strict=True):
            assert torch.isfinite(one).all()
            torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_the_operator_keeps_the_rules_of_pytorch():
    queries, keys, shadow, ring = drawn(8)
    inputs = (queries.requires_grad_(), keys.requires_grad_(), shadow, ring)
    torch.library.opcheck(torch.ops.tenfold.ring_attention.default, inputs)


def test_halves_are_near_and_scores_large_as_they_come_do_no_harm():
    queries, keys, shadow, ring = drawn()
    exact = loop(queries, keys, shadow, ring)
    for form in FORMS:
        halves = form(queries.bfloat16(), keys.bfloat16(), shadow, ring)
        assert halves.dtype == torch.bfloat16
        torch.testing.assert_close(halves.float(), exact, rtol=0.1, atol=0.1)
        assert torch.isfinite(form(1e4 * queries, 1e3 * keys, shadow, ring)).all()


def test_macs_follow_the_masks():
    mask = torch.zeros(2, 1, 40, 40)
    mask[:, :, 10:14, 10:13] = 1  # 12 pixels, and 14 x 13 - 12 around
    assert attention_macs(mask, ring_of(mask), 48) == 2 * 2 * 48 * 12 * 170


# -- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (9, 12), (20, 30)])
def test_the_layer_resizes_by_nearest_neighbour_as_the_reference_does(size):
    torch.manual_seed(1)
    layer = RingAttention(4, size).eval()
    features, mask = torch.randn(5, 4, 16, 16), masks()
    grown = dilate(mask)

    small, inside, whole = (
        torch.nn.functional.interpolate(each, size, mode="nearest")
        for each in (features, mask, grown)
    )
    queries, keys = (part(small).flatten(2).transpose(1, 2) for part in (layer.query, layer.key))
    found = loop(queries, keys, inside.flatten(1) > 0.5, (whole - inside).flatten(1) > 0.5)
    found = found.transpose(1, 2).reshape(5, 6, *size)
    found = torch.nn.functional.interpolate(found, (16, 16), mode="nearest")
    expected = layer.merge(torch.cat([features, found], 1))

    result = layer(features, mask, grown - mask)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert str(size) in repr(layer)


@pytest.mark.path
@pytest.mark.parametrize("form", ["masked", "gathered"])
def test_its_onnx_takes_other_masks_and_rounds_as_pytorch(form):
    import onnxruntime

    torch.manual_seed(1)
    layer = RingAttention(4, (40, 26)).eval()  # 66 / 40 falls on edges of pixels
    layer.exported = form
    features, mask = torch.randn(1, 4, 66, 65), masks(65)
    mask = torch.nn.functional.pad(mask, (0, 0, 0, 1))
    ring = ring_of(mask)
    inputs = (features, mask[:1], ring[:1])
    stream = io.BytesIO()
    torch.onnx.export(layer, inputs, dynamo=True, verbose=False).save(stream)
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for item in range(5):
        given = (features, mask[item : item + 1], ring[item : item + 1])
        feeds = {name: each.numpy() for name, each in zip(names, given, strict=True)}
        result = torch.from_numpy(session.run(None, feeds)[0])
        torch.testing.assert_close(result, layer(*given).detach(), rtol=0, atol=1e-5)
