"""Facts about this machine's processor and memory, from the operating system. Unknown is None."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from pathlib import Path

import torch

__all__ = [
    "cpu_model",
    "instruction_sets",
    "logical_cores",
    "memory_bytes",
    "physical_cores",
    "usable_cores",
]

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

# What decides which CPU kernels run, as Linux, macOS and this package call it.
_KNOWN_SETS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_MAC_FEATURES = {
    "hw.optional.neon": "asimd",
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.avx512f": "avx512f",
}


def cpu_model() -> str | None:
    """Return the processor's marketing name."""
    for block in _cpuinfo():
        name = block.get("model name")
        if name:
            return name
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or None


def physical_cores() -> int | None:
    """Return the number of cores of the machine, hyperthreads counted once."""
    pairs = {
        (block["physical id"], block["core id"])
        for block in _cpuinfo()
        if "physical id" in block and "core id" in block
    }
    return len(pairs) or _integer(_sysctl("hw.physicalcpu"))


def logical_cores() -> int | None:
    """Return the number of hardware threads of the machine."""
    return os.cpu_count()


def usable_cores() -> int | None:
    """Return how many hardware threads this process may use: affinity and container quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    quota = _cgroup_quota()
    if cores is None or quota is None:
        return cores
    return max(1, min(cores, math.ceil(quota)))


def memory_bytes() -> int | None:
    """Return the memory that this process may use, in bytes."""
    total = None
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    total = total or _integer(_sysctl("hw.memsize"))
    limits = [
        _integer(_read(CGROUP / name).strip())
        for name in ("memory.max", "memory/memory.limit_in_bytes")
    ]
    return min([value for value in [total, *limits] if value], default=None)


def instruction_sets() -> tuple[str, ...] | None:
    """Return the vector and matrix instruction sets that matter for inference."""
    for block in _cpuinfo():
        flags = block.get("flags") or block.get("Features")
        if flags:
            present = set(flags.split())
            return tuple(name for name in _KNOWN_SETS if name in present)
    if platform.system() == "Darwin":
        found = {name for key, name in _MAC_FEATURES.items() if _sysctl(key) == "1"}
        return tuple(name for name in _KNOWN_SETS if name in found)
    capability = torch.backends.cpu.get_cpu_capability().upper()
    if capability.startswith("AVX512"):
        return ("avx2", "fma", "avx512f")
    return ("avx2", "fma") if capability.startswith("AVX2") else None


def _cgroup_quota() -> float | None:
    """Return the CPU quota of this container in cores (cgroup version 2, else 1)."""
    parts = _read(CGROUP / "cpu.max").split()
    if len(parts) != 2:
        parts = [
            _read(CGROUP / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
    quota, period = (_integer(part) for part in parts)
    return quota / period if quota and period and quota > 0 else None


def _cpuinfo() -> list[dict[str, str]]:
    blocks = []
    for text in _read(PROC / "cpuinfo").split("\n\n"):
        pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
        block = {key.strip(): value.strip() for key, _, value in pairs}
        if block:
            blocks.append(block)
    return blocks


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(key: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    try:
        result = subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _integer(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
