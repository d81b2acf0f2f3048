"""The gradient at chosen places against the dense one in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.kernels.live import able, live_gradient

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(native.missing() is not None, reason="needs the compiled kernels"),
]


def dense(x, gradient, shape, stride, padding, dilation):
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = nn.functional.conv2d(x.double(), weight, None, stride, padding, dilation)
    return torch.autograd.grad(out, weight, gradient.double())[0]


def close(found, expected):
    size = float(expected.abs().max()) + 1e-6
    assert float((found.double() - expected).abs().max()) < 2e-6 * size * 10


@settings(max_examples=50, deadline=None)
@given(
    images=st.integers(8, 40),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 20),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions(
    images, channels, outputs, size, kernel, stride, padding, dilation, share, last, seed
):
    generator = torch.Generator().manual_seed(seed)
    out_size = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    if min(out_size) < 1:
        return
    x = torch.randn(images, channels, *size, generator=generator)
    gradient = torch.randn(images, outputs, *out_size, generator=generator)
    live = torch.rand(outputs, channels, *kernel, generator=generator) < share
    if last:
        live = live.contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    found = live_gradient(x, gradient, live, stride, padding, dilation)
    assert not found[~live].any()
    close(found, dense(x, gradient, live.shape, stride, padding, dilation) * live)


@pytest.mark.parametrize(("channels", "size"), [(600, 4), (130, 40), (3, 200)])
def test_tiles_of_channels_and_of_rows(channels, size):
    """More than the packed input of one tile, and rows longer than a tile."""
    torch.manual_seed(0)
    x, gradient = torch.randn(9, channels, size, size), torch.randn(9, 3, size, size)
    live = torch.rand(3, channels, 3, 3) < 0.1
    found = live_gradient(x, gradient, live, (1, 1), (1, 1), (1, 1))
    close(found, dense(x, gradient, live.shape, 1, 1, 1) * live)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(5,), (16,), (48,), (3, 7), (2, 3, 8)]),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_linear_layers(shape, inputs, outputs, share, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, inputs, generator=generator)
    gradient = torch.randn(*shape, outputs, generator=generator)
    live = torch.rand(outputs, inputs, generator=generator) < share
    found = live_gradient(x, gradient, live)
    expected = gradient.double().reshape(-1, outputs).T @ x.double().reshape(-1, inputs)
    close(found, expected * live)


def test_all_instruction_sets_agree_and_repeat_themselves():
    torch.manual_seed(0)
    x, gradient = torch.randn(35, 30, 9, 7), torch.randn(35, 20, 5, 4)
    live = torch.rand(20, 30, 3, 3) < 0.2
    expected = dense(x, gradient, live.shape, 2, 1, 1) * live
    used, threads = native.instruction_set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in native._module.instruction_sets():
            native._module.use(name)
            found = live_gradient(x, gradient, live, (2, 2), (1, 1), (1, 1))
            close(found, expected)
            assert torch.equal(found, live_gradient(x, gradient, live, (2, 2), (1, 1), (1, 1)))
    finally:
        native._module.use(used)
        torch.set_num_threads(threads)


def test_what_it_takes():
    images, weight = torch.zeros(8, 4, 5, 5), torch.zeros(6, 4, 3, 3)
    assert able(images, weight)
    assert not able(images[:7], weight)  # most lanes would be empty
    assert not able(images, weight, groups=2)
    assert not able(images.double(), weight.double())
    assert not able(images.bfloat16(), weight)
    assert not able(torch.zeros(8, 4, 5), torch.zeros(6, 4, 3))
    assert able(torch.zeros(3, 4), torch.zeros(6, 4))


def test_refusals():
    x, live = torch.zeros(8, 4, 5, 5), torch.ones(6, 4, 3, 3, dtype=torch.bool)
    with pytest.raises(UserError, match=r"expected \(8, 6, 3, 3\)"):
        live_gradient(x, torch.zeros(8, 6, 5, 5), live)
    with pytest.raises(UserError, match="expected bool, with the input's channels"):
        live_gradient(x[:, :3], torch.zeros(8, 6, 3, 3), live)
    with pytest.raises(UserError, match="expected float32 on the CPU"):
        live_gradient(x.double(), torch.zeros(8, 6, 3, 3).double(), live)
    with pytest.raises(UserError, match=r"expected \(7, 2\)"):
        live_gradient(torch.zeros(7, 3), torch.zeros(6, 2), torch.ones(2, 3, dtype=torch.bool))
