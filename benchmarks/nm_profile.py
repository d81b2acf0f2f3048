"""Where the time of an optimized N:M network goes, and the least that this processor would need.

    python benchmarks/nm_profile.py [--rounds 30]

The graph of `tenfold.optimize` is run node by node, with the rest of the network around it, so that
caches are as full as they are in use. The bound counts multiply-adds alone: those on kept weights
at the speed of a thread with one operand in the first-level cache (each meets another row of the
activations), the others at the speed with all operands in registers. Memory isn't in it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import tenfold
from common import save
from nm_engine import NETWORKS, PATTERNS, SEED, build, prune
from tenfold.kernels import native
from tenfold.kernels.attention import attention
from tenfold.nn.packed import PackedLayer

NAME = "nm_profile"
ATTENTION = (attention, F.scaled_dot_product_attention)


class Timed(fx.Interpreter):
    """Runs a graph and notes how long each node took, and what it multiplied."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.macs: dict[str, int] = {}

    def run_node(self, node: fx.Node) -> Any:
        arguments = self.fetch_args_kwargs_from_env(node)[0]
        started = time.perf_counter()
        result = super().run_node(node)
        self.seconds[node.name].append(time.perf_counter() - started)
        if node.name not in self.macs:
            self.macs[node.name] = self._macs(node, arguments, result)
        return result

    def _macs(self, node: fx.Node, arguments: tuple[Any, ...], result: Any) -> int:
        if node.op == "call_module":
            layer = self.module.get_submodule(str(node.target))
            if isinstance(layer, PackedLayer):
                return layer.macs(result) * layer.n // layer.m
            if isinstance(layer, nn.Conv2d | nn.Linear):
                return result.numel() * layer.weight[0].numel()
        if node.target in ATTENTION:
            batch, heads, tokens, depth = arguments[0].shape
            return 2 * batch * heads * tokens * arguments[1].shape[2] * depth
        return 0


def kind(graph: fx.GraphModule, node: fx.Node) -> str:
    """Return the row of the table that a node belongs to."""
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        if isinstance(layer, PackedLayer):
            return "packed layers"
        if isinstance(layer, nn.Conv2d | nn.Linear):
            return "dense layers"
    return "attention" if node.target in ATTENTION else "all else"


def profile(name: str, n: int, m: int, rounds: int, peaks: tuple[float, float]) -> dict[str, Any]:
    """Time one network at one pattern on one thread."""
    x = torch.randn(1, 3, 224, 224)
    fast = tenfold.optimize(prune(build(name), n, m), x, choose="packed")
    graph = fast.network
    assert isinstance(graph, fx.GraphModule)
    timed, whole = Timed(graph), []
    with torch.inference_mode():
        for _ in range(rounds):
            started = time.perf_counter()
            graph(x)
            whole.append(time.perf_counter() - started)
            timed.run(x)
    found: dict[str, Any] = {"ms": round(statistics.median(whole) * 1e3, 3), "kinds": {}}
    registers, cache = peaks
    for node in graph.graph.nodes:
        row = found["kinds"].setdefault(
            kind(graph, node), {"nodes": 0, "ms": 0.0, "gmacs": 0.0, "bound_ms": 0.0}
        )
        macs, seconds = timed.macs[node.name], statistics.median(timed.seconds[node.name])
        peak = cache if kind(graph, node) == "packed layers" else registers
        row["nodes"] += 1
        row["ms"] += seconds * 1e3
        row["gmacs"] += macs / 1e9
        row["bound_ms"] += macs / peak * 1e3
    found["kinds"] = {
        name: {key: round(value, 3) for key, value in row.items()}
        for name, row in found["kinds"].items()
    }
    found["bound_ms"] = round(sum(row["bound_ms"] for row in found["kinds"].values()), 3)
    print(name, f"{n}:{m}", found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    peaks = native.peak()
    if peaks is None:
        raise SystemExit(f"no compiled kernels: {native.missing()}")
    results: dict[str, Any] = {
        "peak_gmacs_a_thread": [round(each / 1e9, 1) for each in peaks],
        "kernels": native.instruction_set(),
    }
    for name in NETWORKS:
        results[name] = {f"{n}:{m}": profile(name, n, m, given.rounds, peaks) for n, m in PATTERNS}
    save(NAME, shlex.join(["python", *sys.argv]), SEED, results)


if __name__ == "__main__":
    main()
