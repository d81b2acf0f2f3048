"""N:M kernels beside the fastest dense engine: layer by layer, and whole networks.

    python benchmarks/nm_engine.py [--only layers resnet50 deit_small extras] [--seconds 1.0]

All contenders of a cell run in one process, in turn, with the same number of threads, in float32:
the dense model in PyTorch eager (both memory formats), torch.compile, ONNX Runtime, OpenVINO and
with `tenfold.optimize`, and the sparse ones with `tenfold.optimize`. A speedup is against the
fastest dense contender of that cell, whichever it is. Weights are random and cut to their pattern
by magnitude; speed doesn't depend on their values. Finished parts stay in the results file, so that
parts can be run apart.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tenfold
from common import RESULTS, save
from contenders import compare
from tenfold.kernels import native
from tenfold.measure.timing import interleave, paired_ratio
from tenfold.nn import models

NAME = "nm_engine"
PATTERNS = ((2, 4), (1, 4), (2, 16), (1, 16))
NETWORKS = {"resnet50": "timm/resnet50", "deit_small": "timm/deit_small_patch16_224"}
BATCHES, THREADS = (1, 8), (1, 2)
SEED = 0


def prune(model: nn.Module, n: int, m: int) -> nn.Module:
    """Cut a copy to N:M by magnitude: all but the first convolution and the last linear layer."""
    pruned = copy.deepcopy(model)
    layers = [module for module in pruned.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers[1:-1] if len(layers) > 2 else layers:
        rows = layer.weight.detach().movedim(1, -1)
        blocks = rows.reshape(-1, m)
        kept = torch.zeros_like(blocks).scatter_(1, blocks.abs().topk(n, dim=1).indices, 1.0)
        layer.weight.data = (blocks * kept).reshape(rows.shape).movedim(-1, 1).contiguous()
    return pruned


def build(name: str) -> nn.Module:
    """Return a network with random weights and BatchNorm that does something."""
    torch.manual_seed(SEED)
    model, _ = models.build(NETWORKS[name], num_classes=1000)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm starts some at zero: no weight to fold
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def conv_shapes(model: nn.Module, x: Tensor) -> Counter[tuple[Any, ...]]:
    """Count the sizes of a network's sparse convolutions."""
    found: Counter[tuple[Any, ...]] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
        found[(*sizes, inputs[0].shape[-1])] += 1

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [layer.register_forward_hook(note) for layer in convolutions[1:]]
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def layers(seconds: float, batch: int, threads: int, folder: Path) -> dict[str, Any]:
    """Time every convolution of ResNet-50 but the first alone; convolutions of equal sizes once."""
    shapes = conv_shapes(build("resnet50"), torch.randn(1, 3, 224, 224))
    peaks = native.peak()
    rows = []
    for (inputs, outputs, kernel, stride, size), count in shapes.items():
        torch.manual_seed(SEED)
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2).eval()
        x = torch.randn(batch, inputs, size, size)
        sparse = {
            f"{n}:{m}": tenfold.optimize(prune(layer, n, m), x, choose="packed").network
            for n, m in PATTERNS
        }
        name = f"{inputs}-{outputs}-{kernel}-{stride}-{size}"
        found = compare(layer, sparse, x, threads, seconds / 8, folder / name)
        out = (size + 2 * (kernel // 2) - kernel) // stride + 1
        macs = batch * inputs * outputs * kernel**2 * out**2
        rows.append(
            {
                "layer": f"{inputs}->{outputs}, {kernel}x{kernel}/{stride}, {size}x{size}",
                "count": count,
                "macs": macs,
                **found,
            }
        )
        for pattern, result in found["sparse"].items():
            n, m = map(int, pattern.split(":"))
            result["gmacs"] = round(macs * n / m / result["ms"] / 1e6, 1)  # of non-zeros
        speedups = " ".join(f"{k} {v['speedup']:.2f}x" for k, v in found["sparse"].items())
        print(f"  {rows[-1]['layer']:36} best {found['best_dense']:22} {speedups}", flush=True)
    total = sum(row["count"] for row in rows)
    means = {
        name: round(
            math.exp(
                sum(r["count"] * math.log(r["sparse"][name]["speedup"]) for r in rows) / total
            ),
            3,
        )
        for name in rows[0]["sparse"]
    }
    print(f"  geometric mean over {total} layers: {means}")
    peak = None if peaks is None else [round(each / 1e9, 1) for each in peaks]
    return {"geometric_mean": means, "layers": total, "peak_gmacs_a_thread": peak, "rows": rows}


def network(name: str, seconds: float, batch: int, threads: int, folder: Path) -> dict[str, Any]:
    """Time a whole network; every layer's form is chosen by `tenfold.optimize` here."""
    torch.set_num_threads(threads)
    model = build(name)
    x = torch.randn(batch, 3, 224, 224)
    # Two samples tell how to take a batch: timing every layer at 8 of them takes minutes.
    sparse = {f"{n}:{m}": tenfold.optimize(prune(model, n, m), x[:2]) for n, m in PATTERNS}
    found = compare(model, sparse, x, threads, seconds, folder / name)
    for pattern, fast in sparse.items():
        choices = Counter(row.chosen for row in fast.plan.layers)
        found["sparse"][pattern]["chosen"] = dict(choices)
        found["sparse"][pattern]["at_once"] = fast.plan.at_once
        found["sparse"][pattern]["difference"] = fast.plan.difference
    speedups = " ".join(f"{key} {value['speedup']:.2f}x" for key, value in found["sparse"].items())
    print(f"  {name}: best {found['best_dense']} {found['dense_ms']} {speedups}", flush=True)
    return found


def memory_peak(pattern: str, batch: int) -> float:
    """Return what a process that runs ResNet-50 once takes beyond what it took before, in MiB."""
    torch.set_num_threads(1)
    model = build("resnet50")
    x = torch.randn(batch, 3, 224, 224)
    if pattern != "dense":
        n, m = map(int, pattern.split(":"))
        model = tenfold.optimize(prune(model, n, m), x[:1], choose="packed")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building left behind would be taken first, unseen
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts anew
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with torch.inference_mode():
        model(x)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return (peak - before) / 2**20


def extras(seconds: float) -> dict[str, Any]:
    """Scaling over threads, image and batch size; the roofline; packing, disk and memory."""
    model = build("resnet50")
    x = torch.randn(1, 3, 224, 224)
    found: dict[str, Any] = {"packing_seconds": {}, "disk_bytes": {}, "scaling": {}, "sizes": {}}
    fast = {}
    for n, m in PATTERNS:
        pruned = prune(model, n, m)
        started = time.perf_counter()
        fast[f"{n}:{m}"] = tenfold.optimize(pruned, x, choose="packed")
        found["packing_seconds"][f"{n}:{m}"] = round(time.perf_counter() - started, 2)
    with tempfile.TemporaryDirectory() as folder:
        for name, saved in {"dense": model, **fast}.items():
            path = Path(tenfold.save(saved, Path(folder, name.replace(":", "of"))))
            found["disk_bytes"][name] = sum(file.stat().st_size for file in path.iterdir())
    with torch.inference_mode():
        for name, each in fast.items():
            calls = {}
            for threads in THREADS:

                def call(each: nn.Module = each, threads: int = threads) -> object:
                    torch.set_num_threads(threads)
                    return each(x)

                calls[str(threads)] = call
            samples = interleave(calls, seconds * 2)
            found["scaling"][name] = round(paired_ratio(samples["1"], samples["2"]).median, 3)
        torch.set_num_threads(1)
        for size in (128, 224, 320):
            for batch in (1, 4, 16):
                image = torch.randn(batch, 3, size, size)
                samples = interleave({"2:4": lambda image=image: fast["2:4"](image)}, seconds)
                ms = statistics.median(samples["2:4"]) / batch
                found["sizes"][f"{size}x{size}, batch {batch}"] = round(ms, 3)
    found["memory_mib"] = {}
    for pattern in ("dense", *fast):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", pattern],
            capture_output=True,
            text=True,
            check=True,
        )
        found["memory_mib"][pattern] = round(float(done.stdout.split()[-1]), 1)
    print(json.dumps(found, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("layers", *NETWORKS, "extras")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--seconds", type=float, default=1.0, help="a contender and cell")
    parser.add_argument("--output", default=NAME)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(memory_peak(given.peak, batch=8))
        return
    path = RESULTS / f"{given.output}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    results: dict[str, Any] = {key: kept.get(key, {}) for key in parts}
    results["kernels"] = native.instruction_set()
    commands = [*filter(None, kept.get("command", "").split("; "))]
    command = "; ".join(dict.fromkeys([*commands, shlex.join(["python", *sys.argv])]))
    cells = [
        (part, batch, threads)
        for part in given.only
        for threads in given.threads
        for batch in given.batches
        if part != "extras"
    ]
    with tempfile.TemporaryDirectory() as folder:
        for part, batch, threads in cells:
            cell = f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
            print(f"{part}, {cell}", flush=True)
            results[part][cell] = (
                layers(given.seconds, batch, threads, Path(folder))
                if part == "layers"
                else network(part, given.seconds, batch, threads, Path(folder))
            )
            save(given.output, command, SEED, results)
    if "extras" in given.only:
        results["extras"] = extras(given.seconds)
        save(given.output, command, SEED, results)


if __name__ == "__main__":
    main()
