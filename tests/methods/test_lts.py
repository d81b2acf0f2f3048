"""LTS against the sheet's worked numbers and against straightforward float64 autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tenfold.errors import StateError, UserError
from tenfold.methods import LTS
from tenfold.methods.freezing import WeightQuantizer
from tenfold.methods.freezing_schedule import default_momentum, freeze_threshold
from tenfold.methods.quantizers import Bounds, quantize_input, quantize_weight
from tenfold.methods.savings import Savings

pytestmark = pytest.mark.parity

DOUBLE = torch.float64


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """No batch norm: what it learns doesn't depend on how a batch is shared out."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 4, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    ).to(dtype)


def images(step: int, count: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step % 4)
    x = torch.randn(count, 3, 4, 4, generator=generator, dtype=DOUBLE).to(dtype)
    return x, torch.randint(0, 4, (count,), generator=generator)


def train(model, method, optimizer, steps, first=0, parts=1, observe=None):
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x, y = images(step, dtype=dtype)
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(part_x), part_y) / parts).backward()
        if observe:
            observe(step)
        optimizer.step()
        method.step()


def start(total=40, *, dtype=torch.float32, lr=0.02, sgd=True, **fields):
    method = LTS(**{"bits": 2, **fields})
    model = method.attach(network(dtype), total_steps=total)
    method.calibrate(images(0, dtype=dtype)[0])
    parameters = method.parameters_for(model)
    if sgd:
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr / 10, weight_decay=0.05)
    return method, model, optimizer


def frozen_of(method) -> dict[str, Tensor]:
    return {t.name: t.quantizer.frozen.clone() for t in method._layers}


# -- the quantizer ---------------------------------------------------------------------------------


def test_worked_example():
    """The sheet's first oracle."""
    w = torch.tensor([-1.0, -0.5, 0.05, 0.31, 0.88], dtype=DOUBLE)
    lower, upper = torch.tensor(-0.9, dtype=DOUBLE), torch.tensor(0.9, dtype=DOUBLE)
    quantized, code = quantize_weight(w, lower, upper, 4)
    assert code.tolist() == [0, 1, 2, 2, 3]
    torch.testing.assert_close(quantized, torch.tensor([-1, -1 / 3, 1 / 3, 1 / 3, 1], dtype=DOUBLE))
    v = (w - lower) / (upper - lower)
    distance = (v - code / 3).abs()
    expected = torch.tensor([0.05556, 0.11111, 0.13889, 0.00556, 0.01111], dtype=DOUBLE)
    torch.testing.assert_close(distance, expected, atol=1e-5, rtol=0)


def one_layer(weight: Tensor, levels: int = 4, **fields) -> WeightQuantizer:
    bounds = Bounds(["one"], weight)
    bounds.values.data.copy_(torch.tensor([[-0.9, 0.9, 0.0, 1.0]]))
    bounds.known = [True]
    settings = {"rescale": False, "pin_code": True, "freezes": True, **fields}
    return WeightQuantizer(weight, bounds, 0, levels, **settings)


def test_only_what_is_near_its_level_freezes():
    """Fixed threshold 0.1 in the worked example: 0.03333 lets the last two pass."""
    w = torch.tensor([[-1.0, -0.5, 0.05, 0.31, 0.88]], dtype=DOUBLE)
    quantizer = one_layer(w)
    quantizer.update(w, torch.empty_like(w), momentum=None, limit=0.1 / 3)
    assert quantizer.frozen.tolist() == [[False, False, False, True, True]]


def test_distance_is_averaged_and_reset():
    """d = 0.13889, beta = 0.9, D = 0.02 gives 0.12700; a level change gives one spacing exactly."""
    w = torch.tensor([[0.05, 0.05]], dtype=DOUBLE)
    quantizer = one_layer(w)
    quantizer.update(w, w, momentum=None, limit=None)
    torch.testing.assert_close(quantizer.distance[0, 0].item(), 0.13889, atol=1e-5, rtol=0)
    # v = 2/3 - 0.02 keeps code 2; v = 0.4 changes to 1
    moved = torch.tensor([[-0.9 + 1.8 * (2 / 3 - 0.02), -0.9 + 1.8 * 0.4]], dtype=DOUBLE)
    quantizer.update(moved, moved, momentum=0.9, limit=None)
    torch.testing.assert_close(quantizer.distance[0, 0].item(), 0.127, atol=1e-5, rtol=0)
    assert quantizer.distance[0, 1].item() == 1 / 3
    assert quantizer.code.tolist() == [[2, 1]]


