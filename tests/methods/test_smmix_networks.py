"""What SMMix reads in each kind of network: its logits, and the attention of its last block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.errors import StateError, UserError
from tenfold.methods import SMMix
from tenfold.methods.attention_scores import attention_received, find_tokens
from tenfold.nn.pvt import PyramidVisionTransformer
from tests import nets

pytestmark = pytest.mark.parity

SMALL_VIT = {"img_size": 64, "depth": 3}
PVT = {"num_classes": 10, "size": (128, 128), "depths": (1, 1, 1, 2), "dims": (8, 8, 16, 24),
       "heads": (1, 1, 2, 3), "sr_ratios": (4, 2, 1, 1)}  # fmt: skip
# By kind: timm's name (None: tenfold's PVT), arguments, pixels, scores that the network has.
KINDS: dict[str, tuple[str | None, dict[str, Any], int, tuple[str, ...]]] = {
    "deit": ("deit_tiny_patch16_224", {**SMALL_VIT, "drop_path_rate": 0.2, "drop_rate": 0.2,
                                       "attn_drop_rate": 0.2}, 64, ("image", "class")),
    "deit3": ("deit3_small_patch16_224", {**SMALL_VIT, "init_values": 1.0}, 64,
              ("image", "class")),
    "vit, averaged": ("vit_tiny_patch16_224", {**SMALL_VIT, "global_pool": "avg"}, 64,
                      ("image", "class")),
    "vit, no class token": ("vit_tiny_patch16_224", {**SMALL_VIT, "global_pool": "avg",
                            "class_token": False}, 64, ("image",)),
    "vit, registers": ("vit_tiny_patch16_224", {**SMALL_VIT, "reg_tokens": 4}, 64,
                       ("image", "class")),
    "vit, normed queries": ("vit_tiny_patch16_224", {**SMALL_VIT, "qk_norm": True,
                            "dynamic_img_size": True, "pre_norm": True}, 96, ("image", "class")),
    "cait": ("cait_xxs24_224", {**SMALL_VIT, "drop_path_rate": 0.1}, 64, ("image", "class")),
    "pvt v2": ("pvt_v2_b0", {"drop_path_rate": 0.2}, 128, ("image",)),
    "pvt": (None, PVT, 128, ("image", "class")),
}  # fmt: skip
CASES = [(kind, score) for kind, (_, _, _, scores) in KINDS.items() for score in scores]
FUSED = [kind for kind in KINDS if kind != "cait"]


def make(kind: str) -> nn.Module:
    name, arguments, _, _ = KINDS[kind]
    torch.manual_seed(0)
    if name is None:
        model: nn.Module = PyramidVisionTransformer(**arguments)
    else:
        model = timm.create_model(name, num_classes=10, **arguments)
    with torch.no_grad():  # attention of fresh weights is nearly uniform
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("qkv", ".q.", ".k.", ".kv.")) and parameter.ndim == 2:
                parameter.mul_(8)
    return model


def images(kind: str, count: int = 4) -> Tensor:
    pixels = KINDS[kind][2]
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return softmaxed attention of every layer by name, `(B, heads, N, N)`, of unfused layers."""
    model = copy.deepcopy(model).double().eval()
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if name.endswith("attn_drop"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: found.__setitem__(name, args[0])
                )
            )
        if name.endswith("proj_w"):  # CaiT: ahead of the heads' talk, heads last
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: found.__setitem__(name, args[0].permute(0, 3, 1, 2))
                )
            )
    with torch.no_grad():
        model(x.double())
    return found


def expected_scores(kind: str, score: str, model: nn.Module, x: Tensor) -> Tensor:
    """Work the scores out in float64, from whole maps."""
    if kind == "pvt":  # fused always: by its definition
        twin = copy.deepcopy(model).double().eval()
        block = twin.block4[-1]
        with torch.no_grad():
            u = block.norm1(twin.forward_before_last_block(x.double()))
            heads = block.attn.num_heads
            q = block.attn.q(u).unflatten(2, (heads, -1))
            k = block.attn.kv(u).chunk(2, dim=2)[0].unflatten(2, (heads, -1))
            attention = torch.einsum("bihd,bjhd->bhij", q, k) * block.attn.scale
        attention = attention.softmax(dim=-1)
        prefix = 1
    else:
        found = maps(model, x)
        cait_class = kind == "cait" and score == "class"
        names = [n for n in found if ("token_only" in n) == cait_class]
        if kind == "cait" and not cait_class:
            names = [n for n in names if n.endswith("proj_w")]
        attention = found[names[-1]]
        prefix = getattr(model, "num_prefix_tokens", 0)
        if kind == "cait":
            prefix = int(cait_class)
    if score == "class":
        return attention[:, :, 0, prefix:].mean(dim=1)
    return attention[:, :, prefix:, prefix:].mean(dim=(1, 2))


