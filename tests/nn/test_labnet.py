"""LAB-Net against the sheet's numbers and a plain form of it, written as the released code runs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from tenfold.errors import UserError
from tenfold.nn.labnet import LABNet
from tenfold.nn.labnet_blocks import BasicBlock, EdgeChannelAttention
from tenfold.nn.ring_attention import dilate, ring_of
from tests.nn.test_ring_attention import loop

pytestmark = pytest.mark.unit


# -- the plain form -------------------------------------------------------------------------------


class PlainConv(nn.Conv2d):
    def __init__(self, inputs, outputs, kernel, dilation=1):
        border = dilation * (kernel - 1) // 2
        super().__init__(
            inputs, outputs, kernel, dilation=dilation, padding=border, padding_mode="reflect"
        )

    def forward(self, x):
        return functional.leaky_relu(super().forward(x), 0.2)


class PlainBlock(nn.Module):
    def __init__(self, inputs, outputs, width):
        super().__init__()
        layers = []
        for stage, dilations in enumerate([(1, 4, 16), (2, 8, 32), (4, 16, 64)]):
            given = width if stage else inputs
            for share, dilation in zip((1, 2, 3), dilations, strict=True):
                layers.append(PlainConv(given, share * width // 2, 3, dilation))
            layers.append(PlainConv(3 * width, width, 1))
        self.stages = nn.ModuleList(layers)
        self.squeeze = PlainConv(3 * width, width, 1)
        self.last = PlainConv(width, outputs, 3)
        self.linear1 = nn.Linear(3 * width, 3 * width // 8)
        self.linear2 = nn.Linear(3 * width // 8, 3 * width)
        self.highpass = nn.Conv2d(3 * width, 3 * width, 3, groups=3 * width, bias=False)

    def forward(self, x):
        maps = []
        for stage in range(3):
            *three, merge = self.stages[4 * stage : 4 * stage + 4]
            x = merge(torch.cat([each(x) for each in three], 1))
            maps.append(x)
        x = torch.cat(maps, 1)
        deviation = self.highpass(x).std(dim=(2, 3))
        hidden = functional.leaky_relu(self.linear1(deviation), 0.2)
        return self.last(self.squeeze(x * self.linear2(hidden).sigmoid()[:, :, None, None]))


class PlainAttention(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.size = size
        self.q = PlainConv(width, 3 * width // 2, 3)
        self.k = PlainConv(width, 3 * width // 2, 3)
        self.out = PlainConv(5 * width // 2, width, 1)

    def forward(self, x, mask, grown):
        small, inside, whole = (
            functional.interpolate(each, self.size, mode="nearest") for each in (x, mask, grown)
        )
        q, k = (each(small).flatten(2).transpose(1, 2) for each in (self.q, self.k))
        found = loop(q, k, inside.flatten(1) == 1, (whole - inside).flatten(1) == 1)
        found = found.transpose(1, 2).reshape(len(x), -1, *self.size)
        return self.out(torch.cat([x, functional.interpolate(found, x.shape[2:])], 1))


class PlainLABNet(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        c = width
        order = [
            PlainConv(3, 3, 3), PlainBlock(4, c, c), PlainBlock(4, c, c), PlainConv(2 * c, c, 1),
            PlainBlock(c, c, c), PlainConv(2 * c, c, 1), PlainBlock(c, c, c),
            PlainConv(2 * c, c, 1), PlainAttention(c, size), PlainBlock(c, c, c),
            PlainConv(2 * c, c, 1), PlainAttention(c, size), PlainBlock(c, c, c),
            PlainConv(2 * c, c, 1), PlainAttention(c, size), PlainBlock(c, 1, c),
            PlainConv(2 * c, c, 1), PlainAttention(c, size), PlainBlock(c, 2, c),
            PlainConv(3, 3, 3),
        ]  # fmt: skip
        self.parts = nn.ModuleList(order)

    def forward(self, codes, mask):
        (
            convst, block1, block2, f12l, block3, f12ab, block4, f34l, lsa1, block5, f34ab, lsa2,
            block6, f56l, lsa3, block7, f56ab, lsa4, block8, convfinal,
        ) = self.parts  # fmt: skip
        grown = functional.max_pool2d(mask, 11, 1, 5)
        e = torch.cat([convst(codes), mask], 1)
        both = torch.cat([block1(e), block2(e)], 1)
        both = torch.cat([block3(f12l(both)), block4(f12ab(both))], 1)
        light, colour = lsa1(f34l(both), mask, grown), lsa2(f34ab(both), mask, grown)
        both = torch.cat([block5(light), block6(colour)], 1)
        light, colour = lsa3(f56l(both), mask, grown), lsa4(f56ab(both), mask, grown)
        return convfinal(torch.cat([block7(light), block8(colour)], 1) + codes)


# -- helpers --------------------------------------------------------------------------------------


def photo(height: int = 66, width: int = 70, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Draw smooth codes, and masks of a square each."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(batch, 3, 9, 9, generator=generator)
    codes = functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    mask = torch.zeros(batch, 1, height, width)
    for item in range(batch):
        mask[item, :, 20 + item : 40 + 3 * item, 10 : 31 + item] = 1
    return codes, mask


def network(width: int = 4, size: int | tuple[int, int] = 16, **settings) -> LABNet:
    torch.manual_seed(0)
    return LABNet(width, size, **settings).eval()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def noisy(model: LABNet) -> LABNet:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases, which start at zero
                parameter.normal_(std=0.1)
    return model


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "parameters"), [(32, 933_355), (16, 238_411), (8, 62_203)])
def test_parameters(width, parameters):
    model = LABNet(width, 64, highpass="trainable")
    assert count(model) == parameters
    kernels = 8 * 3 * width * 9
    assert count(LABNet(width, 64)) == parameters - kernels
    assert not [m for m in model.modules() if "Norm" in type(m).__name__]


def test_parameters_of_each_part():
    model = LABNet(highpass="trainable")
    assert count(LABNet()) == 926_443
    assert [count(getattr(model, f"block{i}")) for i in range(1, 9)] == (
        [83_980] * 2 + [108_172] * 4 + [99_213, 99_502]
    )
    assert {count(m) for name, m in model.named_children() if "fuse" in name} == {2_080}
    assert {count(m) for name, m in model.named_children() if "attention" in name} == {30_336}
    assert count(model.first) == count(model.last) == 84


def macs(side: int, attention: int) -> float:
    """Count on the meta device, which knows shapes alone; those of the attention come on top."""
    model = LABNet(32, attention).to("meta")
    inputs = (torch.zeros(1, channels, side, side, device="meta") for channels in (3, 1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("side", "attention", "expected"), [(256, 256, 59.6), (256, 128, 54.2), (400, 128, 129.7)]
)
def test_macs(side, attention, expected):
    assert macs(side, attention) == pytest.approx(expected, abs=0.06)


def test_macs_of_the_attention():
    model = LABNet(32, 33)
    mask = torch.zeros(1, 1, 66, 66)
    mask[:, :, 20:40, 20:40] = 1  # at half the size 10 x 10, and 5 pixels around at full size
    ring = ring_of(mask)[:, :, ::2, ::2]
    assert model.attention_macs(mask) == 4 * 2 * 48 * 100 * int(ring.sum())


# -- the same function as the plain form ----------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("size", [(66, 70), (20, 17)])
def test_it_is_the_plain_form_with_the_parameters_in_order(size):
    model = noisy(network(8, size, highpass="trainable"))
    plain = PlainLABNet(8, size)
    # The order of the released code, by which its checkpoints are read.
    ours, theirs = list(model.parameters()), list(plain.parameters())
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    with torch.no_grad():
        for source, target in zip(ours, theirs, strict=True):
            target.copy_(source)
    codes, mask = photo()
    with torch.no_grad():
        single, expected = model(codes, mask), plain(codes, mask)
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(single, expected, rtol=0, atol=bound)

    outputs = [each.double()(codes.double(), mask.double()) for each in (model, plain)]
    largest = outputs[1].detach().abs().max().item()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12 * largest)
    for output in outputs:
        (output.square().mean() / largest**2).backward()
    for source, target in zip(ours, theirs, strict=True):
        bound = 1e-9 * target.grad.abs().max().item()
        torch.testing.assert_close(source.grad, target.grad, rtol=0, atol=bound)


def test_a_released_checkpoint_loads_into_either_highpass():
    torch.manual_seed(2)
    plain = PlainLABNet(4, (16, 16)).eval()
    released = {f"module.{key}": value for key, value in plain.state_dict().items()}
    codes, mask = photo()
    with torch.no_grad():
        expected = plain(codes, mask)
        for highpass in ("fixed", "trainable"):
            model = network(highpass=highpass)
            model.load_state_dict(model.adapt_state_dict(released))
            torch.testing.assert_close(model(codes, mask), expected, rtol=1e-4, atol=1e-4)
    own = model.state_dict()
    assert model.adapt_state_dict(own).keys() == own.keys()
    with pytest.raises(UserError, match="give the checkpoint's width"):
        LABNet(8, 16).adapt_state_dict(released)
    with pytest.raises(UserError, match="has 1 tensors: expected the"):
        model.adapt_state_dict({"a": torch.zeros(1)})


def test_channels_last_gives_the_same():
    model = network(8)
    codes, mask = photo()
    with torch.no_grad():
        expected = model(codes, mask)
        fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
        result = fast(codes.contiguous(memory_format=torch.channels_last), mask)
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=0, atol=bound)


def test_an_image_is_the_same_alone():
    model = network(8)
    codes, mask = photo()
    with torch.no_grad():
        together = model(codes, mask)
        for item in range(2):
            alone = model(codes[item : item + 1], mask[item : item + 1])
            bound = 1e-5 * together.abs().max().item()
            torch.testing.assert_close(alone[0], together[item], rtol=0, atol=bound)


# -- channel attention ----------------------------------------------------------------------------


def test_channel_attention_of_the_worked_example():
    layer = EdgeChannelAttention(8)
    with torch.no_grad():
        layer.reduce.weight.fill_(0.5)
        layer.reduce.bias.fill_(-0.25)
        layer.expand.weight.copy_(torch.linspace(-1, 1, 8)[:, None])
        layer.expand.bias.zero_()
    x = (7 * torch.arange(200) % 13 / 13).reshape(1, 8, 5, 5)
    deviations = [1.802776, 1.802776, 1.833333, 1.715938, 1.691482, 1.691482, 1.802776, 1.802776]
    gate = [0.001089, 0.007595, 0.051001, 0.273980, 0.726020, 0.949000, 0.992405, 0.998911]
    torch.testing.assert_close(layer.deviations(x)[0], torch.tensor(deviations), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.gate(x)[0], torch.tensor(gate), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x), x * torch.tensor(gate)[:, None, None], rtol=0, atol=1e-5)


def test_deviations_keep_their_digits_where_the_mean_is_large():
    layer = EdgeChannelAttention(8, highpass="trainable")
    torch.manual_seed(0)
    x = 1000 + torch.rand(1, 8, 40, 40)
    with torch.no_grad():
        expected = layer.double().highpass(x.double()).std((2, 3))
        found = layer.float().deviations(x)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)


def test_a_constant_image_has_a_gradient():
    layer = EdgeChannelAttention(8)
    x = torch.full((1, 8, 6, 6), 0.5, requires_grad=True)
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_fixed_highpass_is_a_laplacian_that_nothing_trains_or_draws_anew():
    model = network()
    laplacian = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    model.initialize()
    for module in model.modules():
        if isinstance(module, EdgeChannelAttention):
            assert (module.highpass.weight == laplacian).all()
    assert not [name for name, _ in model.named_parameters() if "highpass" in name]
    trained = network(highpass="trainable")
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert not (trained.block1.attention.highpass.weight == laplacian).any()


# -- starts ---------------------------------------------------------------------------------------


def test_weights_start_by_kaiming_and_biases_at_zero():
    model = LABNet(32, 16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()
            fan = module.weight[0].numel()
            if module.weight.numel() > 2000:
                spread = module.weight.std().item()
                assert spread == pytest.approx((2 / fan) ** 0.5, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_an_identity_start_gives_the_input_back(seed):
    torch.manual_seed(seed)
    model = LABNet(8, 36)
    codes, mask = photo(72, 72)
    with torch.no_grad():
        assert (model(codes, mask) - codes).abs().mean() > 0.1
        model.identity_start()
        assert (model(codes, mask) - codes).abs().mean() < 0.01


# -- sizes and masks ------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(65, 65), (66, 70)])
def test_sizes(height, width):
    codes, mask = photo(height, width, 1)
    with torch.no_grad():
        assert network(4, (16, 24))(codes, mask).shape == codes.shape


def test_the_last_convolution_has_a_leaky_relu():
    model = network()
    nn.init.zeros_(model.last.conv.weight)
    nn.init.constant_(model.last.conv.bias, -1.0)
    with torch.no_grad():
        assert (model(*photo()) == -0.2).all()


def test_empty_and_full_masks_give_finite_values_and_gradients():
    model = network()
    codes, mask = photo()
    mask = torch.stack([torch.zeros_like(mask[0]), torch.ones_like(mask[0])])
    output = model(codes, mask)
    output.mean().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_ring_of_ones_own():
    model = network()
    codes, mask = photo()
    with torch.no_grad():
        usual = model(codes, mask)
        assert torch.equal(model(codes, mask, ring_of(mask)), usual)
        assert not torch.equal(model(codes, mask, dilate(mask, 21) - mask), usual)


# -- graphs ---------------------------------------------------------------------------------------


def test_it_compiles_to_one_graph_that_takes_other_masks():
    model = network()
    codes, mask = photo()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (mask, mask.roll(9, 3), torch.zeros_like(mask)):
        torch.testing.assert_close(compiled(codes, given), model(codes, given), rtol=0, atol=1e-5)
    compiled(codes, mask).mean().backward()
    assert model.first.conv.weight.grad.abs().sum() > 0


def test_an_exported_program_takes_batches_and_sizes_of_any_kind():
    model = network()
    codes, mask = photo()
    batch, height, width = (
        torch.export.Dim(name, min=low) for name, low in (("b", 1), ("h", 65), ("w", 65))
    )
    sizes = {0: batch, 2: height, 3: width}
    program = torch.export.export(model, (codes, mask), dynamic_shapes=(sizes, sizes))
    others = photo(80, 67, 3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*others), model(*others), rtol=0, atol=1e-5)


@pytest.mark.path
def test_its_onnx_takes_other_masks():
    import onnxruntime

    model = network(4, 40)
    model.export_attention("gathered")
    codes, mask = photo(65, 66, 1)
    stream = io.BytesIO()
    program = torch.onnx.export(model, (codes, mask), dynamo=True, verbose=False)
    program.save(stream)
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    masks = (mask, mask.roll(9, 3), torch.zeros_like(mask), torch.ones_like(mask))
    with torch.no_grad():
        for given in masks:
            expected = model(codes, given)
            feeds = dict(zip(names, (codes.numpy(), given.numpy()), strict=True))
            result = torch.from_numpy(session.run(None, feeds)[0])
            bound = 1e-5 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(result, expected, rtol=0, atol=bound)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 7}, "width 7: expected an even number of at least 4"),
        ({"width": 2}, "width 2: expected an even number of at least 4"),
        ({"attention_size": 0}, "attention_size 0: expected a side"),
        ({"attention_size": (8, 8, 8)}, "attention_size"),
        ({"highpass": "fixd"}, "did you mean fixed"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LABNet(**settings)


def test_input_that_is_refused():
    model = network()
    codes, mask = photo()
    nan = codes.clone()
    nan[0, 1, 5, 5] = float("nan")
    cases = [
        (codes[:, :2], mask, "expected LAB codes"),
        (codes[:, :, :64, :64], mask[:, :, :64, :64], "64x64: expected sides of at least 65"),
        (codes, mask.expand(-1, 3, -1, -1), r"a mask of shape \(2, 3, 66, 70\): expected"),
        (codes, mask[:1], "one channel of the images' size"),
        (codes, mask[:, :, 1:], "one channel of the images' size"),
        (nan, mask, "finite LAB codes"),
        (100 * codes, mask, "values from 0 to 100"),
        (codes, 0.5 * mask, "a mask with other values than 0 and 1"),
        (codes, 255 * mask, "a mask with other values than 0 and 1"),
    ]
    for given, by, message in cases:
        with pytest.raises(UserError, match=message):
            model(given, by)
    with pytest.raises(UserError, match="did you mean masked"):
        model.export_attention("maskd")
    with pytest.raises(UserError, match="a ring with other values"):
        model(codes, mask, 0.5 * mask)


def test_a_block_maps_channels():
    block = BasicBlock(4, 2, 8)
    assert block(torch.rand(1, 4, 65, 65)).shape == (1, 2, 65, 65)
