"""What the tables of the docs are made with: results, markdown, where figures come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Write a table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(found: dict[str, Any]) -> str:
    """Say where, with what and how figures were made."""
    machine = found["machine"]
    engines = ", ".join(
        f"{name} {engine['version']}" for name, engine in machine["engines"].items()
    )
    seed = f", seed {found['seed']}" if "seed" in found else ""
    if isinstance(found.get("seed"), list):
        seed = f", seeds {', '.join(map(str, found['seed']))}"
    gpu = found.get("gpu")
    cpu = f"{machine['cpu']}, {found['threads']} threads ({' '.join(machine['instruction_sets'])})"
    return (
        f"*{f'{gpu} beside {cpu}' if gpu else cpu}, "
        f"{engines}; `{found['command']}`{seed}, {found['created'][:10]}.*"
    )


def points(found: dict[str, Any] | None) -> str:
    """Write a difference of `paired` between shares, in points."""
    if found is None:
        return ""
    if found["low"] is None:
        return f"{100 * found['mean']:+.2f}, {found['verdict']}"
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['mean']:+.2f} ({low:+.2f} to {high:+.2f}), {found['verdict']}"


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
