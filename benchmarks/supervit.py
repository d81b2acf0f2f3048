"""SuperViT: what cells cost beside a plain ViT, what a training step costs, how right they are.

    python benchmarks/supervit.py                        # all but accuracy, 15 minutes
    python benchmarks/supervit.py --parts cells grid     # some of it
    python benchmarks/supervit.py --parts accuracy       # small ViTs, 18 runs: an hour and a half
    python benchmarks/supervit.py --parts accuracy --minutes 9   # stop cleanly; repeat to go on
    python benchmarks/supervit.py --parts accuracy --full        # ImageNet-like, on a GPU

- cells: DeiT-small in all twelve cells beside timm's plain deit_small and beside a direct wrapper
  of it (attention maps, sorting, gathering), in one interleaved run. Multiply-adds by the formula
  and by PyTorch's counter.
- engines: keep rates 0.7 and 0.5 at 224 beside deit_small inside each engine.
- training: a step over all combinations of cells that may be drawn, beside a step of deit_small;
  with and without the shared trunk.
- grid: evaluating all cells with shared work beside one after the other.
- sparse: a SuperViT whose blocks have 2:4 weights, as LBC's preset deit leaves them, made fast by
  `tenfold.optimize`, beside deit_small in its fastest engine.
- accuracy: one SuperViT beside plain ViTs that are trained at each size, and beside ViTs that are
  trained at one keep rate (tokens leave as in EViT, without its fused token). All runs of a seed
  share data, order, augmentation, optimizer and number of epochs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tenfold
from common import RESULTS, save
from contenders import compare
from resumable import command_of
from supervit_accuracy import FULL, SMALL, run_accuracy
from tenfold.errors import UserError
from tenfold.measure.engines import OnnxFiles, prepare
from tenfold.measure.timing import interleave, paired_ratio
from tenfold.methods import LBC, SuperViT, SuperViTTraining

PARTS = ("cells", "engines", "training", "grid", "sparse")
MODEL = "deit_small_patch16_224"
RUNTIMES = ("pytorch", "onnxruntime", "openvino", "tenfold")


class Direct(nn.Module):
    """A SuperViT as one would write it down: maps of attention, a full sort, gather."""

    def __init__(self, model: SuperViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, size: int, rate: float) -> Tensor:
        model: Any = self.model
        x = nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=True)
        x = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + model.pos_embed_list[model.sizes.index(size)]
        for index, block in enumerate(model.blocks):
            batch, tokens, width = x.shape
            attn = block.attn
            qkv = attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            attention = ((q @ k.transpose(-2, -1)) * attn.scale).softmax(dim=-1)
            y = (attention @ v).transpose(1, 2).reshape(batch, tokens, width)
            x = x + attn.proj(y)
            if index in model.drop_blocks and rate != 1:
                scores = attention[:, :, 0, 1:].mean(dim=1)
                kept = min(-int(-rate * tokens // 1), tokens - 1)
                order = scores.argsort(dim=1, descending=True)[:, :kept]
                patches = x[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, width))
                x = torch.cat([x[:, :1], patches], dim=1)
            x = x + block.mlp(block.norm2(x))
        logits: Tensor = model.head(model.norm(x)[:, 0])
        return logits


def networks() -> tuple[nn.Module, SuperViT]:
    """Return the plain network and a SuperViT on the same weights, in the same memory."""
    import timm

    torch.manual_seed(0)
    plain = timm.create_model(MODEL)
    return plain, SuperViT(plain)


def cells(batch: int, seconds: float) -> dict[str, Any]:
    plain, model = networks()
    plain.eval()
    model.eval()
    direct = Direct(model)
    images = torch.randn(batch, 3, 224, 224)
    rows = []
    plain_ms: list[float] = []
    most = model.macs(224, 1.0)
    for cell in model.cells:
        size, rate = cell
        calls: dict[str, Callable[[], object]] = {
            "plain": functools.partial(plain, images),
            "ours": functools.partial(model, images, *cell),
            "direct": functools.partial(direct, images, *cell),
        }
        with torch.inference_mode():
            torch.testing.assert_close(calls["ours"](), calls["direct"](), atol=1e-4, rtol=1e-4)
            # By three, so that what is compared lies close together in time.
            samples = interleave(calls, seconds * len(calls))
            with FlopCounterMode(display=False) as counter:
                model(images[:1], size, rate)
        macs = model.macs(size, rate)
        row: dict[str, Any] = {
            "size": size,
            "keep_rate": rate,
            "macs": macs,
            "counted": counter.get_total_flops() // 2,
            "macs_ratio": round(most / macs, 4),
            "ms": round(statistics.median(samples["ours"]), 3),
            "rounds": len(samples["ours"]),
        }
        for name in ("ours", "direct"):
            found = paired_ratio(samples["plain"], samples[name])
            row[name] = {
                "speedup": round(found.median, 4),
                "low": round(found.low, 4),
                "high": round(found.high, 4),
                "of_macs_ratio": round(found.median / row["macs_ratio"], 4),
            }
        rows.append(row)
        plain_ms += samples["plain"]
        print(row, flush=True)
    return {
        "batch": batch,
        "plain_ms": round(statistics.median(plain_ms), 3),
        "rounds": min(row["rounds"] for row in rows),
        "rows": rows,
    }


def engines(batch: int, seconds: float, threads: int) -> dict[str, Any]:
    plain, model = networks()
    models: dict[str, nn.Module] = {"plain": plain.eval()}
    for rate in (0.7, 0.5):
        models[f"{rate:g}"] = model.cell(224, rate).eval()
    images = torch.randn(batch, 3, 224, 224)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files = OnnxFiles(models, (images,), {}, Path(folder))
        for runtime in RUNTIMES:
            for prepared in prepare(runtime, models, [(images,)], threads, files):
                if len(prepared.calls) < len(models) or prepared.runtime in found:
                    found.setdefault(prepared.runtime, {"skipped": prepared.skipped})
                    continue
                samples = interleave(prepared.calls, seconds * len(models))
                entry: dict[str, Any] = {"plain_ms": round(statistics.median(samples["plain"]), 3)}
                for name in list(models)[1:]:
                    ratio = paired_ratio(samples["plain"], samples[name])
                    entry[name] = {
                        "ms": round(statistics.median(samples[name]), 3),
                        "speedup": round(ratio.median, 4),
                        "low": round(ratio.low, 4),
                        "high": round(ratio.high, 4),
                    }
                found[prepared.runtime] = entry
                print(prepared.runtime, entry, flush=True)
    limits = {f"{rate:g}": round(model.macs(224, 1.0) / model.macs(224, rate), 4)
              for rate in (0.7, 0.5)}  # fmt: skip
    return {"batch": batch, "macs_ratio": limits, "runtimes": found}


def training(batch: int, rounds: int) -> dict[str, Any]:
    """Time one step of every combination that may be drawn, beside a step of the plain network."""
    plain, model = networks()
    plain.train()
    model.train()
    images = torch.randn(batch, 3, 224, 224)
    labels = torch.arange(batch) % 1000

    def plain_step() -> None:
        optimizer_of["plain"].zero_grad()
        nn.functional.cross_entropy(plain(images), labels).backward()
        optimizer_of["plain"].step()

    optimizer_of = {
        "plain": torch.optim.AdamW(plain.parameters(), lr=1e-4, foreach=True),
        "supervit": torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True),
    }
    drawn = list(itertools.product(model.sizes[:-1], model.keep_rates[:-1], model.keep_rates[:-1]))

    def step(method: SuperViTTraining, cells: list[tuple[int, float]]) -> None:
        method.draw = lambda: cells  # type: ignore[method-assign]
        optimizer_of["supervit"].zero_grad()
        method.loss(model, images, labels).backward()  # type: ignore[no-untyped-call]
        optimizer_of["supervit"].step()

    calls: dict[str, Callable[[], object]] = {"plain": plain_step}
    for shared in (True, False):
        method = SuperViTTraining(share_trunk=shared)
        method.attach(model, total_steps=10**9)
        for size, rate, other in drawn:
            cells = [(224, 1.0), (224, rate), (size, 1.0), (size, other)]
            name = f"{'shared' if shared else 'apart'} {size} {rate:g} {other:g}"
            calls[name] = functools.partial(step, method, cells)
    from common import interleave as in_turn

    times = in_turn(calls, rounds, warm_up=1)
    found: dict[str, Any] = {"batch": batch, "rounds": rounds, "combinations": len(drawn)}
    found["plain_ms"] = round(1000 * statistics.median(times["plain"]), 1)
    for name in ("shared", "apart"):
        # Combinations are drawn equally often: their mean in each round is a step's mean.
        means = [
            statistics.mean(times[key][index] for key in times if key.startswith(f"{name} "))
            for index in range(rounds)
        ]
        ratio = paired_ratio(means, times["plain"])
        found[name] = {
            "times_plain": round(ratio.median, 4),
            "low": round(ratio.low, 4),
            "high": round(ratio.high, 4),
        }
    full = model.macs(224, 1.0)
    limit = statistics.mean(_step_macs(model, *each) for each in drawn) / full
    apart = statistics.mean(
        sum(model.macs(*cell) for cell in ((224, 1.0), (224, a), (s, 1.0), (s, b)))
        for s, a, b in drawn
    )
    found["macs"] = {"shared": round(limit, 4), "apart": round(apart / full, 4)}
    return found


def _step_macs(model: SuperViT, size: int, rate: float, other: float) -> float:
    total = 0
    for side, kept in ((224, rate), (size, other)):
        total += model.macs(side, 1.0) + model.macs(side, kept) - trunk_macs(model, side)
    return total


def trunk_macs(model: SuperViT, size: int) -> int:
    """Return what the cells of a size have in common: patches, blocks and the first attention."""
    tokens, width = (size // model.patch_size) ** 2 + 1, model.cls_token.shape[-1]
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    mlp = 2 * model.hidden * tokens * width
    first = model.drop_blocks[0]
    stem = (tokens - 1) * 3 * model.patch_size**2 * width
    return int(stem + first * (attention + mlp) + attention)


def grid(batch: int, seconds: float) -> dict[str, Any]:
    _, model = networks()
    model.eval()
    images = torch.randn(batch, 3, 224, 224)

    def one_by_one() -> list[Tensor]:
        return [model(images, *cell) for cell in model.cells]

    def together() -> list[Tensor]:
        found = []
        for _, group in itertools.groupby(model.cells, key=lambda cell: cell[0]):
            found += model(images, cells=list(group))
        return found

    with torch.inference_mode():
        for a, b in zip(one_by_one(), together(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        samples = interleave({"apart": one_by_one, "together": together}, seconds)
    ratio = paired_ratio(samples["apart"], samples["together"])
    return {
        "batch": batch,
        "speedup": round(ratio.median, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
    }


def sparse(batch: int, seconds: float, threads: int) -> dict[str, Any]:
    """Time 2:4 cells as `optimize` makes them; weights are random and cut to the pattern."""
    plain, model = networks()
    for layer in LBC(n=2, m=4, preset="deit").plan(model):
        if layer.treatment:
            weight: Any = model.get_submodule(layer.name).weight
            weight.data = _two_of_four(weight.data)
    images = torch.randn(batch, 3, 224, 224)
    fast = {
        f"{rate:g}": tenfold.optimize(model.cell(224, rate).eval(), images)
        for rate in model.keep_rates[::-1]
    }
    with tempfile.TemporaryDirectory() as folder:
        found = compare(plain.eval(), fast, images, threads, seconds, Path(folder), RUNTIMES)
    for rate, network in fast.items():
        found["sparse"][rate]["packed"] = len(network.plan.packed)
        found["sparse"][rate]["difference"] = network.plan.difference
    return {"batch": batch, **found}


def _two_of_four(weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, 4)
    kept = torch.zeros_like(blocks).scatter_(1, blocks.abs().topk(2, dim=1).indices, 1.0)
    return (blocks * kept).reshape(weight.shape)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "accuracy"), default=list(PARTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="a contender")
    parser.add_argument("--rounds", type=int, default=5, help="of training steps")
    parser.add_argument("--full", action="store_true", help="accuracy: a GPU's settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--minutes", type=float, help="accuracy: start no epoch that ends later")
    parser.add_argument("--output", help="name of the file in benchmarks/results")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    torch.set_num_threads(given.threads)
    command = command_of("supervit", words)
    if "accuracy" in given.parts:
        preset = {**(FULL if given.full else SMALL)}
        preset |= {
            key: value for key in ("epochs", "images") if (value := getattr(given, key)) is not None
        }
        return run_accuracy(
            preset,
            given.seeds,
            given.minutes,
            given.output or ("supervit_accuracy_gpu" if given.full else "supervit_accuracy"),
            command,
        )
    measured: dict[str, Callable[[], Mapping[str, Any]]] = {
        "cells": lambda: cells(given.batch, given.seconds),
        "engines": lambda: engines(given.batch, given.seconds, given.threads),
        "training": lambda: training(max(2, given.batch // 2), given.rounds),
        "grid": lambda: grid(given.batch, given.seconds * 4),
        "sparse": lambda: sparse(given.batch, given.seconds, given.threads),
    }
    output = given.output or "supervit"
    known: dict[str, Any] = {}
    if (RESULTS / f"{output}.json").is_file():
        import json

        known = json.loads((RESULTS / f"{output}.json").read_text("utf-8"))
    results = {part: known.get(part) for part in PARTS}
    commands = known.get("command", command).split("; ")
    for part in given.parts:
        results[part] = dict(measured[part]())
        save(
            output,
            "; ".join(dict.fromkeys([*commands, command])),
            0,
            {"threads": given.threads, "model": MODEL, **results},
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"supervit: {error}")
