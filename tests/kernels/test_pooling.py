"""Pooling against PyTorch's own."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.kernels.pooling import max_pool2d, mean_pool

pytestmark = pytest.mark.parity

SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])


def same(given: Tensor, expected: Tensor) -> None:
    assert given.shape == expected.shape
    assert torch.equal(given.isnan(), expected.isnan())
    assert torch.equal(given.nan_to_num(), expected.nan_to_num())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_max_pool2d_equals_pytorchs(data: st.DataObject) -> None:
    draw = data.draw

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, stride, dilation = pair(1, 5), pair(1, 4), pair(1, 3)
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 70))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(height + 2 * padding[0] >= reach[0] and width + 2 * padding[1] >= reach[1])
    torch.manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(draw(st.integers(0, 3)), draw(st.integers(1, 5)), height, width)
    if draw(st.booleans()):
        special = SPECIAL[torch.randint(4, x.shape)]
        x = torch.where(torch.rand(x.shape) < 0.1, special, x)
    layout = draw(st.sampled_from(["contiguous", "contiguous", "channels_last", "every second"]))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        x = x.repeat_interleave(2, dim=3)[..., ::2]
    ceil_mode = draw(st.booleans())
    expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    same(max_pool2d(x, kernel, stride, padding, dilation, ceil_mode), expected)
    if dilation == (1, 1):
        with_relu = max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, relu=True)
        same(with_relu, F.max_pool2d(x.relu(), kernel, stride, padding, dilation, ceil_mode))


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 17, 32, 56, 112])
def test_of_residual_networks(size: int) -> None:
    x = torch.randn(2, 5, size, size)
    same(max_pool2d(x, (3, 3), (2, 2), (1, 1)), F.max_pool2d(x, 3, 2, 1))
    same(max_pool2d(x, (3, 3), (1, 1), (1, 1)), F.max_pool2d(x, 3, 1, 1))


def test_windows_that_do_not_fit_are_refused() -> None:
    x = torch.randn(1, 2, 4, 4)
    for arguments in (
        ((5, 5), (1, 1)),
        ((3, 3), (1, 1), (2, 2)),
        ((2, 2), (0, 1)),
        ((0, 2), (1, 1)),
    ):
        with pytest.raises((UserError, RuntimeError)):
            max_pool2d(x, *arguments)
    if not native.missing():
        with pytest.raises(UserError, match=r"max_pool2d of \(1, 2, 4, 4\): kernel \(5, 5\)"):
            max_pool2d(x, (5, 5), (1, 1))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_mean_pool_equals_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    shape = [draw(st.integers(low, high)) for low, high in ((0, 3), (1, 9), (1, 20), (1, 20))]
    torch.manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape) + draw(st.sampled_from([0.0, 100.0]))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    y, expected = mean_pool(x), x.double().mean((2, 3), keepdim=True)
    assert y.shape == expected.shape
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_means_of_nan_and_infinity() -> None:
    x = torch.randn(1, 4, 7, 7)
    for channel in range(3):
        x[0, channel, channel, -1] = SPECIAL[channel]
    same(mean_pool(x)[:, :3], F.adaptive_avg_pool2d(x, 1)[:, :3])


def test_other_types_shapes_and_gradients_are_pytorchs() -> None:
    x = torch.randn(2, 3, 8, 9)
    same(max_pool2d(x.double(), (2, 2), (2, 2)), F.max_pool2d(x.double(), 2))
    same(max_pool2d(x[0], (2, 2), (2, 2), relu=True), F.max_pool2d(x[0].relu(), 2))
    same(mean_pool(x[0]), F.adaptive_avg_pool2d(x[0], 1))
    a, b = (x.clone().requires_grad_() for _ in "ab")
    (max_pool2d(a, (2, 2), (2, 2), relu=True).sum() + mean_pool(a).sum()).backward()
    (F.max_pool2d(b.relu(), 2).sum() + F.adaptive_avg_pool2d(b, 1).sum()).backward()
    torch.testing.assert_close(a.grad, b.grad)
    last = x.contiguous(memory_format=torch.channels_last)
    assert max_pool2d(last, (2, 2), (2, 2)).is_contiguous(memory_format=torch.channels_last)


class Net(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mean_pool(max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), True, True)) + 1


def test_are_traced_and_compiled() -> None:
    for x in (
        torch.randn(2, 3, 9, 8),
        torch.randn(2, 3, 9, 8).to(memory_format=torch.channels_last),
    ):
        program = torch.export.export(Net(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        called = {str(node.target) for node in program.graph.nodes}
        assert {"tenfold.max_pool2d.default", "tenfold.mean_pool.default"} <= called
        wider = torch.randn(5, 3, 9, 8)
        torch.testing.assert_close(program.module()(wider), Net()(wider))
        compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), Net()(x))


def test_pass_pytorchs_own_checks() -> None:
    checks = ("test_schema", "test_faketensor")
    for x in (
        torch.randn(2, 3, 9, 8),
        torch.randn(2, 3, 9, 8).to(memory_format=torch.channels_last),
    ):
        torch.library.opcheck(
            torch.ops.tenfold.max_pool2d.default,
            (x, (3, 2), (2, 1), (1, 1), (1, 2), True, False),
            test_utils=checks,
        )
        torch.library.opcheck(torch.ops.tenfold.mean_pool.default, (x,), test_utils=checks)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    try:
        for shape in ((1, 1, 31, 30), (2, 8, 14, 14), (1, 2, 1, 40)):
            x = torch.randn(shape)
            torch.set_num_threads(1)
            expected = max_pool2d(x, (3, 3), (2, 2), (1, 1)), mean_pool(x)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(max_pool2d(x, (3, 3), (2, 2), (1, 1)), expected[0])
                assert torch.equal(mean_pool(x), expected[1])
    finally:
        torch.set_num_threads(before)


def test_concurrent_calls() -> None:
    inputs = [torch.randn(1, 4, size, size) for size in (9, 33, 64, 20)]
    expected = [max_pool2d(x, (3, 3), (2, 2), (1, 1)) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(max_pool2d(inputs[i], (3, 3), (2, 2), (1, 1)), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
