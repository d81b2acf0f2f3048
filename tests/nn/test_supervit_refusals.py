"""What no SuperViT can be made of, what it doesn't take, and which weights it takes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from tenfold.errors import UserError
from tenfold.nn import models
from tenfold.nn.supervit import SuperViT
from tenfold.tasks.starting_point import initialize
from tests.supervits import SIZES, pictures, plain, plain_lvvit, supervit

pytestmark = pytest.mark.unit


# -- networks and grids ---------------------------------------------------------------------------


def other(name: str, **changes: Any) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, img_size=64, **changes)
    return made


NETWORKS = [
    (lambda: plain(reg_tokens=2), "3 prefix tokens"),
    (lambda: plain(class_token=False, global_pool="avg"), "0 prefix tokens"),
    (lambda: plain(no_embed_class=True), "no position for its class token"),
    (lambda: plain(pos_embed="none"), "no position for its class token"),
    (lambda: plain(global_pool="avg"), "pools by 'avg'"),
    (lambda: plain(pre_norm=True), "a norm ahead of its blocks"),
    (lambda: plain(fc_norm=True), "a norm ahead of its blocks or its classifier"),
    (lambda: plain(patch_drop_rate=0.2), "drops patches at random"),
    (lambda: plain(img_size=(32, 128)), "cuts no square image"),
    (lambda: plain(patch_size=(8, 16), img_size=(32, 64)), "patches of"),
    (lambda: other("deit_tiny_distilled_patch16_224"), "2 prefix tokens"),
    (lambda: other("vit_tiny_r_s16_p8_224"), "cuts no square image"),
    (lambda: other("vit_small_patch16_18x2_224"), "an attention or an MLP that it doesn't know"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 5)), "is no VisionTransformer"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "text"), NETWORKS, ids=[text for _, text in NETWORKS])
def test_networks_without_one_class_token_that_looks_at_patches(build, text):
    with pytest.raises(UserError, match=text) as caught:
        SuperViT(build(), sizes=(32, 64), drop_blocks=(1,))
    assert "\n" not in str(caught.value)


def test_a_network_without_a_classifier():
    model = plain()
    model.reset_classifier(0)
    with pytest.raises(UserError, match="has no linear classifier"):
        supervit(model)


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ({"sizes": (32, 48)}, r"sizes=\[32, 48\] for a network of 64 pixels: expected 64 among"),
        ({"sizes": (64, 128)}, "expected 64 among them, as the largest"),
        ({"sizes": (36, 64)}, "36 are no multiples of the patch's 8 pixels"),
        ({"sizes": ()}, r"sizes=\[\]: expected pixels"),
        ({"sizes": (0, 64)}, "expected pixels"),
        ({"sizes": (32.5, 64)}, "expected pixels"),
        ({"sizes": (64, 64)}, "one is given twice"),
        ({"keep_rates": ()}, "expected 1 among them"),
        ({"keep_rates": (0.5, 0.7)}, "expected 1 among them"),
        ({"keep_rates": (1, 1.0)}, "one is given twice"),
        ({"keep_rates": (0.0, 1)}, r"keep_rate=0\.0: expected a share in \(0, 1\]"),
        ({"keep_rates": (1.5, 1)}, "expected a share"),
        ({"keep_rates": (float("nan"), 1)}, "expected a share"),
        ({"keep_rates": ("0.5", 1)}, "expected a share"),
        ({"drop_blocks": ()}, "expected numbers of blocks from 0, ascending"),
        ({"drop_blocks": (2, 1)}, "ascending"),
        ({"drop_blocks": (1, 1)}, "ascending"),
        ({"drop_blocks": (-1, 1)}, "ascending"),
        ({"drop_blocks": (1, 4)}, r"drop_blocks=\[1, 4\] for 4 blocks: expected numbers below 4"),
        ({"tables": "new"}, "expected resampled or fresh"),
    ],
)
def test_grids_that_cannot_be(grid, text):
    with pytest.raises(UserError, match=text) as caught:
        supervit(**grid)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ({"size": 40}, "size=40: this SuperViT was made for 32, 48, 64"),
        ({"keep_rate": 0}, "expected a share"),
        ({"keep_rate": 1.1}, "expected a share"),
        ({"keep_rate": True}, "expected a share"),
        ({"keep_rate": float("nan")}, "expected a share"),
        ({"cells": [(64, 1)], "size": 64}, "leave size and keep_rate out"),
        ({"cells": [(64, 1), (40, 1)]}, "size=40"),
        ({"cells": [(64, 1)], "aux": True}, "no second classifier"),
    ],
)
def test_cells_that_are_not_there(cell, text):
    with pytest.raises(UserError, match=text):
        supervit()(pictures(), **cell)


def test_whole_numbers_are_rates_too():
    model = supervit()
    assert torch.equal(model(pictures(), 48, 1), model(pictures(), 48, 1.0))


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (
            torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
            "images of torch.uint8: expected normalised",
        ),
        (torch.zeros(2, 3, 64, 48), "expected square ones"),
        (torch.zeros(3, 64, 64), "expected square ones"),
    ],
)
def test_images_that_are_none(images, text):
    with pytest.raises(UserError, match=text):
        supervit()(images)


def test_code_of_the_users_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match="names code of your own: give SuperViT the network itself"):
        SuperViT("evil.py:f", sizes=(32,))
    for name in ("supervit", "resnet20", "torchvision/resnet18", "nothing"):
        with pytest.raises(UserError):
            SuperViT(name, sizes=(32,))
    with pytest.raises(UserError, match="loads weights"):
        SuperViT("vit_tiny_patch16_224", sizes=(32,), options={"pretrained": True})


# -- weights --------------------------------------------------------------------------------------


def released(depth: int = 12, tables: int = 4) -> set[str]:
    """The names in the authors' checkpoints of DeiT-S."""
    names = {"cls_token"} | {f"pos_embed_list.{index}" for index in range(tables)}
    layers = ["patch_embed.proj", "norm", "head"]
    for block in range(depth):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        layers += [f"blocks.{block}.{part}" for part in parts]
    return names | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_names_are_those_of_the_released_checkpoints():
    with torch.device("meta"):
        model = SuperViT("deit_small_patch16_224")
    state = model.state_dict()
    assert set(state) == released()
    lengths = [state[f"pos_embed_list.{index}"].shape[1] for index in range(4)]
    assert lengths == [65, 101, 145, 197]
    assert model.sizes == (128, 160, 192, 224)


