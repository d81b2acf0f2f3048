from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NETS = Path(__file__).parents[1] / "nets.py"
MADE_UP = Path(__file__).parents[1] / "made_up.py"


def recipe(**changes: Any) -> dict[str, Any]:
    """A run of seconds: 256 digits, a small network, LBC at 2:4."""
    values: dict[str, Any] = {
        "task": "classification",
        "data": {"name": "digits", "limit": 256},
        "model": f"{NETS}:small",
        "methods": {"lbc": {"n": 2, "m": 4}},
        "train": {"epochs": 3, "batch_size": 64, "lr": 0.05},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if key == "train" else value
    return values


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
