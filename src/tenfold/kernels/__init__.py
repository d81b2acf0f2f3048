"""Operators with compiled CPU kernels and a plain PyTorch form of each.

Importing it registers all of them, which a program that was exported with them needs.
"""

from tenfold.kernels import attention, generator, nm, normalize, pooling

__all__ = ["attention", "generator", "nm", "normalize", "pooling"]
