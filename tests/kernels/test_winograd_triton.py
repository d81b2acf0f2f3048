"""The Triton kernels against the plain form: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tenfold.deploy import semi_structured
from tenfold.deploy.candidates import find_layers
from tenfold.deploy.choose import Target, choose_layers
from tenfold.errors import UserError
from tenfold.kernels import winograd_reference, winograd_triton
from tenfold.kernels.winograd_transforms import column_count, tile_of
from tenfold.nn.winograd import WinogradConv3d

pytest.importorskip("triton", reason="comes with PyTorch for CUDA")
pytestmark = pytest.mark.parity
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Have them used here, where no GPU is, by being interpreted (see tests/conftest.py)."""
    monkeypatch.setattr(winograd_triton, "_DEVICE", DEVICE)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("tile", "step", "size", "padding", "channels", "bias"),
    [
        (2, 1, (3, 5, 4), (1, 0, 2), (5, 3), True),
        (2, 3, (4, 4, 4), (0, 0, 0), (2, 66), False),
        (4, 1, (1, 6, 5), (1, 1, 1), (3, 2), True),
        ((2, 4, 2), 7, (4, 3, 5), (0, 1, 1), (1, 4), True),
    ],
)
def test_equals_the_plain_form(tile, step, size, padding, channels, bias):
    columns = tuple(range(0, column_count(tile_of(tile)), step))
    x, values = random(2, channels[0], *size), random(len(columns), channels[1], channels[0])
    offset = random(channels[1], seed=1) if bias else None
    given = (values, columns, offset, tile, padding, "accurate")
    found = winograd_triton.conv3d(x, *given)
    expected = winograd_reference.conv3d(x, *given)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert difference(found, expected) < 2e-6
    last = x.contiguous(memory_format=torch.channels_last_3d)
    if tile == 2:  # being interpreted takes seconds
        again = winograd_triton.conv3d(last, *given)
        assert again.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(again, found)


def test_parts_change_nothing(monkeypatch):
    x, values = random(3, 2, 3, 3, 4), random(64, 2, 2)
    given = (values, range(64), None, 2, (1, 1, 1), "standard")
    whole = winograd_triton.conv3d(x, *given)
    monkeypatch.setattr(winograd_triton, "_MOST_BYTES", 1)
    torch.testing.assert_close(winograd_triton.conv3d(x, *given), whole)


def test_half_precision_reaches_the_products_alone():
    x, values = random(1, 4, 4, 4, 4), random(64, 4, 4)
    given = (values, range(64), None, 2, (1, 1, 1), "accurate")
    found = winograd_triton.conv3d(x.bfloat16(), *given)
    assert found.dtype == torch.bfloat16
    assert difference(found.float(), winograd_reference.conv3d(x, *given)) < 3e-2


@pytest.fixture
def calls(monkeypatch):
    """Nothing is proven yet; returns what the kernels were asked for."""
    seen = []
    kernel = winograd_triton.conv3d
    monkeypatch.setattr(
        winograd_triton, "conv3d", lambda *given: seen.append(given) or kernel(*given)
    )
    monkeypatch.setattr(winograd_triton, "_proven", {})
    return seen


def test_the_layer_uses_it(calls, monkeypatch):
    dense = torch.nn.Conv3d(2, 3, 3, padding=1).to(DEVICE)
    layer = WinogradConv3d.from_dense(dense, 2, name="a.b")
    x = random(1, 2, 3, 4, 3)
    with torch.no_grad():
        layer(torch.zeros_like(x) * float("nan"))
        assert not calls  # nothing can be learned of it
        layer(x)
        assert list(winograd_triton._proven.values()) == [True]
        with monkeypatch.context() as patch:
            patch.setattr(winograd_reference, "conv3d", None)
            torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-4)
    assert len(calls) == 2
    layer(x.clone().requires_grad_())  # has a gradient: the plain form
    with torch.no_grad():
        layer.double()(x.double())
    assert len(calls) == 2
    with torch.no_grad(), pytest.raises(UserError, match=r"layer a\.b: input of shape"):
        layer.float()(random(1, 3, 3, 4, 3))


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (lambda x, *given: winograd_reference.conv3d(x, *given) * 1.1, "differ by 1.0e-01"),
        (lambda x, *given: torch.full((1, 1, 1, 1, 1), torch.nan), "differ by nan"),
        (lambda x, *given: 1 / 0, "fail .ZeroDivisionError: division by zero"),
    ],
)
def test_kernels_that_are_wrong_at_first_are_not_used(kernel, text, monkeypatch):
    monkeypatch.setattr(winograd_triton, "_proven", {})
    monkeypatch.setattr(winograd_triton, "conv3d", kernel)
    x, values = random(1, 2, 3, 3, 4), random(64, 2, 2)
    given = (x, values, range(64), None, 2, (1, 1, 1), "standard")
    expected = winograd_reference.conv3d(*given)
    with pytest.warns(UserWarning, match=rf"tile \(2, 2, 2\) {text}.*; plain PyTorch is used"):
        assert torch.equal(winograd_triton.convolve(*given), expected)
    monkeypatch.setattr(winograd_triton, "conv3d", None)
    assert torch.equal(winograd_triton.convolve(*given), expected)  # and no second warning


