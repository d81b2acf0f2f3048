"""The compiled 3-D Winograd convolution against dense layers in float64."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native, native3d, winograd, winograd_reference
from tenfold.kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.parity

NO_SHORT = (False, False, False)
# Of the largest sum, beside which rounding in float32 is measured; larger tiles round more.
TOLERANCE = {0: 2e-6, 1: 5e-6, 2: 1e-5, 3: 2e-5}
LAYOUTS = ("contiguous", "channels_last", "every second")


def clip(shape: tuple[int, ...], layout: str) -> Tensor:
    if layout == "channels_last":
        return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)
    if layout == "every second":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return torch.randn(shape)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def close(given: Tensor, expected: Tensor, sums: Tensor, tile: tuple[int, int, int]) -> None:
    assert given.shape == expected.shape
    assert given.dtype == torch.float32
    if expected.numel():
        size = float(sums.abs().max().clamp_min(1e-3))
        assert float((given - expected).abs().max()) < TOLERANCE[tile.count(4)] * size


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_the_dense_convolution_in_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    tile = draw(st.sampled_from(list(product((2, 4), repeat=3))))
    short = tuple(m == 2 and draw(st.integers(0, 3)) == 0 for m in tile)
    padding = tuple(1 if s else draw(st.integers(0, 2)) for s in short)
    size = tuple(
        2 if s else draw(st.integers(max(1, 3 - 2 * p), 14))
        for s, p in zip(short, padding, strict=True)
    )
    channels, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    batch = draw(st.integers(0, 3))
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    pool = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(3))
    points = draw(st.sampled_from(["accurate", "accurate", "dyadic"]))
    torch.manual_seed(draw(st.integers(0, 999)))

    x = clip((batch, channels, *size), draw(st.sampled_from(LAYOUTS)))
    weight = torch.randn(outputs, channels, 3, 3, 3) / (5 * channels**0.5)
    bias = torch.randn(outputs) if draw(st.booleans()) else None
    sums = F.conv3d(x.double(), weight.double(), double(bias), padding=padding)
    add = clip(tuple(sums.shape), draw(st.sampled_from(LAYOUTS))) if draw(st.booleans()) else None
    sums = sums if add is None else sums + add
    windows = [n // w for n, w in zip(sums.shape[2:], pool, strict=True)]
    if min(windows) < 1:
        pool = (1, 1, 1)
    values = winograd.domain_weight(weight, tile, short, points)
    given = winograd.conv3d(
        x, winograd.pack(values), bias, add, range(len(values)), outputs, tile, padding, points,
        activation, pool, short,
    )  # fmt: skip
    expected = ACTIVATIONS[activation](sums)
    expected = F.max_pool3d(expected, pool) if batch else expected.new_empty(given.shape)
    tolerated = tile if points == "accurate" else (4, 4, 4)
    close(given, expected, sums if sums.numel() else torch.ones(1), tolerated)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_kept_columns_equal_the_plain_path_in_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    tile = draw(st.sampled_from([(2, 2, 2), (2, 4, 4), (4, 4, 4), (4, 2, 4)]))
    most = math.prod(m + 2 for m in tile)
    kept = sorted(draw(st.sets(st.integers(0, most - 1), min_size=1, max_size=most)))
    channels, outputs = draw(st.integers(1, 36)), draw(st.integers(1, 40))
    size = tuple(draw(st.integers(3, 11)) for _ in range(3))
    torch.manual_seed(draw(st.integers(0, 999)))
    x = clip((2, channels, *size), draw(st.sampled_from(LAYOUTS)))
    values = torch.randn(len(kept), outputs, channels) / channels**0.5
    expected = winograd_reference.conv3d(
        x.double(), values.double(), kept, None, tile, (1, 1, 1), "accurate"
    )
    given = winograd.conv3d(
        x, winograd.pack(values), None, None, kept, outputs, tile, (1, 1, 1), "accurate"
    )
    close(given, expected, expected, tile)


def problem(
    channels: int = 20, outputs: int = 40, tile: tuple[int, int, int] = (2, 4, 4)
) -> tuple[Tensor, tuple[object, ...]]:
    """Return a dense weight, and the operator's arguments behind x."""
    weight = torch.randn(outputs, channels, 3, 3, 3) / (5 * channels**0.5)
    values = winograd.domain_weight(weight, tile, NO_SHORT, "accurate")
    columns = tuple(range(len(values)))
    return weight, (
        winograd.pack(values), None, None, columns, outputs, tile, (1, 1, 1), "accurate", "relu",
        (1, 1, 1), NO_SHORT, False,
    )  # fmt: skip