def test_thresholds():
    for x, sine in ((0.25, 0.38268), (0.5, 0.70711), (1.0, 1.0)):
        assert freeze_threshold("linear", x) == x
        assert round(freeze_threshold("sine", x), 5) == sine
        assert freeze_threshold(0.1, x) == 0.1
    assert freeze_threshold("linear", 1.7) == 1.0


def test_dwell_times():
    """After a level change d needs ln(rho) / ln(beta) steps: the sheet's own numbers."""
    for beta, rho, steps in ((0.99, 0.1, 230), (0.99, 0.5, 69), (0.9999, 0.5, 6932)):
        assert math.ceil(math.log(rho) / math.log(beta)) == steps
    for total in (50, 1000, 5000):
        dwell = math.log(0.5) / math.log(default_momentum(total))
        assert dwell <= max(1.0, 0.0101 * total)
    assert default_momentum(10**6) == 0.99


def reference_weight(w, lower, upper, levels, rescale):
    """The equations by plain autograd: rounding and codes pass their gradient straight through."""
    v = ((w - lower) / (upper - lower)).clamp(0, 1)
    q = v + ((v * (levels - 1)).round() / (levels - 1) - v).detach()
    return lower + (upper - lower) * q if rescale else 2 * q - 1


@pytest.mark.parametrize("rescale", [False, True])
@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 1000), large=st.booleans())
def test_gradients_are_those_of_autograd(rescale, bits, seed, large):
    """Weights and inputs, random tensors, both sides of the size that is cut into pieces."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 40_000) if large else (4, 5, 3, 3)
    w = torch.randn(shape, generator=generator, dtype=DOUBLE, requires_grad=True)
    lower = torch.tensor(-1.1, dtype=DOUBLE, requires_grad=True)
    upper = torch.tensor(0.8, dtype=DOUBLE, requires_grad=True)
    g = torch.randn(shape, generator=generator, dtype=DOUBLE)
    inputs = (w, lower, upper)
    expected = reference_weight(w, lower, upper, 2**bits, rescale)
    found, _ = quantize_weight(w, lower, upper, 2**bits, rescale)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    expected = reference_weight(w, lower, upper, 2**bits, rescale)
    if not rescale:
        expected = (expected + 1) / 2
    found = quantize_input(w, lower, upper, 2**bits, rescale)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_worked_gradients():
    """The sheet's second oracle: w = 0.31 with g = 1; and a clipped weight gives none."""
    lower = torch.tensor(-0.9, dtype=DOUBLE, requires_grad=True)
    upper = torch.tensor(0.9, dtype=DOUBLE, requires_grad=True)
    for value, expected in ((0.31, (1.11111, -0.36420, -0.74691)), (-1.0, (0.0, 0.0, 0.0))):
        w = torch.tensor([value], dtype=DOUBLE, requires_grad=True)
        quantized, _ = quantize_weight(w, lower, upper, 4)
        found = torch.autograd.grad(quantized.sum(), (w, lower, upper))
        assert [round(float(one), 5) for one in found] == list(expected)


def test_the_bounds_themselves_are_in_range():
    """Ties of the range: v = 0 and v = 1 pass the gradient, as the sheet has it."""
    x = torch.tensor([0.0, 0.9, -1e-9, 0.9 + 1e-9], dtype=DOUBLE, requires_grad=True)
    zero, upper = torch.zeros((), dtype=DOUBLE), torch.tensor(0.9, dtype=DOUBLE)
    quantize_input(x, zero, upper, 4).sum().backward()
    assert (x.grad != 0).tolist() == [True, True, False, False]


# -- calibration -----------------------------------------------------------------------------------


