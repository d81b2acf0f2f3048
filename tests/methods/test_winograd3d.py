"""Winograd3d against the sheet's numbers, plain autograd, and itself after a resume."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tenfold
from tenfold.errors import StateError, UserError
from tenfold.kernels.winograd_transforms import column_count, tile_of
from tenfold.methods import Winograd3d, gain_scales, transforms, winograd_weight
from tenfold.methods.winograd_layer import WinogradTraining
from tenfold.nn.winograd import WinogradConv3d

pytestmark = pytest.mark.parity


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3, 4))


def network(dtype: torch.dtype = torch.float32, channels: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm3d(channels),
        nn.ReLU(),
        nn.Conv3d(channels, channels + 2, 3, padding=(0, 1, 1)),
        nn.ReLU(),
        Pool(),
        nn.Linear(channels + 2, 4),
    ).to(dtype)


def clips(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(6, 2, 5, 6, 7, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 4, (6,), generator=generator)


def make(**fields) -> Winograd3d:
    return Winograd3d(**{"tile": 2, "rank": 3, "min_channels": 4, **fields})


def train(model, winograd, optimizer, steps, first=0, observe=None):
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(first, first + steps):
        x, y = clips(step, dtype)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        winograd.step()
        if observe:
            observe()
        losses.append(loss.item())
    return losses


def sgd(model, lr=0.05):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def layers(model) -> list[WinogradTraining]:
    return [m for m in model.modules() if isinstance(m, WinogradTraining)]


def spread(layer: WinogradTraining) -> Tensor:
    """The composed weight with zeros for the columns that are gone, `(t^3, O, C)`."""
    values = layer.values().detach()
    full = values.new_zeros(layer.count, *values.shape[1:])
    full[list(layer.kept)] = values
    return full


# -- start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [2, 4, (2, 4, 4)])
@pytest.mark.parametrize("mode", ["residual", "dense"])
def test_starts_as_the_dense_network(tile, mode):
    model = network(torch.float64).eval()
    x, _ = clips(0, torch.float64)
    before = model(x)
    winograd = make(tile=tile, mode=mode, keep_ratio=0.6)
    model = winograd.attach(model, total_steps=10)
    assert len(layers(model)) == 2
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("tile", [2, 4])
def test_a_factor_of_full_rank_starts_as_the_dense_network_too(tile):
    for rank in (27, 30):  # beyond 27 there is nothing left to take
        model = network(torch.float64).eval()
        x, _ = clips(0, torch.float64)
        before = model(x)
        model = make(tile=tile, mode="factor", rank=rank).attach(model, total_steps=10)
        torch.testing.assert_close(model(x), before, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("tile", [2, 4])
def test_a_factor_of_low_rank_starts_with_the_least_error_for_white_inputs(tile):
    """sqrt(sum over k > s of sigma_k^2 / sum of all): relative error for white noise."""
    torch.manual_seed(0)
    conv = nn.Conv3d(8, 12, 3, bias=False).double()
    made = WinogradTraining(conv, tile, "factor", 8, "accurate")
    sigma = torch.linalg.svdvals(conv.weight.detach().reshape(96, 27))
    expected = float((sigma[8:].square().sum() / sigma.square().sum()).sqrt())
    # A truncated kernel is still a kernel, so its distance is the error for white inputs.
    kernel = made.inference().to_dense().weight.detach()
    found = float(((kernel - conv.weight).norm() / conv.weight.norm()).detach())
    assert found == pytest.approx(expected, rel=1e-6)
    domain = winograd_weight(conv.weight.detach(), tile, "accurate").reshape(96, -1)
    u, s, vh = torch.linalg.svd(domain, full_matrices=False)
    plain = WinogradConv3d.like(conv, tile)
    plain.fill(((u * s)[:, :8] @ vh[:8]).reshape(12, 8, -1).permute(2, 0, 1), None)
    x = torch.randn(1, 8, 22, 22, 22, dtype=torch.float64)
    errors = [
        float(((other(x) - conv(x)).norm() / conv(x).norm()).detach())
        for other in (made.inference(), plain)
    ]
    assert errors[0] == pytest.approx(expected, rel=0.03)
    assert errors[0] < errors[1]  # the plain decomposition of What loses more


@pytest.mark.parametrize(
    ("tile", "rank", "small", "large"),
    [
        (2, 4, 16640, 524544), (4, 4, 17248, 525152),
        (2, 8, 33280, 1049088), (4, 8, 34496, 1050304),
        (2, 16, 66560, 2098176), (4, 16, 68992, 2100608),
    ],
)  # fmt: skip
def test_trained_parameters_of_the_sheets_table(tile, rank, small, large):
    for (inputs, outputs), expected in {(64, 64): small, (256, 512): large}.items():
        # On PyTorch's meta device shapes are followed and nothing is computed.
        conv = nn.Conv3d(inputs, outputs, 3, bias=False, device="meta")
        made = WinogradTraining(conv, tile, "residual", rank, "accurate")
        assert sum(p.numel() for p in made.parameters()) == expected
        assert made.left.shape == (outputs, inputs, rank)
        assert made.right.shape == (rank, column_count(tile_of(tile)))


def test_dense_training_has_as_many_parameters_as_columns():
    conv = nn.Conv3d(8, 8, 3, bias=False)
    for tile, factor in ((2, 64 / 27), (4, 8)):
        made = WinogradTraining(conv, tile, "dense", 1, "accurate")
        assert sum(p.numel() for p in made.parameters()) == factor * conv.weight.numel()


@pytest.mark.parametrize("mode", ["residual", "factor", "dense"])
def test_the_network_can_be_put_into_channels_last_while_it_trains(mode):
    """PyTorch refuses that for any parameter of four axes."""
    winograd = make(mode=mode, keep_ratio=1.0)
    model = winograd.attach(network(), total_steps=4)
    x, _ = clips(0)
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


# -- gains and scores -----------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("mode", ["residual", "factor", "dense"])
def test_normalisation_changes_no_bit_and_no_score(tile, mode):
    found = []
    for normalize in (True, False):
        model = network()
        winograd = make(tile=tile, mode=mode, normalize=normalize, rank=4, keep_ratio=0.5)
        torch.manual_seed(5)
        model = winograd.attach(model, total_steps=100)
        for layer in layers(model):
            if mode != "dense":  # as if trained; the same weight in both scales
                right = torch.randn(layer.right.shape, generator=torch.Generator().manual_seed(1))
                layer.right.data = right * layer.scales
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        x, y = clips(0)
        logits = model(x)
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
        winograd.step()
        scores = list(winograd.extra_state()["scores"].values())
        winograd._pruner.remove(50)
        found.append((logits, scores, [layer.kept for layer in layers(model)]))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)
    assert found[0][2] == found[1][2]


def test_scores_are_weight_times_gradient_by_column():
    model = network(torch.float64)
    winograd = make(mode="dense", keep_ratio=0.5)
    model = winograd.attach(model, total_steps=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = [torch.zeros(64) for _ in layers(model)]
    for step in range(3):
        x, y = clips(step, torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for total, layer in zip(expected, layers(model), strict=True):
            total += (layer.weight * layer.weight.grad).abs().sum(dim=(1, 2)).detach()
        optimizer.step()
        winograd.step()
    found = winograd.extra_state()["scores"].values()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=0)


def test_gradients_of_the_factors():
    """dSf = dWhat Tf^T and dTf = Sf^T dWhat, as the sheet writes them."""
    conv = nn.Conv3d(3, 4, 3).double()
    layer = WinogradTraining(conv, 2, "residual", 5, "accurate", normalize=False)
    layer.right.data.normal_()
    values = layer.values()
    outer = torch.randn_like(values)
    left, right = torch.autograd.grad((values * outer).sum(), (layer.left, layer.right))
    d_what = outer.permute(1, 2, 0).reshape(12, 64)
    s, t = layer.left.detach().reshape(12, 5), layer.right.detach().reshape(5, 64)
    torch.testing.assert_close(left.reshape(12, 5), d_what @ t.T)
    torch.testing.assert_close(right.reshape(5, 64), s.T @ d_what)


# -- pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["residual", "factor", "dense"])
@pytest.mark.parametrize("score", ["taylor", "magnitude", "output_error", "random"])
@pytest.mark.parametrize("compensate", [True, False])
def test_trains_prunes_and_finalizes(mode, score, compensate):
    model = network()
    winograd = make(mode=mode, score=score, compensate=compensate, keep_ratio=0.25, every=2)
    model = winograd.attach(model, total_steps=20)
    seen = [[set(layer.kept) for layer in layers(model)]]

    def observe():
        now = [set(layer.kept) for layer in layers(model)]
        for before, after in zip(seen[-1], now, strict=True):
            assert after <= before  # nothing comes back
        seen.append(now)

    train(model, winograd, sgd(model), 20, observe=observe)
    sizes = [len(kept[0]) for kept in seen]
    assert sizes[2] == 64  # start=0.1
    assert sizes[10] == sizes[-1] == 16  # end=0.5
    assert len(set(sizes)) > 3
    assert winograd.metrics() == {"columns": 0.25}
    x, _ = clips(99)
    expected = model.eval()(x)
    model = winograd.finalize(model)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert [len(m.kept) for m in model.modules() if isinstance(m, WinogradConv3d)] == [16, 16]
    assert not layers(model)


@pytest.mark.parametrize("mode", ["residual", "factor", "dense"])
@pytest.mark.parametrize("tile", [2, 4])
def test_compensation_moves_what_is_lost_in_every_form(mode, tile):
    """Merged, the layer's weight becomes What_J + What_R X, whatever form it is kept in."""
    conv = nn.Conv3d(4, 5, 3).double()
    layer = WinogradTraining(conv, tile, mode, 3, "accurate")
    if mode != "dense":
        layer.right.data.normal_()
    count = layer.count
    before, scaled = spread(layer), layer.scaled_weight()
    generator = torch.Generator().manual_seed(0)
    removed = sorted(torch.randperm(count, generator=generator)[: count // 3].tolist())
    kept = sorted(set(range(count)) - set(removed))
    moved = torch.randn(len(removed), len(kept), generator=generator, dtype=torch.float64)
    layer.remove(removed, moved)
    found = layer.scaled_weight()
    torch.testing.assert_close(found[kept], scaled[kept] + moved.T @ scaled[removed])
    assert (found[removed] == 0).all()
    assert layer.kept == tuple(kept)
    other = WinogradTraining(conv, tile, mode, 3, "accurate")
    other.load_state_dict(layer.state_dict())
    assert other.kept == layer.kept
    assert torch.equal(spread(other), spread(layer))
    assert not torch.equal(before, spread(layer))


def test_compensation_lowers_the_output_error_of_every_layer():
    found = {}
    for compensate in (True, False):
        model = network(torch.float64).eval()
        convs = [model[2], model[5]]
        winograd = make(keep_ratio=0.5, compensate=compensate, score="random", start=0, end=0.9)
        model = winograd.attach(model.train(), total_steps=100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train(model, winograd, optimizer, 8)
        winograd._pruner.remove(90)
        model.eval()
        for conv, place in zip(convs, (2, 5), strict=True):
            x = model[:place](clips(0, torch.float64)[0]).detach()
            with torch.no_grad():
                difference, expected = model[place](x) - conv(x), conv(x)
            found[compensate, place] = float(difference.norm() / expected.norm())
    for place in (2, 5):
        assert found[True, place] < 0.8 * found[False, place]


def test_all_columns_are_no_change_to_the_training():
    """keep_ratio=1 removes nothing, keeps no scores, and may be finalized at any time."""
    model = network()
    winograd = make(keep_ratio=1.0)
    model = winograd.attach(model, total_steps=10)
    train(model, winograd, sgd(model), 3)
    assert winograd.extra_state()["scores"] == {}
    assert winograd.extra_state()["moments"] == {}
    assert winograd.metrics() == {"columns": 1.0}
    assert winograd.finished()
    winograd.finalize(model)


def test_pruned_columns_cost_no_gradient_and_masked_ones_equal_zeros():
    model = network(torch.float64)
    winograd = make(mode="dense", keep_ratio=0.5, score="random", compensate=False)
    model = winograd.attach(model, total_steps=100)
    x, y = clips(0, torch.float64)
    winograd._pruner.remove(50)
    nn.functional.cross_entropy(model(x), y).backward()
    for layer in layers(model):
        gone = [j for j in range(64) if j not in layer.kept]
        assert len(gone) == 32
        assert (layer.weight.grad[gone] == 0).all()
        full = WinogradConv3d(
            layer.in_channels, layer.out_channels, 2, padding=layer.padding, bias=False
        ).double()
        full.fill(spread(layer), None)
        z = torch.randn(1, layer.in_channels, 4, 5, 4, dtype=torch.float64)
        bias = 0 if layer.bias is None else layer.bias.detach()[:, None, None, None]
        torch.testing.assert_close(layer(z).detach(), full(z) + bias)


def test_one_budget_for_all_layers():
    model = network()
    winograd = make(scope="global", keep_ratio=0.4, every=2)
    model = winograd.attach(model, total_steps=20)
    train(model, winograd, sgd(model), 20)
    costs = [m.in_channels * m.out_channels * m.tiles for m in layers(model)]
    kept = [len(m.kept) for m in layers(model)]
    spent = sum(c * k for c, k in zip(costs, kept, strict=True))
    goal = round(0.4 * 64)
    assert spent <= goal * sum(costs) < spent + max(costs)
    assert min(kept) >= 8
    assert kept[0] != kept[1]


@settings(max_examples=12, deadline=None)
@given(total=st.integers(1, 60), keep=st.sampled_from([0.2, 0.5, 0.9]), every=st.integers(1, 20))
def test_any_length_of_run_ends_with_the_wanted_columns(total, keep, every):
    winograd = make(keep_ratio=keep, every=every, score="random", compensate=False)
    model = winograd.attach(
        nn.Sequential(nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 3)), total_steps=total
    )
    for step in range(1, total + 1):
        winograd._pruner.step(step)
    assert len(model[1].kept) == round(keep * 64)


# -- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"keep_ratio": 0.4, "every": 3},
        {"keep_ratio": 0.4, "every": 3, "mode": "factor", "score": "output_error"},
        {"keep_ratio": 0.4, "every": 3, "mode": "dense", "score": "random"},
    ],
)
def test_resume_is_bit_equal(fields, tmp_path):
    def start():
        winograd = make(**fields)
        model = winograd.attach(network(), total_steps=24)
        return winograd, model, sgd(model)

    winograd, model, optimizer = start()
    train(model, winograd, optimizer, 9)
    states = (model.state_dict(), winograd.state_dict(), optimizer.state_dict())
    torch.save(states, tmp_path / "state")
    train(model, winograd, optimizer, 15, first=9)

    again, model2, optimizer2 = start()
    saved = torch.load(tmp_path / "state", weights_only=True)
    for target, state in zip((model2, again, optimizer2), saved, strict=True):
        target.load_state_dict(state)
    assert 25 < len(layers(model2)[0].kept) < 64  # in the midst of the removal
    train(model2, again, optimizer2, 15, first=9)
    a, b = winograd.finalize(model), again.finalize(model2)
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


