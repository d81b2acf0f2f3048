"""3-D convolutions in the Winograd domain beside the fastest dense engine.

    python benchmarks/winograd3d.py [--only layers r3d_18 c3d errors growth] [--seconds 1.0]

All contenders of a cell run in one process, in turn, with the same number of threads, in float32:
the dense model in PyTorch eager (both memory formats), torch.compile, ONNX Runtime and OpenVINO;
with all columns, what `tenfold.optimize` makes of the untouched dense model; with half and with a
quarter of them, what it makes of a model in the Winograd domain whose columns were picked at
random, so that they can still form all outputs of a tile. A speedup is against the fastest dense
contender of that cell, whichever it is. Speed doesn't depend on the values of weights.

A pruned model has one tile, chosen before it is trained: (2, 4, 4) in whole networks; layers are
timed in several. Finished parts stay in the results file, so that parts can be run apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shlex
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tenfold
from common import RESULTS, save
from contenders import compare
from tenfold.deploy.candidates import find_layers, replace_layers
from tenfold.kernels import native
from tenfold.kernels.winograd_transforms import column_count, transforms
from tenfold.measure.timing import interleave
from tenfold.nn import models
from tenfold.nn.winograd import WinogradConv3d
from tenfold.nn.winograd_fit import unconvertible
from tenfold.nn.winograd_packed import PackedWinogradConv3d

NAME = "winograd3d"
ENGINES = ("pytorch", "torch.compile", "onnxruntime", "openvino")
NETWORKS = {"r3d_18": "torchvision/r3d_18", "c3d": "tenfold/c3d"}
CLIP = (3, 16, 112, 112)
KEEPS = {"all": 1.0, "half": 0.5, "quarter": 0.25}
TILES = ((2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 2), (4, 4, 4))
NETWORK_TILE = (2, 4, 4)
MIN_CHANNELS = 16  # of layers that training would put into the domain
SEED = 0


def build(name: str) -> nn.Module:
    """Return a network with random weights and BatchNorm that does something."""
    torch.manual_seed(SEED)
    model, _ = models.build(NETWORKS[name], num_classes=400)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def random_columns(tile: tuple[int, int, int], keep: float, seed: int) -> list[int]:
    """Return columns, picked at random, with which all outputs of a tile stay independent."""
    outputs, most = math.prod(tile), column_count(tile)
    kept = round(keep * most)
    matrices = [transforms(m, "accurate")[0] for m in tile]
    matrix = np.kron(np.kron(matrices[0], matrices[1]), matrices[2])
    order = random.Random(seed).sample(range(most), most)
    chosen: list[int] = []
    for column in order:
        if len(chosen) < outputs and np.linalg.matrix_rank(matrix[:, [*chosen, column]]) > len(
            chosen
        ):
            chosen.append(column)
    if kept < outputs or len(chosen) < outputs:
        raise ValueError(f"{kept} columns can't form the {outputs} outputs of a tile {tile}")
    rest = [column for column in order if column not in set(chosen)]
    return sorted([*chosen, *rest[: kept - outputs]])


def pruned(model: nn.Module, tile: tuple[int, int, int], keep: float) -> nn.Module:
    """Return a copy in the Winograd domain with some of its columns."""
    made = copy.deepcopy(model)
    layers = {
        name: WinogradConv3d.from_dense(module, tile, random_columns(tile, keep, SEED + number))
        for number, (name, module) in enumerate(made.named_modules())
        if isinstance(module, nn.Conv3d)
        and unconvertible(module) is None
        and module.in_channels >= MIN_CHANNELS
    }
    return replace_layers(made, layers)


def allowed(tile: tuple[int, int, int], keep: float) -> bool:
    return round(keep * column_count(tile)) >= math.prod(tile)


def named(tile: tuple[int, int, int]) -> str:
    return "x".join(map(str, tile))


def conv_sizes(model: nn.Module) -> Counter[tuple[int, ...]]:
    """Count the eligible convolutions of a network: channels, outputs, depth, height, width."""
    found: Counter[tuple[int, ...]] = Counter()
    for layer in find_layers(model, (torch.randn(1, *CLIP),)):
        if isinstance(layer.module, nn.Conv3d) and layer.reason is None:
            assert layer.input is not None
            found[(layer.input[1], layer.module.out_channels, *layer.input[2:])] += 1
    return found


def layers(seconds: float, threads: int, folder: Path) -> dict[str, Any]:
    """Time R3D-18's eligible convolutions alone; those of equal sizes once."""
    torch.set_num_threads(threads)
    peaks = native.peak()
    rows = []
    for (inputs, outputs, *size), count in conv_sizes(build("r3d_18")).items():
        torch.manual_seed(SEED)
        layer = nn.Conv3d(inputs, outputs, 3, padding=1).eval()
        x = torch.randn(1, inputs, *size)
        last = x.contiguous(memory_format=torch.channels_last_3d)
        fast: dict[str, nn.Module] = {}
        everything = tenfold.optimize(layer, last)
        tile_of_all = everything.plan.layers[0].tile
        if tile_of_all is not None:
            fast[f"all, {named(tile_of_all)}"] = everything.network
        for keep, tile in ((keep, tile) for keep in ("half", "quarter") for tile in TILES):
            if allowed(tile, KEEPS[keep]):
                domain = pruned(nn.Sequential(layer), tile, KEEPS[keep])[0]
                packed = PackedWinogradConv3d.from_layer(domain)
                packed.channels_last = True
                fast[f"{keep}, {named(tile)}"] = packed
        name = f"{inputs}-{outputs}-{size[0]}-{size[1]}"
        path = folder / name
        found = compare(layer, fast, x, threads, seconds / 4, path, ENGINES, last)
        macs = inputs * outputs * 27 * math.prod(size)
        rows.append(
            {
                "layer": f"{inputs}->{outputs}, {'x'.join(map(str, size))}",
                "count": count,
                "macs": macs,
                "best": {keep: best_of(found["sparse"], keep) for keep in KEEPS},
                **found,
            }
        )
        speedups = " ".join(f"{k} {v['speedup']:.2f}x" for k, v in found["sparse"].items())
        print(f"  {rows[-1]['layer']:22} best {found['best_dense']:22} {speedups}", flush=True)
    means = {
        **{keep: mean_of(rows, [row["best"][keep] for row in rows]) for keep in KEEPS},
        **{
            f"{keep}, {named(tile)}": mean_of(rows, [f"{keep}, {named(tile)}"] * len(rows))
            for keep in ("half", "quarter")
            for tile in TILES
            if allowed(tile, KEEPS[keep])
        },
    }
    print(f"  geometric means: {means}")
    peak = None if peaks is None else [round(each / 1e9, 1) for each in peaks]
    total = sum(row["count"] for row in rows)
    return {"geometric_mean": means, "layers": total, "peak_gmacs_a_thread": peak, "rows": rows}


