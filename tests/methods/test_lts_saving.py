"""What LTS leaves out of the backward pass changes nothing else: against the dense pass."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.methods import LBC, LTS
from tenfold.methods.freezing import WeightQuantizer
from tenfold.methods.live_filters import LiveForward, survey
from tenfold.methods.quantizers import Bounds, InputQuantizer
from tests.methods.test_lts import frozen_of, images, network, start, train

pytestmark = pytest.mark.parity

DOUBLE = torch.float64


def treated(layer, frozen, saving, *, rescale=False, seed=0):
    """Quantize one layer with 2 bits, its frozen weights given; returns it with its bounds."""
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    holder = Bounds(["one"], layer.weight)
    holder.values.data.copy_(torch.tensor([[-0.8, 0.8, -0.5, 1.5]]))
    holder.known = [True]
    quantizer = WeightQuantizer(
        layer.weight.detach(), holder, 0, 4, rescale=rescale, pin_code=True, freezes=True
    )
    quantizer.code.copy_(quantizer.codes(layer.weight.detach()))
    quantizer.frozen.copy_(frozen.reshape(layer.weight.shape))
    quantizer.any_frozen = bool(frozen.any())
    parametrize.register_parametrization(layer, "weight", quantizer)
    layer.register_forward_pre_hook(InputQuantizer(holder, 0, 4, rescale))
    return LiveForward(layer, quantizer, saving), holder


def results(make, shape, frozen, dtype=DOUBLE, **fields):
    """Return output and all gradients, with the saving and without."""
    found = []
    for saving in (True, False):
        layer = make().to(dtype)
        forward, holder = treated(layer, frozen, saving, **fields)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
        x.requires_grad_()
        out = layer(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=dtype)
        (out * weights).sum().backward()
        latent = forward.weight.grad
        gradients = {
            "output": out.detach(),
            "x": x.grad,
            "weight": torch.zeros_like(forward.weight) if latent is None else latent,
            "bounds": holder.values.grad,
        }
        if layer.bias is not None:
            gradients["bias"] = layer.bias.grad
        found.append((gradients, forward))
    return found


LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (5, 6)),
    "tokens": (lambda: nn.Linear(6, 10, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 10, 3, padding=1, dilation=2), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 10, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 3, 6, 7)),
    "same": (lambda: nn.Conv2d(3, 10, 3, padding="same", bias=False), (2, 3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 10, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(10, 10, 3, groups=10), (2, 10, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 10, 2, padding=1), (2, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dead", [0, 2, 7, 10])
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_gradients_are_those_of_the_dense_pass(kind, dead, rescale):
    """Filters whose weights are all frozen, and among the others every third weight."""
    make, shape = LAYERS[kind]
    weight = make().weight
    frozen = torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0
    frozen[:dead] = True
    (ours, saving), (theirs, _) = results(make, shape, frozen, rescale=rescale)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=name)
    if dead == 10:
        assert saving.whole
        assert saving.weight.grad is None  # not even zeros
    elif dead == 7 and kind not in ("same", "grouped", "depthwise"):
        assert saving.live.tolist()[-3:] == [7, 8, 9]


@settings(max_examples=30, deadline=None)
@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 5),
    kernel=st.integers(1, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_frozen_set_and_shape(outputs, inputs, kernel, share, seed):
    """Clipped weights (sigma 0.5 between +-0.8) are inert too, as long as they are clipped."""
    generator = torch.Generator().manual_seed(seed)
    frozen = torch.rand(outputs, inputs, kernel, kernel, generator=generator) < share

    def make():
        return nn.Conv2d(inputs, outputs, kernel, padding=1)

    (ours, saving), (theirs, _) = results(make, (2, inputs, 4, 4), frozen, seed=seed)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=name)
    weight = saving.weight.detach()
    inert = frozen | (weight.abs() > 0.8)
    places = torch.zeros_like(frozen)
    live = survey(weight, saving.quantizer, None, places).live
    assert torch.equal(places, ~inert)
    assert live.tolist() == (~inert).flatten(1).sum(dim=1).tolist()


@pytest.mark.skipif(native.missing() is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("share", [0.0, 0.03, 0.1])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(20, 10), (9, 20)),
        (lambda: nn.Linear(20, 10, bias=False), (2, 16, 20)),
        (lambda: nn.Conv2d(5, 10, 3, padding=1, stride=2), (8, 5, 9, 6)),
        (lambda: nn.Conv2d(5, 10, (1, 2), dilation=(1, 2)), (17, 5, 4, 5)),
    ],
)
def test_single_weights_are_summed_up_where_few_are_live(make, shape, share):
    """In single precision, with the compiled kernel; scattered over all filters."""
    weight = make().weight
    frozen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) >= share
    (ours, saving), (theirs, _) = results(make, shape, frozen, dtype=torch.float32)
    assert (saving.places is None) == (share == 0.0)
    for name, expected in theirs.items():
        size = float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(ours[name] / size, expected / size, rtol=0, atol=1e-5, msg=name)


def test_a_live_filter_is_never_left_out_when_something_has_changed():
    """Loading weights, moving bounds or thawing by hand is noticed at the next forward pass."""
    frozen = torch.zeros(10, 6, dtype=torch.bool)
    frozen[:8] = True
    layer = nn.Linear(6, 10).to(DOUBLE)
    forward, holder = treated(layer, frozen, saving=True)
    x = torch.randn(4, 6, dtype=DOUBLE)
    layer(x).sum().backward()
    assert len(forward.live) <= 2
    with torch.no_grad():
        forward.quantizer.frozen[3] = False
        holder.values[0, 0], holder.values[0, 1] = -50.0, 50.0  # nothing is clipped any more
    layer(x).sum().backward()
    assert forward.live.tolist() == [3, 8, 9]
    with torch.no_grad():
        forward.weight.mul_(1e6)  # everything is clipped
    layer(x).sum().backward()
    assert forward.live.tolist() == []
    assert not forward.whole


def run(save_backward, *, sgd=True, steps=60, **fields):
    method, model, optimizer = start(steps, sgd=sgd, save_backward=save_backward, **fields)
    train(model, method, optimizer, steps)
    return method, model, optimizer


@pytest.mark.parametrize("sgd", [True, False])
@pytest.mark.parametrize("fields", [{}, {"rescale": True}, {"freeze_clipped": True}], ids=str)
def test_whole_runs_are_equal_with_and_without_the_saving(sgd, fields):
    """Weights, bounds and frozen sets, to the rounding of another order of sums."""
    ours, model, _ = run(True, sgd=sgd, dtype=DOUBLE, **fields)
    theirs, twin, _ = run(False, sgd=sgd, dtype=DOUBLE, **fields)
    for name, frozen in frozen_of(ours).items():
        assert torch.equal(frozen, frozen_of(theirs)[name])
    other = twin.state_dict()
    for key, value in model.state_dict().items():
        expected = other[key]
        if key.endswith("distance"):  # of frozen weights nobody asks any more
            frozen = other[key.replace("distance", "frozen")]
            value, expected = value.masked_fill(frozen, 0), expected.masked_fill(frozen, 0)
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9, msg=key)
    x = images(1, dtype=DOUBLE)[0]
    torch.testing.assert_close(ours.finalize(model)(x), theirs.finalize(twin)(x))


def test_layers_that_are_frozen_whole_leave_the_optimizer():
    method, model, optimizer = start(60)
    train(model, method, optimizer, 1)
    weights = {t.name: t.forward.weight for t in method._layers}
    assert all(weight in optimizer.state for weight in weights.values())
    for treated_layer in method._layers[:2]:
        weight = treated_layer.forward.weight.detach()
        treated_layer.quantizer.code.copy_(treated_layer.quantizer.codes(weight))
        treated_layer.quantizer.frozen.fill_(True)
        treated_layer.quantizer.any_frozen = True
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    train(model, method, optimizer, 30, first=1)
    for name in ("0", "2"):
        assert weights[name].grad is None
        assert weights[name] not in optimizer.state
        assert torch.equal(weights[name], before[name])
    assert weights["5"] in optimizer.state
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train(model, method, optimizer, 29, first=31)
    method.finalize(model)


def test_no_product_is_computed_for_a_frozen_layer():
    """Counted by PyTorch itself: 3 products a layer become 2, and none of those kept is larger."""
    from torch.utils.flop_counter import FlopCounterMode

    method, model, optimizer = start(40)
    train(model, method, optimizer, 2)
    x, y = images(2)

    def flops():
        with FlopCounterMode(display=False) as counter:
            nn.functional.cross_entropy(model(x), y).backward()
        return counter.get_total_flops()

    dense = flops()
    forwards = 2 * sum(t.forward.macs for t in method._layers) * len(x)
    for t in method._layers:
        t.quantizer.frozen.fill_(True)
        t.quantizer.any_frozen = True
    assert dense - flops() == forwards
    half = method._layers[1]
    half.quantizer.frozen[:4] = False  # 4 of 12 filters live again
    with torch.no_grad():
        method._bounds.values[1, :2] *= 100  # none of them is clipped
    assert dense - flops() == forwards - 2 * half.forward.macs * len(x) * 4 // 12


def test_masked_weights_are_inert_and_not_counted():
    """With LBC behind it, nothing freezes before the mask is final, and zeros count as nothing."""
    lts, lbc = LTS(bits=2, warmup=0.1), LBC(n=1, m=4, end=0.5)
    model = lbc.attach(lts.attach(network(), total_steps=60), total_steps=60)
    optimizer = torch.optim.SGD(lts.parameters_for(model), lr=0.02, momentum=0.9)
    for step in range(60):
        x, y = images(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        lts.step()
        lbc.step()
        if not lbc.finished():
            assert lts.metrics()["frozen"] == 0
    masked = {t.name: t for t in lts._layers}["2"]
    kept = masked.forward.mask != 0
    assert int(kept.sum()) * 4 == kept.numel()
    frozen = int((masked.quantizer.frozen & kept).sum())
    assert 0 < frozen == lts.savings.frozen["2"] <= int(kept.sum())
    expected = (~kept | masked.quantizer.frozen).flatten(1).all(dim=1)
    live = survey(masked.forward.weight.detach(), masked.quantizer, masked.forward.mask).live
    assert not live[expected].any()
    model = lts.finalize(lbc.finalize(model))
    assert torch.equal(model[2].integers != 0, kept)


def test_a_copy_of_the_model_uses_its_own_bounds_and_weights():
    """Running averages copy models under training."""
    method, model, optimizer = start(40)
    train(model, method, optimizer, 25)
    x = images(0)[0]
    twin = copy.deepcopy(model)
    expected = twin(x).detach()
    train(model, method, optimizer, 5, first=25)
    torch.testing.assert_close(twin(x), expected)
    assert not torch.equal(model(x), expected)
    with torch.no_grad():
        twin.tenfold_lts.module.values.mul_(2.0)
    assert not torch.equal(twin(x), expected)


def test_measured_steps_have_equal_gradients_and_change_nothing():
    method, model, optimizer = start(40)
    train(model, method, optimizer, 30)
    before = copy.deepcopy((model.state_dict(), method.state_dict()))
    x, y = images(7)
    found = method.measure(lambda net: nn.functional.cross_entropy(net(x), y), rounds=2)
    assert found.saving_ms > 0 < found.dense_ms
    assert found.gradient_difference < 1e-5
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[0][key]), key
    assert str(method.state_dict()) == str(before[1])


def test_saving_with_a_pinned_latent_is_refused():
    with pytest.raises(UserError, match="expected pin='code'"):
        LTS(bits=2, pin="latent", save_backward=True)


def test_autocast_computes_in_the_same_type_as_the_dense_pass():
    frozen = torch.zeros(10, 6, dtype=torch.bool)
    frozen[:8] = True
    found = []
    for saving in (True, False):
        layer = nn.Linear(6, 10)
        forward, holder = treated(layer, frozen, saving)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
        found.append((out, x.grad, forward.weight.grad, holder.values.grad))
    assert found[0][0].dtype == torch.bfloat16
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