# -- the pass without gradients --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "score"), CASES, ids=[f"{kind}, {score}" for kind, score in CASES]
)
def test_logits_and_scores_of_the_pass_without_gradients(kind, score):
    model, x = make(kind), images(kind)
    found, scores = find_tokens(model, score).probe(x)
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(x), rtol=0, atol=1e-5)
    expected = expected_scores(kind, score, model, x)
    assert scores.shape == expected.shape
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=1e-6)
    assert float(expected.std()) > 1e-4, "the maps say something"


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_pass_without_gradients_leaves_no_trace(kind):
    model, x = make(kind), images(kind)
    model.train()
    frozen = list(model.modules())[-1]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    random = torch.get_rng_state()
    logits, scores = find_tokens(model).probe(x)
    assert [module.training for module in model.modules()] == modes
    assert [getattr(module, "fused_attn", None) for module in model.modules()] == fused
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not logits.requires_grad
    assert not scores.requires_grad
    assert not logits.is_inference(), "it is a constant of a loss that goes backward"
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_modes_are_put_back_after_an_error():
    model = make("deit").train()
    with pytest.raises(AssertionError):
        find_tokens(model).probe(torch.randn(2, 3, 32, 32))
    assert all(module.training for module in model.modules())


def test_scores_of_a_fresh_network_add_up_to_all_but_the_class_tokens_share():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10, depth=2)
    _, scores = find_tokens(model).probe(torch.randn(2, 3, 224, 224))
    assert scores.shape == (2, 196)
    torch.testing.assert_close(scores.sum(dim=1), torch.full((2,), 196 / 197), atol=2e-4, rtol=0)


