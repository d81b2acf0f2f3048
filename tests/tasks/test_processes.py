"""The same recipe on two processes (gloo), by Lightning's own flags and by torchrun."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tenfold
from tenfold.tasks.run import train
from tests import nets
from tests.tasks.conftest import NETS, recipe

pytestmark = pytest.mark.path
TWO = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}


def values(**changes: Any) -> dict[str, Any]:
    """250 images: neither the ranks' shares nor the last batch come out even."""
    changes.setdefault("data", {"name": "digits", "limit": 250})
    return recipe(model=f"{NETS}:plain", **changes)


def launch(name: str, recipe_values: dict[str, Any], *words: str, module: str = "tenfold.cli"):
    Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe_values))
    command = [sys.executable, "-m", *module.split()]
    command += ["train", f"{name}.yaml", "--no_bench", "--run_dir", name, *words]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> str:
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, out
    return out


def weights(name: str) -> dict[str, torch.Tensor]:
    return tenfold.load(name, model=nets.plain(10)).state_dict()


def rows(name: str) -> list[dict[str, str]]:
    with Path(name, "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_two_processes_equal_one_with_the_same_global_batch():
    """Masks alike, weights to the tolerance of the order of summation."""
    half = {"epochs": 3, "batch_size": 25, "augment": "none"}
    one = {**half, "batch_size": 50}
    out = finish(launch("two", values(train=half, trainer=TWO)))
    assert out.count("epoch 3/3") == 1  # one rank speaks
    whole = train(values(train=one), run_dir="one")
    assert whole is not None
    for key, value in weights("two").items():
        expected = whole.model.state_dict()[key]
        assert torch.equal(value == 0, expected == 0), key
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
    assert [r["step"] for r in rows("two")] == [r["step"] for r in rows("one")]
    assert [r["density"] for r in rows("two")] == [r["density"] for r in rows("one")]
    for ours, theirs in zip(rows("two"), rows("one"), strict=True):
        assert float(ours["test_loss"]) == pytest.approx(float(theirs["test_loss"]), rel=1e-3)


def test_torchrun_uneven_batches_accumulation_and_bfloat16():
    settings = values(
        train={"epochs": 2, "batch_size": 32, "accumulate": 3},
        trainer={**TWO, "precision": "bf16-mixed"},
    )
    module = "torch.distributed.run --standalone --nproc_per_node 2 -m tenfold.cli"
    finish(launch("run", settings, module=module))
    # 125 images a rank are 4 batches; 3 + 1 make 2 steps an epoch
    assert [row["step"] for row in rows("run")] == ["2", "4"]
    kept = [float((v != 0).float().mean()) for k, v in weights("run").items() if k == "2.weight"]
    assert kept == [0.5]


def test_a_killed_pair_of_processes_resumes_bit_equal():
    settings = values(train={"epochs": 5, "batch_size": 32}, trainer=TWO)
    process = launch("killed", settings)
    deadline = time.time() + 200
    while not list(Path("killed/checkpoints").glob("*.ckpt")):
        assert time.time() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed/model").exists()
    finish(launch("killed", settings, "--resume"))
    finish(launch("whole", settings))
    for key, value in weights("whole").items():
        assert torch.equal(value, weights("killed")[key]), key
    assert rows("whole") == rows("killed")


def test_sharded_strategies_are_refused_with_the_reason(capsys):
    from tenfold.cli import main

    settings = values(trainer={"accelerator": "cpu", "devices": 2, "strategy": "fsdp"})
    Path("fsdp.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "fsdp.yaml", "--run_dir", "fsdp"]) == 2
    err = capsys.readouterr().err
    assert "fsdp" in err
    assert "ddp" in err
    assert not Path("fsdp").exists()
