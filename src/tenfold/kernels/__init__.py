"""Operators with compiled CPU kernels and a plain PyTorch form of each."""