def best_of(found: dict[str, Any], keep: str) -> str | None:
    """Return the contender with that share of the columns that is the fastest, by its tile."""
    names = [name for name in found if name.startswith(f"{keep},")]
    return max(names, key=lambda name: found[name]["speedup"], default=None)


def mean_of(rows: list[dict[str, Any]], names: list[str | None]) -> float:
    """Return the geometric mean of speedups over a network's layers; 1 where nothing is faster."""
    total = sum(row["count"] for row in rows)
    logs = [
        row["count"] * math.log(row["sparse"][name]["speedup"] if name else 1.0)
        for row, name in zip(rows, names, strict=True)
    ]
    return round(math.exp(sum(logs) / total), 3)


def network(name: str, seconds: float, threads: int, folder: Path) -> dict[str, Any]:
    """Time a whole network; every layer's form is chosen by `tenfold.optimize` here."""
    torch.set_num_threads(threads)
    model = build(name)
    x = torch.randn(1, *CLIP)
    fast = {"all": tenfold.optimize(model, x)}
    for keep in ("half", "quarter"):
        fast[keep] = tenfold.optimize(pruned(model, NETWORK_TILE, KEEPS[keep]), x)
    found = compare(model, fast, x, threads, seconds, folder / name, ENGINES)
    for keep, each in fast.items():
        found["sparse"][keep]["difference"] = each.plan.difference
        found["sparse"][keep]["network_ms"] = each.plan.network_ms
        found["sparse"][keep]["layers"] = [
            {
                "layer": row.layer,
                "tile": named(row.tile) if row.tile else None,
                "columns": row.columns,
                "dense_ms": row.dense_ms,
                "packed_ms": row.packed_ms,
                "fused": row.fused,
            }
            for row in each.plan.layers
        ]
    speedups = " ".join(f"{key} {value['speedup']:.2f}x" for key, value in found["sparse"].items())
    print(f"  {name}: best {found['best_dense']} {found['dense_ms']} {speedups}", flush=True)
    return found


