"""A process that has run OpenVINO still stands a signal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

CODE = """
import gc, signal, subprocess, sys
import numpy
from tenfold.measure.runners import OpenVinoModel, load_openvino

openvino = load_openvino()
from openvino import opset13 as operations

image = operations.parameter([1, 4], numpy.float32)
openvino.save_model(openvino.Model([operations.relu(image)], [image]), sys.argv[1])
first = OpenVinoModel(sys.argv[1])
second = OpenVinoModel(sys.argv[1])
assert second(numpy.ones((1, 4), numpy.float32)).shape == (1, 4)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
subprocess.run([sys.executable, "-c", ""], check=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_signals_are_handled_after_models_have_come_and_gone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model.xml")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr[-500:]
