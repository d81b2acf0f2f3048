"""Compiled LAB against the formulas in double precision, and what is left to the formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.kernels import native
from tenfold.kernels.lab import compiled, lab_of_rgb, rgb_of_lab

pytestmark = pytest.mark.parity

# Vectors of every width end within these, and blocks of 512.
SIZES = [(1, 1), (1, 3), (3, 5), (4, 4), (1, 17), (9, 7), (16, 32), (19, 27), (1, 1025)]
CODES = torch.tensor([100.0, 255, 255])[:, None, None], torch.tensor([0.0, 128, 128])[:, None, None]


def images(draw: st.DrawFn) -> Tensor:
    """uint8, noise or few levels, of any layout."""
    shape = (*draw(st.sampled_from([(), (1,), (2,), (2, 3)])), 3, *draw(st.sampled_from(SIZES)))
    torch.manual_seed(draw(st.integers(0, 999)))
    levels = draw(st.sampled_from([range(256), range(14), (0,), (255,), (0, 255), (10, 11)]))
    made = torch.tensor(list(levels), dtype=torch.uint8)[torch.randint(len(levels), shape)]
    layout = draw(st.sampled_from(["contiguous", "channels last", "every second"]))
    if layout == "channels last":
        return made.movedim(-3, -1).contiguous().movedim(-1, -3)
    return made.repeat_interleave(2, dim=-1)[..., ::2] if layout == "every second" else made


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_double_precision(data: st.DataObject) -> None:
    given = images(data.draw)
    exact = lab_of_rgb(given.double() / 255)
    scale, shift = CODES
    with torch.no_grad():
        for colours in (given, given.float() / 255):
            lab, codes = lab_of_rgb(colours), lab_of_rgb(colours, codes=True)
            assert lab.dtype == codes.dtype == torch.float32
            assert lab.is_contiguous()
            assert (lab - exact).abs().max() < 1e-4
            assert (codes - (exact + shift) / scale).abs().max() < 1e-6
            for back, in_codes in ((lab, False), (codes, True)):
                assert torch.equal(rgb_of_lab(back, in_codes, as_bytes=True), given)
                assert (rgb_of_lab(back, in_codes) - given / 255.0).abs().max() < 1e-5


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_colours_beyond_the_screen_are_clipped(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    size = data.draw(st.sampled_from(SIZES))
    lab = torch.rand(2, 3, *size) * torch.tensor([140.0, 300, 300])[:, None, None]
    lab -= torch.tensor([20.0, 150, 150])[:, None, None]
    exact = rgb_of_lab(lab.double())
    with torch.no_grad():
        found, levels = rgb_of_lab(lab), rgb_of_lab(lab, as_bytes=True)
        assert (found - exact).abs().max() < 2e-5
        assert (levels - 255 * exact).abs().max() < 0.5 + 1e-3
        assert (
            rgb_of_lab(lab, clip=False).max() == rgb_of_lab(lab.requires_grad_(), clip=False).max()
        )


def test_every_level_of_grey_is_right_and_grey() -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    exact = lab_of_rgb(levels.double() / 255)
    lab = lab_of_rgb(levels)
    # The matrix itself leaves a tint of up to 0.005 in white.
    assert (lab - exact).abs().max() < 6e-5
    assert lab[:, 1:].abs().max() < 5e-3
    assert lab[0, 0, 0].diff().min() > 0


def test_what_is_not_finite_stays_in_its_pixel() -> None:
    colours = torch.rand(1, 3, 4, 9)
    colours[0, 1, 2, 3] = float("nan")
    with torch.no_grad():
        lab = lab_of_rgb(colours)
        assert lab.isnan().any(1).nonzero().tolist() == [[0, 2, 3]]
        assert rgb_of_lab(lab).isnan().any(1).nonzero().tolist() == [[0, 2, 3]]


def test_gradients_and_half_precision_are_the_formulas() -> None:
    colours = torch.rand(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lab_of_rgb(x, codes=True), (colours,))
    codes = lab_of_rgb(colours.detach(), codes=True).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rgb_of_lab(x, True, clip=False), (codes,))
    for dtype, bound in ((torch.float16, 0.07), (torch.bfloat16, 0.5)):
        half = lab_of_rgb(colours.detach().to(dtype))
        assert half.dtype == dtype
        assert (half - lab_of_rgb(colours.detach().to(dtype).double())).abs().max() < bound
        assert rgb_of_lab(half).dtype == dtype
    _, tangent = torch.func.jvp(lab_of_rgb, (colours,), (torch.ones_like(colours),))
    assert (tangent[:, 0] > 0).all()
    levels = (colours.detach() * 255).to(torch.uint8)
    mapped = torch.vmap(lab_of_rgb)(levels)
    torch.testing.assert_close(mapped, lab_of_rgb(levels), atol=1e-4, rtol=0)


class Net(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rgb_of_lab(lab_of_rgb(x, codes=True), codes=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_is_traced_into_plain_operators() -> None:
    net = Net()
    for x in (torch.rand(2, 3, 4, 5), torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)):
        with torch.no_grad():
            expected = net(x)
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(net, (x,), dynamic_shapes=shapes)
            assert not any("tenfold" in str(node.target) for node in program.graph.nodes)
            made = (
                program.module(),
                torch.compile(net, backend="aot_eager", fullgraph=True),
                torch.jit.trace(net, (x,)),
            )
            for each in made:
                torch.testing.assert_close(each(x), expected, atol=1e-5, rtol=0)
                torch.testing.assert_close(each(x.flip(0)), net(x.flip(0)), atol=1e-5, rtol=0)


def test_nothing_is_nothing() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        empty = torch.empty(shape, dtype=torch.uint8)
        assert lab_of_rgb(empty).shape == shape
        assert not compiled(empty)
    levels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert compiled(levels) == (native.instruction_set() is not None)
    assert not compiled(levels, levels.to("meta"))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    levels = torch.randint(256, (5, 3, 150, 171), dtype=torch.uint8)
    try:
        torch.set_num_threads(1)
        expected = lab_of_rgb(levels)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            if native.instruction_set() is not None:
                assert torch.equal(lab_of_rgb(levels), expected)
            assert torch.equal(rgb_of_lab(expected, as_bytes=True), levels)
    finally:
        torch.set_num_threads(before)
