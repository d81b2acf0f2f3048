"""LBC at its edges: ties, groups, odd layers, other parametrizations, second use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import tenfold.methods.lbc as lbc
from tenfold.errors import StateError, UserError
from tenfold.methods import LBC, Kind, Method, Stage, in_order, to_blocks
from tenfold.methods.scores import AccumulatorScores, FullScores
from tenfold.nn.blocks import nm_pattern

pytestmark = pytest.mark.parity


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def step(model, optimizer, seed=0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 8, generator=generator).to(dtype)
    nn.functional.cross_entropy(model(x).float(), torch.arange(16) % 4).backward()
    optimizer.step()


def train(model, sparsity, optimizer, steps=10) -> None:
    for index in range(steps):
        step(model, optimizer, index)
        sparsity.step()


@pytest.mark.parametrize("scores", ["full", "accumulator"])
def test_ties_go_to_the_lower_index(scores):
    """Equal scores: candidates die from the first on, and the last, 0011, is left."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    sparsity = LBC(n=2, m=4, include=["0"], scores=scores)
    sparsity.attach(model, total_steps=100, steps_per_epoch=1)
    model[0].parametrizations.weight.original.grad = torch.zeros(1, 4)
    sparsity.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
    left = []
    for _ in range(5):
        sparsity._remove("0", 1)
        left.append(sparsity._alive["0"].int().flatten().tolist())
    assert left == [
        [0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip
    assert model[0].parametrizations.weight[0].mask.int().tolist() == [[0, 0, 1, 1]]


def test_each_layer_follows_its_own_parameter_group():
    model = two_layers()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(model, total_steps=100)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.5}]
    )
    step(model, optimizer)
    assert (sparsity._scores["0"].value == 0).all()
    assert (sparsity._scores["2"].value != 0).any()


def test_the_memory_of_full_scores_is_checked_when_adam_asks_for_them():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    sparsity = LBC(n=4, m=8, memory_limit_gib=2e-4)  # enough for the candidates alone
    sparsity.attach(model, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    with pytest.raises(UserError, match="in the full form"):
        optimizer.step()


@pytest.mark.parametrize("scores", ["full", "accumulator"])
def test_scores_are_single_precision_even_for_half_weights(scores):
    model = two_layers().bfloat16()
    sparsity = LBC(n=2, m=4, scores=scores)
    sparsity.attach(model, total_steps=10)
    train(model, sparsity, torch.optim.SGD(model.parameters(), lr=0.05), steps=3)
    assert {scores.value.dtype for scores in sparsity._scores.values()} == {torch.float32}
    train(model, sparsity, torch.optim.SGD(model.parameters(), lr=0.05), steps=7)
    assert nm_pattern(sparsity.finalize(model)[0].weight) == (2, 4)


def test_removal_in_pieces_equals_removal_at_once(monkeypatch):
    def masks() -> Tensor:
        model = two_layers()
        sparsity = LBC(n=2, m=4)
        sparsity.attach(model, total_steps=10)
        train(model, sparsity, torch.optim.SGD(model.parameters(), lr=0.05))
        return sparsity.finalize(model)[2].weight.detach() != 0

    whole = masks()
    monkeypatch.setattr(lbc, "_ROWS_AT_ONCE", 6 * 5)  # five of sixteen blocks at a time
    assert torch.equal(masks(), whole)


def test_the_form_follows_each_optimizer_and_survives_a_resume():
    model = two_layers()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(model, total_steps=50)
    sgd = torch.optim.SGD(model[0].parameters(), lr=0.05)
    adam = torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()], lr=1e-3)
    model(torch.randn(4, 8)).square().sum().backward()
    sgd.step()
    adam.step()
    sparsity.step()
    assert [type(s) for s in sparsity._scores.values()] == [AccumulatorScores, FullScores]
    again = LBC(n=2, m=4)
    again.attach(two_layers(), total_steps=50)
    again.load_state_dict(sparsity.state_dict())
    assert [type(s) for s in again._scores.values()] == [AccumulatorScores, FullScores]


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.NAdam])
def test_other_optimizers_get_full_scores_and_no_accumulator(make):
    model = two_layers()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(model, total_steps=10)
    train(model, sparsity, make(model.parameters(), lr=1e-3))
    assert nm_pattern(sparsity.finalize(model)[0].weight) == (2, 4)
    model, sparsity = two_layers(), LBC(n=2, m=4, scores="accumulator")
    sparsity.attach(model, total_steps=10)
    with pytest.raises(UserError, match="exact only for SGD"):
        step(model, make(model.parameters(), lr=1e-3))