def test_calibration_in_one_forward_pass():
    """3 sigma of the weights, minimum and 3 sigma / sqrt(1 - 2/pi) of quantized inputs."""
    method = LTS(bits=4, first_last="same", rescale=False, threshold=0.0)
    reference = network(DOUBLE)
    with pytest.warns(UserWarning, match="no norm behind it"):
        model = method.attach(network(DOUBLE), total_steps=10)
    x = images(0, dtype=DOUBLE)[0]
    method.calibrate(x)
    y = x
    for layer in reference:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            row = method._bounds.values[
                [t.name for t in method._layers].index(str(list(reference).index(layer)))
            ]
            spread = 3 * layer.weight.std()
            lower, upper = y.min(), 3 * y.std() / math.sqrt(1 - 2 / math.pi)
            expected = torch.stack([-spread, spread, lower, upper])
            torch.testing.assert_close(row, expected)
            layer.weight.data = reference_weight(layer.weight.data, *expected[:2], 16, False)
            y = (reference_weight(y, lower, upper, 16, False) + 1) / 2
        y = layer(y)
    torch.testing.assert_close(model(x), y)


def test_the_first_training_batch_calibrates():
    method = LTS(bits=2)
    model = method.attach(network(), total_steps=4)
    x, y = images(0)
    before = model.eval()(x)
    torch.testing.assert_close(before, network()(x))  # in floats until then
    optimizer = torch.optim.SGD(method.parameters_for(model), lr=0.0)
    model.train()
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(method._bounds.known)
    other = LTS(bits=2)
    twin = other.attach(network(), total_steps=4)
    other.calibrate(x)
    torch.testing.assert_close(method._bounds.values, other._bounds.values)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    optimizer.step()
    method.step()


# -- freezing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sgd", [True, False])
@pytest.mark.parametrize("pin", ["code", "latent"])
def test_frozen_weights_stay_bit_identical(sgd, pin):
    """Under momentum and weight decay; the set only grows; what is pinned is the value before."""
    method, model, optimizer = start(60, sgd=sgd, pin=pin)
    pinned: dict[str, Tensor] = {}
    frozen = frozen_of(method)
    for step in range(60):
        before = {t.name: t.forward.weight.detach().clone() for t in method._layers}

        def no_gradient(_, frozen=frozen):
            for t in method._layers:
                if t.forward.weight.grad is not None:
                    assert not t.forward.weight.grad[frozen[t.name]].any()

        train(model, method, optimizer, 1, first=step, observe=no_gradient)
        for t in method._layers:
            now, was = t.quantizer.frozen, frozen[t.name]
            assert (now | ~was).all()
            values = torch.where(was, pinned.get(t.name, before[t.name]), before[t.name])
            assert torch.equal(t.forward.weight[now], values[now])
            pinned[t.name] = values
        frozen = frozen_of(method)
        if step <= 12:  # n <= W = 12
            assert not any(one.any() for one in frozen.values())
    assert sum(int(one.sum()) for one in frozen.values()) > 100


def test_codes_of_frozen_weights_stay_when_bounds_move():
    for pin, may_move in (("code", False), ("latent", True)):
        method, model, optimizer = start(40, pin=pin)
        train(model, method, optimizer, 30)
        codes = {t.name: t.quantizer.codes(t.forward.weight.detach()) for t in method._layers}
        with torch.no_grad():
            method._bounds.values[:, 0] *= 0.4
            method._bounds.values[:, 1] *= 0.5
        moved = False
        for t in method._layers:
            now = t.quantizer.codes(t.forward.weight.detach())
            moved |= bool((now != codes[t.name])[t.quantizer.frozen].any())
        assert moved == may_move


