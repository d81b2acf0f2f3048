"""LAB-Net's kernels against the network that they stand for, and each layer against PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.kernels import labnet_layers as layers
from tenfold.kernels import native
from tenfold.kernels.labnet import labnet, nearest
from tenfold.kernels.labnet_packing import PackedNetwork
from tenfold.kernels.labnet_reference import labnet_reference
from tenfold.kernels.labnet_weights import shapes, size_of, tensors_of
from tenfold.nn.labnet import LABNet
from tenfold.nn.ring_attention import ring_of

pytestmark = pytest.mark.parity
compiled = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels")

CASES = [
    # width, attention, batch, height, width of the image, high-pass, N of M
    (4, (16, 16), 1, 65, 65, "fixed", None),
    (4, (66, 83), 2, 66, 83, "trainable", None),
    (6, (20, 31), 1, 97, 70, "trainable", None),
    (8, (64, 64), 1, 80, 129, "fixed", None),
    (8, (32, 32), 2, 65, 97, "fixed", (1, 4)),
    (10, (9, 12), 1, 66, 65, "fixed", None),
    (16, (100, 90), 1, 70, 67, "fixed", (1, 4)),
    (16, (65, 66), 1, 65, 66, "trainable", (1, 2)),
]


def network(width: int, size: tuple[int, int], highpass: str = "fixed") -> LABNet:
    """Return a network whose biases matter, and whose output is neither tiny nor huge."""
    torch.manual_seed(width)
    made = LABNet(width, size, highpass).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            parameter.normal_(0, 0.1)
    return made


def prune(model: nn.Module, n: int, m: int) -> None:
    """Keep the largest n of every m weights along the input channels, where those divide by m."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape[1] % m == 0:
            innermost = module.weight.data.movedim(1, -1)
            blocks = innermost.reshape(-1, m)
            kept = torch.zeros_like(blocks).scatter(1, blocks.abs().topk(n, 1).indices, 1.0)
            module.weight.data = (blocks * kept).reshape(innermost.shape).movedim(-1, 1)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def images(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return codes, and masks of which each is another one."""
    codes = torch.rand(batch, 3, height, width)
    mask = torch.zeros(batch, 1, height, width)
    for item in range(batch):
        mask[item, :, 20 + item : 50 - 9 * item, 7 : 40 + item] = 1
    return codes, mask


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("width", range(4, 34, 2))
def test_weights_stand_in_the_order_of_the_network(width: int) -> None:
    with torch.device("meta"):
        state = LABNet(width).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes(width)
    assert list(state) == list(shapes(width))
    assert size_of(width) == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_network_in_double_precision(case: tuple) -> None:
    width, size, batch, height, wide, highpass, pattern = case
    model = network(width, size, highpass)
    if pattern is not None:
        prune(model, *pattern)
    codes, mask = images(batch, height, wide)
    weights, ring = weights_of(model), ring_of(mask)
    expected = model.double()(codes.double(), mask.double())
    for form in (labnet, labnet_reference):
        assert error(form(codes, mask, ring, weights, width, size), expected) < 3e-6
    # Images in other strides are no other images.
    last = codes.to(memory_format=torch.channels_last)
    strided = codes.repeat_interleave(2, -1)[..., ::2], mask.bool().float()
    expected = labnet(codes, mask, ring, weights, width, size)
    torch.testing.assert_close(labnet(last, mask, ring, weights, width, size), expected)
    torch.testing.assert_close(labnet(*strided, ring, weights, width, size), expected)


@compiled
@pytest.mark.parametrize("width", range(4, 34, 2))
def test_every_width(width: int) -> None:
    size = (18, 17)
    model = network(width, size)
    codes, mask = images(1, 65, 66)
    expected = model(codes, mask)
    found = labnet(codes, mask, ring_of(mask), weights_of(model), width, size)
    assert error(found, expected) < 3e-6


@compiled
def test_every_instruction_set_is_right() -> None:
    extension, now = native.extension(), native.instruction_set()
    forms = []
    for pattern in (None, (1, 4)):
        model = network(8, (20, 20))
        if pattern:
            prune(model, *pattern)
        codes, mask = images(1, 67, 75)
        weights = weights_of(model)
        forms.append((codes, mask, weights, model.double()(codes.double(), mask.double())))
    try:
        for name, form in itertools.product(extension.instruction_sets(), forms):
            extension.use(name)
            codes, mask, weights, expected = form
            found = labnet(codes, mask, ring_of(mask), weights, 8, (20, 20))
            assert error(found, expected) < 3e-6, name
    finally:
        extension.use(now)


@compiled
def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    model = network(6, (24, 24))
    codes, mask = images(2, 70, 65)
    given = codes, mask, ring_of(mask), weights_of(model), 6, (24, 24)
    try:
        torch.set_num_threads(1)
        expected = labnet(*given)
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(labnet(*given), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(16, 16), (65, 66)])
def test_empty_and_full_masks_and_rings(size: tuple[int, int]) -> None:
    model = network(4, size)
    weights, codes = weights_of(model), torch.rand(1, 3, 65, 66)
    empty, full = torch.zeros(1, 1, 65, 66), torch.ones(1, 1, 65, 66)
    part = full.clone()
    part[..., 30:] = 0
    for mask, ring in itertools.product((empty, full, part), repeat=2):
        found = labnet(codes, mask, ring, weights, 4, size)
        assert found.isfinite().all()
        expected = model(codes, mask, ring)
        assert error(found, expected) < 3e-6


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = network(4, (20, 20))
    codes, mask = images(3, 66, 65)
    given = ring_of(mask), weights_of(model), 4, (20, 20)
    together = labnet(codes, mask, *given)
    alone = labnet(codes[1:2], mask[1:2], given[0][1:2], *given[1:])
    torch.testing.assert_close(alone, together[1:2], atol=1e-6, rtol=0)
    codes[1, 0, 5, 5] = float("nan")
    spoiled = labnet(codes, mask, *given)
    assert spoiled[1].isnan().all()
    torch.testing.assert_close(spoiled[::2], together[::2], atol=1e-6, rtol=0)


@compiled
def test_a_size_that_was_run_before_leaves_nothing_behind() -> None:
    """Working memory is kept: what a larger image left there must not be seen."""
    model = network(4, (20, 20))
    weights = weights_of(model)
    small, large = images(1, 65, 65), images(1, 130, 90)
    first = labnet(*small, ring_of(small[1]), weights, 4, (20, 20))
    large[0].mul_(float("inf"))
    labnet(*large, ring_of(large[1]), weights, 4, (20, 20))
    assert torch.equal(labnet(*small, ring_of(small[1]), weights, 4, (20, 20)), first)


@compiled
def test_weights_that_change_are_packed_anew() -> None:
    model, other = network(4, (20, 20)), network(4, (20, 20))
    for parameter in other.parameters():
        parameter.mul_(0.9)
    weights = weights_of(model)
    codes, mask = images(1, 65, 65)
    given = codes, mask, ring_of(mask), weights, 4, (20, 20)
    before = labnet(*given)
    weights.copy_(weights_of(other))
    after = labnet(*given)
    assert error(before, after) > 1e-3
    assert error(after, other(codes, mask)) < 3e-6


def test_autocast_changes_nothing() -> None:
    """Gates and shares are computed by PyTorch's operators, which would round to bfloat16."""
    model = network(4, (20, 20))
    codes, mask = images(1, 65, 65)
    given = codes, mask, ring_of(mask), weights_of(model), 4, (20, 20)
    expected = labnet(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = labnet(*given)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# -- layers ---------------------------------------------------------------------------------------


def random_map(maps: layers.Maps, x: Tensor, border: int) -> layers.Map:
    made = maps.take(*x.shape, border)
    made.fill(x)
    return made


def memory() -> layers.Maps:
    """Return maps among values that would show where they don't belong."""
    return layers.Maps(torch.full((1 << 19,), float("nan")))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    border = dilation * (weight.shape[2] // 2)
    x = F.pad(x[None].double(), (border,) * 4, "reflect")
    bias = None if bias is None else bias.double()
    return F.conv2d(x, weight.double(), bias, dilation=dilation)[0]


def thinned(weight: Tensor, kept: float) -> Tensor:
    return weight * (torch.rand_like(weight) < kept)


@compiled
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "name", native.extension().instruction_sets() if native.extension() else []
)
def test_a_stage(name: str, sparse: bool) -> None:
    """Every number of outputs around the groups, and widths around the vectors."""
    extension, now = native.extension(), native.instruction_set()
    torch.manual_seed(0)
    try:
        extension.use(name)
        for inputs, width, wide in ((4, 2, 17), (3, 4, 65), (5, 6, 96), (8, 8, 99), (7, 10, 112)):
            maps, x = memory(), torch.randn(inputs, 19, wide)
            sizes, dilations = (width // 2, width, 3 * width // 2), (1, 4, 16)
            source, out = random_map(maps, x, 16), maps.take(width, 19, wide, 5)
            given = [(thinned(torch.randn(size, inputs, 3, 3), 0.3 if sparse else 1),
                      torch.randn(size), dilation)
                     for size, dilation in zip(sizes, dilations, strict=True)]  # fmt: skip
            merge = thinned(torch.randn(width, 3 * width, 1, 1), 0.3 if sparse else 1)
            bias = torch.randn(width)
            packed = [layers.pack(*each, sparse=sparse) for each in given]
            layers.layer([source], packed, out, layers.pack(merge, bias, sparse=sparse))
            results = [F.leaky_relu(plain(x, *each), 0.2) for each in given]
            expected = F.leaky_relu(plain(torch.cat(results), merge, bias), 0.2)
            expected = F.pad(expected, (5, 5), "reflect")
            torch.testing.assert_close(
                out.view(5), expected.float(), atol=2e-5, rtol=2e-5, msg=f"{width} of {wide}"
            )
    finally:
        extension.use(now)


@compiled
@pytest.mark.parametrize("sparse", [False, True])
def test_a_pointwise_layer_reads_several_maps(sparse: bool) -> None:
    torch.manual_seed(0)
    for outputs, wide in ((1, 16), (2, 33), (3, 160), (5, 20), (9, 97)):
        maps = memory()
        parts = [torch.randn(channels, 5, wide) for channels in (3, 1, 6)]
        sources = [random_map(maps, x, border) for x, border in zip(parts, (0, 3, 12), strict=True)]
        weight = thinned(torch.randn(outputs, 10, 1, 1), 0.3 if sparse else 1)
        bias, add = torch.randn(outputs), torch.randn(outputs, 5, wide)
        packed = layers.pack(weight, bias, sources=(3, 1, 6), sparse=sparse)
        assert (packed.counts is not None) == sparse
        out, added = maps.take(outputs, 5, wide, 1), random_map(maps, add, 0)
        expected = plain(torch.cat(parts), weight, bias) + add
        layers.layer(sources, [packed], out, add=added)
        wanted = F.pad(F.leaky_relu(expected, 0.2), (1, 1), "reflect").float()
        torch.testing.assert_close(out.view(1), wanted, atol=2e-5, rtol=2e-5)
        layers.layer(sources, [packed], out, add=added, leaky=False)
        torch.testing.assert_close(out.view(), expected.float(), atol=2e-5, rtol=2e-5)
        # Channels that are weighed, by weights that are.
        factors = torch.rand(10)
        weighed = torch.cat(parts) * factors[:, None, None]
        layers.layer(sources, [packed.scaled(factors)], out, leaky=False)
        wanted = plain(weighed, weight, bias).float()
        torch.testing.assert_close(out.view(), wanted, atol=2e-5, rtol=2e-5)


@compiled
def test_results_go_to_a_part_of_a_map() -> None:
    torch.manual_seed(0)
    maps, x = memory(), torch.randn(4, 9, 30)
    source, whole = random_map(maps, x, 2), maps.take(7, 9, 30, 3)
    whole.view(3).zero_()
    weight = torch.randn(3, 4, 3, 3)
    layers.layer([source], [layers.pack(weight, None, 2)], whole.part(2, 3))
    expected = F.pad(F.leaky_relu(plain(x, weight, None, 2), 0.2), (3, 3), "reflect")
    torch.testing.assert_close(whole.view(3)[2:5], expected.float(), atol=2e-5, rtol=2e-5)
    assert not whole.view(3)[[0, 1, 5, 6]].any()


@compiled
@pytest.mark.parametrize("size", [(65, 70), (66, 19), (3, 3), (12, 18), (10, 50), (11, 131)])
def test_variances_of_edges(size: tuple[int, int]) -> None:
    """Means a thousand deviations away: sums of squares alone would lose the variance."""
    torch.manual_seed(0)
    x = torch.randn(3, *size)
    x[1] = 4 + 1e-3 * x[1]
    kernels = torch.randn(3, 1, 3, 3)
    kernels[1] = 1
    edges = F.conv2d(x[None].double(), kernels.double(), groups=3)[0].flatten(1)
    found = layers.variances(random_map(memory(), x, 1), kernels)
    if size == (3, 3):  # one edge has no deviation
        assert found.isnan().all()
        return
    torch.testing.assert_close(found.double(), edges.var(1), rtol=2e-4, atol=0)


@compiled
def test_maps_change_their_size_as_in_pytorch() -> None:
    torch.manual_seed(0)
    for given, wanted in (((20, 33), (7, 11)), ((7, 11), (20, 33)), ((64, 64), (65, 100))):
        maps, x = memory(), torch.randn(3, *given)
        source, out = random_map(maps, x, 0), maps.take(3, *wanted, 2)
        rows, columns = (nearest(given[i], wanted[i]) for i in range(2))
        layers.resample(source, out, rows, columns)
        assert torch.equal(out.view(2), F.pad(F.interpolate(x[None], wanted)[0], (2, 2), "reflect"))


@compiled
def test_pixels_go_out_and_in() -> None:
    torch.manual_seed(0)
    maps, x = memory(), torch.randn(5, 9, 21)
    held = random_map(maps, x, 0).part(1, 3)
    places = torch.randperm(9 * 21)[:40]
    rows = layers.pixels_of(held, places)
    assert torch.equal(rows, x[1:4].flatten(1)[:, places].T)
    layers.write_pixels(held, places, 2 * rows)
    expected = x[1:4].flatten(1).clone()
    expected[:, places] *= 2
    assert torch.equal(held.view().flatten(1), expected)


def test_weights_are_left_out_where_enough_of_them_are_zero() -> None:
    model = network(8, (16, 16))
    packed = PackedNetwork(weights_of(model), 8)
    assert all(conv.counts is None for convs, _ in packed.blocks[3].stages for conv in convs)
    prune(model, 1, 4)
    packed = PackedNetwork(weights_of(model), 8)
    for convs, merge in packed.blocks[3].stages:
        assert all(conv.counts is not None for conv in (*convs, merge))
    convs, _ = packed.blocks[3].stages[1]
    assert sum(len(conv.values) for conv in convs) == 24 * 8 * 9 // 4


# -- the operator ---------------------------------------------------------------------------------


def test_refuses_what_does_not_fit() -> None:
    weights, mask = weights_of(network(4, (16, 16))), torch.zeros(1, 1, 65, 65)
    codes = torch.rand(1, 3, 65, 65)
    with pytest.raises(UserError, match="expected \\(B, 3, H, W\\)"):
        labnet(codes[:, :2], mask, mask, weights, 4, (16, 16))
    with pytest.raises(UserError, match="at least 65"):
        labnet(codes[..., 1:], mask[..., 1:], mask[..., 1:], weights, 4, (16, 16))
    with pytest.raises(UserError, match="a mask of shape"):
        labnet(codes, mask[..., 1:], mask, weights, 4, (16, 16))
    with pytest.raises(UserError, match="a ring of shape"):
        labnet(codes, mask, mask[..., 1:], weights, 4, (16, 16))
    with pytest.raises(UserError, match="width 5"):
        labnet(codes, mask, mask, weights, 5, (16, 16))
    with pytest.raises(UserError, match="attention of size"):
        labnet(codes, mask, mask, weights, 4, (16, 1))
    with pytest.raises(UserError, match=f"expected {size_of(6)}"):
        labnet(codes, mask, mask, weights, 6, (16, 16))
    with pytest.raises(UserError, match=f"expected {size_of(6)}"):
        tensors_of(weights, 6)
    assert labnet(codes[:0], mask[:0], mask[:0], weights, 4, (16, 16)).shape == (0, 3, 65, 65)


def test_is_traced_and_compiled() -> None:
    model = network(4, (16, 16))
    weights = weights_of(model)
    codes, mask = images(2, 66, 70)

    class Holder(nn.Module):
        def forward(self, codes: Tensor, mask: Tensor) -> Tensor:
            return labnet(codes, mask, ring_of(mask), weights, 4, (16, 16))

    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(Holder(), (codes, mask), dynamic_shapes=(batch, batch))
    assert "tenfold.labnet.default" in {str(node.target) for node in exported.graph.nodes}
    expected = Holder()(codes[:1], mask[:1])
    torch.testing.assert_close(exported.module()(codes[:1], mask[:1]), expected)
    fast = torch.compile(Holder(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(codes, mask), Holder()(codes, mask))
    torch.library.opcheck(
        torch.ops.tenfold.labnet.default,
        (codes, mask, ring_of(mask), weights, 4, [16, 16]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_other_types_are_computed_by_pytorch() -> None:
    model = network(4, (16, 16))
    weights = weights_of(model)
    codes, mask = images(1, 65, 70)
    expected = model.double()(codes.double(), mask.double())
    found = labnet(codes.double(), mask, ring_of(mask), weights, 4, (16, 16))
    assert found.dtype == torch.float64
    assert error(found, expected) < 1e-12