# -- layers that are not what they seem -----------------------------------------------------------


class Standardised(nn.Conv2d):
    """Like timm's StdConv2d: what forward uses is not the weight that is stored."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.conv2d(x, weight, self.bias)


def test_plan_leaves_odd_layers_alone_and_says_why():
    model = nn.Sequential(
        nn.Linear(8, 8),
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.Linear(8, 8).requires_grad_(False),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
    )
    model.add_module("embedding", nn.Embedding(8, 8))
    model.embedding.weight = model[4].weight
    reasons = {layer.name: layer.reason for layer in LBC(n=2, m=4).plan(model)}
    assert reasons == {
        "0": None,
        "1": "its weight is computed by another parametrization",
        "2": "its weight is computed by another parametrization",
        "3": "frozen (requires_grad is off)",
        "4": "shares its weight with embedding",
        "5": "last linear layer, kept dense",
    }
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 1), Standardised(8, 8, 1), nn.Conv2d(8, 8, 1))
    reasons = {layer.name: layer.reason for layer in LBC(n=2, m=4).plan(convolutions)}
    assert reasons["1"] == "Standardised changes its weight in forward"
    assert reasons["2"] is None
    with pytest.raises(UserError, match="layer 3 can't be made 2:4: frozen"):
        LBC(n=2, m=4, include=["3"]).plan(model)


def test_every_head_of_a_distilled_transformer_stays_dense():
    import timm

    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=8)
    reasons = {layer.name: layer.reason for layer in LBC(n=2, m=4).plan(model)}
    assert reasons["head"] == reasons["head_dist"] == "classifier, kept dense"


def test_a_layer_without_gradient_is_named_not_pruned_by_chance():
    model = two_layers()
    sparsity = LBC(n=2, m=4)
    sparsity.attach(model, total_steps=4)
    optimizer = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    with pytest.raises(UserError, match="layer 0 has had no gradient from the optimizer"):
        train(model, sparsity, optimizer, steps=4)


# -- beside other methods ------------------------------------------------------------------------


class Rounded(nn.Module):
    elementwise = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((weight * 8).round() / 8 + 0.0625 - weight).detach()  # has no zero level


@dataclass(kw_only=True, eq=False)
class Rounding(Method):
    """A quantizer by parametrization, as LTS will be: it has no level at zero."""

    kind: ClassVar[Kind] = Kind.WEIGHTS
    stage: ClassVar[Stage] = Stage.QUANTIZE

    def on_attach(self, model: nn.Module) -> nn.Module:
        for layer in (model[0], model[2]):
            parametrize.register_parametrization(layer, "weight", Rounded())
        return model

    def on_finalize(self, model: nn.Module) -> nn.Module:
        for layer in (model[0], model[2]):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        return model


def test_quantize_then_mask_on_one_weight():
    model = two_layers()
    methods: list[Any] = in_order([LBC(n=2, m=4), Rounding()], "classification")
    assert [method.key() for method in methods] == ["rounding", "lbc"]
    for method in methods:
        model = method.attach(model, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in range(10):
        step(model, optimizer, index)
        for method in methods:
            method.step()
    x = torch.randn(3, 8)
    expected = model(x)
    for method in reversed(methods):
        model = method.finalize(model)
    torch.testing.assert_close(model(x), expected)
    for layer in (model[0], model[2]):
        assert not parametrize.is_parametrized(layer)
        assert (to_blocks(layer.weight != 0, 4).sum(1) == 2).all()
        levels = (layer.weight[layer.weight != 0] - 0.0625) * 8
        torch.testing.assert_close(levels, levels.round())


def test_a_used_object_is_refused():
    model, sparsity = two_layers(), LBC(n=2, m=4)
    sparsity.attach(model, total_steps=10)
    train(model, sparsity, torch.optim.SGD(model.parameters(), lr=0.05))
    sparsity.finalize(model)
    assert sparsity.metrics() == {}
    with pytest.raises(StateError, match=r"make another LBC\(…\)"):
        sparsity.attach(two_layers(), total_steps=10)


def test_compiled_models_are_not_compiled_again_at_removals():
    from torch._dynamo.testing import CompileCounter

    model, sparsity = two_layers(), LBC(n=2, m=4)
    sparsity.attach(model, total_steps=10)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        compiled(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        sparsity.step()
    assert sparsity.finished()
    assert counter.frame_count == 1
