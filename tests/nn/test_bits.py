import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.errors import UserError
from tenfold.nn.bits import pack_bits, unpack_bits

pytestmark = pytest.mark.unit


@given(bits=st.integers(1, 8), data=st.data())
def test_round_trip_and_size(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), bits)
    assert len(packed) == (len(values) * bits + 7) // 8
    assert unpack_bits(packed, bits, len(values)).tolist() == values


def test_bits_are_laid_out_lowest_first():
    assert pack_bits(torch.tensor([5, 1]), 3).tolist() == [0b001101]
    assert pack_bits(torch.tensor([True, False, True]), 1).tolist() == [5]


def test_wrong_length_is_refused():
    with pytest.raises(UserError, match="2 bytes don't hold 3 numbers of 2 bits"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 2, 3)
    with pytest.raises(UserError, match="expected 1 to 8"):
        pack_bits(torch.zeros(2), 9)
