"""The packed operators against dense layers in float64."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native, nm, reference

pytestmark = pytest.mark.parity

PATTERNS = [(2, 4), (1, 4), (2, 16), (1, 16), (1, 2), (4, 8), (3, 5), (1, 32), (7, 24)]


def sparse(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest of each m neighbours along the input channels."""
    rows = weight.movedim(1, -1).contiguous()
    groups = rows.reshape(-1, m)
    kept = torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, dim=1).indices, 1.0)
    return (groups * kept).reshape(rows.shape).movedim(-1, 1).contiguous()


def quantized(values: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    if kind == "bfloat16":
        return values.bfloat16(), None
    if kind == "int8":
        scale = (values.abs().amax(dim=(0, 2)) / 127).clamp_min(1e-9)
        return (values / scale[:, None]).round().to(torch.int8), scale
    return values, None


def as_double(values: Tensor) -> Tensor:
    return values if values.dtype == torch.int8 else values.double()


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def close(given: Tensor, expected: Tensor, sums: Tensor | None = None) -> None:
    """Within 1e-5 of the largest sum, that an activation may have cut off."""
    assert given.shape == expected.shape
    assert given.dtype == torch.float32
    assert given.is_contiguous()
    if expected.numel():
        size = (expected if sums is None else sums).abs().max().clamp_min(1e-3)
        assert float((given - expected).abs().max() / size) < 1e-5


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_conv2d_equals_the_dense_convolution_in_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    n, m = draw(st.sampled_from(PATTERNS))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, outputs = m * draw(st.integers(1, 8)), groups * draw(st.integers(1, 40))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 5), (7, 1), (2, 2)]))
    stride, padding, dilation = (
        tuple(draw(st.integers(low, high)) for _ in "yx") for low, high in ((1, 3), (0, 3), (1, 2))
    )
    smallest = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    height, width = (draw(st.integers(s, s + 24)) for s in smallest)
    batch = draw(st.integers(0, 5))
    kind = draw(st.sampled_from(["float32", "float32", "bfloat16", "int8"]))
    activation = draw(st.sampled_from(list(nm.ACTIVATIONS)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "every second"]))
    torch.manual_seed(draw(st.integers(0, 999)))

    x = torch.randn(batch, groups * channels, height, width)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        x = torch.randn(batch, groups * channels, height, 2 * width)[..., ::2]
    weight = sparse(torch.randn(outputs, channels, *kernel), n, m)
    values, index = nm.pack(weight, n, m)
    values, scale = quantized(values, kind)
    nm.check_packed(values, index, n, m, weight[0].numel())
    bias = torch.randn(outputs) if draw(st.booleans()) else None
    shape = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if kind == "float32":
        expected = F.conv2d(x.double(), weight.double(), double(bias), **shape)
    else:
        expected = reference.conv2d(
            x.double(), as_double(values), index, double(scale), double(bias), None, (n, m),
            kernel, stride, padding, dilation, groups, "none",
        )  # fmt: skip
    add = torch.randn(expected.shape) if draw(st.booleans()) else None
    sums = expected if add is None else expected + add

    given = nm.conv2d(
        x, values, index, scale, bias, add, (n, m), kernel, stride, padding, dilation, groups,
        activation,
    )  # fmt: skip
    close(given, nm.ACTIVATIONS[activation](sums), sums)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_linear_equals_the_dense_layer_in_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    n, m = draw(st.sampled_from(PATTERNS))
    features, outputs = m * draw(st.integers(1, 40)), draw(st.integers(1, 700))
    tokens = draw(st.sampled_from([(), (0,), (1,), (3,), (4,), (9,), (2, 17), (197,), (1, 65)]))
    kind = draw(st.sampled_from(["float32", "float32", "bfloat16", "int8"]))
    activation = draw(st.sampled_from(list(nm.ACTIVATIONS)))
    torch.manual_seed(draw(st.integers(0, 999)))

    x = torch.randn(*tokens, features)
    weight = sparse(torch.randn(outputs, features), n, m)
    values, index = nm.pack(weight, n, m)
    values, scale = quantized(values, kind)
    nm.check_packed(values, index, n, m, features)
    bias = torch.randn(outputs) if draw(st.booleans()) else None
    add = torch.randn(*tokens, outputs) if draw(st.booleans()) else None
    if kind == "float32":
        expected = F.linear(x.double(), weight.double(), double(bias))
    else:
        expected = reference.linear(
            x.double(), as_double(values), index, double(scale), double(bias), None, (n, m), "none"
        )
    sums = expected if add is None else expected + add
    given = nm.linear(x, values, index, scale, bias, add, (n, m), activation)
    close(given, nm.ACTIVATIONS[activation](sums), sums)


