"""Adversarial losses against worked numbers, and judging without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.nn.adversarial import MODES, discriminator_loss, generator_loss, judging
from tenfold.nn.discriminators import PatchDiscriminator

pytestmark = pytest.mark.unit
LOGITS = torch.tensor([-2.0, 0.0, 0.5, 3.0])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("mode", "real", "made", "generator"),
    [("hinge", 1.125, 1.625, -0.375), ("lsgan", 3.5625, 3.3125, 3.5625)],
)
def test_losses_by_hand(mode, real, made, generator):
    """The discriminator's halves are told apart by logits that cost nothing in the other place."""
    free = {"hinge": (2.0, -2.0), "lsgan": (1.0, 0.0)}[mode]
    one = torch.ones(7, 3)
    assert 2 * discriminator_loss(mode, LOGITS, free[1] * one).item() == pytest.approx(real)
    assert 2 * discriminator_loss(mode, free[0] * one, LOGITS).item() == pytest.approx(made)
    both = discriminator_loss(mode, LOGITS, LOGITS.reshape(2, 2))
    assert both.item() == pytest.approx((real + made) / 2)
    assert generator_loss(mode, LOGITS).item() == pytest.approx(generator)
    assert both.shape == ()


def test_unknown_losses_are_refused():
    assert MODES == ("lsgan", "hinge")
    with pytest.raises(UserError, match="unknown GAN loss 'hing': did you mean hinge"):
        generator_loss("hing", LOGITS)
    with pytest.raises(UserError, match="unknown GAN loss 'bce': known: hinge, lsgan"):
        discriminator_loss("bce", LOGITS, LOGITS)


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_gradients_pass_through_and_nothing_stays(norm):
    torch.manual_seed(0)
    network = PatchDiscriminator(3, 4, norm)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    before = state(network)
    with judging(network):
        logits = network(images)
        generator_loss("lsgan", logits).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    # Outside, the same logits move the weights and, with a batch norm, the statistics.
    again = network(images.detach())
    torch.testing.assert_close(again, logits)  # so the batch's own statistics were used
    again.mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    if norm == "batch":
        assert network.model[3].num_batches_tracked == 1
        assert not torch.equal(network.model[3].running_mean, before["model.3.running_mean"])


def test_a_batch_norm_in_evaluation_keeps_its_running_statistics():
    torch.manual_seed(0)
    network = PatchDiscriminator(3, 4, "batch")
    network(3 * torch.randn(2, 3, 32, 32))
    network.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), judging(network):
        judged = network(images)
    torch.testing.assert_close(judged, network(images))
    torch.testing.assert_close(judged[:1], network(images[:1]))


def test_flags_are_as_they_were_even_after_an_error():
    network = PatchDiscriminator(3, 4, "batch")
    network.model[0].requires_grad_(False)
    network.model[3].eval()
    network.model[6].track_running_stats = False
    other = nn.BatchNorm1d(2)

    def flags():
        grads = [p.requires_grad for n in (network, other) for p in n.parameters()]
        return grads, [
            (m.training, m.track_running_stats)
            for m in (*network.modules(), other)
            if hasattr(m, "track_running_stats")
        ]

    def fail():
        with judging(network, other):
            seen_inside()
            raise ZeroDivisionError

    def seen_inside():
        assert not any(p.requires_grad for n in (network, other) for p in n.parameters())
        with judging(network):
            pass
        assert not any(p.requires_grad for p in network.parameters())

    before = flags()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert flags() == before
    network.zero_grad()
    network(torch.randn(2, 3, 32, 32)).mean().backward()
    assert network.model[0].weight.grad is None
    assert network.model[2].weight.grad is not None
