"""Networks as after training with N:M sparsity, without the training."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from tenfold.nn.blocks import from_blocks, to_blocks


def pruned(network, *patterns):
    """Keep the largest weights of each block; layers take the patterns in turn."""
    turn = itertools.cycle(patterns)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            n, m = next(turn)
            if module.weight.shape[1] % m:
                continue
            with torch.no_grad():
                blocks = to_blocks(module.weight, m).abs()
                kept = torch.zeros_like(blocks).scatter_(1, blocks.topk(n, dim=1).indices, 1.0)
                module.weight.mul_(from_blocks(kept, module.weight.shape))
    return network


def settled(network, seed=0):
    """Give every BatchNorm statistics and scales as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(generator=generator)
    return network.eval()


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())
