"""LBC against the sheet's worked numbers and against straightforward autograd."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tenfold.errors import StateError, UserError
from tenfold.methods import LBC, candidates, from_blocks, removed_candidates, to_blocks
from tenfold.methods.scores import AccumulatorScores, FullScores

pytestmark = pytest.mark.parity


def network(dtype: torch.dtype = torch.float32, channels: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1),
        nn.Flatten(),
        nn.Linear(channels * 16, channels),
        nn.ReLU(),
        nn.Linear(channels, 4),
    ).to(dtype)


def images(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 4, (6,), generator=generator)


def train(model, sparsity, optimizer, steps, first=0, observe=None):
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(first, first + steps):
        x, y = images(step, dtype)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if observe:
            observe(model)
        optimizer.step()
        sparsity.step()
        losses.append(loss.item())
    return losses


def masks(model) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("mask")}


# -- candidates, blocks, schedule ---------------------------------------------------------------


def test_candidates_are_lexicographic():
    rows = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert candidates(2, 4).tolist() == rows


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (1, 16), (3, 5)])
def test_candidates_sums(n, m):
    table = candidates(n, m)
    assert table.shape == (math.comb(m, n), m)
    assert (table.sum(1) == n).all()
    assert (table.sum(0) == math.comb(m - 1, n - 1)).all()
    combinations = [row.nonzero().flatten().tolist() for row in table]
    assert combinations == [list(c) for c in itertools.combinations(range(m), n)]


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 5),
    blocks=st.integers(1, 4),
    m=st.integers(1, 8),
    kernel=st.lists(st.integers(1, 3), max_size=3),
    last=st.booleans(),
)
def test_blocks_round_trip(out, blocks, m, kernel, last):
    weight = torch.arange(out * blocks * m * math.prod(kernel)).reshape(out, blocks * m, *kernel)
    if last and len(kernel) == 2:
        weight = weight.to(memory_format=torch.channels_last)
    split = to_blocks(weight, m)
    assert split.shape == (weight.numel() // m, m)
    assert torch.equal(from_blocks(split, weight.shape), weight)
    # a block holds m neighbouring channels at one filter and kernel position
    filters, *position = [0] * (1 + len(kernel))
    first = weight[(filters, slice(0, m), *position)]
    assert torch.equal(split[0], first)


def test_blocks_refuse_channels_that_do_not_divide():
    with pytest.raises(UserError, match="6 input channels are not divisible into blocks of 4"):
        to_blocks(torch.zeros(2, 6, 2, 2), 4)  # 48 elements would divide; the channels don't


@pytest.mark.parametrize(
    ("n", "m", "end", "power", "changes"),
    [
        (2, 4, 60, 3, {5: 1, 10: 2, 16: 3, 25: 4, 60: 5}),
        (1, 4, 60, 3, {8: 1, 19: 2, 60: 3}),
        (2, 4, 200, 4, {11: 1, 24: 2, 41: 3, 67: 4, 200: 5}),
    ],
)
def test_schedule_table(n, m, end, power, changes):
    c = math.comb(m, n)
    k = [removed_candidates(e, c, 0, end, power) for e in range(end + 5)]
    found = {e: k[e] for e in range(1, len(k)) if k[e] != k[e - 1]}
    assert found == changes
    assert k == sorted(k)
    assert all(value == c - 1 for value in k[end:])


def test_schedule_1_16_and_the_integer_ceiling():
    k = [removed_candidates(e, 16, 0, 60, 3) for e in range(61)]
    assert (k[1], k[2], k[35], k[36], k[59], k[60]) == (0, 1, 13, 14, 14, 15)
    assert removed_candidates(20, 28, 0, 60, 3) == 19  # in floats: 18
    assert removed_candidates(40, 28, 0, 60, 3) == 26  # in floats: 25


def test_schedule_waits_for_its_start():
    assert [removed_candidates(e, 6, 10, 20, 3) for e in (0, 5, 10)] == [0, 0, 0]


# -- the worked block ---------------------------------------------------------------------------


def worked_block(scores: str) -> tuple[nn.Linear, LBC, list[list[int]]]:
    weight = torch.tensor([[0.5, -1.0, 0.2, 0.8]])
    gradient = torch.tensor([[0.1, 0.3, -0.2, 0.4]])
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data.copy_(weight)
    sparsity = LBC(n=2, m=4, include=["0"], scores=scores)
    sparsity.attach(model, total_steps=100, steps_per_epoch=1)
    original = model[0].parametrizations.weight.original
    original.grad = gradient.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.before_step(optimizer)
    state = copy.deepcopy(sparsity.extra_state()["scores"]["0"])
    steps = []
    for k in range(1, 6):
        sparsity._remove("0", 1)
        sparsity._removed = k
        steps.append(model[0].parametrizations.weight[0].mask.int().flatten().tolist())
    return state, sparsity, steps


def test_worked_block_full_scores():
    state, _, steps = worked_block("full")
    expected = [0.358333, 0.332333, 0.296333, 0.367333, 0.331333, 0.305333]
    torch.testing.assert_close(state["value"][0], torch.tensor(expected), atol=1e-6, rtol=0)
    assert float((state["value"][0] - 1 / 3).sum()) == pytest.approx(-0.1 * 0.09, abs=1e-6)
    assert steps == [[1] * 4, [1] * 4, [1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]]


def test_worked_block_accumulator_makes_the_same_choices():
    state, _, steps = worked_block("accumulator")
    expected = torch.tensor([[0.05, -0.30, -0.04, 0.32]]) * -0.1
    torch.testing.assert_close(state["value"], expected)
    assert steps[-1] == [0, 1, 1, 0]
    assert steps == worked_block("full")[2]


# -- forward, backward, identity ----------------------------------------------------------------


def test_dense_at_start():
    model = network()
    x, _ = images(0)
    before = model(x)
    LBC(n=2, m=4).attach(model, total_steps=10)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)


def test_score_gradient_equals_autograd_through_the_straight_through_choice():
    torch.manual_seed(1)
    m, table = 4, candidates(2, 4, torch.float64)
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    blocks = weight.numel() // m
    alive = torch.rand(blocks, 6, dtype=torch.float64) < 0.5
    alive[:, 2] = True
    scores = torch.full((blocks, 6), 1 / 3, dtype=torch.float64, requires_grad=True)

    # The mask as a function of the scores with an identity gradient: each alive candidate adds
    # itself to the positions that it covers, and the sum's value is replaced by "some covers it".
    covered = (scores * alive) @ table
    kept = ((alive.double() @ table) > 0).double()
    mask = kept + covered - covered.detach()
    effective = from_blocks(mask, weight.shape) * weight
    effective.retain_grad()
    nn.functional.conv2d(x, effective, padding=1).square().sum().backward()

    identity = (to_blocks(weight.grad * weight.detach(), m) @ table.T) * alive
    torch.testing.assert_close(scores.grad, identity, atol=0, rtol=1e-12)
    direct = (to_blocks(effective.grad * weight.detach(), m) @ table.T) * alive
    torch.testing.assert_close(scores.grad, direct, atol=0, rtol=1e-12)


def test_masked_weights_get_no_gradient_and_never_return():
    model = network()
    sparsity = LBC(n=1, m=4, end=4)
    sparsity.attach(model, total_steps=30, steps_per_epoch=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    previous = masks(model)

    def observe(model):
        nonlocal previous
        now = masks(model)
        for name, mask in now.items():
            assert ((previous[name] - mask) >= 0).all()  # nothing comes back
            layer = model.get_submodule(name.rsplit(".parametrizations", 1)[0])
            gradient = layer.parametrizations.weight.original.grad
            assert (gradient[mask == 0] == 0).all()
        previous = now
        for alive in sparsity._alive.values():
            assert (alive.sum(1) == sparsity.n_candidates - sparsity._removed).all()

    train(model, sparsity, optimizer, 30, observe=observe)
    assert sparsity.finished()
    for mask in masks(model).values():
        assert (to_blocks(mask, 4).sum(1) == 1).all()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
def test_accumulator_equals_full_form_under_sgd(n, m, nesterov):
    runs = []
    for scores in ("full", "accumulator"):
        model = network(torch.float64)
        sparsity = LBC(n=n, m=m, scores=scores)
        sparsity.attach(model, total_steps=60)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=nesterov
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        losses = []
        for step in range(60):
            losses += train(model, sparsity, optimizer, 1, first=step)
            schedule.step()
        form = {type(s) for s in sparsity._scores.values()} or None
        runs.append((losses, masks(model), form))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-10)
    for name, mask in runs[0][1].items():
        assert torch.equal(mask, runs[1][1][name])
        assert mask.mean() == pytest.approx(n / m)


def test_large_layers_update_in_pieces_equals_whole():
    torch.manual_seed(0)
    weight = torch.randn(96, 96, 3, 3).to(memory_format=torch.channels_last)
    assert weight.numel() > 2**16
    table = candidates(2, 4)
    group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "dampening": 0.0, "nesterov": True}
    pieces = AccumulatorScores(weight, table, 4)
    reference = nn.Parameter(torch.zeros_like(weight))
    optimizer = torch.optim.SGD([reference], lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    for step in range(3):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(
            memory_format=torch.channels_last
        )
        reference.grad = weight.grad * weight
        pieces.update(weight, group, torch.ones(1))
        optimizer.step()
    torch.testing.assert_close(pieces.value, reference.detach())


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_changes_nothing(fused):
    """A scaler may leave the unscaling to a fused optimizer's kernel: the scores don't see it."""

    def run(scale: float | None):
        model, sparsity = network(), LBC(n=2, m=4)
        sparsity.attach(model, total_steps=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for step in range(4):
            x, y = images(step)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            sparsity.step()
        return model, sparsity

    plain, scaled = run(None), run(1024.0)
    for name, scores in plain[1]._scores.items():
        torch.testing.assert_close(scores.value, scaled[1]._scores[name].value, rtol=1e-5, atol=0)
    for a, b in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_full_scores_follow_adam(make):
    torch.manual_seed(0)
    weight = torch.randn(8, 8, dtype=torch.float64)
    table = candidates(2, 4)
    scores = FullScores(weight, table, 4)
    reference = nn.Parameter(scores.value.clone())
    optimizer = make([reference], lr=0.01, weight_decay=0.05)
    alive = torch.ones(16, 6, dtype=torch.bool)
    for step in range(5):
        weight.grad = torch.randn(
            8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        reference.grad = to_blocks(weight.grad * weight, 4) @ table.double().T
        scores.update(weight, optimizer.param_groups[0], alive)
        optimizer.step()
    torch.testing.assert_close(scores.value, reference.detach(), rtol=1e-9, atol=1e-12)


def test_adam_chooses_full_scores_and_sgd_the_accumulator():
    for make, form in ((torch.optim.AdamW, FullScores), (torch.optim.SGD, AccumulatorScores)):
        model = network()
        sparsity = LBC(n=2, m=4)
        sparsity.attach(model, total_steps=40)
        train(model, sparsity, make(model.parameters(), lr=1e-3), 1)
        assert {type(scores) for scores in sparsity._scores.values()} == {form}


def test_adam_refuses_the_accumulator():
    model = network()
    sparsity = LBC(n=2, m=4, scores="accumulator")
    sparsity.attach(model, total_steps=4)
    with pytest.raises(UserError, match="exact only for SGD"):
        train(model, sparsity, torch.optim.AdamW(model.parameters()), 1)


def test_layout_perturbing_one_block_changes_only_its_mask():
    def final_masks(change: bool) -> Tensor:
        torch.manual_seed(3)
        conv = nn.Conv2d(8, 4, 3, bias=False)
        model = nn.Sequential(conv)
        sparsity = LBC(n=2, m=4, include=["0"], end=1)
        sparsity.attach(model, total_steps=2, steps_per_epoch=1)
        weight = conv.parametrizations.weight.original
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        if change:
            with torch.no_grad():
                weight[2, 4:8, 1, 2] *= torch.tensor([-3.0, 5.0, -7.0, 2.0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.step()
        sparsity.step()
        return conv.parametrizations.weight[0].mask.clone()

    a, b = final_masks(False), final_masks(True)
    different = (a != b).nonzero()
    assert len(different)
    assert all(row[0] == 2 and row[1] >= 4 and tuple(row[2:]) == (1, 2) for row in different)


def test_pointwise_convolution_and_linear_get_equal_masks():
    found = []
    for layer in (nn.Conv2d(8, 6, 1, bias=False), nn.Linear(8, 6, bias=False)):
        torch.manual_seed(0)
        values, gradients = torch.randn(6, 8), torch.randn(6, 8)
        model = nn.Sequential(layer)
        layer.weight.data.copy_(values.reshape(layer.weight.shape))
        sparsity = LBC(n=2, m=4, include=["0"])
        sparsity.attach(model, total_steps=2)
        layer.parametrizations.weight.original.grad = gradients.reshape(layer.weight.shape)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.step()
        sparsity.step()
        assert sparsity.finished()
        found.append(layer.parametrizations.weight[0].mask.flatten())
    assert torch.equal(*found)


# -- finalize, resume ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (1, 2), (1, 8)])
def test_finalize_leaves_plain_layers_with_exact_zeros(n, m):
    model = network()
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    sparsity = LBC(n=n, m=m)
    sparsity.attach(model, total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, sparsity, optimizer, 20)
    x, _ = images(99)
    expected = model.eval()(x)
    final = sparsity.finalize(model)
    assert final is model
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    for name in ("2", "4", "6"):
        assert (to_blocks(model.get_submodule(name).weight != 0, m).sum(1) == n).all()
        assert isinstance(model.get_submodule(name).weight, nn.Parameter)
    assert (model[0].weight != 0).all()
    assert (model[8].weight != 0).all()


@pytest.mark.parametrize("make", ["sgd", "adamw"])
def test_resume_in_the_middle_is_bit_equal(make, tmp_path):
    def start():
        model = network()
        sparsity = LBC(n=2, m=4)
        sparsity.attach(model, total_steps=40, steps_per_epoch=4)
        if make == "sgd":
            return model, sparsity, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, sparsity, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, sparsity, optimizer = start()
    train(model, sparsity, optimizer, 14)
    assert 0 < sparsity._removed < 5
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "method": sparsity.state_dict(),
    }
    torch.save(saved, tmp_path / "checkpoint")
    train(model, sparsity, optimizer, 26, first=14)

    again, sparsity_again, optimizer_again = start()
    loaded = torch.load(tmp_path / "checkpoint", weights_only=True)
    again.load_state_dict(loaded["model"])
    optimizer_again.load_state_dict(loaded["optimizer"])
    sparsity_again.load_state_dict(loaded["method"])
    train(again, sparsity_again, optimizer_again, 26, first=14)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    sparsity.finalize(model)
    sparsity_again.finalize(again)


def test_resume_with_another_pattern_is_refused():
    one, two = LBC(n=2, m=4), LBC(n=1, m=4)
    one.attach(network(), total_steps=10)
    two.attach(network(), total_steps=10)
    with pytest.raises(UserError, match="checkpoint is 2:4, and this LBC is 1:4"):
        two.load_state_dict(one.state_dict())


def test_optimizer_made_before_attach_still_serves():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsity = LBC(n=2, m=4)
    sparsity.attach(model, total_steps=10)
    train(model, sparsity, optimizer, 10)
    sparsity.finalize(model)


# -- time ---------------------------------------------------------------------------------------


def final_step(sparsity: LBC, total_steps: int, steps_per_epoch=None) -> int:
    model = network()
    sparsity.attach(model, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(total_steps):
        train(model, sparsity, optimizer, 1, first=step)
        if sparsity.finished():
            return step + 1
    return -1


def test_one_epoch_is_enough():
    assert final_step(LBC(n=2, m=4), 20, steps_per_epoch=20) == 10


def test_the_default_ends_at_half_the_run_and_deit_at_two_thirds():
    assert final_step(LBC(n=2, m=4), 60, steps_per_epoch=3) == 30
    assert final_step(LBC(n=2, m=4, preset="deit"), 60, steps_per_epoch=3) == 39
    assert final_step(LBC(n=2, m=4, preset="deit"), 60) == 40


def test_epochs_as_ints_count_epochs_even_unequal_ones():
    assert final_step(LBC(n=1, m=4, end=3), 20, steps_per_epoch=[8, 4, 4, 4]) == 16
    assert final_step(LBC(n=1, m=4, end=4), 20, steps_per_epoch=[8, 4, 4, 4]) == 20


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 4, "m": 4}, "1 <= n < m"),
        ({"n": 0, "m": 4}, "1 <= n < m"),
        ({"n": 1, "m": 1}, "1 <= n < m"),
        ({"n": 2.0, "m": 4}, "two ints"),
        ({"n": True, "m": 4}, "two ints"),
        ({"n": 16, "m": 32}, "601,080,390 candidates"),
        ({"n": 2, "m": 4, "end": 0}, "end=0"),
        ({"n": 2, "m": 4, "end": 1.5}, "share of the run"),
        ({"n": 2, "m": 4, "start": -1}, "at least 0"),
        ({"n": 2, "m": 4, "start": 5, "end": 5}, "start < end"),
        ({"n": 2, "m": 4, "power": 0}, "power=0"),
        ({"n": 2, "m": 4, "preset": "vgg"}, "preset='vgg'"),
        ({"n": 2, "m": 4, "scores": "half"}, "full or accumulator"),
        ({"n": 2, "m": 4, "include": "layer1"}, "list of layer names"),
    ],
)
def test_bad_fields(fields, text):
    with pytest.raises(UserError, match=text):
        LBC(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"include": ["0"]}, "layer 0 can't be made 2:4: 3 input channels are not divisible"),
        ({"include": ["nothing"]}, "matches no convolution or linear"),
        ({"exclude": ["2", "4", "6"]}, "no layer is left"),
        ({"end": 3}, "counts epochs"),
    ],
)
def test_bad_layers_and_times(fields, text):
    sparsity = LBC(n=2, m=4, **fields)
    model = network()
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=text):
        sparsity.attach(model, total_steps=100)
    assert list(model.state_dict()) == keys  # nothing was changed


def test_end_beyond_the_run():
    with pytest.raises(UserError, match="the run has 4 epochs only"):
        LBC(n=2, m=4, end=5).attach(network(), total_steps=8, steps_per_epoch=2)


def test_full_scores_over_the_memory_limit():
    model = network(channels=16)
    with pytest.raises(UserError, match=r"4:8 has 70 candidates .* MiB in the full form"):
        LBC(n=4, m=8, scores="full", memory_limit_gib=1e-5).attach(model, total_steps=10)


def test_diverged_gradients_are_named():
    model = network()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(model, total_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    optimizer.step()
    with pytest.raises(UserError, match="layer 2: its scores are not finite"):
        sparsity.step()


def test_plan_names_reasons():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(6, 8, 1),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Linear(8, 8),
        nn.Linear(8, 2),
    )
    model.add_module("tied", nn.Linear(8, 8))
    model.tied.weight = model[5].weight
    model.add_module("head", nn.Linear(8, 8))
    plan = {layer.name: layer for layer in LBC(n=2, m=4).plan(model)}
    assert {name for name, layer in plan.items() if layer.treatment == "2:4"} == {"2", "6"}
    assert plan["0"].reason == "first convolution, kept dense"
    assert plan["1"].reason == "depthwise convolution"
    assert plan["3"].reason == "6 input channels are not divisible by M=4"
    assert plan["4"].reason == "transposed convolution"
    assert plan["5"].reason == "shares its weight with tied"
    assert plan["head"].reason == "last linear layer, kept dense"


def test_score_memory_of_the_sheet():
    """2:4, 1:4, 2:8 and 4:8 cost 1.5, 1, 3.5 and 8.75 times the weights (full), 1x (small)."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    weights = 2 * 64 * 64
    for (n, m), factor in {(2, 4): 1.5, (1, 4): 1.0, (2, 8): 3.5, (4, 8): 8.75}.items():
        sparsity = LBC(n=n, m=m)
        alive = math.comb(m, n) / m * weights
        assert sparsity.score_bytes(model, "full") - alive == 4 * factor * weights
        assert sparsity.score_bytes(model, "accumulator") - alive == 4 * weights


def test_finalize_too_early():
    model = network()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(model, total_steps=10)
    with pytest.raises(StateError, match="has not finished: 0 of 10 steps"):
        sparsity.finalize(model)
