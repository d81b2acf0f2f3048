"""Say what this machine is and what it can gain from compression, before anybody trains."""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal, TypeVar

import torch

from tenfold.kernels import native
from tenfold.measure import cpu
from tenfold.measure.quiet import quiet

__all__ = ["Advice", "Engine", "Gpu", "Machine", "advice", "doctor", "find_compiler", "render"]

Verdict = Literal["gain", "even", "no gain", "missing"]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, compute capability such as "8.6", and memory."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Engine:
    """An installed library that runs models; `details` lists its providers or devices."""

    version: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What `doctor` found; None where it could not tell.

    Attributes:
        cpu: Processor name.
        physical_cores: Cores of the machine.
        logical_cores: Hardware threads of the machine.
        usable_cores: Hardware threads that this process may use (affinity, container quota).
        torch_threads: Threads that PyTorch uses for one operator.
        instruction_sets: Vector and matrix instruction sets, such as "avx2".
        memory_bytes: Memory that this process may use.
        gpus: CUDA devices.
        engines: Installed engines by name: torch, onnxruntime, openvino.
        compiler: C++ compiler that torch.compile can use on the CPU.
        kernels: Instruction set of tenfold's compiled kernels; None without them.
        python: Python version.
        os: Operating system and architecture.
    """

    cpu: str | None = None
    physical_cores: int | None = None
    logical_cores: int | None = None
    usable_cores: int | None = None
    torch_threads: int | None = None
    instruction_sets: tuple[str, ...] | None = None
    memory_bytes: int | None = None
    gpus: tuple[Gpu, ...] = ()
    engines: dict[str, Engine] = field(default_factory=dict)
    compiler: str | None = None
    kernels: str | None = None
    python: str | None = None
    os: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class Advice:
    """One conclusion: a topic, what to expect ("gain", "even", "no gain", "missing"), and why."""

    topic: str
    verdict: Verdict
    text: str


def doctor() -> Machine:
    """Look at this machine. Never raises; what can't be found out is None or empty."""
    return Machine(
        cpu=_quietly(cpu.cpu_model, None),
        physical_cores=_quietly(cpu.physical_cores, None),
        logical_cores=_quietly(cpu.logical_cores, None),
        usable_cores=_quietly(cpu.usable_cores, None),
        torch_threads=_quietly(torch.get_num_threads, None),
        instruction_sets=_quietly(cpu.instruction_sets, None),
        memory_bytes=_quietly(cpu.memory_bytes, None),
        gpus=_quietly(_gpus, ()),
        engines=_engines(),
        compiler=_quietly(find_compiler, None),
        kernels=_quietly(native.instruction_set, None),
        python=platform.python_version(),
        os=_quietly(lambda: f"{platform.system()} {platform.release()} {platform.machine()}", None),
    )


def find_compiler() -> str | None:
    """Return the command of the C++ compiler that torch.compile would use, or None."""
    chosen = os.environ.get("CXX", "").split()
    windows = platform.system() == "Windows"
    candidates = chosen[:1] or (["cl"] if windows else ["g++", "clang++", "c++"])
    return next((name for name in candidates if shutil.which(name)), None)


def advice(machine: Machine) -> list[Advice]:
    """Conclude what compression brings on `machine`, one entry a topic."""
    return [
        _n_of_m(machine),
        _two_four(machine),
        _int8(machine),
        _compile(machine),
        _engine(machine, "onnxruntime", "ONNX Runtime"),
        _engine(machine, "openvino", "OpenVINO"),
    ]


def render(machine: Machine) -> str:
    """Return facts and advice as plain text for a terminal."""
    sets = machine.instruction_sets
    facts = [
        ("cpu", _or_unknown(machine.cpu)),
        ("physical cores", _or_unknown(machine.physical_cores)),
        ("logical cores", _or_unknown(machine.logical_cores)),
        ("usable here", _or_unknown(machine.usable_cores)),
        ("threads", f"{_or_unknown(machine.torch_threads)} used by PyTorch"),
        ("instructions", "unknown" if sets is None else " ".join(sets) or "none of those known"),
        ("memory", _gigabytes(machine.memory_bytes)),
        *(
            ("gpu", f"{gpu.name}, compute capability {gpu.compute_capability}, "
             f"{_gigabytes(gpu.memory_bytes)}")
            for gpu in machine.gpus
        ),
        *(
            (name, f"{engine.version} {' '.join(engine.details)}".rstrip())
            for name, engine in machine.engines.items()
        ),
        ("compiler", machine.compiler or "none found"),
        ("kernels", machine.kernels or "none compiled"),
        ("python", _or_unknown(machine.python)),
        ("os", _or_unknown(machine.os)),
    ]  # fmt: skip
    if not machine.gpus:
        facts.append(("gpu", "no CUDA device"))
    lines = [f"{name:<16}{value}" for name, value in facts]
    lines.append("")
    for entry in advice(machine):
        text = f"{entry.verdict:<9}{entry.topic}: {entry.text}"
        lines += textwrap.wrap(text, width=100, subsequent_indent=" " * 9)
    return "\n".join(lines)


