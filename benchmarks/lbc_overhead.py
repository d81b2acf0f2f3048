"""What a training step costs with LBC, against the same step without it.

    python benchmarks/lbc_overhead.py [--rounds 30]

Two copies of one network train on the same batch in one process, step by step in turn: one plainly,
one with LBC in its first half, where masks are applied and scores are updated in every step. SGD
with momentum and weight decay, channels-last, all of PyTorch's threads. Beside it: what the scores
take in memory, counted from the shapes of whole networks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import nn

from common import interleave, paired_ratio, save, summary
from tenfold.methods import LBC
from tenfold.nn import models

CASES = {
    "ResNet-20, 32x32, batch 128": ("resnet20", 10, 32, 128),
    "timm resnet18, 224x224, batch 16": ("timm/resnet18", 1000, 224, 16),
}
PATTERNS = ((2, 4), (1, 4), (2, 8), (4, 8))
NETWORKS = ("timm/resnet18", "timm/resnet34", "timm/resnet50", "timm/deit_small_patch16_224")
SEED = 0


def step_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, sparsity: LBC | None):
    """Return a function that does one whole training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if sparsity is not None:
            sparsity.step()

    return step


def overhead(name: str, classes: int, size: int, batch: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(SEED)
    dense, _ = models.build(name, num_classes=classes)
    dense = dense.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,))
    steps: dict[str, Callable[[], None]] = {
        "dense": step_of(copy.deepcopy(dense), images, labels, None)
    }
    for n, m in ((2, 4), (1, 16)):
        model, sparsity = copy.deepcopy(dense), LBC(n=n, m=m)
        # long enough that the schedule is still removing candidates when the timing ends
        sparsity.attach(model, total_steps=100 * rounds)
        steps[f"LBC {n}:{m}"] = step_of(model, images, labels, sparsity)
    times = interleave(steps, rounds)
    return {
        "times": {key: summary(values) for key, values in times.items()},
        "overhead": {
            key: paired_ratio(values, times["dense"])
            for key, values in times.items()
            if key != "dense"
        },
    }


def score_memory(name: str) -> dict[str, object]:
    model, _ = models.build(name, num_classes=1000)
    found: dict[str, object] = {}
    for n, m in PATTERNS:
        sparsity = LBC(n=n, m=m, preset="deit" if "deit" in name else "resnet")
        plan = [layer for layer in sparsity.plan(model) if layer.treatment]
        weights = sum(torch.Size(layer.shape).numel() for layer in plan)
        blocks = weights // m
        found["sparse_weights"] = weights
        found[f"{n}:{m}"] = {
            "full_MiB": round(4 * blocks * sparsity.n_candidates / 2**20, 1),
            "accumulator_MiB": round(4 * weights / 2**20, 1),
            "alive_MiB": round(blocks * sparsity.n_candidates / 2**20, 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    results: dict[str, object] = {}
    for title, case in CASES.items():
        results[title] = overhead(*case, rounds=rounds)
        print(title, results[title])
    memory = {name: score_memory(name) for name in NETWORKS}
    save(
        "lbc_overhead",
        f"python benchmarks/lbc_overhead.py --rounds {rounds}",
        SEED,
        {"threads": torch.get_num_threads(), "step": results, "score_memory": memory},
    )


if __name__ == "__main__":
    main()
