"""Weights and images from formulas, by which networks are compared without any file."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fill(network: nn.Module) -> nn.Module:
    """Set conv weights 0.1 sin(1.7(o+1)(i+2) + 0.9(a+1)(b+3)), biases 0.01(o+1), and batch norms.

    o is the output channel, i the input channel within its group, also for transposed
    convolutions. A batch norm gets 1 + 0.1 cos(c) and 0.05 sin(c).
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                transposed = isinstance(module, nn.ConvTranspose2d)
                weight = module.weight.transpose(0, 1) if transposed else module.weight
                o, i, a, b = torch.meshgrid(
                    *(torch.arange(n, dtype=torch.float64) for n in weight.shape), indexing="ij"
                )
                weight.copy_(0.1 * torch.sin(1.7 * (o + 1) * (i + 2) + 0.9 * (a + 1) * (b + 3)))
                if module.bias is not None:
                    module.bias.copy_(0.01 * (torch.arange(len(module.bias)) + 1))
            elif isinstance(module, nn.BatchNorm2d):
                c = torch.arange(module.num_features)
                module.weight.copy_(1 + 0.1 * torch.cos(c))
                module.bias.copy_(0.05 * torch.sin(c))
    return network


def image(channels: int, height: int, width: int) -> Tensor:
    """Return sin(0.13(c+1)i + 0.07(c+2)j + c), `(1, C, H, W)`."""
    c, i, j = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (channels, height, width)), indexing="ij"
    )
    return torch.sin(0.13 * (c + 1) * i + 0.07 * (c + 2) * j + c).float()[None]
