"""Magnitude and SR-STE against naive formulas: a weak rival would flatter LBC."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from rivals import SRSTE, Magnitude, magnitude_mask
from tenfold.errors import UserError
from tenfold.methods import LBC
from tenfold.nn.blocks import to_blocks

pytestmark = pytest.mark.parity
PATTERNS = [(2, 4), (1, 4), (1, 16), (3, 5)]


def network(dtype: torch.dtype = torch.float64, channels: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 16, channels),
        nn.ReLU(),
        nn.Linear(channels, 4),
    ).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (6,), generator=generator)


def train(model, method, optimizer, steps, observe=lambda: None):
    for step in range(steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        method.step()
        observe()


def naive_mask(weight: Tensor, n: int, m: int) -> Tensor:
    mask = torch.zeros_like(weight)
    filters, channels, *kernel = weight.shape
    for filter_, *at in itertools.product(range(filters), *map(range, kernel)):
        for first in range(0, channels, m):
            block = [(abs(float(weight[(filter_, c, *at)])), c) for c in range(first, first + m)]
            for _, channel in sorted(block, reverse=True)[:n]:
                mask[(filter_, channel, *at)] = 1
    return mask


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_mask_is_that_of_the_largest(n, m, kernel):
    weight = torch.randn(3, 2 * m, *kernel, generator=torch.Generator().manual_seed(n))
    mask = magnitude_mask(weight, n, m)
    assert mask.shape == weight.shape
    assert torch.equal(mask.to(weight.dtype), naive_mask(weight, n, m))


def test_mask_of_equal_weights_keeps_n_all_the_same():
    assert (to_blocks(magnitude_mask(torch.ones(4, 8, 3, 3), 2, 4), 4).sum(dim=1) == 2).all()


@pytest.mark.parametrize("rival", [Magnitude, SRSTE])
def test_same_layers_as_lbc_and_exactly_n_of_m_at_the_end(rival):
    model, method = network(), rival(n=2, m=4)
    chosen = [layer.name for layer in LBC(n=2, m=4).plan(model) if layer.treatment]
    assert chosen == ["2", "5"]
    names = [name for name, _ in model.named_parameters()]
    model = method.attach(model, total_steps=3)
    train(model, method, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 3)
    logits = model(batch(9)[0])
    model = method.finalize(model)
    assert torch.equal(model(batch(9)[0]), logits)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Conv2d | nn.Linear) and str(index) in chosen:
            assert (to_blocks(layer.weight != 0, 4).sum(dim=1) == 2).all()
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            assert (layer.weight != 0).all()


def test_magnitude_chooses_once_and_its_mask_stays():
    model = network()
    dense = model[2].weight.detach().clone()
    method = Magnitude(n=1, m=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model = method.attach(model, total_steps=20)
    first = naive_mask(dense, 1, 4)
    torch.testing.assert_close(model[2].weight.detach(), first * dense, rtol=0, atol=0)

    def check() -> None:
        assert torch.equal((model[2].weight != 0).double(), first)

    train(model, method, optimizer, 20, check)
    kept = model[2].weight[first == 1]
    assert not torch.equal(kept, dense[first == 1]), "the kept weights train on"


def test_sr_ste_chooses_anew_at_every_step():
    model = network()
    method = SRSTE(n=1, m=4)
    model = method.attach(model, total_steps=30)
    seen = [model[2].weight != 0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train(model, method, optimizer, 30, lambda: seen.append(model[2].weight != 0))
    assert not torch.equal(seen[0], seen[-1])
    latent = model[2].parametrizations.weight.original.detach()
    assert torch.equal(seen[-1].double(), naive_mask(latent, 1, 4))


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.3])
def test_sr_ste_gradient_is_the_papers(decay):
    """dL/dW = dL/dW_eff + decay * (1 - mask) * W, with dL/dW_eff from a plain masked layer."""
    weight = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    images = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mask = naive_mask(weight, 2, 4)
    effective = (mask * weight).requires_grad_()
    (images @ effective.T).pow(3).sum().backward()
    expected = effective.grad + decay * (1 - mask) * weight

    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 1)).double()
    model[0].weight.data.copy_(weight)
    SRSTE(n=2, m=4, decay=decay).attach(model, total_steps=1)
    model[0](images).pow(3).sum().backward()
    found = model[0].parametrizations.weight.original.grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[mask == 0] != 0).all(), "the gradient reaches pruned weights"


def test_wrong_values_are_refused():
    with pytest.raises(UserError, match="n=4, m=4"):
        Magnitude(n=4, m=4)
    with pytest.raises(UserError, match="decay=-1"):
        SRSTE(n=2, m=4, decay=-1)
