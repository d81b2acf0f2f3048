"""LTS by recipe: from a trained run to int8 files, resumed, on two processes, beside LBC."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

import tenfold
from tenfold.deploy.artifact import artifact_bytes
from tenfold.errors import UserError
from tenfold.methods import LTS
from tenfold.nn.quantized import QuantizedLayer
from tenfold.tasks.run import evaluate, plan, train
from tenfold.tasks.verbs import bench_run, export_run
from tests import nets
from tests.tasks.conftest import NETS, recipe

pytestmark = pytest.mark.path


def values(**changes: Any) -> dict[str, Any]:
    changes.setdefault("methods", {"lts": {"bits": 2}})
    changes.setdefault("model", f"{NETS}:plain")
    return recipe(**changes)


def metrics(name: str) -> list[dict[str, str]]:
    with Path(name, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(name: str) -> dict[str, torch.Tensor]:
    return tenfold.load(name, model=nets.plain(10)).state_dict()


@pytest.mark.filterwarnings("ignore:.*starts from fresh weights")
def test_from_a_trained_run_to_int8_files():
    """The recipe's own path: init, train, finalize, save, export, evaluate, bench."""
    dense = train(values(methods={}), run_dir="dense")
    run = train(
        values(init="dense", baseline="dense", train={"epochs": 4, "lr": 0.005}), run_dir="two"
    )
    assert dense is not None
    assert run is not None
    assert sum(isinstance(m, QuantizedLayer) for m in run.model.modules()) == 4
    assert artifact_bytes("two") < artifact_bytes("dense") / 2.5
    exported = export_run("two")
    assert {check.runtime for check in exported.checks} == {"onnxruntime", "openvino"}
    for to in ("onnx", "openvino"):
        assert evaluate("two", to=to).accuracy == pytest.approx(run.evaluation.accuracy, abs=0.01)
    result = bench_run("two", batch_sizes=[1], runtimes=["openvino", "onnxruntime"], seconds=0.05)
    assert result.models == ["dense", "lts"]
    assert {row.model for row in result.latency} == {"dense", "lts"}
    rows = metrics("two")
    assert {"frozen", "updates_saved", "backward_saved", "left_out"} <= set(rows[0])
    assert float(rows[0]["frozen"]) == 0 < float(rows[-1]["frozen"])
    layers = json.loads(Path("two/layers.json").read_text())["layers"]
    assert [row["treatment"] for row in layers] == ["8 bits", "2 bits", "2 bits", "8 bits"]


def test_fresh_weights_are_warned_of():
    with pytest.warns(UserWarning, match="lts is made for a trained network"):
        plan(values())


@pytest.mark.filterwarnings("ignore:.*starts from fresh weights")
def test_a_warm_up_as_long_as_the_run_is_refused_ahead():
    with pytest.raises(UserError, match="warmup=3: expected less than the 3 epochs"):
        plan(values(methods={"lts": {"bits": 2, "warmup": 3}}))


@pytest.mark.filterwarnings("ignore:.*starts from fresh weights")
@pytest.mark.parametrize(
    "methods", [{"lts": {"bits": 2}}, {"lts": {"bits": 4}, "lbc": {"n": 2, "m": 4}}]
)
def test_an_interrupted_run_goes_on_bit_equal(methods, monkeypatch):
    settings = values(methods=methods, train={"epochs": 4})
    whole = train(settings, run_dir="whole")
    assert whole is not None

    from tenfold.tasks import classification

    epoch = classification.Classification.on_train_epoch_start

    def stop(self):
        if self.current_epoch == 3:
            raise KeyboardInterrupt
        epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(classification.Classification, "on_train_epoch_start", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings, run_dir="cut")
    train(settings, run_dir="cut", resume=True)
    for key, value in weights("whole").items():
        assert torch.equal(value, weights("cut")[key]), key


@pytest.mark.filterwarnings("ignore:.*starts from fresh weights")
def test_a_running_average_of_the_weights():
    run = train(values(train={"epochs": 2, "ema": 0.9}), run_dir="ema")
    assert run is not None
    assert evaluate("ema").loss == pytest.approx(run.evaluation.loss)


def launch(name: str, settings: dict[str, Any]) -> None:
    Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    words = ["--run_dir", name]
    done = subprocess.run(
        [sys.executable, "-m", "tenfold.cli", "train", f"{name}.yaml", "--no_bench", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore:.*starts from fresh weights")
def test_two_processes_equal_one_with_the_same_global_batch():
    """Codes alike; Lightning wraps in DDP, and frozen layers are left out of what it reduces."""
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    half = {"epochs": 4, "batch_size": 25, "augment": "none"}
    data = {"name": "digits", "limit": 250}
    # calibrated from the whole batch in one process: the same images in both
    launch("two", values(train=half, trainer=two, data=data))
    found = weights("two")
    assert all(torch.isfinite(v.float()).all() for v in found.values())
    rows = metrics("two")
    assert float(rows[-1]["frozen"]) > 0.5


def _rank(rank: int, folder: str) -> None:
    """Train a network under DDP, half of it frozen; every rank writes down how it ended."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nets.plain(10)
    lts = LTS(bits=2, warmup=0.1)
    model = lts.attach(model, total_steps=40)
    wrapped = nn.parallel.DistributedDataParallel(model)
    lts.on_wrapped(wrapped)
    sent: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    optimizer = torch.optim.SGD(lts.parameters_for(model), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for step in range(40):
        if step == 20:  # two layers have settled
            for treated in lts._layers[:2]:
                weight = treated.weight.detach()
                treated.quantizer.code.copy_(treated.quantizer.codes(weight))
                treated.quantizer.frozen.fill_(True)
                treated.quantizer.any_frozen = True
        images = torch.randn(8, 1, 8, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(images), torch.arange(8) % 10).backward()
        optimizer.step()
        lts.step()
    dist.all_reduce = reduce
    parameters = sum(p.numel() for p in model.parameters())
    frozen = sum(t.weight.numel() for t in lts._layers[:2])
    assert sum(sent[: len(sent) // 2]) == 20 * parameters
    assert sum(sent[-1:]) <= parameters - frozen
    in_training = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save((in_training, lts.finalize(model).state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_end_alike_and_send_no_frozen_gradients(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    (ours, codes), (theirs, others) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    for key, value in codes.items():
        assert torch.equal(value, others[key]), key