def test_a_state_serves_its_own_configuration_only():
    winograd = make()
    winograd.attach(network(), total_steps=10)
    state = copy.deepcopy(winograd.state_dict())
    for fields, text in (
        ({"tile": 4}, r"has tile=\[2, 2, 2\], and this Winograd3d tile=\[4, 4, 4\]"),
        ({"mode": "dense"}, "has mode='residual', and this Winograd3d mode='dense'"),
        ({"rank": 2}, "has rank=3"),
        ({"points": "standard"}, "has points='accurate'"),
        ({"normalize": False}, "has normalize=True"),
        ({"exclude": ["5"]}, r"treats other layers \(5\)"),
    ):
        other = make(**fields)
        other.attach(network(), total_steps=10)
        with pytest.raises(UserError, match=text):
            other.load_state_dict(state)


def test_a_models_state_for_other_geometry_is_refused():
    first = make().attach(network(), total_steps=10).state_dict()
    with pytest.raises(UserError, match=r"layer 2: the state was made for tile \(2, 2, 2\)"):
        make(tile=4).attach(network(), total_steps=10).load_state_dict(first)
    with pytest.raises(UserError, match="layer 2: the state's weights are scaled by other"):
        make(normalize=False).attach(network(), total_steps=10).load_state_dict(first)


