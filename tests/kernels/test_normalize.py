"""Layer norm against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.kernels.normalize import layer_norm

pytestmark = pytest.mark.parity


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    features = draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 100, 384, 1000]))
    shape = (*draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (1, 197)])), features)
    torch.manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape) * draw(st.sampled_from([1.0, 1e-3, 100.0]))
    x += draw(st.sampled_from([0.0, 1.0, -50.0]))
    if draw(st.booleans()):
        x = x.unsqueeze(-1).repeat_interleave(2, dim=-1)[..., 0]
    weight = torch.randn(features) if draw(st.booleans()) else None
    bias = torch.randn(features) if draw(st.booleans()) else None
    epsilon = draw(st.sampled_from([1e-5, 1e-6, 0.1]))
    y = layer_norm(x, weight, bias, epsilon)
    double = [None if each is None else each.double() for each in (weight, bias)]
    expected = F.layer_norm(x.double(), (features,), *double, epsilon)
    assert y.shape == x.shape
    assert y.is_contiguous()
    if x.numel():
        # The mean's own rounding is magnified where a row hardly varies.
        steps = (
            x.abs().amax(-1, keepdim=True)
            / (x.var(-1, correction=0, keepdim=True) + epsilon).sqrt()
        )
        size = (1 if weight is None else weight.abs()) * (1 + steps)
        assert float(((y - expected).abs() / (size + expected.abs())).max()) < 1e-6


def test_nan_and_infinity_stay_in_their_row() -> None:
    x = torch.randn(4, 40)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y = layer_norm(x, torch.ones(40), torch.zeros(40))
    assert y[1:3].isnan().all()
    assert y[::3].isfinite().all()


def test_other_types_parameters_and_gradients_are_pytorchs() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(layer_norm(x.double()), F.layer_norm(x.double(), (8,)))
    torch.testing.assert_close(layer_norm(x, weight[::1]), F.layer_norm(x, (8,), weight))
    spread = torch.randn(16)[::2]
    torch.testing.assert_close(layer_norm(x, spread), F.layer_norm(x, (8,), spread))
    with pytest.raises(RuntimeError):
        layer_norm(x, torch.randn(7))
    with pytest.raises((RuntimeError, IndexError)):
        layer_norm(torch.tensor(1.0))
    a, b = (weight.clone().requires_grad_() for _ in "ab")
    layer_norm(x, a).square().sum().backward()
    F.layer_norm(x, (8,), b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, None, 1e-6) + 1


def test_is_traced_and_compiled() -> None:
    net, x = Net(), torch.randn(2, 3, 8)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "tenfold.layer_norm.default" in {str(node.target) for node in program.graph.nodes}
    wider = torch.randn(5, 3, 8)
    torch.testing.assert_close(program.module()(wider), net(wider))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch.library.opcheck(
        torch.ops.tenfold.layer_norm.default,
        (x, torch.randn(8), None, 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    try:
        x = torch.randn(197, 384)
        torch.set_num_threads(1)
        expected = layer_norm(x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(layer_norm(x), expected)
    finally:
        torch.set_num_threads(before)