class Maps(TorchDispatchMode):
    """Counts what has the size of a whole map of attention."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.softmaxed, self.fused = tokens, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.softmaxed += name == "_softmax" and out.shape[-1] == self.tokens
        self.fused += "scaled_dot_product" in name
        return out


@pytest.mark.parametrize(
    ("kind", "tokens", "fused"), [("deit", 17, 3), ("vit, averaged", 17, 3), ("pvt", 17, 5)]
)
def test_one_map_alone_is_ever_made(kind, tokens, fused):
    """Of the last block. There too, the token that the classifier sees attends fused."""
    model, x = make(kind), images(kind)
    find_tokens(model).probe(x)
    with Maps(tokens) as seen:
        find_tokens(model).probe(x)
    assert seen.softmaxed == 1
    assert seen.fused == fused


def test_large_batches_are_taken_in_parts(monkeypatch):
    q, k = torch.randn(2, 5, 2, 10, 4, generator=torch.Generator().manual_seed(0))
    whole = attention_received(q, k, 0.5)
    monkeypatch.setattr("tenfold.methods.attention_scores.MAP_BYTES", 2 * 4 * 2 * 9 * 10)
    torch.testing.assert_close(attention_received(q, k, 0.5), whole)
    naive = (0.5 * q.double() @ k.double().mT).softmax(dim=-1)[:, :, 1:, 1:].mean(dim=(1, 2))
    torch.testing.assert_close(whole.double(), naive, rtol=1e-5, atol=1e-8)


def test_whose_attention_counts():
    """The class token looks at token 5, all image tokens look at token 9."""
    q = torch.zeros(2, 1, 17, 2)
    q[:, :, 0, 0] = q[:, :, 1:, 1] = 1.0
    k = torch.zeros(2, 1, 17, 2)
    k[:, :, 1 + 5, 0] = k[:, :, 1 + 9, 1] = 20.0
    assert attention_received(q, k, 1.0, 1, "image").argmax(dim=1).tolist() == [9, 9]
    assert attention_received(q, k, 1.0, 1, "class").argmax(dim=1).tolist() == [5, 5]


@pytest.mark.parametrize("score", ["image", "class"])
def test_whose_attention_counts_in_a_network(score):
    """The same by weights set by hand: tokens say by their first features who they are."""
    model = nets.vit(4, depth=1)
    attn = model.blocks[0].attn
    with torch.no_grad():
        model.blocks[0].norm1 = nn.Identity()
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.cls_token.zero_()
        model.pos_embed.zero_()
        model.pos_embed[0, 0, 0] = 1.0  # the class token
        model.pos_embed[0, 1:, 1] = 1.0  # an image token
        model.pos_embed[0, 1 + 5, 2] = 1.0
        model.pos_embed[0, 1 + 9, 3] = 1.0
        attn.qkv.weight.zero_()
        attn.qkv.bias.zero_()
        attn.qkv.weight[0, 0] = attn.qkv.weight[1, 1] = 10.0  # queries of the first head
        attn.qkv.weight[16, 2] = attn.qkv.weight[17, 3] = 10.0  # its keys
    _, scores = find_tokens(model, score).probe(torch.randn(2, 1, 8, 8))
    assert scores.argmax(dim=1).tolist() == [{"image": 9, "class": 5}[score]] * 2


def test_a_gated_last_block():
    model = make("deit")
    attn = model.blocks[-1].attn
    attn.gate = nn.Linear(192, 192)
    x = images("deit")
    found, _ = find_tokens(model).probe(x)
    torch.testing.assert_close(found, model.eval()(x), rtol=0, atol=1e-5)


# -- the training pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_tokens_of_the_training_pass(kind):
    """They are those that the classifier saw: pooled as the network does it, they give logits."""
    torch.manual_seed(0)
    model, x = make(kind), images(kind)
    for module in model.modules():
        if type(module).__name__ in ("DropPath", "Dropout"):
            module.eval()
    tokens = find_tokens(model)
    tokens.watch()
    model.train()
    for module in model.modules():
        if type(module).__name__ in ("DropPath", "Dropout"):
            module.eval()
    if kind == "deit":  # dropout inside of fused attention goes by the module's mode
        for block in model.blocks:
            block.attn.eval()
    logits = model(x)
    found = tokens.take()
    count = tokens.probe(x)[1].shape[1]
    assert found.shape[:2] == (4, count)
    assert found.requires_grad
    if kind in ("vit, averaged", "vit, no class token", "pvt v2"):
        again = tokens.head(tokens.pooled(found.mean(dim=1)))
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    else:
        whole = model.forward_features(x)
        torch.testing.assert_close(found, whole[:, -count:], rtol=1e-4, atol=1e-5)
        tokens.take()
    with pytest.raises(StateError, match="did not run in training mode"):
        tokens.take()
    model.eval()(x)
    with pytest.raises(StateError, match="did not run in training mode"):
        tokens.take()
    tokens.remove()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_gives_every_parameter_a_gradient(kind):
    model = make(kind).train()
    mixer = SMMix(switch_prob=1.0, token_head="own")
    model = mixer.attach(model, total_steps=2)
    mixer.loss(model, images(kind), torch.tensor([1, 2, 3, 4])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "score", "text"),
    [
        ("resnet18", {}, "image", "ResNet: it has no tokens"),
        ("swin_tiny_patch4_window7_224", {}, "image", "SwinTransformer: it has no tokens"),
        ("deit_tiny_distilled_patch16_224", {}, "image", "it is distilled"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "image", "pools its tokens by 'map'"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.2}, "image", "drops patches at random"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, "image", "classifier is Identity"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "class",
         "has no class token"),
        ("pvt_v2_b0", {}, "class", "has no class token"),
        ("pvt_v2_b2_li", {}, "image", "attends to pooled tokens"),
        ("vit_base_patch16_18x2_224", {"img_size": 64, "depth": 2}, "image",
         r"last block blocks\.1 can't be read \(ParallelThingsBlock"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be_read(name, arguments, score, text):
    model = timm.create_model(name, **{"num_classes": 4, **arguments})
    with pytest.raises(UserError, match=f"SMMix can't read the attention of .*{text}") as error:
        SMMix(score=score).attach(model, total_steps=2)
    assert "expected timm's vit_*" in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_networks_that_are_wrapped_already():
    model = nets.vit(4)
    with pytest.raises(UserError, match=r"before torch\.compile wraps it"):
        SMMix().attach(torch.compile(model, backend="eager"), total_steps=2)