def conv_arguments(weight: Tensor, n: int, m: int) -> tuple[object, ...]:
    values, index = nm.pack(weight, n, m)
    kernel = tuple(weight.shape[2:])
    return (
        values, index, None, None, None, (n, m), kernel, (1, 1),
        (kernel[0] // 2, kernel[1] // 2), (1, 1), 1, "relu",
    )  # fmt: skip


def test_maps_of_one_pixel_and_of_none() -> None:
    weight = sparse(torch.randn(24, 16, 3, 3), 2, 4)
    arguments = conv_arguments(weight, 2, 4)
    for batch in (1, 2, 3, 9):
        x = torch.randn(batch, 16, 1, 1)
        close(nm.conv2d(x, *arguments), F.conv2d(x.double(), weight.double(), padding=1).relu())
    assert nm.conv2d(torch.randn(0, 16, 5, 5), *arguments).shape == (0, 24, 5, 5)
    for shape in ((1, 16, 5, 0), (1, 16, 0, 5)):  # PyTorch refuses them too
        with pytest.raises((UserError, RuntimeError)):
            nm.conv2d(torch.randn(shape), *arguments)


def test_small_maps_share_panels_over_images() -> None:
    weight = sparse(torch.randn(40, 32, 3, 3), 1, 4)
    for batch, size in ((2, 7), (8, 7), (5, 3), (3, 14)):
        x = torch.randn(batch, 32, size, size)
        close(
            nm.conv2d(x, *conv_arguments(weight, 1, 4)),
            F.conv2d(x.double(), weight.double(), padding=1).relu(),
        )


@pytest.mark.parametrize("shape", [(8, 12), (6, 8, 3, 3), (4, 200), (3, 36, 2, 5)])
def test_packing_keeps_every_weight_also_of_groups_with_fewer_than_n(
    shape: tuple[int, ...],
) -> None:
    weight = sparse(torch.randn(shape), 3, 4)
    weight[0] = 0
    weight[1].flatten()[:6] = 0
    values, index = nm.pack(weight, 3, 4)
    k = weight[0].numel()
    rows = reference.dense_rows(values, index, None, (3, 4), k)
    kernel = (*weight.shape[2:], 1, 1)[:2]
    again = reference.untiled(rows, weight.shape[1], kernel, 4)
    assert torch.equal(again.reshape(shape), weight)
    assert values.numel() <= 1.2 * 0.75 * weight.numel() + 24


def test_blocks_are_about_equal_and_fit_the_cache() -> None:
    for n, m in [(1, m) for m in range(2, 33)] + [(m - 1, m) for m in range(2, 33)]:
        for units in range(1, 200):
            k = units * m
            length = nm.block_length(k, n, m)
            blocks = -(-k // length)
            assert length % m == 0
            assert length <= (64 if 3 * n > m else 128)
            assert blocks * length - k < length
            assert blocks * length < 1.5 * k + m


def test_a_weight_that_is_not_sparse_enough_is_refused_by_its_first_place() -> None:
    weight = sparse(torch.randn(3, 8, 2, 2), 2, 4)
    weight[1, 4:7, 1, 0] = 1.0
    with pytest.raises(UserError, match=r"output 1, kernel position 2, input channels 4 to 7 have"):
        nm.pack(weight, 2, 4)
    with pytest.raises(UserError, match="doesn't divide"):
        nm.pack(torch.zeros(2, 6), 1, 4)
    with pytest.raises(UserError, match="expected 0 < n < m"):
        nm.pack(torch.zeros(2, 64), 1, 64)


def test_damaged_packed_weights_are_refused() -> None:
    values, index = nm.pack(sparse(torch.randn(4, 260), 1, 4), 1, 4)
    nm.check_packed(values, index, 1, 4, 260)
    assert values.shape[0] == 3
    for block, place in ((0, 88), (2, 84)):  # blocks of 88, 88 and 84
        bad = index.clone()
        bad[block, 3, -1] = place
        with pytest.raises(UserError, match="outside"):
            nm.check_packed(values, bad, 1, 4, 260)
        bad[block, 3, -1] = place - 1
        nm.check_packed(values, bad, 1, 4, 260)
    with pytest.raises(UserError, match="no 2:4"):
        nm.check_packed(values, index, 2, 4, 260)
    with pytest.raises(UserError, match="uint8"):
        nm.check_packed(values, index.int(), 1, 4, 260)


def test_inputs_that_do_not_fit_are_refused_before_the_kernel_reads_them() -> None:
    if native.missing():
        pytest.skip("the compiled kernels' own check")
    weight = sparse(torch.randn(8, 16, 3, 3), 2, 4)
    arguments = conv_arguments(weight, 2, 4)
    with pytest.raises(UserError, match="doesn't fit"):
        nm.conv2d(torch.randn(1, 128, 5, 5), *arguments)
    x = torch.randn(1, 16, 5, 5)
    with pytest.raises(UserError, match=r"add has type .* shape \(1, 8, 4, 4\): expected"):
        nm.conv2d(x, *arguments[:4], torch.randn(1, 8, 4, 4), *arguments[5:])
    with pytest.raises(UserError, match=r"add has type torch\.float64"):
        nm.conv2d(x, *arguments[:4], torch.randn(1, 8, 5, 5).double(), *arguments[5:])
    with pytest.raises(UserError, match=r"bias has type torch\.bfloat16"):
        nm.conv2d(x, *arguments[:3], torch.zeros(8).bfloat16(), *arguments[4:])
    values, index = nm.pack(sparse(torch.randn(8, 16), 2, 4), 2, 4)
    with pytest.raises(UserError, match="doesn't fit"):
        nm.linear(torch.randn(2, 640), values, index, None, None, None, (2, 4))


def test_nan_and_infinity_pass_through() -> None:
    weight = sparse(torch.randn(8, 16), 2, 4)
    values, index = nm.pack(weight, 2, 4)
    for tokens in (1, 20):
        x = torch.randn(tokens, 16)
        x[0] = float("nan")
        for activation in nm.ACTIVATIONS:
            y = nm.linear(x, values, index, None, None, None, (2, 4), activation)
            assert y[0].isnan().all()
            assert not y[1:].isnan().any()


def test_activations_are_exact_over_their_whole_range() -> None:
    values, index = nm.pack(torch.tensor([[1.0, 0.0]]), 1, 2)
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-1e30, 1e30, -90, 90, 0.0])])
    inputs = torch.stack([x, torch.zeros_like(x)], dim=1)
    for activation, exact in nm.ACTIVATIONS.items():
        y = nm.linear(inputs, values, index, None, None, None, (1, 2), activation)[:, 0]
        error = (y - exact(x.double())).abs() / x.double().abs().clamp_min(1)
        assert float(error.max()) < 1e-6, activation