def test_what_it_takes(monkeypatch):
    x = torch.zeros(1, 1, 3, 3, 3, device=DEVICE)
    assert winograd_triton.takes(x)
    assert not winograd_triton.takes(x.double())
    assert not winograd_triton.takes(x.requires_grad_())
    with torch.no_grad():
        assert winograd_triton.takes(x)
        monkeypatch.setattr(winograd_triton, "_DEVICE", "cuda")
        # Interpreted on a CPU only where a test says so: it takes minutes.
        assert winograd_triton.takes(x) == (DEVICE == "cuda")


def test_optimize_leaves_winograd_layers_to_them_on_a_gpu(monkeypatch):
    monkeypatch.setattr(semi_structured, "missing", lambda device: "no 2:4 tensor cores")
    dense = torch.nn.Conv3d(2, 2, 3, padding=1)
    network = torch.nn.Sequential(WinogradConv3d.from_dense(dense, 2), dense)
    layers = find_layers(network, (torch.zeros(1, 2, 3, 3, 3),))
    found = choose_layers(layers, Target("float32", torch.device("cuda")), "time")
    assert not found.rankings
    reasons = {row.layer: str(row.reason) for row in found.rows}
    assert reasons["0"] == "it is computed by Triton kernels as it is, where there is Triton"
    assert reasons["1"].startswith("the kernels of 3-D convolutions are for a CPU")


@pytest.mark.parametrize(
    ("x", "padding"),
    [
        (torch.zeros(1, 3, 4, 4, 4), (0, 0, 0)),
        (torch.zeros(1, 2, 4, 4), (0, 0, 0)),
        (torch.zeros(1, 2, 2, 4, 4), (0, 0, 0)),
        (torch.zeros(1, 2, 4, 4, 4), (0, 0)),
    ],
)
def test_refusals(x, padding):
    with pytest.raises(UserError, match=r"expected \(N, 2, D, H, W\) with at least 3 positions"):
        winograd_triton.conv3d(x, torch.zeros(64, 1, 2), range(64), None, 2, padding, "accurate")


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tenfold.kernels import winograd_triton, winograd_triton_kernels as kernels
from tenfold.kernels.winograd_domain import domain_of

domain = domain_of((2, 2, 2), "accurate", tuple(range(64)))
rows = winograd_triton._rows(domain, torch.device("cpu"))
fixed = {"B_H": rows.input_height, "B_W": rows.input_width, "A_H": rows.output_height}
fixed |= {"A_W": rows.output_width, "M_D": 2, "M_H": 2, "M_W": 2, "BIAS": True}
fixed |= {"BLOCK_P": 2, "BLOCK_C": 64}
pointers = {"depth_rows_ptr": "*fp32", "slots_ptr": "*i32", "bias_ptr": "*fp32"}
for kernel in (kernels.input_kernel, kernels.output_kernel):
    types = {
        name: "constexpr" if name in fixed
        else pointers.get(name, "*fp32") if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
    }
    values = {(n,): fixed[name] for n, name in enumerate(kernel.arg_names) if name in fixed}
    made = compile(ASTSource(kernel, types, values), target=GPUTarget("cuda", 80, 32))
    print(kernel.__name__, len(made.asm["cubin"]))
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there():
    """Being interpreted shows what they compute, not that a GPU's compiler takes them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert {name for name, size in found.items() if int(size) > 1000} == {
        "input_kernel",
        "output_kernel",
    }
