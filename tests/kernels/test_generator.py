"""The generator kernel against the networks that it stands for, and against its reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.kernels.generator import generator
from tenfold.kernels.generator_program import (
    IMAGE,
    Activation,
    Norm,
    Op,
    Step,
    as_program,
    macs,
    pack_bias,
    pack_weight,
    steps_of,
    unpack_weight,
)
from tenfold.kernels.generator_reference import generator_reference
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator
from tenfold.nn.packed_generator import PackedGenerator

pytestmark = pytest.mark.parity

CASES = [
    # kind, ngf, channels, outputs, blocks, batch, height, width, norm
    (MobileResNetGenerator, 16, 3, 3, 2, 1, 64, 64, "instance"),
    (MobileResNetGenerator, 5, 1, 1, 3, 2, 32, 48, "instance"),
    (MobileResNetGenerator, 12, 3, 3, 1, 1, 36, 100, "instance"),
    (MobileResNetGenerator, 3, 2, 4, 2, 3, 40, 16, "batch"),
    (MobileResNetGenerator, 8, 3, 5, 2, 1, 128, 132, "instance"),
    (MobileResNetGenerator, 1, 3, 2, 1, 1, 8, 12, "instance"),
    (ResNetGenerator, 6, 3, 3, 2, 1, 64, 64, "instance"),
    (ResNetGenerator, 5, 1, 1, 2, 2, 32, 48, "instance"),
    (ResNetGenerator, 40, 3, 3, 1, 1, 24, 20, "instance"),  # weights that leave the cache
    (ResNetGenerator, 4, 2, 4, 1, 2, 40, 16, "batch"),
]


def network(kind: type, ngf: int, channels: int, outputs: int, blocks: int, norm: str) -> nn.Module:
    """Return a network whose maps are large, and biases and running statistics matter."""
    made = kind(ngf, channels, outputs, norm, blocks).eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight *= 3
            if module.bias is not None:
                module.bias.normal_(0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_network_in_double_precision(case: tuple) -> None:
    kind, ngf, channels, outputs, blocks, batch, height, width, norm = case
    torch.manual_seed(0)
    model = network(kind, ngf, channels, outputs, blocks, norm)
    packed = PackedGenerator.from_network(model)
    x = torch.rand(batch, channels, height, width) * 2.4 - 1.2
    expected = model.double()(x.double())
    assert float(expected.std()) > 0.05
    for form in (packed(x), generator_reference(x, packed.weights, packed.program, 1e-5)):
        assert form.shape == expected.shape
        assert float((form - expected).abs().max()) < 2e-5
    # Images in other strides are no other images.
    for same in (x.to(memory_format=torch.channels_last), x.repeat_interleave(2, -1)[..., ::2]):
        torch.testing.assert_close(packed(same), packed(x), atol=2e-5, rtol=0)


@pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels")
def test_every_instruction_set_is_right() -> None:
    extension, now = native.extension(), native.instruction_set()
    torch.manual_seed(0)
    model = network(MobileResNetGenerator, 6, 3, 3, 2, "instance")
    packed = PackedGenerator.from_network(model)
    x = torch.rand(1, 3, 44, 36) * 2 - 1
    expected = model.double()(x.double())
    try:
        for name in extension.instruction_sets():
            extension.use(name)
            assert float((packed(x) - expected).abs().max()) < 2e-5, name
    finally:
        extension.use(now)


@pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    model = network(MobileResNetGenerator, 8, 3, 3, 2, "instance")
    packed = PackedGenerator.from_network(model)
    x = torch.rand(2, 3, 72, 64) * 2 - 1
    try:
        torch.set_num_threads(1)
        expected = packed(x)
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(packed(x), expected)
    finally:
        torch.set_num_threads(before)


def test_a_large_mean_leaves_the_norm_right() -> None:
    """Means a thousand deviations away: sums of squares alone would lose the variance."""
    torch.manual_seed(0)
    model = network(ResNetGenerator, 8, 1, 1, 1, "instance")
    first = model.model[1]
    first.weight.normal_(0, 1e-3)
    first.weight += 1
    packed = PackedGenerator.from_network(model)
    x = 0.9 + 0.01 * torch.rand(1, 1, 64, 64)
    expected = model.double()(x.double())
    plain = float((model.float()(x) - expected).abs().max())
    assert float((packed(x) - expected).abs().max()) < max(2e-5, 2 * plain)


def test_nan_stays_in_its_image() -> None:
    torch.manual_seed(0)
    packed = PackedGenerator.from_network(network(MobileResNetGenerator, 4, 3, 3, 1, "instance"))
    x = torch.rand(3, 3, 32, 32)
    x[1, 0, 5, 5] = float("nan")
    y = packed(x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], packed(x[::2]))


@pytest.mark.parametrize("outputs", [1, 3, 4, 5, 8, 9])
def test_weights_are_packed_without_loss(outputs: int) -> None:
    for op, kernel in ((Op.CONVOLUTION, 7), (Op.DOWN, 3), (Op.UP, 3), (Op.POINTWISE, 1)):
        weight = torch.randn(outputs, 3, kernel, kernel)
        weight = weight.transpose(0, 1).contiguous() if op == Op.UP else weight
        step = Step(op, 3, outputs, kernel, IMAGE, IMAGE)
        packed = pack_weight(op, weight)
        assert packed.shape == (step.weights,)
        assert torch.equal(unpack_weight(step, packed), weight)
    assert pack_bias(torch.ones(outputs)).sum() == outputs


def program(**changes: object) -> tuple[int, ...]:
    """Return a program of two steps, the second one changed."""
    weight = {"op": Op.CONVOLUTION, "channels": 4, "outputs": 2, "kernel": 3, "reads": 0,
              "writes": IMAGE, "norm": Norm.INSTANCE, "activation": Activation.RELU,
              "weight": 64}  # fmt: skip
    first = Step(Op.CONVOLUTION, 1, 4, 3, IMAGE, 0, measured=True)
    return as_program([first, Step(**{**weight, **changes})])


def test_a_program_of_two_steps() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 1, 3, 3), torch.randn(2, 4, 3, 3)
    weights = torch.cat([pack_weight(Op.CONVOLUTION, a), torch.zeros(28),
                         pack_weight(Op.CONVOLUTION, b)])  # fmt: skip
    x = torch.randn(2, 1, 9, 11)

    def padded(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")

    y = nn.functional.instance_norm(nn.functional.conv2d(padded(x), a)).relu()
    expected = nn.functional.conv2d(padded(y), b).tanh()
    torch.testing.assert_close(generator(x, weights, program()), expected, atol=1e-5, rtol=1e-5)
    assert macs(program(), 9, 11) == 9 * 11 * 9 * (4 + 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": 5}, "kernel 5"),
        ({"channels": 3}, "after 4 outputs"),
        ({"reads": 1}, "reads 1"),
        ({"writes": 1}, "writes 1"),
        ({"norm": Norm.NONE}, "go together"),
        ({"norm": Norm.GIVEN}, "go together"),
        ({"add": 2}, "doesn't hold"),
        ({"add": 7}, "maps go from"),
        ({"keep": 0}, "writes a map that it reads"),
        ({"weight": -64}, "weights at"),
        ({"op": Op.UP}, "last one"),
        ({"op": Op.DOWN}, "another size"),
        ({"op": Op.POINTWISE, "kernel": 1}, "only normalises"),
        ({"measured": True}, "isn't measured"),
    ],
)
def test_refuses_programs_that_would_read_elsewhere(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        steps_of(program(**changes))


def test_refuses_other_numbers_sizes_and_weights() -> None:
    right, x = program(), torch.zeros(1, 1, 8, 8)
    weights = torch.zeros(64 + 144)
    for wrong in ((), right[:-1], (9, *right[1:])):
        with pytest.raises(UserError, match="program"):
            steps_of(wrong)
    for image in (torch.zeros(1, 2, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 1, 1, 8)):
        with pytest.raises(UserError, match="generator got images"):
            generator(image, weights, right)
    with pytest.raises(UserError, match="expected 208 in a row"):
        generator(x, weights[:-1], right)
    assert generator(torch.zeros(0, 1, 8, 8), weights, right).shape == (0, 2, 8, 8)


def test_is_traced_and_compiled() -> None:
    torch.manual_seed(0)
    packed = PackedGenerator.from_network(network(MobileResNetGenerator, 4, 3, 3, 1, "instance"))
    x = torch.rand(2, 3, 16, 24)
    sizes = {0: torch.export.Dim("batch"), 2: 4 * torch.export.Dim("h", min=2, max=99)}
    exported = torch.export.export(packed, (x,), dynamic_shapes=(sizes,))
    assert "tenfold.generator.default" in {str(node.target) for node in exported.graph.nodes}
    taller = torch.rand(3, 3, 32, 24)
    torch.testing.assert_close(exported.module()(taller), packed(taller))
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), packed(x))
    torch.library.opcheck(
        torch.ops.tenfold.generator.default,
        (x, packed.weights, list(packed.program), 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_other_types_are_computed_by_pytorch() -> None:
    torch.manual_seed(0)
    model = network(MobileResNetGenerator, 4, 3, 3, 1, "instance").double()
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    packed = PackedGenerator.from_network(model.float())
    expected = model.double()(x)
    y = generator(x, packed.weights, packed.program)
    assert y.dtype == torch.float64
    assert float((y - expected).abs().max()) < 1e-9


def test_numbers_of_rows_around_a_band() -> None:
    """Bands are eight rows: sides of one more and one less, and images of less than a band."""
    torch.manual_seed(0)
    model = network(ResNetGenerator, 4, 1, 3, 1, "instance")
    packed = PackedGenerator.from_network(model)
    model = model.double()
    for height, width in itertools.product((8, 28, 32, 36), (8, 60, 68)):
        x = torch.rand(1, 1, height, width) * 2 - 1
        assert float((packed(x) - model(x.double())).abs().max()) < 2e-5, (height, width)