def test_operators_are_traced_and_compiled() -> None:
    weight = sparse(torch.randn(8, 16, 3, 3), 2, 4)
    arguments = conv_arguments(weight, 2, 4)
    values, index = nm.pack(sparse(torch.randn(12, 8), 1, 4), 1, 4)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = nm.conv2d(x, *arguments)
            return nm.linear(y.movedim(1, -1), values, index, None, None, None, (1, 4), "gelu")

    x = torch.randn(2, 16, 6, 5)
    expected = Net()(x)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Net(), (x,), dynamic_shapes=({0: batch},))
    called = {str(node.target) for node in program.graph.nodes}
    assert {"tenfold.nm_conv2d.default", "tenfold.nm_linear.default"} <= called
    wider = torch.randn(5, 16, 6, 5)
    torch.testing.assert_close(program.module()(wider), Net()(wider))
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_operators_pass_pytorchs_own_checks() -> None:
    weight = sparse(torch.randn(8, 16, 3, 3), 2, 4)
    x = torch.randn(2, 16, 6, 5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.tenfold.nm_conv2d.default, (x, *conv_arguments(weight, 2, 4)), test_utils=checks
    )
    values, index = nm.pack(sparse(torch.randn(12, 16), 1, 4), 1, 4)
    torch.library.opcheck(
        torch.ops.tenfold.nm_linear.default,
        (torch.randn(3, 16), values, index, None, None, None, (1, 4), "silu"),
        test_utils=checks,
    )