def test_results_lie_as_the_input_does_or_channels_last_on_request() -> None:
    _, arguments = problem()
    x = torch.randn(2, 20, 4, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    y, of_last = winograd.conv3d(x, *arguments), winograd.conv3d(last, *arguments)
    on_request = winograd.conv3d(x, *arguments[:-1], True)
    assert y.is_contiguous()
    assert of_last.is_contiguous(memory_format=torch.channels_last_3d)
    assert on_request.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(y, of_last)
    assert torch.equal(y, on_request)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 16, 2), (8, 33, 40), (2, 100, 3)])
def test_packing_keeps_every_value(shape: tuple[int, int, int]) -> None:
    values = torch.randn(shape)
    packed = winograd.pack(values)
    assert packed.shape == (shape[0], -(-shape[1] // 32), shape[2], 32)
    assert torch.equal(winograd.unpack(packed, shape[1]), values)
    assert float(packed.sum() - values.sum()) == pytest.approx(0, abs=1e-3)  # zeros behind


def test_a_short_axis_saves_a_quarter_of_the_columns_and_computes_the_same() -> None:
    weight = torch.randn(6, 5, 3, 3, 3).double()
    every = product((False, True), repeat=3)
    for short in every:
        values = winograd.domain_weight(weight, (2, 2, 2), short, "standard")
        assert len(values) == 4 ** short.count(False) * 3 ** short.count(True)
        again = winograd.short_to_two(values, (2, 2, 2), short)
        full = winograd.domain_weight(weight, (2, 2, 2), NO_SHORT, "standard")
        torch.testing.assert_close(again, full)


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 37])
def test_reordering_is_exact(channels: int) -> None:
    if native.missing():
        pytest.skip("the compiled kernels' own")
    for size in ((1, 1, 1), (2, 3, 5), (4, 4, 8)):
        x = torch.randn(2, channels, *size)
        last = native3d.channels_last(x)
        assert torch.equal(last, x)
        assert last.is_contiguous(memory_format=torch.channels_last_3d)
        first = native3d.channels_first(last)
        assert torch.equal(first, x)
        assert first.is_contiguous()


def test_what_the_kernel_would_misread_is_refused() -> None:
    weight, arguments = problem()
    x = torch.randn(1, 20, 4, 5, 6)
    packed, columns = arguments[0], arguments[3]
    rest = (40, (2, 4, 4), (1, 1, 1), "accurate")
    refused = [
        (torch.randn(1, 21, 4, 5, 6), packed, columns, *rest, r"expected \(N, 20, D, H, W\)"),
        (x[0], packed, columns, *rest, r"expected \(N, 20, D, H, W\)"),
        (x, packed, columns[:-1], *rest, "don't fit"),
        (x, packed, (*columns[:-1], 144), *rest, "don't fit"),
        (x, packed, (1, 0, *columns[2:]), *rest, "don't fit"),
        (x, packed, columns, 80, *rest[1:], "don't fit"),
        (x, packed, columns, 40, (2, 4, 3), *rest[2:], "don't fit"),
        (x, packed, columns, 40, (2, 4, 4), (-1, 1, 1), "accurate", "don't fit"),
        (torch.randn(1, 20, 4, 0, 6), packed, columns, *rest, "at least 3 positions"),
    ]
    for of_input, of_weight, kept, outputs, tile, padding, points, message in refused:
        with pytest.raises(UserError, match=message):
            winograd.conv3d(of_input, of_weight, None, None, kept, outputs, tile, padding, points)
    short = (True, False, False)
    fewer = winograd.pack(winograd.domain_weight(weight, (2, 4, 4), short, "accurate"))
    with pytest.raises(UserError, match=r"axis 0 .* is no short one"):
        winograd.conv3d(x, fewer, None, None, range(108), *rest, "none", (1, 1, 1), short)
    if native.missing():
        return
    with pytest.raises(UserError, match=r"add has type .* shape \(1, 40, 4, 5, 5\): expected"):
        winograd.conv3d(x, packed, None, torch.randn(1, 40, 4, 5, 5), *arguments[3:])
    with pytest.raises(UserError, match="bias has type"):
        winograd.conv3d(x, packed, torch.zeros(39), None, *arguments[3:])