def fresh() -> SuperViT:
    torch.manual_seed(9)
    return supervit(
        "vit_tiny_patch16_224",
        num_classes=7,
        options={"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4},
    )


def test_a_fresh_one_starts_as_the_authors_does():
    torch.manual_seed(0)
    model = SuperViT("vit_tiny_patch16_224", sizes=(64, 128), options={"embed_dim": 192})
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    for table in model.pos_embed_list:
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_released_checkpoint_is_taken_whole(tmp_path):
    """A file as the authors write theirs: everything under `model`."""
    source, model = supervit(), fresh()
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "released.pth")
    left = initialize(model, models.Network(None), str(tmp_path / "released.pth"))
    assert left == []
    assert torch.equal(model(pictures(), 48, 0.5), source(pictures(), 48, 0.5))


def test_a_plain_checkpoint_is_resampled_as_timm_does(tmp_path):
    source, model = plain(), fresh()
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    assert initialize(model, models.Network(None), str(tmp_path / "plain.pth")) == []
    for size, table in zip(SIZES, model.pos_embed_list, strict=True):
        grid = [size // 8, size // 8]
        expected = resample_abs_pos_embed(source.pos_embed, grid, num_prefix_tokens=1)
        assert torch.equal(table, expected)
        assert torch.equal(table[:, 0], source.pos_embed[:, 0])
    torch.testing.assert_close(model(pictures()), source(pictures()), atol=1e-5, rtol=1e-5)
    made = SuperViT(source, SIZES, drop_blocks=(1,)).eval()
    assert torch.equal(made(pictures(), 32), model(pictures(), 32))


def test_a_checkpoint_of_a_larger_network_is_resampled_to_all_sizes():
    state = plain(img_size=96).state_dict()
    adapted = fresh().adapt_state_dict(state)
    assert "pos_embed" not in adapted
    assert [adapted[f"pos_embed_list.{i}"].shape[1] for i in range(3)] == [17, 37, 65]


def test_many_tables_are_compared_in_their_order():
    sizes = tuple(range(8, 104, 8))
    base = plain(img_size=96)
    model = SuperViT(base, sizes, drop_blocks=(1,))
    assert set(model.adapt_state_dict(model.state_dict())) == set(model.state_dict())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("pos_embed_list.2"), "tables of 17, 37 tokens, and the sizes 32, 48, 64"),
        (lambda s: s.update({"pos_embed_list.2": torch.zeros(1, 82, 64)}), "17, 37, 82 tokens"),
        (lambda s: [s.pop(f"pos_embed_list.{i}") for i in range(3)], "tables of no tokens"),
        (lambda s: s.update({"pos_embed_list.x": torch.zeros(3)}), "give the sizes that it was"),
    ],
)
def test_tables_of_other_sizes_are_refused(tmp_path, change, text):
    state = supervit().state_dict()
    change(state)
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=text):
        initialize(fresh(), models.Network(None), str(tmp_path / "other.pth"))


def test_a_table_that_is_no_square_is_refused():
    state = {**plain().state_dict(), "pos_embed": torch.zeros(1, 66, 64)}  # such as a distilled one
    with pytest.raises(UserError, match="66 tokens: expected one class token and a square"):
        fresh().adapt_state_dict(state)


def test_weight_decay_and_the_tables():
    assert supervit().no_weight_decay() == {"cls_token"}
    tables = {f"pos_embed_list.{index}" for index in range(3)}
    assert supervit(decay_pos_embed=False).no_weight_decay() == {"cls_token"} | tables
    assert supervit(plain_lvvit()).get_classifier().out_features == 7
