"""Multiply-adds of a generator as the papers on GAN compression count them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.measure.cost import count_cost

__all__ = ["paper_macs"]


def paper_macs(model: nn.Module, example: Tensor) -> int:
    """Count multiply-adds with transposed convolutions by the size of their output.

    A transposed convolution multiplies each input pixel with its kernel; the tool that the papers
    used counts the kernel at each output pixel instead, four times as much where it doubles both
    sides. `count_cost` counts what is multiplied. Quote both, and say which is which.

    Args:
        model: any network.
        example: `(B, C, H, W)`.
    """
    surplus = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal surplus
        (given,) = inputs
        kernel = module.weight[0].numel()  # type: ignore[index]
        pixels = output.shape[2:].numel() - given.shape[2:].numel()
        surplus += kernel * given.shape[1] * pixels

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.ConvTranspose2d)
    ]
    try:
        with torch.no_grad():
            true = count_cost(model, example).macs
    finally:
        for handle in handles:
            handle.remove()
    return true + surplus
