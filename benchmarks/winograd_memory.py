"""Trained parameters and optimizer state of dense, vanilla Winograd and low-rank training.

    python benchmarks/winograd_memory.py

R3D-18 and C3D of full size take one step each, of SGD with momentum and of AdamW; then the tensors
that the optimizer holds are counted. The gradients are zeros: what it holds doesn't depend on them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from common import save
from tenfold.methods import Winograd3d
from tenfold.nn import models

CLASSES = 101
NETWORKS = {"R3D-18": "torchvision/r3d_18", "C3D": "c3d"}
FORMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    **{f"vanilla, tile {tile}": {"tile": tile, "mode": "dense"} for tile in (2, 4)},
    **{
        f"rank {rank}, tile {tile}": {"tile": tile, "rank": rank}
        for tile in (2, 4)
        for rank in (4, 8, 16)
    },
}


def build(name: str) -> nn.Module:
    return models.build(name, num_classes=CLASSES, frames=16, size=(112, 112))[0]


def count(name: str, form: dict[str, Any] | None) -> dict[str, int]:
    """Return numbers that are trained and frozen, and the bytes of the optimizers' states."""
    torch.manual_seed(0)
    model = build(name)
    method = Winograd3d(**(form or {}))
    names = [layer.name for layer in method.plan(model) if layer.treatment]
    if form is not None:
        model = method.attach(model, total_steps=100)
    layers = [model.get_submodule(layer) for layer in names]
    trained = list(model.parameters())
    found = {
        "layers": len(layers),
        "trained": sum(p.numel() for layer in layers for p in layer.parameters()),
        # Of a layer in training form, `base` of the mode residual.
        "frozen": sum(
            x.numel() for layer in layers for n, x in layer.named_buffers() if n == "base"
        ),
        "trained_in_all": sum(p.numel() for p in trained),
    }
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for key, optimizer in (
        ("sgd_bytes", torch.optim.SGD(trained, lr=1e-9, momentum=0.9)),
        ("adamw_bytes", torch.optim.AdamW(trained, lr=1e-9)),
    ):
        optimizer.step()
        found[key] = state_bytes(optimizer)
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors of an optimizer's state."""
    held = [x for state in optimizer.state.values() for x in state.values()]
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))


def main() -> None:
    warnings.simplefilter("error")
    found: dict[str, dict[str, dict[str, int]]] = {}
    for title, name in NETWORKS.items():
        for form, options in FORMS.items():
            entry = found.setdefault(title, {})[form] = count(name, options)
            print(f"{title}, {form}: {entry}", flush=True)
    save(
        "winograd_memory",
        "python benchmarks/winograd_memory.py",
        0,
        {"threads": torch.get_num_threads(), "networks": found},
    )


if __name__ == "__main__":
    main()
