"""SuperViT against the published token counts and costs, and against its formulas in loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold.errors import UserError
from tenfold.nn import supervit as module
from tenfold.nn.lvvit import LVViT
from tenfold.nn.supervit import SuperViT, SuperViTCell
from tenfold.nn.supervit_grid import Box, kept_patches
from tests.supervits import RATES, SIZES, naive, pictures, plain, plain_lvvit, resized, supervit

pytestmark = pytest.mark.unit

# By size and keep rate: tokens into blocks 0-3, 4-6, 7-9, 10-11; multiply-adds of DeiT-S.
PUBLISHED = {
    (128, 0.5): ((65, 34, 18, 10), 742_410_240),
    (128, 0.7): ((65, 47, 34, 25), 972_282_624),
    (128, 1): ((65, 65, 65, 65), 1_438_384_128),
    (160, 0.5): ((101, 52, 27, 15), 1_155_333_888),
    (160, 0.7): ((101, 72, 52, 38), 1_514_876_928),
    (160, 1): ((101, 101, 101, 101), 2_268_487_680),
    (192, 0.5): ((145, 74, 38, 20), 1_668_157_440),
    (192, 0.7): ((145, 103, 74, 53), 2_193_734_400),
    (192, 1): ((145, 145, 145, 145), 3_315_499_008),
    (224, 0.5): ((197, 100, 51, 27), 2_298_486_528),
    (224, 0.7): ((197, 139, 99, 71), 3_012_624_384),
    (224, 1): ((197, 197, 197, 197), 4_598_882_304),
}
OTHER_RATES = {
    0.3: ((197, 61, 20, 7), 1.812),
    0.6: ((197, 120, 73, 45), 2.625),
    0.8: ((197, 159, 129, 105), 3.477),
    0.9: ((197, 179, 163, 148), 4.022),
}
LVVIT = {
    128: (1.115, 1.402, 2.052),
    160: (1.737, 2.185, 3.236),
    192: (2.500, 3.153, 4.728),
    224: (3.432, 4.319, 6.551),
}


@pytest.fixture(scope="module")
def deit() -> SuperViT:
    """DeiT-S, without memory for its weights."""
    with torch.device("meta"):
        return SuperViT("deit_small_patch16_224").eval()


def stages(model: SuperViT, size: int, rate: float) -> tuple[int, ...]:
    counts = model.token_counts(size, rate)
    for index, (before, after) in enumerate(counts):
        assert after == (counts[index + 1][0] if index + 1 < len(counts) else after)
        assert after < before or index not in model.drop_blocks or rate == 1
    return tuple(counts[index][0] for index in (3, 6, 9, 11))


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", PUBLISHED, ids=str)
def test_tokens_and_multiply_adds_of_every_cell(deit, cell):
    tokens, macs = PUBLISHED[cell]
    assert stages(deit, *cell) == tokens
    assert deit.macs(*cell) == macs
    assert dict(deit.cells_with_macs())[cell] == macs
    assert deit.cell(*cell).macs == macs


@pytest.mark.parametrize("rate", OTHER_RATES)
def test_rates_that_were_not_trained(deit, rate):
    tokens, macs = OTHER_RATES[rate]
    assert stages(deit, 224, rate) == tokens
    assert round(deit.macs(224, rate) / 1e9, 3) == macs


@pytest.mark.parametrize("cell", [(128, 0.5), (160, 0.7), (224, 0.5), (224, 1)], ids=str)
def test_the_count_is_what_runs(deit, cell):
    """PyTorch's own counter sees the same products; the class token's row comes on top."""
    images = torch.zeros(1, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deit(images, *cell)
    assert counter.get_total_flops() / 2 == pytest.approx(deit.macs(*cell), rel=2e-3)


def test_parameters_of_deit(deit):
    assert sum(p.numel() for p in deit.parameters()) == 22_170_088
    assert sum(table.numel() for table in deit.pos_embed_list) == 195_072


@pytest.mark.parametrize("size", LVVIT)
def test_multiply_adds_of_lvvit(size):
    with torch.device("meta"):
        model = SuperViT("lvvit_small").eval()
    found = tuple(round(model.macs(size, rate) / 1e9, 3) for rate in (0.5, 0.7, 1))
    assert found == LVVIT[size]
    assert sum(p.numel() for p in model.parameters()) == 26_271_248
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, device="meta"), size, 0.7)
    assert counter.get_total_flops() / 2 == pytest.approx(model.macs(size, 0.7), rel=2e-3)


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"),
    [(5, 0.5, 3), (5, 0.999, 4), (5, 1, 4), (197, 0.5, 99), (5, 0.001, 1), (2, 0.5, 1)],
)
def test_the_class_token_counts_in_how_many_stay(tokens, rate, kept):
    assert kept_patches(tokens, rate) == kept


def test_which_patches_stay():
    x = torch.arange(5.0).view(1, 5, 1)
    scores = torch.tensor([[0.10, 0.40, 0.20, 0.25]])
    kept = module._keep(x, scores, 5, kept_patches(5, 0.5) + 1)
    assert kept[0, 0, 0] == 0
    assert sorted(kept[0, 1:, 0].tolist()) == [2, 3, 4]  # the patches 1, 2 and 3
    assert module._keep(x, scores, 5, kept_patches(5, 0.999) + 1) is x


# -- what a cell computes -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "qk_norm", "layer scale", "lvvit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_cell_is_the_formula(kind, dtype):
    base: nn.Module = (
        plain_lvvit()
        if kind == "lvvit"
        else plain(
            **{"qk_norm": {"qk_norm": True}, "layer scale": {"init_values": 0.5}}.get(kind, {})
        )
    )
    model = supervit(base, tables="fresh").to(dtype)
    images = pictures().to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    with torch.no_grad():
        together = model(images, cells=model.cells)
        for (size, rate), logits in zip(model.cells, together, strict=True):
            expected = naive(model, images, size, rate)
            torch.testing.assert_close(
                model(images, size, rate), expected, atol=tolerance, rtol=tolerance
            )
            torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
            assert expected.std() > 0.05, "a network that says nothing proves nothing"


@pytest.mark.parametrize("size", [32, 48, 64])
def test_all_tokens_are_the_plain_network(size):
    for changes in ({}, {"qk_norm": True}, {"init_values": 0.5}):
        model = supervit(plain(**changes))
        other = plain(**{**changes, "img_size": size})
        state = plain(**changes).state_dict()
        table = model.pos_embed_list[SIZES.index(size)].detach()
        other.load_state_dict({**state, "pos_embed": table})
        with torch.no_grad():
            expected = other.eval()(resized(pictures(), size))
            torch.testing.assert_close(model(pictures(), size), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.pos_embed_list[-1], state["pos_embed"])


def test_all_tokens_of_lvvit_are_the_plain_network():
    base = plain_lvvit()
    with torch.no_grad():
        expected = base(pictures())
        torch.testing.assert_close(supervit(copy.deepcopy(base))(pictures()), expected)
    model = supervit(base).train()
    assert model(pictures(), 32, 0.5).shape == (3, 7)


def test_all_tokens_run_no_scoring(monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(SuperViT, "_attend", never)
    model = supervit()
    assert model(pictures()).shape == (3, 7)
    assert model(pictures(), 32, 1).shape == (3, 7)
    with pytest.raises(AssertionError):
        model(pictures(), 32, 0.5)


@pytest.mark.parametrize("rate", [*RATES, 0.3])
def test_the_order_of_patches_is_of_no_account(rate):
    model = supervit().double()
    images = pictures().double()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = naive(model, images, 64, rate, order)
        torch.testing.assert_close(model(images, 64, rate), expected, atol=1e-10, rtol=1e-10)


def test_no_gradient_goes_through_what_is_chosen():
    model = supervit(drop_blocks=(3,))  # behind the last attention only the class token counts
    model(pictures(), 64, 0.5).sum().backward()
    whole = copy.deepcopy(model)
    whole.zero_grad()
    whole(pictures(), 64, 1).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_attention_dropout_does_not_touch_the_scores():
    model = supervit(plain(attn_drop_rate=0.5))
    x = torch.randn(2, 65, 64)
    _, expected = model._attend(1, x)
    _, scores = model.train()._attend(1, x)
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad


def test_the_resize_has_its_corners_on_the_corners():
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    expected = torch.tensor([[0, 1.5, 3], [6, 7.5, 9], [12, 13.5, 15]])
    torch.testing.assert_close(module._resized(ramp, 3)[0, 0], expected)
    torch.testing.assert_close(resized(ramp, 3)[0, 0], expected)
    assert module._resized(ramp, 4) is ramp


def test_images_of_another_side_are_brought_to_the_size():
    model = supervit()
    with torch.no_grad():
        torch.testing.assert_close(model(pictures(side=80), 48, 0.7),
                                   naive(model, pictures(side=80), 48, 0.7),
                                   atol=1e-5, rtol=1e-5)  # fmt: skip


def test_attention_that_is_not_finite_is_refused_and_its_block_is_named():
    images = pictures()
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1: the class token's attention is not finite"):
        supervit()(images, 64, 0.5)
    logits = supervit()(images)  # all tokens stay: there is nothing to choose
    assert logits[1].isnan().all()
    assert not logits[[0, 2]].isnan().any()


# -- boxes ----------------------------------------------------------------------------------------


def test_boxes_on_other_grids():
    box = Box(2, 3, 9, 11, 14)
    assert box.at(12) == Box(1, 2, 7, 9, 12)
    assert box.at(10) == Box(1, 2, 6, 7, 10)
    assert box.at(8) == Box(1, 1, 5, 6, 8)
    for grid in (8, 10, 12, 14):
        assert Box(0, 0, 14, 14, 14).at(grid) == Box(0, 0, grid, grid, grid)
    assert Box(0, 0, 14, 14, 14).share == 1
    assert box.share == 7 * 8 / 196
    mask = Box(1, 0, 2, 2, 3).mask(torch.device("cpu"))
    assert mask[:, 0].tolist() == [False] * 3 + [True, True] + [False] * 4


def test_tokens_inside_a_box_are_those_of_the_reversed_batch():
    model = supervit(plain_lvvit())
    images, grid = pictures(), 4
    whole = Box(0, 0, grid, grid, grid)
    with torch.no_grad():
        torch.testing.assert_close(model(images, box=whole), model(images.flip(0)))
        plain_tokens = model._embed(images, 64, None)
        mixed = model._embed(images, 64, Box(1, 1, 3, 4, grid))
        inside = Box(1, 1, 3, 4, grid).mask(torch.device("cpu"))[:, 0]
        torch.testing.assert_close(mixed[:, 1:][:, inside], plain_tokens.flip(0)[:, 1:][:, inside])
        torch.testing.assert_close(mixed[:, 1:][:, ~inside], plain_tokens[:, 1:][:, ~inside])
        # the patches' own logits are put back where they came from
        swapped = model(images, cells=[(64, 1)], box=whole, aux=True)[-1]
        torch.testing.assert_close(swapped, model(images, cells=[(64, 1)], aux=True)[-1])


# -- LV-ViT ---------------------------------------------------------------------------------------


def test_blocks_of_lvvit_halve_what_they_add():
    base = plain_lvvit()
    block = base.blocks[0]
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
        x = torch.randn(2, 5, 32)
        torch.testing.assert_close(block(x), x + block.attn(block.norm1(x)) / 2)


def test_logits_of_lvvit_hold_a_quarter_of_its_surest_living_patch():
    model = supervit(plain_lvvit())
    with torch.no_grad():
        (tokens,) = model.forward_cells(pictures(), [(64, 0.5)])
        assert tokens.shape[1] == model.token_counts(64, 0.5)[-1][1] < 17
        tokens = model.norm(tokens)
        surest = model.aux_head(tokens[:, 1:]).max(dim=1).values
        expected = model.head(tokens[:, 0]) + 0.25 * surest
        torch.testing.assert_close(model(pictures(), 64, 0.5), expected)
        torch.testing.assert_close(model.train()(pictures(), 64, 0.5), model.head(
            model.norm(model.forward_cells(pictures(), [(64, 0.5)])[0])[:, 0]))  # fmt: skip
    assert isinstance(plain_lvvit(), LVViT)


# -- cells ----------------------------------------------------------------------------------------


def test_a_cell_is_a_network_of_its_own_on_the_same_weights():
    model = supervit()
    cell = model.cell(48, 0.7)
    assert isinstance(cell, SuperViTCell)
    assert not cell.training
    assert cell.supervit is model
    assert "size=48, keep_rate=0.7" in repr(cell)
    with torch.no_grad():
        assert torch.equal(cell(pictures()), model(pictures(), size=48, keep_rate=0.7))
    assert (model.cell().size, model.cell().keep_rate) == (64, 1.0)
    assert model.cells == [(size, rate) for size in SIZES for rate in RATES]
    with pytest.raises(UserError, match=r"size=40: this SuperViT was made for 32, 48, 64"):
        model.cell(40)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_cell_compiles(backend):
    model = supervit()
    torch._dynamo.reset()
    compiled = torch.compile(model.cell(48, 0.5), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(pictures()), model(pictures(), 48, 0.5), atol=1e-5, rtol=1e-5
        )