def test_threads_share_packed_weights() -> None:
    weight = sparse(torch.randn(64, 64, 3, 3), 2, 4)
    arguments = conv_arguments(weight, 2, 4)
    inputs = [torch.randn(1, 64, 20, 20) for _ in range(4)]
    expected = [nm.conv2d(x, *arguments) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(nm.conv2d(inputs[i], *arguments), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    weight = sparse(torch.randn(72, 64, 3, 3), 2, 4)
    x = torch.randn(2, 64, 14, 14)
    try:
        torch.set_num_threads(1)
        expected = nm.conv2d(x, *conv_arguments(weight, 2, 4))
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(nm.conv2d(x, *conv_arguments(weight, 2, 4)), expected)
    finally:
        torch.set_num_threads(before)


COMPARE = """
import sys, torch
from tenfold.kernels import native, nm
sys.path.insert(0, "tests")
torch.manual_seed(0)
weight = torch.zeros(40, 32, 3, 3)
weight[:, ::4] = torch.randn(40, 8, 3, 3)
values, index = nm.pack(weight, 1, 4)
y = nm.conv2d(torch.randn(3, 32, 9, 11), values, index, None, None, None, (1, 4), (3, 3), (2, 2),
              (1, 1), (1, 1), 1, "silu")
z = nm.linear(torch.randn(21, 32), *nm.pack(weight[:, :, 0, 0], 1, 4), None, None, None, (1, 4),
              "gelu")
print(native.instruction_set(), float(y.double().sum()), float(z.double().sum()))
"""


def test_all_instruction_sets_and_the_plain_path_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["reference"]
    if native._module is not None:
        names += native._module.instruction_sets()
    sums = {}
    for name in names:
        monkeypatch.setenv("TENFOLD_KERNELS", name)
        done = subprocess.run(
            [sys.executable, "-c", COMPARE], capture_output=True, text=True, check=True
        )
        used, y, z = done.stdout.split()
        assert used == ("None" if name == "reference" else name)
        sums[name] = (float(y), float(z))
    for name, found in sums.items():
        assert found == pytest.approx(sums["reference"], rel=1e-5), name


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.missing():
        pytest.skip("needs compiled kernels")
    monkeypatch.setenv("TENFOLD_KERNELS", "avx1024")
    done = subprocess.run(
        [sys.executable, "-c", "import tenfold.kernels.nm"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert (
        "TENFOLD_KERNELS=avx1024: expected reference or one that this processor runs" in done.stderr
    )


def test_the_peak_is_more_with_registers_than_with_the_cache() -> None:
    peaks = native.peak()
    if peaks is None:
        assert native.missing()
    else:
        assert 1e9 < peaks[0] < 2e11  # two AVX-512 units at 6 GHz
        assert 0.2 * peaks[0] < peaks[1] < 1.2 * peaks[0]


THREADS = """
import os, torch
from tenfold.kernels import native, nm
torch.set_num_threads(2)
def threads(): return len(os.listdir("/proc/self/task"))
a = torch.randn(600, 600)
a @ a; torch.randn(1 << 22).sin()
before = threads()
weight = torch.zeros(64, 64, 3, 3); weight[:, ::4] = torch.randn(64, 16, 3, 3)
values, index = nm.pack(weight, 1, 4)
for _ in range(3):
    nm.conv2d(torch.randn(1, 64, 40, 40), values, index, None, None, None, (1, 4), (3, 3))
print(native.instruction_set(), before, threads())
"""


def test_kernels_run_on_pytorchs_own_threads() -> None:
    """One pool of threads for both: nothing is oversubscribed."""
    if native.missing() or not Path("/proc/self/task").is_dir():
        pytest.skip("needs compiled kernels and /proc")
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, check=True
    )
    _, before, after = done.stdout.split()
    assert int(after) == int(before)