# -- loops that are less plain --------------------------------------------------------------------


def test_micro_batches_add_up_and_evaluation_leaves_no_trace():
    model = network()
    winograd = make(keep_ratio=0.5)
    model = winograd.attach(model, total_steps=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model(clips(7)[0])
    model.eval()
    nn.functional.cross_entropy(model(clips(8)[0]), clips(8)[1]).backward()
    assert all(layer.score is None and layer.moment is None for layer in layers(model))
    model.train()
    optimizer.zero_grad()
    for step in range(2):
        nn.functional.cross_entropy(model(clips(step)[0]), clips(step)[1]).backward()
    optimizer.step()
    winograd.step()
    assert all(count > 0 for count in winograd.extra_state()["counts"].values())
    assert len(winograd.extra_state()["scores"]) == 2


def test_a_step_that_a_loss_scaler_skips_leaves_no_score():
    model = network()
    winograd = make(keep_ratio=0.5)
    model = winograd.attach(model, total_steps=100)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    x, y = clips(0)
    scaler.scale(nn.functional.cross_entropy(model(x), y) * 1e10).backward()
    scaler.step(optimizer)
    scaler.update()
    winograd.step()
    assert winograd.extra_state()["scores"] == {}
    assert all(layer.score is None and layer.moment is None for layer in layers(model))


def test_autocast_with_small_tiles_trains_and_with_large_ones_is_refused():
    x, y = clips(0)
    for tile in (2, 4):
        model = network()
        model = make(tile=tile).attach(model, total_steps=10)
        with torch.autocast("cpu", torch.bfloat16):
            if tile == 4:
                with pytest.raises(UserError, match=r"layer 2: half precision with tile"):
                    model(x)
                continue
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        for layer in layers(model):
            assert layer.right.grad.dtype == torch.float32
            assert bool(layer.right.grad.any())


def test_other_methods_find_what_is_left():
    """It attaches first: LBC then treats the linear layers and convolutions that stay."""
    model = nn.Sequential(
        nn.Conv3d(4, 8, 3), nn.Conv3d(8, 8, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)
    )
    winograd, sparsity = make(), tenfold.methods.LBC(n=2, m=4)
    assert tenfold.methods.in_order([sparsity, winograd], "classification")[0] is winograd
    model = winograd.attach(model, total_steps=10)
    treated = [layer.name for layer in sparsity.plan(model) if layer.treatment]
    assert treated == ["3"]


# -- plans and refusals ---------------------------------------------------------------------------


def test_plan_names_reasons():
    model = nn.Sequential(
        nn.Conv3d(3, 16, 3),
        nn.Conv3d(16, 16, 3),
        nn.Conv3d(16, 8, 3, stride=2),
        nn.Conv3d(8, 16, 3),
        nn.Conv3d(16, 16, (3, 1, 1)),
        nn.Conv3d(16, 16, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(16, 16, 3, groups=2),
        nn.ConvTranspose3d(16, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Conv3d(16, 2, 3, padding="same"),
        nn.Linear(8, 8),
        nn.Linear(8, 2),
    )
    model.add_module("tied", nn.Conv3d(16, 16, 3))
    model.add_module("twin", nn.Conv3d(16, 16, 3))
    model.twin.weight = model.tied.weight
    model.add_module("frozen", nn.Conv3d(16, 16, 3).requires_grad_(False))
    plan = {layer.name: layer for layer in Winograd3d(rank=33, keep_ratio=0.5).plan(model)}
    treated = {name: layer for name, layer in plan.items() if layer.treatment}
    assert set(treated) == {"1"}
    assert treated["1"].treatment == "Winograd 2x2x2 residual rank 33"
    assert treated["1"].kept == 0.5
    for name, reason in {
        "0": "first convolution, kept dense",
        "2": "stride (2, 2, 2), expected 1",
        "3": "8 input channels, fewer than min_channels=16",
        "4": "kernel (3, 1, 1), expected 3",
        "5": "padding_mode 'replicate', expected zeros",
        "6": "2 groups, expected 1",
        "7": "transposed convolution",
        "8": "Conv2d is no 3-D convolution",
        "9": "rank 33 is more than 32, the most that its weight can have",
        "10": "Linear is no 3-D convolution",
        "11": "last linear layer, kept dense",
        "tied": "shares its weight with twin",
        "frozen": "frozen (requires_grad is off)",
    }.items():
        assert plan[name].reason == reason, name


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tile": 3}, "expected 2, 4, or three"),
        ({"tile": (2, 4)}, "expected 2, 4, or three"),
        ({"rank": 0}, "rank=0: expected an int of at least 1"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"mode": "residul"}, "did you mean residual"),
        ({"score": "tailor"}, "unknown score"),
        ({"scope": "all"}, "unknown scope"),
        ({"points": "exact"}, "unknown points"),
        ({"keep_ratio": 0}, r"expected a share in \(0, 1\]"),
        ({"keep_ratio": 1.01}, r"expected a share in \(0, 1\]"),
        ({"keep_ratio": 0.005}, "keeps none of 64 columns"),
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"end": 0}, "end=0"),
        ({"end": 1.5}, "share of the run"),
        ({"start": -1}, "at least 0"),
        ({"every": 0}, "every=0"),
        ({"scope": "global", "score": "output_error"}, "expected taylor or magnitude"),
        ({"include": "layer1"}, "list of layer names"),
    ],
)
def test_bad_fields(fields, text):
    with pytest.raises(UserError, match=text):
        Winograd3d(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"include": ["0"], "min_channels": 3},
            "layer 0 can't be made Winograd .*2 input channels",
        ),
        ({"include": ["nothing"]}, "matches no convolution or linear"),
        ({"exclude": ["2", "5"]}, "no layer is left"),
        ({"rank": 65}, "2: rank 65 is more than 36"),
        ({"end": 3}, "counts epochs, and this loop has none"),
        ({"start": 0.501, "end": 0.502}, "expected the end after the start"),
    ],
)
def test_bad_layers_and_times(fields, text):
    winograd = make(**fields)
    model = network()
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=text):
        winograd.attach(model, total_steps=100)
    assert list(model.state_dict()) == keys  # nothing was changed


