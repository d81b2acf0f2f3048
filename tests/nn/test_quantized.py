"""Quantized layers against the float layers that they stand for, and their packed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenfold.errors import UserError
from tenfold.nn.bits import pack_bits
from tenfold.nn.qdq import QdqLayer, to_qdq
from tenfold.nn.quantized import (
    QUANTIZED,
    QuantizedConv2d,
    pack_codes,
    quantized_like,
    unpack_codes,
)

pytestmark = pytest.mark.parity

DOUBLE = torch.float64
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "tokens": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 4, 6, 7)),
    "unpadded": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 6, 7)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, padding=1), (2, 2, 3, 4, 3)),
}
BOUNDS = torch.tensor([-0.7, 0.9, -0.4, 1.3], dtype=DOUBLE)


def filled(make, bits, *, rescale=False, removed=0.0, seed=0):
    """Return a float layer, its quantized form in float64, and the codes and mask."""
    torch.manual_seed(seed)
    layer = make().to(DOUBLE)
    codes = torch.randint(0, 2**bits, layer.weight.shape)
    mask = (torch.rand(layer.weight.shape) >= removed).to(DOUBLE)
    done = quantized_like(layer, bits, rescale=rescale).fill(codes, BOUNDS, mask)
    if layer.bias is not None:
        done.bias.copy_(layer.bias.detach())
    return layer, done.eval(), codes, mask


def expected(layer, x, codes, mask, bits, rescale):
    """Compute the layer in floats by the equations of the training form."""
    levels = 2**bits
    lower, upper, low, high = BOUNDS
    share = codes.to(DOUBLE) / (levels - 1)
    weight = (lower + (upper - lower) * share if rescale else 2 * share - 1) * mask
    k = ((x - low) / (high - low)).clamp(0, 1).mul(levels - 1).round() / (levels - 1)
    x = low + (high - low) * k if rescale else k
    with torch.no_grad():
        layer.weight.copy_(weight)
        return layer(x)


@pytest.mark.parametrize("removed", [0.0, 0.5])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_layers_compute_what_their_codes_say(kind, bits, rescale, removed):
    """In the plain form and in the form for export, the sums for 8 bits and offsets included."""
    make, shape = LAYERS[kind]
    layer, done, codes, mask = filled(make, bits, rescale=rescale, removed=removed)
    x = torch.randn(shape, dtype=DOUBLE)
    wanted = expected(layer, x, codes, mask, bits, rescale)
    torch.testing.assert_close(done(x), wanted)
    torch.testing.assert_close(QdqLayer(done)(x), wanted)
    assert torch.equal(done.weight == 0, mask == 0)
    torch.testing.assert_close(done.weight, layer.weight.detach())


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("rescale", [False, True])
def test_folding_changes_scales_and_never_integers(bits, rescale):
    make, shape = LAYERS["conv2d"]
    _, done, _, _ = filled(make, bits, rescale=rescale)
    x = torch.randn(shape, dtype=DOUBLE)
    scale = torch.tensor([1.0, -2.0, 0.0, 0.3, -0.1, 5.0], dtype=DOUBLE)
    shift = torch.randn(6, dtype=DOUBLE)
    wanted = done(x) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
    before = done.integers.clone()
    done.fold(scale, shift)
    torch.testing.assert_close(done(x), wanted)
    assert torch.equal(done.integers, before)
    exported = QdqLayer(done)
    torch.testing.assert_close(exported(x), wanted)
    assert exported.scale.min() > 0
    assert exported.integers.dtype == torch.int8


def test_integers_are_odd_and_small():
    for bits, dtype in ((2, torch.int8), (7, torch.int8), (8, torch.int16)):
        _, done, codes, _ = filled(LAYERS["linear"][0], bits)
        assert done.integers.dtype == dtype
        assert torch.equal(done.integers.long(), 2 * codes - (2**bits - 1))
        assert (done.integers % 2 == 1).all()
    _, done, _, _ = filled(LAYERS["linear"][0], 2)
    assert set(done.integers.unique().tolist()) <= {-3, -1, 1, 3}


def test_sums_of_whole_numbers_are_exact_in_single_precision():
    """The same integers in another order of channels give the same bits."""
    _, done, _, _ = filled(lambda: nn.Linear(2000, 5), 4)
    done = done.float()
    x, order = torch.randn(3, 2000), torch.randperm(2000)
    first = done(x)
    done.integers.copy_(done.integers[:, order])
    assert torch.equal(done(x[:, order]), first)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 3),
    pattern=st.sampled_from([None, (1, 4), (2, 4), (3, 4), "random"]),
    seed=st.integers(0, 99),
)
def test_packing_round_trip(bits, rows, blocks, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 4 * blocks, 3)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    integers = (2 * codes - (2**bits - 1)).to(torch.int16 if bits == 8 else torch.int8)
    if pattern == "random":
        integers[torch.rand(shape, generator=generator) < 0.5] = 0
    elif pattern is not None:
        n, m = pattern
        order = torch.rand(rows, blocks, m, 3, generator=generator).argsort(dim=2).reshape(shape)
        integers[order >= n] = 0
    packed, found = pack_codes(integers, bits)
    again = unpack_codes(
        packed["codes"], packed.get("index"), bits, shape, None if found is None else tuple(found)
    )
    assert torch.equal(again, integers)
    assert again.dtype == integers.dtype
    kept = int((integers != 0).sum())
    assert len(packed["codes"]) == -(-kept * bits // 8)


def test_two_bits_take_two_bits():
    integers = torch.full((64, 64, 3, 3), -3, dtype=torch.int8)
    packed, _ = pack_codes(integers, 2)
    assert list(packed) == ["codes"]
    assert packed["codes"].numel() * 8 == 2 * integers.numel()
    assert torch.equal(packed["codes"], pack_bits(torch.zeros(integers.numel()), 2))


def test_refusals():
    layer = nn.Conv2d(3, 4, 3)
    for bits in (1, 9, True, 2.0):
        with pytest.raises(UserError, match="expected an int from 2 to 8"):
            quantized_like(layer, bits)
    with pytest.raises(UserError, match="ConvTranspose2d has no quantized form"):
        quantized_like(nn.ConvTranspose2d(3, 4, 3), 2)
    done = quantized_like(layer, 2)
    with pytest.raises(UserError, match="codes from 0 to 4: expected 0 to 3"):
        done.fill(torch.arange(108).reshape(4, 3, 3, 3) % 5, BOUNDS)
    with pytest.raises(UserError, match=r"codes of shape \(4, 3\): expected \(4, 3, 3, 3\)"):
        done.fill(torch.zeros(4, 3), BOUNDS)


def test_what_is_printed():
    done = quantized_like(nn.Conv2d(3, 4, 3, bias=False), 2)
    assert repr(done) == "QuantizedConv2d(4x3x3x3, bits=2, bias=False)"
    assert set(QUANTIZED) == {f"Quantized{k}" for k in ("Conv1d", "Conv2d", "Conv3d", "Linear")}


def test_the_form_for_export_is_a_copy():
    network = nn.Sequential(quantized_like(nn.Conv2d(3, 4, 3), 2), nn.ReLU()).eval()
    changed = to_qdq(network)
    assert isinstance(network[0], QuantizedConv2d)
    assert isinstance(changed[0], QdqLayer)
    plain = nn.Sequential(nn.Linear(2, 2))
    assert to_qdq(plain) is plain
    assert isinstance(to_qdq(network[0]), QdqLayer)