def test_the_operator_is_traced_and_compiled() -> None:
    _, arguments = problem()

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return winograd.conv3d(x, *arguments).mean(dim=(2, 3, 4))

    x = torch.randn(2, 20, 5, 6, 7)
    program = torch.export.export(Net(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "tenfold.winograd_conv3d.default" in {str(node.target) for node in program.graph.nodes}
    wider = torch.randn(5, 20, 5, 6, 7)
    torch.testing.assert_close(program.module()(wider), Net()(wider))
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), Net()(x))


def test_the_operator_passes_pytorchs_own_checks() -> None:
    _, arguments = problem()
    for x in (clip((2, 20, 4, 5, 6), layout) for layout in LAYOUTS):
        torch.library.opcheck(
            torch.ops.tenfold.winograd_conv3d.default,
            (x, *arguments[:9], (1, 2, 2), *arguments[10:]),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    inputs = [torch.randn(1, 20, 4, 9, 4 + 3 * i) for i in range(4)]
    _, arguments = problem()
    expected = [winograd.conv3d(x, *arguments) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(winograd.conv3d(inputs[i], *arguments), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    # Blocks apart, and, where the weights are large, together.
    cases = [((16, 24), (1, 16, 5, 33, 40)), ((256, 160), (1, 256, 4, 6, 7))]
    try:
        for (channels, outputs), shape in cases:
            _, arguments = problem(channels, outputs, (2, 2, 2))
            x = torch.randn(shape)
            torch.set_num_threads(1)
            expected = winograd.conv3d(x, *arguments)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(winograd.conv3d(x, *arguments), expected)
    finally:
        torch.set_num_threads(before)


def test_nan_is_seen_behind_a_maximum() -> None:
    _, arguments = problem()
    x = torch.randn(1, 20, 4, 4, 8)
    x[..., 0] = float("nan")
    y = winograd.conv3d(x, *arguments[:9], (2, 2, 2), *arguments[10:])
    assert y[..., 0].isnan().all()
    assert not y[..., 3].isnan().any()  # of another tile


COMPARE = """
import torch
from tenfold.kernels import native, winograd
torch.manual_seed(0)
sums = []
for tile, size in (((2, 4, 4), (3, 9, 10)), ((4, 4, 4), (5, 7, 6)), ((2, 2, 2), (2, 7, 7))):
    short = tuple(n == 2 for n in size)
    values = winograd.domain_weight(torch.randn(44, 21, 3, 3, 3), tile, short, "accurate")
    y = winograd.conv3d(torch.randn(2, 21, *size), winograd.pack(values), torch.randn(44), None,
                        range(len(values)), 44, tile, (1, 1, 1), "accurate", "gelu", (1, 2, 2),
                        short)
    sums.append(float(y.double().sum()))
print(native.instruction_set(), *sums)
"""


def test_all_instruction_sets_and_the_plain_path_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["reference"]
    if native._module is not None:
        names += native._module.instruction_sets()
    found = {}
    for name in names:
        monkeypatch.setenv("TENFOLD_KERNELS", name)
        done = subprocess.run(
            [sys.executable, "-c", COMPARE], capture_output=True, text=True, check=True
        )
        used, *sums = done.stdout.split()
        assert used == ("None" if name == "reference" else name)
        found[name] = [float(each) for each in sums]
    for name, sums in found.items():
        assert sums == pytest.approx(found["reference"], rel=1e-5), name
