"""The contract that every method keeps, on two made-up methods and on all registered ones."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tenfold.errors import StateError, UserError
from tenfold.methods import Kind, Method, find, in_order, registry
from tenfold.methods.schedule import Schedule
from tenfold.nn.discriminators import PatchDiscriminator
from tenfold.nn.generators import MobileResNetGenerator
from tenfold.nn.hqss_networks import HQSS
from tests import nets
from tests.made_up import Focal, Gain, Hermit, OtherLoss

pytestmark = pytest.mark.unit

# How to make each registered method; a new one fails `test_every_method_has_a_sample` until added.
SAMPLES = {
    "crd": {"weight": 5.0},
    "dcd": {"weight": 0.5},
    "hqss": {"pool": 10},
    "labnet": {"guess": "ring"},
    "lbc": {"n": 2, "m": 4},
    "lts": {"bits": 4},
    "kcd": {
        "teacher": nn.Linear(8, 4).eval().requires_grad_(False),
        "stages": 2,
        "augment_max": 0.0,
    },
    "omgd": {"channel": 100.0},
    "smmix": {"token_head": "own"},
    "supervit": {"sizes": [4, 8], "drop_blocks": [1]},
    "winograd3d": {"tile": 2, "rank": 2, "min_channels": 4},
}
# What `attach` takes in place of a number of steps.
ATTACHED = {
    "kcd": {"dataset": TensorDataset(torch.randn(24, 8), torch.arange(24) % 4), "epochs": 2},
}
# Methods that ask for other networks ahead of `attach`.
GIVEN = {
    "dcd": {"teacher": lambda: generator(4), "discriminator": lambda: PatchDiscriminator(3, 4)},
    "omgd": {"teacher": lambda: generator(4)},
}
# Methods whose result no plain layer can hold: they leave layers of tenfold.nn behind.
INFERENCE_LAYERS = {
    "lts": {"Linear": "QuantizedLinear"},
    "winograd3d": {"Conv3d": "WinogradConv3d"},
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def volumes() -> nn.Sequential:
    """For methods of 3-D convolutions; takes what `network` takes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2, 2)),
        nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def generator(ngf: int = 2) -> nn.Module:
    """For methods that translate images."""
    torch.manual_seed(0)
    return MobileResNetGenerator(ngf, blocks=1)


def synthesizer() -> nn.Module:
    """For the method that paints shadows."""
    torch.manual_seed(0)
    return HQSS(width=4, blocks=1, discriminator_width=4)


NETWORKS = {
    "crd": generator,
    "dcd": generator,
    "hqss": synthesizer,
    "omgd": generator,
    "smmix": lambda: nets.vit(4),
    "supervit": lambda: nets.supervit(4),
    "winograd3d": volumes,
}


def network_for(key: str) -> nn.Module:
    return NETWORKS.get(key, network)()


def give_networks(key: str, method: Method) -> None:
    for role, build in GIVEN.get(key, {}).items():
        method.use_network(role, build())


