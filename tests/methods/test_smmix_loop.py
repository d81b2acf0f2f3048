"""SMMix in a plain loop: draws, resuming, precision, torch.compile, processes, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tenfold.errors import StateError, UserError
from tenfold.methods import SMMix, TrainingSet, smooth_labels
from tests import nets

pytestmark = pytest.mark.unit
CLASSES = 4


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nets.vit(CLASSES).to(dtype)


def batch(step: int, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


def start(weights: int = 0, total_steps: int = 20, **fields: Any):
    mixer = SMMix(**fields)
    model = mixer.attach(network(weights), total_steps=total_steps).train()
    optimizer = torch.optim.AdamW(mixer.parameters_for(model), lr=1e-3)
    return mixer, model, optimizer


def steps(mixer, model, optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = mixer.loss(model, *batch(step))
        loss.backward()
        optimizer.step()
        mixer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_head", ["shared", "own"])
def test_it_trains_and_leaves_the_plain_network(token_head):
    mixer, model, optimizer = start(token_head=token_head)
    keys = list(network().state_dict())
    assert (list(model.state_dict()) == keys) == (token_head == "shared")
    before = None if mixer._head is None else mixer._head.weight.clone()
    losses = steps(mixer, model, optimizer, 0, 20)
    assert all(math.isfinite(loss) for loss in losses)
    if before is not None:
        assert not torch.equal(before, mixer._head.weight)
    assert 0 < mixer._mixed < mixer._draws == 20
    finished = mixer.finalize(model)
    assert finished is model
    assert list(finished.state_dict()) == keys
    assert not any(module._forward_hooks for module in finished.modules())
    finished.train()(batch(0)[0])  # nothing watches any more
    with pytest.raises(StateError, match="attached to no model"):
        mixer.loss(model, *batch(0))


def test_the_mixup_branch_is_mixup():
    mixer, model, _ = start(switch_prob=0.0)
    images, labels = batch(0)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = mixer.loss(model, images, labels)
    (mixed,) = seen
    y = smooth_labels(labels, CLASSES, 0.1)
    share = ((mixed - images.flip(0)) / (images - images.flip(0))).median()
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    expected = nn.functional.cross_entropy(model(mixed), share * y + (1 - share) * y.flip(0))
    torch.testing.assert_close(loss, expected)


def test_shares_of_branches_sides_and_mixup(monkeypatch):
    mixer, model, _ = start(total_steps=400)
    shares, sides = [], []
    monkeypatch.setattr(SMMix, "_mixup", lambda self, m, x, y, share: shares.append(share))
    import tenfold.methods.smmix as module

    found = module.extreme_windows
    monkeypatch.setattr(
        module, "extreme_windows", lambda scores, side: (sides.append(side), found(scores, side))[1]
    )
    for _ in range(300):
        mixer.loss(model, *batch(0, count=2))
    assert 115 < len(shares) < 185
    assert len(shares) + len(sides) == 300
    assert set(sides) == {1, 2, 3}
    assert 0 <= min(shares) < 0.1 < 0.9 < max(shares) <= 1
    assert abs(sum(shares) / len(shares) - 0.5) < 0.1


def test_labels_and_images_of_a_step_belong_together(monkeypatch):
    """The loss gets the labels of b and B-1-b, and the logits of the unmixed images."""
    import tenfold.methods.smmix as module

    mixer, model, _ = start(switch_prob=1.0)
    images, labels = batch(3)
    given = {}
    real = module.smmix_loss

    def note(*arguments):
        names = ("output", "target_output", "source_output", "targets", "unmixed", "lam")
        given.update(zip(names, arguments, strict=True))
        return real(*arguments)

    monkeypatch.setattr(module, "smmix_loss", note)
    mixer.loss(model, images, labels)
    torch.testing.assert_close(given["unmixed"], model.eval()(images).detach())
    assert torch.equal(given["targets"], smooth_labels(labels, CLASSES, 0.1))
    assert given["lam"] in {1 - side**2 / 16 for side in (1, 2, 3)}
    assert not torch.allclose(given["target_output"], given["source_output"])


# -- going on where it stopped ---------------------------------------------------------------------


@pytest.mark.parametrize("token_head", ["shared", "own"])
def test_resume_equals_the_unbroken_run(token_head, tmp_path):
    mixer, model, optimizer = start(token_head=token_head)
    steps(mixer, model, optimizer, 0, 9)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "mixer": mixer.state_dict(),
    }
    torch.save(state, tmp_path / "state")
    losses = steps(mixer, model, optimizer, 9, 20)

    again, other, optimizer = start(weights=5, token_head=token_head)
    state = torch.load(tmp_path / "state", weights_only=True)
    other.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    again.load_state_dict(state["mixer"])
    if token_head == "own":  # a checkpoint ahead of the first step keeps what it got
        assert again.state_dict()["head"] == state["mixer"]["head"]
    assert steps(again, other, optimizer, 9, 20) == losses
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert again.record()["facts"] == mixer.record()["facts"]
    assert torch.equal(again._pictures, mixer._pictures)


def test_another_seed_draws_something_else():
    runs = [steps(*start(**fields), 0, 8) for fields in ({}, {}, {"seed": 3})]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_pictures_of_the_first_mixed_batch_of_each_epoch():
    mixer = SMMix(switch_prob=1.0)
    model = mixer.attach(network(), total_steps=4, steps_per_epoch=2).train()
    assert "images" not in mixer.record()
    optimizer = torch.optim.AdamW(model.parameters())
    steps(mixer, model, optimizer, 0, 3)
    (group,) = mixer.record()["images"]
    assert group["notes"] == ["epoch 2"] * 4
    assert len(group["pictures"]) == 4
    first = group["pictures"][0]
    assert first.dtype == torch.uint8
    assert first.shape == (3, 96, 3 * 96 + 2 * 4)
    steps(mixer, model, optimizer, 3, 4)
    assert torch.equal(mixer.record()["images"][0]["pictures"][0], first)


# -- precision and compilation ---------------------------------------------------------------------


def gradients(precision: str, **fields: Any) -> dict[str, Tensor]:
    mixer, model, _ = start(switch_prob=1.0, **fields)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = mixer.loss(model, *batch(0))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("token_head", ["shared", "own"])
def test_gradients_in_bfloat16_are_those_of_float32(token_head):
    """Also of weights that autocast casts first in the pass without gradients."""
    exact, reduced = (gradients(p, token_head=token_head) for p in ("fp32", "bf16"))
    assert (
        set(exact)
        == set(reduced)
        == {name for name, _ in start(token_head=token_head)[1].named_parameters()}
    )
    for name, gradient in exact.items():
        cosine = nn.functional.cosine_similarity(gradient.flatten(), reduced[name].flatten(), dim=0)
        assert cosine > 0.98, name
        assert 0.9 < reduced[name].norm() / gradient.norm() < 1.1, name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_gives_the_same_and_is_compiled_once(backend):
    torch._dynamo.reset()
    mixer, model, optimizer = start()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    plain, other, optimizer2 = start()
    with torch._dynamo.config.patch(error_on_recompile=True):  # sides and branches change
        losses = steps(mixer, compiled, optimizer, 0, 12)
    expected = steps(plain, other, optimizer2, 0, 12)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert 3 < mixer._mixed < 12
    torch._dynamo.reset()


# -- processes -------------------------------------------------------------------------------------


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for token_head in ("shared", "own"):
        mixer, model, optimizer = start(total_steps=12, token_head=token_head)
        wrapped = DistributedDataParallel(model)
        branches, losses = [], []
        for step in range(12):
            before = mixer._mixed
            images, labels = batch(2 * step + rank)
            loss = mixer.loss(wrapped, images, labels)
            loss.backward()
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
            branches.append(mixer._mixed > before)
            losses.append(loss.item())
        found[token_head] = {
            "branches": branches,
            "losses": losses,
            "weights": {key: value.clone() for key, value in model.state_dict().items()},
        }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.path
def test_two_processes_draw_alike_and_stay_alike(tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for token_head in ("shared", "own"):
        one, other = first[token_head], second[token_head]
        assert one["branches"] == other["branches"]
        assert len(set(one["branches"])) == 2
        assert one["losses"] != other["losses"], "each has images of its own"
        for key, value in one["weights"].items():
            assert torch.equal(value, other["weights"][key]), key
        # One process that averages the gradients of both shares comes to the same weights.
        mixer, model, optimizer = start(total_steps=12, token_head=token_head)
        for step in range(12):
            loss = mixer.loss(model, *batch(2 * step))
            mixer._draws -= 1
            loss = (loss + mixer.loss(model, *batch(2 * step + 1))) / 2
            loss.backward()
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, one["weights"][key], rtol=1e-3, atol=1e-4)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y: (x[:3], y[:3]), "a batch of 3 images can't be paired: .*drop_last=True"),
        (lambda x, y: (x[:0], y[:0]), "a batch of 0 images"),
        (lambda x, y: (x[..., :6], y), r"images of shape \(8, 1, 8, 6\): expected square"),
        (lambda x, y: (x[0], y), "expected square ones"),
        (lambda x, y: ((x * 50).to(torch.uint8), y), "images of torch.uint8: expected normalised"),
        (lambda x, y: (x, torch.eye(CLASSES)[y]), "expected class ids"),
        (lambda x, y: (x, y.float()), "expected class ids"),
        (lambda x, y: (x, y > 1), "expected class ids"),
        (lambda x, y: (x, y[:4]), "expected class ids"),
        (lambda x, y: (x, y + CLASSES), "the network has 4 classes: expected 0 to 3"),
        (lambda x, y: (x, y - 4), "labels from -4 to .*expected 0 to 3"),
        (lambda x, y: (x * math.nan, y), "attention of the last block is not finite"),
        (lambda x, y: (x.index_fill(0, torch.tensor([2]), math.inf), y), "not finite"),
    ],
)
def test_batches_that_cannot_be_mixed(change, text):
    mixer, model, _ = start(switch_prob=1.0)
    with pytest.raises(UserError, match=text) as error:
        mixer.loss(model, *change(*batch(0)))
    assert "\n" not in str(error.value)
    plain, model, _ = start(switch_prob=0.0)  # Mixup takes no worse batches
    if "not finite" not in text:
        with pytest.raises(UserError, match=text):
            plain.loss(model, *change(*batch(0)))


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_the_wrong_network_or_mode(switch_prob):
    mixer, model, _ = start(switch_prob=switch_prob)
    with pytest.raises(StateError, match=r"did not run in training mode.*after model\.train\(\)"):
        mixer.loss(model.eval(), *batch(0))
    with pytest.raises(StateError, match="pass the model that attach returned"):
        mixer.loss(network(1).train(), *batch(0))
    with pytest.raises(StateError, match="attached to no model"):
        SMMix().loss(model, *batch(0))


def test_a_second_head_needs_an_optimizer_with_adams_rates():
    mixer, model, _ = start(token_head="own")
    sgd = torch.optim.SGD(mixer.parameters_for(model), lr=0.1)
    with pytest.raises(UserError, match=r"trained by AdamW with the rates of the classifier.*SGD"):
        steps(mixer, model, sgd, 0, 1)
    with pytest.raises(UserError, match=r"smmix\.parameters_for\(model\)"):
        steps(mixer, model, torch.optim.AdamW(model.parameters()), 0, 1)


def test_a_second_head_follows_the_classifiers_rates():
    mixer, model, _ = start(token_head="own")
    rest = [p for p in mixer.parameters_for(model) if p is not model.head.weight]
    groups = [{"params": rest}, {"params": [model.head.weight], "lr": 5e-4, "weight_decay": 0.3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    steps(mixer, model, optimizer, 0, 2)
    (group,) = mixer._head_optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.3)
    optimizer.param_groups[1]["lr"] = 1e-4
    steps(mixer, model, optimizer, 2, 3)
    assert group["lr"] == 1e-4


def test_what_overflowed_is_not_learned_from():
    mixer, model, _ = start(token_head="own", switch_prob=1.0)
    optimizer = torch.optim.AdamW(mixer.parameters_for(model), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = copy.deepcopy(mixer._head.state_dict())
    scaler.scale(mixer.loss(model, *batch(0))).backward()
    mixer._head.weight.grad.fill_(math.inf)
    model.head.weight.grad.fill_(math.inf)
    scaler.step(optimizer)
    scaler.update()
    mixer.step()
    optimizer.zero_grad()
    for key, value in mixer._head.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in mixer._head.parameters()), "nothing is carried over"
    steps(mixer, model, optimizer, 1, 2)
    assert not torch.equal(mixer._head.weight, before["weight"])


def training_set(size: tuple[int, int]) -> TrainingSet:
    return TrainingSet(
        name="made up", size=4, ids=torch.arange(4), labels=lambda: torch.arange(4),
        example=torch.zeros(1, 1, *size),
    )  # fmt: skip


def test_data_is_looked_at_ahead_of_training():
    model = network().train()
    SMMix().prepare(model, training_set((8, 8)), epochs=1)
    assert all(module.training for module in model.modules())
    with pytest.raises(UserError, match="made up has images of 8x10: SMMix needs square ones"):
        SMMix().prepare(model, training_set((8, 10)), epochs=1)
    with pytest.raises(UserError, match="make squares of 0 to 2 of 4 tokens a side"):
        SMMix(least_side=0.2, largest_side=0.5).prepare(model, training_set((8, 8)), epochs=1)


def test_tokens_that_do_not_divide_the_image():
    model = nets.vit(CLASSES)
    model.patch_embed.strict_img_size = False
    model.patch_embed.img_size = None
    mixer = SMMix(switch_prob=1.0)
    mixer.attach(model, total_steps=1)
    with pytest.raises(UserError, match=r"16 tokens for images of 9 pixels: .*side divides"):
        mixer.loss(model.train(), torch.randn(2, 1, 9, 9), torch.tensor([0, 1]))
