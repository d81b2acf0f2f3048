import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

METRICS = """epoch,step,train_loss,learning_rate,test_loss,test_accuracy,density,note
0,10,1.5,0.1,1.4,0.61,1.0,warm
1,20,0.9,0.05,0.8,0.83,0.75,
2,30,0.5,0.0,0.45,0.9654,0.5,
"""


def latency(runtime: str, batch: int, median: float, ratio: float, verdict: str) -> list[Any]:
    def row(model: str, middle: float) -> dict[str, Any]:
        return {
            "runtime": runtime,
            "batch": batch,
            "model": model,
            "median_ms": middle,
            "p10_ms": middle * 0.9,
            "p90_ms": middle * 1.1,
            "rounds": 9,
            "images_per_second": 1000 * batch / middle,
            "ratio": None,
            "ratio_low": None,
            "ratio_high": None,
            "verdict": None,
        }

    after = row("lbc", median / ratio)
    after |= {"ratio": ratio, "ratio_low": ratio - 0.02, "ratio_high": ratio + 0.02}
    return [row("dense", median), after | {"verdict": verdict}]


def bench() -> dict[str, Any]:
    size = {
        "parameters": 272_474,
        "nonzero_parameters": 272_474,
        "macs": 40_800_000,
        "effective_macs": 40_800_000,
        "dense_bytes": 1_109_012,
        "packed_bytes": None,
    }
    lbc = {"nonzero_parameters": 138_602, "effective_macs": 20_700_000, "packed_bytes": 634_512}
    return {
        "format": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "command": "tenfold bench runs/lbc --seed 0",
        "seed": 0,
        "threads": 2,
        "machine": {
            "cpu": "Example CPU",
            "instruction_sets": ["avx2", "fma"],
            "memory_gib": 24.0,
            "gpu": None,
            "engines": {"onnxruntime": {"version": "9.9.9"}},
        },
        "versions": {"torch": "2.15.0"},
        "models": ["dense", "lbc"],
        "accuracy": {"dense": 0.9702, "lbc": 0.9654},
        "size": {"dense": size, "lbc": size | lbc},
        "latency": latency("pytorch", 1, 3.21, 0.99, "no gain")
        + latency("pytorch", 16, 14.2, 1.0, "no gain")
        + latency("onnxruntime", 1, 0.912, 1.01, "no gain"),
        "skipped": [{"runtime": "torch.compile", "reason": "no C++ compiler found"}],
        "summary": ["No gain yet: lbc is not faster than dense.", "Zeros alone give no speed."],
        "baseline": None,
    }


def layer(name: str, kept: float, treatment: str | None, reason: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "type": "Conv2d",
        "shape": [16, 16, 3, 3],
        "parameters": 2304,
        "macs": 2_359_296,
        "kept": kept,
        "effective_macs": 2_359_296 * kept,
        "treatment": treatment,
        "reason": reason,
    }


@pytest.fixture
def contents() -> dict[str, Any]:
    """Return what a complete run's folder holds, by file name; tests change it, then write it."""
    return {
        "recipe.yaml": "task: classification\nmethods:\n  lbc: {n: 2, m: 4}\n",
        "metrics.csv": METRICS,
        "bench.json": bench(),
        "layers.json": {
            "layers": [
                layer("conv1", 1.0, None, "first convolution"),
                layer("layer1.0.conv1", 0.5, "2:4", None),
            ]
        },
        "run.json": {
            "name": "lbc-run",
            "command": "tenfold train recipe.yaml",
            "reproduce": ["tenfold train recipe.yaml", "tenfold export runs/lbc --to onnx"],
            "seconds": 84.3,
            "epochs": 3,
            "tenfold": "0.1.0",
            "baseline": None,
        },
        "export/export.json": {
            "exports": [
                {
                    "format": "onnx",
                    "path": "model.onnx",
                    "bytes": 1_101_234,
                    "checks": [{"runtime": "openvino", "batch": 3, "max_difference": 1.2e-7}],
                }
            ]
        },
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return an empty folder of a run, two below the project's root as usual."""
    folder = tmp_path / "runs" / "lbc"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def save(run: Path) -> Callable[[dict[str, Any]], Path]:
    """Return a function that writes contents into the run's folder."""

    def save(contents: dict[str, Any]) -> Path:
        for name, data in contents.items():
            file = run / name
            file.parent.mkdir(parents=True, exist_ok=True)
            text = data if isinstance(data, str) else json.dumps(data)
            file.write_text(text, encoding="utf-8")
        return run

    return save