def test_times_in_epochs():
    with pytest.raises(UserError, match="the run has 4 epochs only"):
        make(end=5).attach(network(), total_steps=8, steps_per_epoch=2)
    winograd = make(start=1, end=3, every=1, score="random", compensate=False)
    model = winograd.attach(network(), total_steps=12, steps_per_epoch=[6, 2, 2, 2])
    sizes = []
    for step in range(1, 13):
        winograd._pruner.step(step)
        sizes.append(len(layers(model)[0].kept))
    assert sizes[5] == 64
    assert sizes[6] < 64
    assert sizes[9] == 32


def test_fewer_columns_than_outputs_are_warned_about():
    with pytest.warns(UserWarning, match="keeps 6 columns, fewer than the 8 outputs of a tile"):
        make(keep_ratio=0.1).attach(network(), total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(keep_ratio=0.125).attach(network(), total_steps=10)


def test_pruning_without_a_gradient_or_with_a_diverged_one_names_the_layer():
    winograd = make(keep_ratio=0.5, compensate=False)
    model = winograd.attach(network(), total_steps=10)
    with pytest.raises(UserError, match="layer 2 has had no gradient"):
        winograd._pruner.remove(10)
    winograd = make(keep_ratio=0.5, start=0, end=0.1)
    model = winograd.attach(network(), total_steps=10)
    optimizer = sgd(model)
    x, y = clips(0)
    (nn.functional.cross_entropy(model(x), y) * math.inf).backward()
    optimizer.step()
    with pytest.raises(UserError, match="layer 2: its scores are not finite"):
        winograd.step()
    winograd = make(keep_ratio=0.5, score="random")
    winograd.attach(network(), total_steps=10)
    with pytest.raises(UserError, match="layer 2 has seen no training input"):
        winograd._pruner.remove(10)


def test_finalize_too_early_and_a_training_form_is_not_saved(tmp_path):
    model = network()
    winograd = make()
    model = winograd.attach(model, total_steps=10)
    with pytest.raises(StateError, match="has not finished: 0 of 10 steps"):
        winograd.finalize(model)
    with pytest.raises(UserError, match="still in training form"):
        tenfold.save(model, tmp_path)


def test_inputs_are_refused_with_the_layers_name():
    model = make().attach(network(), total_steps=10)
    with pytest.raises(UserError, match=r"layer 5: input of size \(2, 1, 1\)"):
        model[5](torch.zeros(1, 6, 2, 1, 1))
    with pytest.raises(UserError, match=r"layer 5: input of shape .*expected \(N, 6, D, H, W\)"):
        model[5](torch.zeros(1, 5, 4, 4, 4))


def test_the_pure_functions_are_public():
    assert transforms(2)[0].shape == (2, 4)
    assert gain_scales(2).shape == (4,)
    assert winograd_weight(torch.zeros(1, 1, 3, 3, 3), 2).numel() == column_count((2, 2, 2))
