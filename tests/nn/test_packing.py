import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.errors import UserError
from tenfold.nn.blocks import from_blocks, nm_pattern, to_blocks
from tenfold.nn.packing import pack_nm, packed_bytes, unpack_nm

pytestmark = pytest.mark.unit


def sparse(shape, n, m, seed=0, spare=False):
    generator = torch.Generator().manual_seed(seed)
    blocks = to_blocks(torch.randn(shape, generator=generator), m)
    order = torch.rand(blocks.shape, generator=generator).argsort(dim=1)
    keep = n - 1 if spare else n
    blocks[order >= keep] = 0.0
    return from_blocks(blocks, shape)


@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(2, 20),
    data=st.data(),
    out=st.integers(1, 4),
    blocks=st.integers(1, 3),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (2,), (2, 3, 1)]),
    spare=st.booleans(),
)
def test_round_trip_is_bit_equal(m, data, out, blocks, kernel, spare):
    n = data.draw(st.integers(1, m - 1))
    weight = sparse((out, blocks * m, *kernel), n, m, spare=spare)
    values, index = pack_nm(weight, n, m)
    assert values.shape == (out, weight[0].numel() * n // m)
    assert torch.equal(unpack_nm(values, index, n, m, weight.shape), weight)
    assert values.numel() * 4 + index.numel() == packed_bytes(weight, n, m)


def test_size_at_2_4():
    assert packed_bytes(torch.zeros(64, 64), 2, 4) == 1024 * 8.5


def test_index_is_ascending_positions():
    values, index = pack_nm(torch.tensor([[0.0, 5.0, 0.0, 7.0]]), 2, 4)
    assert values.tolist() == [[5.0, 7.0]]
    assert index.tolist() == [1 + (3 << 2)]


def test_a_denser_block_is_named():
    weight = sparse((2, 8), 2, 4)
    weight[1, 4:7] = 1.0
    with pytest.raises(UserError, match=r"block 3 has [34] non-zeros: expected at most 2"):
        pack_nm(weight, 2, 4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16), (3, 5), (1, 2)])
def test_pattern_is_recognised(n, m):
    assert nm_pattern(sparse((16, m * 4, 3, 3), n, m)) == (n, m)


def test_dense_and_empty_have_no_pattern():
    assert nm_pattern(torch.randn(8, 32)) is None
    assert nm_pattern(torch.zeros(8, 32)) is None
    assert nm_pattern(torch.randn(7)) is None
    assert nm_pattern(torch.randn(4, 1, 3, 3)) is None


def test_least_ratio_then_smallest_block_wins():
    weight = torch.zeros(4, 16)
    weight[:, ::8] = 1.0  # 1:8, and 1:2, 1:4, 2:16 fit as well
    assert nm_pattern(weight) == (1, 8)