def test_frozen_codes_give_no_gradient_to_bounds_and_pinned_latents_do():
    for pin in ("code", "latent"):
        method, model, optimizer = start(20, pin=pin, save_backward=False)
        train(model, method, optimizer, 1)
        for t in method._layers:
            t.quantizer.frozen.fill_(True)
            t.quantizer.any_frozen = True
        x, y = images(3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = method._bounds.values.grad
        assert bool(gradient[:, :2].any()) == (pin == "latent")
        assert gradient[:, 2:].any()  # the inputs' bounds go on learning
        assert not any(t.forward.weight.grad.any() for t in method._layers)


def test_nothing_freezes_without_a_threshold():
    method, model, optimizer = start(20, threshold=0.0)
    train(model, method, optimizer, 20)
    assert method.metrics() == {}
    assert all(t.quantizer.frozen is None for t in method._layers)
    method.finalize(model)


def test_clipped_weights_freeze_only_when_asked():
    w = torch.tensor([[5.0, -5.0, 0.31]], dtype=DOUBLE)
    for clipped, expected in ((False, [False, False, True]), (True, [True, True, True])):
        quantizer = one_layer(w, freeze_clipped=clipped)
        quantizer.update(w, torch.empty_like(w), momentum=None, limit=1 / 3)
        assert quantizer.frozen.tolist() == [expected]


def test_more_steps_than_planned_keep_the_threshold_and_warn():
    method, model, optimizer = start(4)
    train(model, method, optimizer, 4)
    with pytest.warns(UserWarning, match="attached for fewer steps"):
        train(model, method, optimizer, 2, first=4)


# -- counting --------------------------------------------------------------------------------------


def test_counting():
    """Three iterations with 0, 10, 30 of 100 frozen: 13.33 % of updates, 6.67 % of backward."""
    savings = Savings(100)
    for frozen in (0, 10, 30):
        savings.frozen["a"] = frozen
        savings.count({"a": (300, 50), "b": (100, 40)})
    assert round(savings.updates, 4) == 0.1333
    assert round(savings.backward, 4) == 0.0667
    # by work: f = 0, 0.2, 0.6 of the layer that has 3/4 of it, halved
    assert round(savings.backward_by_work, 4) == round((0 + 0.2 + 0.6) / 3 * 0.75 / 2, 4)


def test_the_method_counts_what_is_frozen():
    method, model, optimizer = start(40)
    shares = []
    total = sum(p.numel() for p in model.parameters())
    for step in range(40):
        train(model, method, optimizer, 1, first=step)
        shares.append(sum(int(one.sum()) for one in frozen_of(method).values()) / total)
    assert method.savings.updates == pytest.approx(sum(shares) / 40)
    macs = {t.name: t.forward.macs for t in method._layers}
    assert macs == {"0": 8 * 27 * 16, "2": 12 * 72 * 4, "5": 48 * 10, "7": 40}


# -- resuming, accumulation, evaluation -----------------------------------------------------------


def test_a_resumed_run_is_bit_equal():
    method, model, optimizer = start(40)
    train(model, method, optimizer, 22)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), method.state_dict()))
    train(model, method, optimizer, 18, first=22)
    other, twin, again = start(40)
    twin.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    train(twin, other, again, 18, first=22)
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key
    assert other.savings.state_dict() == method.savings.state_dict()
    x = images(0)[0]
    assert torch.equal(method.finalize(model)(x), other.finalize(twin)(x))


def test_accumulated_half_batches_freeze_the_same():
    whole, model, optimizer = start(40, dtype=DOUBLE)
    train(model, whole, optimizer, 40)
    halves, twin, again = start(40, dtype=DOUBLE)
    train(twin, halves, again, 40, parts=2)
    for name, frozen in frozen_of(whole).items():
        assert torch.equal(frozen, frozen_of(halves)[name])


def test_evaluation_in_between_changes_nothing():
    plain, model, optimizer = start(30)
    train(model, plain, optimizer, 30)
    looked, twin, again = start(30)
    for step in range(30):
        twin.eval()
        with torch.no_grad():
            first = twin(images(0)[0])
        twin.train()
        with torch.no_grad():
            assert torch.equal(twin(images(0)[0]), first)  # no dropout, no norm: the same
        train(twin, looked, again, 1, first=step)
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_the_bounds_follow_the_schedule_of_the_weights():
    method, model, optimizer = start(10, bounds_lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    moves = []
    for step in range(4):
        before = method._bounds.values.detach().clone()
        train(model, method, optimizer, 1, first=step)
        schedule.step()
        moves.append(float((method._bounds.values.detach() - before).abs().max()))
    assert moves[0] > 0 < moves[1]
    assert moves[2] == moves[3] == 0


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 1}, "bits=1: expected an int from 2 to 8"),
        ({"bits": 9}, "bits=9"),
        ({"bits": True}, "bits=True"),
        ({"first_last": 1}, "first_last=1: expected an int from 2 to 8 or 'same'"),
        ({"threshold": -0.1}, "threshold=-0.1: expected 0"),
        ({"threshold": 1.1}, "threshold=1.1"),
        ({"threshold": "cosine"}, "threshold='cosine': expected linear, sine or a number"),
        ({"warmup": -1}, "warmup=-1: expected at least 0 epochs"),
        ({"warmup": 1.0}, "a float is a share of the run"),
        ({"momentum": 1.0}, "momentum=1.0: expected at least 0 and less than 1"),
        ({"pin": "both"}, "pin='both': expected code or latent"),
        ({"pin": "latent", "save_backward": True}, "save_backward=True with pin='latent'"),
        ({"bounds_lr": -1.0}, "bounds_lr=-1.0"),
        ({"include": "conv1"}, "expected a list of layer names"),
    ],
)
def test_wrong_fields_are_refused(fields, text):
    with pytest.raises(UserError, match=text):
        LTS(**{"bits": 2, **fields})