def step(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 4
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


# -- every registered method ----------------------------------------------------------------------


def test_every_method_has_a_sample():
    assert set(SAMPLES) == set(registry())


@pytest.mark.parametrize("key", sorted(registry()))
class TestEveryMethod:
    def make(self, key) -> Method:
        return find(key)(**SAMPLES[key])

    def test_declares_what_it_is(self, key):
        method = self.make(key)
        assert method.key() == key
        assert isinstance(method.kind, Kind)
        assert method.tasks
        assert type(method)(**method.config()).config() == method.config()

    def test_fields_are_never_reassigned(self, key):
        method = self.make(key)
        for field in method.config():
            with pytest.raises(StateError, match="is configuration and is never reassigned"):
                setattr(method, field, None)

    def test_trains_finalizes_and_leaves_nothing_behind(self, key):
        method = self.make(key)
        if method.kind is not Kind.WEIGHTS:
            pytest.skip("only weight methods attach to a bare model")
        model = network_for(key)
        keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
        model = method.attach(model, total_steps=8, steps_per_epoch=2)
        optimizer = torch.optim.SGD(method.parameters_for(model), lr=0.05)
        for index in range(8):
            step(model, optimizer, index)
            method.step()
        x = torch.randn(4, 8)
        expected = model.eval()(x)
        model = method.finalize(model)
        torch.testing.assert_close(model(x), expected)
        others = INFERENCE_LAYERS.get(key, {})
        found = [type(m).__name__ for m in model.modules()]
        for before, after in zip(types, found, strict=True):
            assert after in (before.__name__, others.get(before.__name__))
        if others:
            assert found != [t.__name__ for t in types]
        else:
            assert list(model.state_dict()) == keys
        assert not any("parametriz" in k or k.startswith("tenfold_") for k in model.state_dict())
        if any(parameter.requires_grad for parameter in model.parameters()):
            step(model, optimizer)  # no hook is left that would complain

    def test_one_epoch_is_enough(self, key):
        method = self.make(key)
        if method.kind is not Kind.WEIGHTS:
            pytest.skip("only weight methods attach to a bare model")
        model = method.attach(network_for(key), total_steps=6, steps_per_epoch=6)
        optimizer = torch.optim.SGD(method.parameters_for(model), lr=0.05)
        for index in range(6):
            step(model, optimizer, index)
            method.step()
        method.finalize(model)

    def test_state_survives_weights_only_loading(self, key, tmp_path):
        method = self.make(key)
        give_networks(key, method)
        method.attach(network_for(key), **ATTACHED.get(key, {"total_steps": 6}))
        torch.save(method.state_dict(), tmp_path / "state")
        method.load_state_dict(torch.load(tmp_path / "state", weights_only=True))

    def test_a_loss_leaves_the_network_as_it_was(self, key):
        method = self.make(key)
        if method.kind is not Kind.LOSS or "translation" not in method.tasks:
            pytest.skip("classifiers' losses have their own loops, and tests of them")
        give_networks(key, method)
        model = network_for(key)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        types = [type(module) for module in model.modules()]
        x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
        expected = model(x)
        assert method.attach(model, total_steps=2) is model
        torch.testing.assert_close(model(x), expected)
        optimizer = torch.optim.SGD(method.parameters_for(model), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            method.step()
        trained = model(x)
        assert method.finalize(model) is model
        torch.testing.assert_close(model(x), trained)
        assert not torch.equal(trained, expected)
        assert [type(module) for module in model.modules()] == types
        assert list(model.state_dict()) == list(before)

    def test_is_described_for_people(self, key):
        method = type(self.make(key))
        assert method.__doc__
        assert method.__doc__.strip().splitlines()[0].endswith(".")


# -- moments --------------------------------------------------------------------------------------


def test_the_order_of_moments_in_a_plain_loop():
    gain = Gain()
    model = gain.attach(network(), total_steps=4, steps_per_epoch=2)
    optimizer = torch.optim.SGD(gain.parameters_for(model), lr=0.1)
    for index in range(4):
        step(model, optimizer, index)
        gain.step()
    assert gain.calls == [
        "epoch 0", "before_step", "step", "before_step", "step",
        "epoch 1", "before_step", "step", "before_step", "step", "epoch 2",
    ]  # fmt: skip
    assert gain.seen


def test_step_without_the_optimizer_is_refused():
    gain = Gain()
    model = gain.attach(network(), total_steps=4)
    optimizer = torch.optim.SGD(gain.parameters_for(model), lr=0.1)
    with pytest.raises(StateError, match="without a step of the optimizer before it"):
        gain.step()
    step(model, optimizer)
    gain.step()
    with pytest.raises(StateError, match="without a step of the optimizer before it"):
        gain.step()


def test_another_models_optimizer_does_not_count():
    gain = Gain()
    gain.attach(network(), total_steps=4)
    other = network()
    step(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(StateError, match="without a step of the optimizer"):
        gain.step()


def test_a_step_that_a_loss_scaler_skips_is_counted_not_refused():
    gain = Gain()
    model = gain.attach(network(), total_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = torch.optim.SGD(gain.parameters_for(model), lr=0.1)
    x, y = torch.randn(16, 8) * 1e25, torch.arange(16) % 4
    loss = nn.functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert "before_step" not in gain.calls
    gain.step()
    assert gain.steps_done == 1


def test_an_optimizer_with_a_closure_calls_before_step_itself():
    gain = Gain()
    model = gain.attach(network(), total_steps=4)
    optimizer = torch.optim.LBFGS(gain.parameters_for(model), lr=0.1, max_iter=2)
    x, y = torch.randn(16, 8), torch.arange(16) % 4

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(StateError, match="takes a closure"):
        gain.step()
    gain.before_step(optimizer)
    gain.step()


def test_two_models_two_objects():
    gain = Gain()
    model = gain.attach(network(), total_steps=4)
    with pytest.raises(StateError, match="one object serves one model"):
        gain.attach(network(), total_steps=4)
    with pytest.raises(StateError, match="another model"):
        gain.finalize(network())
    with pytest.raises(StateError, match="has not finished: 0 of 4 steps"):
        gain.finalize(model)
    with pytest.raises(StateError, match="attached to no model"):
        Gain().step()
    for total in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="total_steps"):
            Gain().attach(network(), total_steps=total)


def test_an_abandoned_loop_leaves_no_model_behind():
    gain = Gain()
    model = gain.attach(network(), total_steps=4)
    watched = weakref.ref(model)
    del gain, model
    gc.collect()
    assert watched() is None


def test_an_abandoned_method_may_be_collected_in_the_middle_of_a_step():
    """PyTorch walks through its hooks then: none may vanish from under it."""
    abandoned = [Gain()]
    abandoned[0].attach(network(), total_steps=4)
    model = network()

    class Collecting(Gain):
        def on_before_step(self, optimizer):
            abandoned.clear()
            gc.collect()

    collecting = Collecting()
    collecting.attach(model, total_steps=4)
    later = Gain()  # a hook behind the one that collects
    later.attach(network(), total_steps=4)
    step(model, torch.optim.SGD(collecting.parameters_for(model), lr=0.1))
    collecting.step()
    assert not abandoned


# -- owned parameters -----------------------------------------------------------------------------


def test_owned_parameters_live_on_the_model_and_leave_it():
    gain = Gain()
    model = network()
    keys = list(model.state_dict())
    gain.attach(model, total_steps=2)
    assert "tenfold_gain.module.value" in model.state_dict()
    assert len(gain.parameters_for(model)) == len(list(model.parameters())) - 1
    optimizer = torch.optim.SGD(gain.parameters_for(model), lr=0.1)
    before = gain.scale.value.item()
    for index in range(2):
        step(model, optimizer, index)
        gain.step()
    assert gain.scale.value.item() != before
    gain.finalize(model)
    assert list(model.state_dict()) == keys


def test_an_optimizer_that_holds_an_owned_parameter_is_refused_at_the_first_step():
    gain = Gain()
    model = gain.attach(network(), total_steps=2)
    with pytest.raises(UserError, match=r"build it with gain\.parameters_for\(model\)"):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_owned_parameters_resume_bit_equal():
    def start():
        gain = Gain()
        model = gain.attach(network(), total_steps=6)
        return gain, model, torch.optim.SGD(gain.parameters_for(model), lr=0.1)

    gain, model, optimizer = start()
    for index in range(3):
        step(model, optimizer, index)
        gain.step()
    saved = copy.deepcopy((model.state_dict(), gain.state_dict()))
    for index in range(3, 6):
        step(model, optimizer, index)
        gain.step()
    gain2, model2, optimizer2 = start()
    model2.load_state_dict(saved[0])
    gain2.load_state_dict(saved[1])
    for index in range(3, 6):
        step(model2, optimizer2, index)
        gain2.step()
    assert torch.equal(gain.scale.value, gain2.scale.value)
    focal = Focal()
    focal.attach(network(), total_steps=2)
    with pytest.raises(UserError, match="state belongs to 'gain': expected one of 'focal'"):
        focal.load_state_dict(saved[1])


# -- composition ----------------------------------------------------------------------------------


def test_stages_decide_the_order():
    gain, focal = Gain(), Focal()
    sparsity = find("lbc")(n=2, m=4)
    assert in_order([focal, sparsity, gain], "classification") == [gain, sparsity, focal]


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ((Focal, OtherLoss), "focal and otherloss both replace the batch's loss"),
        ((Gain, Gain), "gain is given twice"),
        ((Gain, Hermit), "hermit and gain exclude each other"),
    ],
)
def test_nonsense_is_refused(methods, text):
    with pytest.raises(UserError, match=text):
        in_order([method() for method in methods], "classification")


def test_another_task_is_refused():
    with pytest.raises(UserError, match="gain doesn't serve the task 'translation'"):
        in_order([Gain()], "translation")
    dcd = find("dcd")()
    with pytest.raises(UserError, match="dcd doesn't serve the task 'classification': it serves t"):
        in_order([dcd], "classification")
    assert in_order([dcd, find("omgd")()], "translation")[0] is dcd


def test_find():
    assert find("tests.made_up:Gain").key() == "gain"
    with pytest.raises(UserError, match="did you mean lbc"):
        find("lcb")
    with pytest.raises(UserError, match="is not a subclass"):
        find("tests.made_up:Scale")


# -- time -----------------------------------------------------------------------------------------


def test_schedule_epochs():
    schedule = Schedule(10, 4)
    assert schedule.epoch_ends == [4, 8, 10]
    assert [schedule.epoch_at(s) for s in (0, 3, 4, 7, 8, 9, 10)] == [0, 0, 1, 1, 2, 2, 3]
    assert Schedule(10, [5, 3, 2]).epochs == 3
    assert Schedule(10).epochs is None
    with pytest.raises(UserError, match="adds up to 9 over 3 epochs"):
        Schedule(10, [5, 3, 1])
    with pytest.raises(UserError, match="steps_per_epoch=0"):
        Schedule(10, 0)


def test_window_prefers_epochs_where_there_are_enough():
    assert Schedule(1200, 10).window(0, 0.5, changes=5).unit == "epoch"
    assert Schedule(1200, 10).window(0, 0.5, changes=5).end == 60
    short = Schedule(60, 10).window(0, 0.5, changes=5)
    assert (short.unit, short.end) == ("step", 30)
    named = Schedule(60, 10).window(0, 3, changes=5)
    assert (named.unit, named.end) == ("epoch", 3)
    with pytest.raises(UserError, match="expected the end after the start"):
        Schedule(1).window(0, 0.4, changes=5)