def _n_of_m(machine: Machine) -> Advice:
    topic = "N:M sparsity, CPU"
    if machine.kernels is None:
        return Advice(
            topic,
            "missing",
            f"{native.missing() or 'no compiled kernels'}: install a C++ compiler (g++ or clang++) "
            "and then tenfold again; PyTorch, ONNX Runtime and OpenVINO multiply the zeros too",
        )
    if machine.kernels == "portable":
        return Advice(
            topic, "even", "only portable kernels run on this processor: measure with tenfold bench"
        )
    return Advice(
        topic,
        "gain",
        f"kernels for {machine.kernels}: tenfold.optimize(model, inputs) packs the layers that "
        "they make faster; the other engines multiply the zeros too",
    )


def _two_four(machine: Machine) -> Advice:
    topic = "2:4 sparsity, GPU"
    if not machine.gpus:
        return Advice(topic, "missing", "no CUDA device here; needs compute capability 8.0 or more")
    able = [gpu for gpu in machine.gpus if _at_least(gpu.compute_capability, (8, 0))]
    if not able:
        found = ", ".join(f"{gpu.name} has {gpu.compute_capability}" for gpu in machine.gpus)
        return Advice(topic, "no gain", f"needs compute capability 8.0 or more; {found}")
    return Advice(
        topic,
        "gain",
        f"sparse tensor cores on {able[0].name}; expect it in half precision, at large layers and "
        "large batches only, so measure with tenfold bench",
    )


def _int8(machine: Machine) -> Advice:
    topic = "int8, CPU"
    sets = machine.instruction_sets
    if sets is None:
        return Advice(
            topic, "even", "the instruction sets are unknown here: measure before relying on it"
        )
    dot = [n for n in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm") if n in sets]
    if dot:
        return Advice(topic, "gain", f"integer dot products are there ({', '.join(dot)})")
    return Advice(
        topic,
        "even",
        "no integer dot products (VNNI, AMX): about as fast as float32, a quarter of the size",
    )


def _compile(machine: Machine) -> Advice:
    if machine.compiler is None:
        return Advice(
            "torch.compile",
            "missing",
            "needs a C++ compiler on the CPU: install g++ or clang++, or set CXX",
        )
    return Advice("torch.compile", "gain", f"C++ compiler found ({machine.compiler})")


def _engine(machine: Machine, name: str, title: str) -> Advice:
    if name not in machine.engines:
        return Advice(title, "missing", f"not installed: install the Python package {name}")
    return Advice(title, "gain", "installed; on CPUs often faster than PyTorch eager, dense or not")


def _engines() -> dict[str, Engine]:
    engines = {}
    for name, details in (
        ("torch", lambda: ()),
        ("onnxruntime", _onnxruntime_providers),
        ("openvino", _openvino_devices),
    ):
        version = _quietly(lambda name=name: metadata.version(name), None)  # type: ignore[misc]
        if version is not None:
            engines[name] = Engine(version, _quietly(details, ()))
    return engines


def _onnxruntime_providers() -> tuple[str, ...]:
    import onnxruntime

    # The Azure provider calls a web service; nothing runs on it here.
    names = (
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    return tuple(name for name in names if name != "Azure")


def _openvino_devices() -> tuple[str, ...]:
    from tenfold.measure.runners import openvino_core

    return tuple(openvino_core().available_devices)


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory) for gpu in found)


def _quietly(probe: Callable[[], _Result], unknown: _Result) -> _Result:
    try:
        with quiet():
            return probe()
    except Exception:
        return unknown


def _at_least(capability: str, wanted: tuple[int, int]) -> bool:
    major, _, minor = capability.partition(".")
    return (int(major), int(minor or 0)) >= wanted


def _or_unknown(value: object) -> str:
    return "unknown" if value is None else str(value)


def _gigabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.1f} GiB"