def test_wrong_runs_are_refused():
    with pytest.raises(UserError, match="warmup=3: expected less than the 3 epochs"):
        LTS(bits=2, warmup=3).attach(network(), total_steps=9, steps_per_epoch=3)
    with pytest.raises(UserError, match="warmup=1 counts epochs, and this loop has none"):
        LTS(bits=2, warmup=1).attach(network(), total_steps=9)
    with pytest.raises(UserError, match=r"its weight is torch\.float16"):
        LTS(bits=2).attach(nn.Sequential(nn.Linear(4, 4)).half(), total_steps=4)


def test_a_constant_weight_is_refused_by_name():
    model = network()
    nn.init.constant_(model[2].weight, 0.5)
    method = LTS(bits=2)
    model = method.attach(model, total_steps=4)
    with pytest.raises(UserError, match="layer 2: the bounds of its weight"):
        model(images(0)[0])


def test_bounds_that_meet_in_training_are_refused_by_name():
    method, model, optimizer = start(10)
    train(model, method, optimizer, 1)
    with torch.no_grad():
        method._bounds.values[1, 3] = method._bounds.values[1, 2] - 1
    with pytest.raises(UserError, match="layer 2: the bounds of its input"):
        train(model, method, optimizer, 1, first=1)


def test_layers_that_were_never_called_are_refused_at_the_end():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.used(x)

    method = LTS(bits=2)
    model = method.attach(Idle(), total_steps=2)
    optimizer = torch.optim.SGD(method.parameters_for(model), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        method.step()
    with pytest.raises(UserError, match="idle have no clipping bounds"):
        method.finalize(model)


def test_checkpoints_of_other_settings_are_refused():
    method, model, optimizer = start(10)
    train(model, method, optimizer, 2)
    state = method.state_dict()
    for fields, text in (
        ({"bits": 3}, r"other bits of layers \(2: 2, now 3\)"),
        ({"exclude": ["5"]}, r"other bits of layers \(5"),
    ):
        other, *_ = start(10, **fields)
        with pytest.raises(UserError, match=text):
            other.load_state_dict(state)
    other, *_ = start(12)
    with pytest.raises(UserError, match=r"other total_steps \(10, now 12\)"):
        other.load_state_dict(state)


def test_an_optimizer_with_the_bounds_is_refused():
    method = LTS(bits=2)
    model = method.attach(network(), total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images(0)[0]).sum().backward()
    with pytest.raises(UserError, match=r"build it with lts\.parameters_for\(model\)"):
        optimizer.step()


def test_shared_and_foreign_layers_are_left_with_a_reason():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    plan = {layer.name: layer for layer in LTS(bits=4).plan(Twins())}
    assert plan["a"].reason == "shares its weight with b"
    assert "without calling it" in str(plan["attention.out_proj"].reason)
    assert plan["c"].treatment == "8 bits"


def test_bits_of_first_and_last():
    plan = {layer.name: layer.treatment for layer in LTS(bits=3).plan(network())}
    assert plan == {"0": "8 bits", "2": "3 bits", "5": "3 bits", "7": "8 bits"}
    plan = {layer.name: layer.treatment for layer in LTS(bits=3, first_last="same").plan(network())}
    assert set(plan.values()) == {"3 bits"}
    with pytest.raises(StateError):
        LTS(bits=2).step()