def errors() -> dict[str, Any]:
    """Compare layers with all columns with float64, relative to the largest output."""
    found: dict[str, Any] = {}
    for inputs, outputs, *size in conv_sizes(build("r3d_18")):
        torch.manual_seed(SEED)
        layer = nn.Conv3d(inputs, outputs, 3, padding=1).eval()
        x = torch.randn(1, inputs, *size).relu()
        with torch.inference_mode():
            exact = copy.deepcopy(layer).double()(x.double())
            row = {"direct": error_of(layer(x), exact)}
            for tile in (*TILES, (4, 2, 4)):
                packed = PackedWinogradConv3d.from_layer(layer, tile)
                row[named(tile)] = error_of(packed(x), exact)
        found[f"{inputs}->{outputs}, {'x'.join(map(str, size))}"] = row
        print(f"  {inputs}->{outputs} {size}: {row}", flush=True)
    return found


def error_of(y: Tensor, exact: Tensor) -> float:
    return float(f"{float((y - exact).abs().max() / exact.abs().max()):.2e}")


def growth(seconds: float) -> list[dict[str, Any]]:
    """Time one layer as its channels, frames and resolution grow, in one thread.

    Direct is the better memory format of PyTorch; all columns are in the tile that `optimize`
    takes, half and a quarter of them in (2, 4, 4).
    """
    torch.set_num_threads(1)
    cells = [(channels, 8, 28) for channels in (2, 4, 8, 16, 32, 64, 128, 256)]
    cells += [(64, frames, 28) for frames in (1, 2, 4, 16, 32)]
    cells += [(64, 8, size) for size in (4, 7, 14, 56, 112)]
    cells += [(8, 2, 7), (16, 2, 7), (64, 2, 7), (256, 2, 7), (512, 2, 7)]
    rows = []
    for channels, frames, size in cells:
        layer = nn.Conv3d(channels, channels, 3, padding=1).eval()
        x = torch.randn(1, channels, frames, size, size)
        last = x.contiguous(memory_format=torch.channels_last_3d)
        fast = tenfold.optimize(layer, last)
        row = fast.plan.layers[0]
        calls = {}
        for keep in ("half", "quarter"):
            domain = pruned_layer(layer, KEEPS[keep])
            calls[keep] = lambda domain=domain, last=last: domain(last)
        with torch.inference_mode():
            samples = interleave(calls, seconds / 4)
        rows.append(
            {
                "channels": channels,
                "frames": frames,
                "size": size,
                "direct_ms": row.dense_ms,
                "all_ms": row.packed_ms,
                "tile": named(row.tile) if row.tile else None,
                "chosen": row.chosen,
                **{f"{keep}_ms": statistics.median(times) for keep, times in samples.items()},
            }
        )
        print(f"  {rows[-1]}", flush=True)
    return rows


def pruned_layer(layer: nn.Conv3d, keep: float) -> PackedWinogradConv3d:
    columns = random_columns(NETWORK_TILE, keep, SEED)
    packed = PackedWinogradConv3d.from_layer(
        WinogradConv3d.from_dense(layer, NETWORK_TILE, columns)
    )
    packed.channels_last = True
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("layers", *NETWORKS, "errors", "growth")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="a contender and cell")
    parser.add_argument("--output", default=NAME)
    given = parser.parse_args()
    path = RESULTS / f"{given.output}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    results: dict[str, Any] = {key: kept.get(key, {}) for key in parts}
    results["kernels"] = native.instruction_set()
    commands = [*filter(None, kept.get("command", "").split("; "))]
    command = "; ".join(dict.fromkeys([*commands, shlex.join(["python", *sys.argv])]))
    with tempfile.TemporaryDirectory() as folder:
        for part in given.only:
            if part in ("errors", "growth"):
                print(part, flush=True)
                results[part] = errors() if part == "errors" else growth(given.seconds)
                save(given.output, command, SEED, results)
                continue
            for threads in given.threads:
                cell = f"{threads} thread{'s' if threads > 1 else ''}"
                print(f"{part}, {cell}", flush=True)
                results[part][cell] = (
                    layers(given.seconds, threads, Path(folder))
                    if part == "layers"
                    else network(part, given.seconds, threads, Path(folder))
                )
                save(given.output, command, SEED, results)


if __name__ == "__main__":
    main()
