"""What holds for all tests."""

from __future__ import annotations

import os

import torch

# Triton reads this once, when the first of the tests that compile something imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
