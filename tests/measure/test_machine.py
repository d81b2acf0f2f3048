"""The doctor on made-up machines and on this one."""

import json
import subprocess
import sys

import pytest

from tenfold.measure import cpu, machine
from tenfold.measure.machine import Engine, Gpu, Machine, advice, doctor, render

pytestmark = pytest.mark.unit

CPUINFO = """processor\t: 0
model name\t: Example CPU 9000
physical id\t: 0
core id\t: 0
flags\t\t: fpu sse2 avx2 fma avx_vnni

processor\t: 1
model name\t: Example CPU 9000
physical id\t: 0
core id\t: 0
flags\t\t: fpu sse2 avx2 fma avx_vnni

processor\t: 2
model name\t: Example CPU 9000
physical id\t: 0
core id\t: 1
flags\t\t: fpu sse2 avx2 fma avx_vnni
"""


@pytest.fixture
def linux(tmp_path, monkeypatch):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    cgroup.mkdir()
    (proc / "cpuinfo").write_text(CPUINFO)
    (proc / "meminfo").write_text("MemTotal:       8388608 kB\n")
    monkeypatch.setattr(cpu, "PROC", proc)
    monkeypatch.setattr(cpu, "CGROUP", cgroup)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def verdicts(found):
    return {entry.topic: entry.verdict for entry in advice(found)}


def test_linux_facts(linux):
    assert cpu.cpu_model() == "Example CPU 9000"
    assert cpu.physical_cores() == 2
    assert cpu.instruction_sets() == ("avx2", "fma", "avx_vnni")
    assert cpu.memory_bytes() == 8 * 2**30
    assert cpu.usable_cores() == 8


def test_container_limits(linux):
    (linux / "cgroup" / "cpu.max").write_text("150000 100000\n")
    (linux / "cgroup" / "memory.max").write_text(str(2**30))
    assert cpu.usable_cores() == 2
    assert cpu.memory_bytes() == 2**30
    (linux / "cgroup" / "cpu.max").write_text("max 100000\n")
    (linux / "cgroup" / "memory.max").write_text("max\n")
    assert cpu.usable_cores() == 8
    assert cpu.memory_bytes() == 8 * 2**30


def test_old_container_limit(linux):
    (linux / "cgroup" / "cpu").mkdir()
    (linux / "cgroup" / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (linux / "cgroup" / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu.usable_cores() == 3


def test_arm_features(linux):
    (linux / "proc" / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert cpu.instruction_sets() == ("asimd", "asimddp")
    assert cpu.physical_cores() is None


def test_doctor_never_raises(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such thing")

    for name in cpu.__all__:
        monkeypatch.setattr(cpu, name, broken)
    monkeypatch.setattr(machine, "_openvino_devices", broken)
    monkeypatch.setattr(machine, "_gpus", broken)
    monkeypatch.setattr(machine, "find_compiler", broken)
    found = doctor()
    assert (found.cpu, found.instruction_sets, found.compiler, found.gpus) == (None, None, None, ())
    assert found.engines["openvino"].details == ()
    assert "unknown" in render(found)


def test_doctor_on_this_machine():
    found = doctor()
    assert set(found.engines) == {"torch", "onnxruntime", "openvino"}
    assert "CPU" in found.engines["openvino"].details
    assert "CPU" in found.engines["onnxruntime"].details
    assert found.usable_cores is not None
    assert found.usable_cores >= 1
    assert json.loads(json.dumps(found.to_dict()))["torch_threads"] == found.torch_threads
    assert max(len(line) for line in render(found).splitlines()) <= 100


def test_advice_on_a_bare_machine():
    found = verdicts(Machine(instruction_sets=("avx2",)))
    assert found == {
        "N:M sparsity, CPU": "missing",
        "2:4 sparsity, GPU": "missing",
        "int8, CPU": "even",
        "torch.compile": "missing",
        "ONNX Runtime": "missing",
        "OpenVINO": "missing",
    }


def test_advice_on_a_rich_machine():
    found = verdicts(
        Machine(
            instruction_sets=("avx2", "avx512_vnni"),
            gpus=(Gpu("Example GPU", "10.0", 2**34),),
            engines={"onnxruntime": Engine("1"), "openvino": Engine("1")},
            compiler="g++",
            kernels="avx2",
        )
    )
    assert set(found.values()) == {"gain"}


def test_portable_kernels_promise_nothing():
    assert verdicts(Machine(kernels="portable"))["N:M sparsity, CPU"] == "even"


def test_two_four_needs_compute_capability_8():
    assert verdicts(Machine(gpus=(Gpu("Old GPU", "7.5", 1),)))["2:4 sparsity, GPU"] == "no gain"


def test_compiler_follows_cxx(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.find_compiler() is None
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "my-c++ -march=native")
    assert machine.find_compiler() == "my-c++"


def test_import_is_light_and_openvino_reports_nothing():
    heavy = (
        "lightning",
        "timm",
        "onnx",
        "onnxruntime",
        "openvino",
        "torchvision",
        "PIL",
        "sklearn",
    )
    code = f"""
import sys
import tenfold.measure, tenfold.deploy.fold, tenfold.deploy.onnx
loaded = [name for name in {heavy} if name in sys.modules]
assert not loaded, loaded
from tenfold.measure.runners import load_openvino
assert load_openvino().Core is not None
loaded = [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
