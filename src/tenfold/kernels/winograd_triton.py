"""Winograd's 3-D convolution on a GPU: two Triton kernels around one batched product.

The same as `tenfold.kernels.winograd_reference.conv3d`, for inference. Each transform is one kernel
that reads its input once from memory and writes the kept columns alone:

    x (N, C, D, H, W) -> V (K, P, C) -> M = V values^T (K, P, O) -> y (N, O, D', H', W')

A program takes some tiles and channels; it makes one depth coordinate after the other, so that only
a plane of the tile is in registers. Tile and points are part of a kernel, the columns are not.
Channels are last in memory; an input that lies otherwise is copied first.

Triton comes with PyTorch for CUDA. Without a GPU it can interpret the kernels, which takes minutes
and is for the tests alone. So far they were run in no other way: they
compile for GPUs of compute capability 8.0 and 9.0, and have never been run on one. So `convolve`
takes them at their word only after a first result that was right.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import winograd_reference
from tenfold.kernels.winograd_domain import Domain, domain_of
from tenfold.kernels.winograd_transforms import Points, tile_of, transforms

__all__ = ["available", "conv3d", "convolve", "takes"]

Matrix = tuple[tuple[float, ...], ...]
# Where the kernels run; tests that have them interpreted say "cpu".
_DEVICE = "cuda"
# V of one launch, in bytes: larger batches are computed in parts.
_MOST_BYTES = 2**30
# How far a first result may be from the plain form's, relative to the largest: products round, in
# single precision by TF32 where it is allowed. What is wrong is further away.
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# Whether the kernels were right at their first use, by what is compiled, and where.
_proven: dict[tuple[object, ...], bool] = {}


def available() -> bool:
    """Tell whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def takes(x: Tensor) -> bool:
    """Tell whether the kernels are for this input: on a GPU, of a type of theirs, no gradient."""
    if torch.compiler.is_compiling():  # also while a file is exported
        return False
    return (
        x.device.type == _DEVICE
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not (x.requires_grad and torch.is_grad_enabled())
        and available()
    )


def convolve(
    x: Tensor,
    values: Tensor,
    columns: Sequence[int],
    bias: Tensor | None,
    tile: int | Sequence[int],
    padding: Sequence[int],
    points: Points,
) -> Tensor:
    """Convolve by the kernels once they have proven right, else by plain PyTorch.

    At the first use of a tile, type and device both are computed and compared. Where the kernels
    fail or differ, a warning says so, and plain PyTorch stands in for them from then on.

    Args:
        x: see `conv3d`, as all others.
        values: likewise.
        columns: likewise.
        bias: likewise.
        tile: likewise.
        padding: likewise.
        points: likewise.

    Raises:
        UserError: shapes, columns or types that don't fit.
    """
    given = (values, columns, bias, tile, padding, points)
    key = (tile_of(tile), points, x.dtype, x.device, _blocks(x.shape[1]), _blocks(values.shape[1]))
    proven = _proven.get(key)
    if proven:
        return conv3d(x, *given)
    expected = winograd_reference.conv3d(x, *given)
    # Zeros and infinities teach nothing.
    if proven is None and bool(expected.any()) and bool(expected.isfinite().all()):
        wrong = _fault(x, given, expected)
        _proven[key] = wrong is None
        if wrong is not None:
            warnings.warn(
                f"the Triton kernels of tile {tile_of(tile)} {wrong}; plain PyTorch is used "
                f"instead on {x.device}",
                stacklevel=2,
            )
    return expected


def _fault(x: Tensor, given: tuple[Any, ...], expected: Tensor) -> str | None:
    """Say what is wrong with the kernels' result, or return None."""
    try:
        found = conv3d(x, *given)
        difference = float((found - expected).abs().max() / expected.abs().max())
    except Exception as error:  # of a compiler or a driver, of any kind
        return f"fail ({type(error).__name__}: {str(error)[:200]})"
    return None if difference <= _TOLERANCE[x.dtype] else f"differ by {difference:.1e}"


def conv3d(
    x: Tensor,
    values: Tensor,
    columns: Sequence[int],
    bias: Tensor | None,
    tile: int | Sequence[int],
    padding: Sequence[int],
    points: Points,
) -> Tensor:
    """Convolve as `winograd_reference.conv3d` does, without a gradient.

    Args:
        x: `(N, C, D, H, W)`, float32, float16 or bfloat16; the products are computed in its type.
        values: `(K, O, C)`.
        columns: the K kept coordinates, ascending.
        bias: `(O,)` or None.
        tile: outputs of a tile in depth, height and width.
        padding: zeros at both sides, in depth, height and width.
        points: of the transforms.

    Returns:
        `(N, O, D', H', W')`, in the memory format of `x`.

    Raises:
        UserError: shapes, columns or types that don't fit.
    """
    named = points if isinstance(points, str) else tuple(points)
    domain = domain_of(tile_of(tile), named, tuple(columns))
    sizes = tuple(n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=False))
    if x.dim() != 5 or x.shape[1] != values.shape[2] or min(sizes) < 1 or len(padding) != 3:
        raise UserError(
            f"input of shape {tuple(x.shape)} with padding {tuple(padding)}: expected "
            f"(N, {values.shape[2]}, D, H, W) with at least 3 positions in depth, height and width"
        )
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    wide = x.permute(0, 2, 3, 4, 1).contiguous()
    low = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
    y = x.new_empty((len(x), *sizes, values.shape[1]), dtype=low)
    kernels = values.to(low).transpose(1, 2)
    tiles = tuple(-(-size // m) for size, m in zip(sizes, domain.tile, strict=True))
    a_sample = len(values) * max(values.shape[1:]) * tiles[0] * tiles[1] * tiles[2] * 4
    samples = max(1, _MOST_BYTES // a_sample)
    # Triton launches on the current device, which may be another one than the input's.
    device = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    with device, torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for first in range(0, len(x), samples):
            part = slice(first, first + samples)
            v = _to_domain(wide[part], domain, tiles, padding, len(values), low)
            _from_domain(torch.bmm(v, kernels), bias, y[part], domain, tiles)
    found = y.permute(0, 4, 1, 2, 3)
    return found.contiguous(
        memory_format=torch.channels_last_3d if last else torch.contiguous_format
    )


def _to_domain(
    x: Tensor,
    domain: Domain,
    tiles: tuple[int, ...],
    padding: Sequence[int],
    columns: int,
    low: torch.dtype,
) -> Tensor:
    from tenfold.kernels.winograd_triton_kernels import input_kernel

    count, channels = len(x) * tiles[0] * tiles[1] * tiles[2], x.shape[4]
    v = x.new_empty((columns, count, channels), dtype=low)
    rows = _rows(domain, x.device)
    blocks = _blocks(channels)
    used = len(rows.inputs)
    across, along = _grid(count, channels, blocks)
    input_kernel[used * across, along](
        x, v, rows.inputs, rows.slots, count, channels, *x.shape[1:4], *tiles, *padding, used,
        rows.input_height, rows.input_width, *domain.tile, *blocks, num_warps=4,
    )  # fmt: skip
    return v


def _from_domain(
    product: Tensor, bias: Tensor | None, y: Tensor, domain: Domain, tiles: tuple[int, ...]
) -> None:
    from tenfold.kernels.winograd_triton_kernels import output_kernel

    _, count, channels = product.shape
    rows = _rows(domain, product.device)
    blocks = _blocks(channels)
    output_kernel[_grid(count, channels, blocks)](
        product, product if bias is None else bias, y, rows.outputs, rows.slots, count, channels,
        *y.shape[1:4], *tiles, len(rows.inputs), rows.output_height, rows.output_width,
        *domain.tile, bias is not None, *blocks, num_warps=4,
    )  # fmt: skip


def _blocks(channels: int) -> tuple[int, int]:
    """Return the tiles and channels of a program: one pair for each thread of four warps."""
    across = 1 << (min(channels, 64) - 1).bit_length()
    return 128 // across, across


def _grid(tiles: int, channels: int, blocks: tuple[int, int]) -> tuple[int, int]:
    return -(-tiles // blocks[0]), -(-channels // blocks[1])


@dataclass(frozen=True)
class _Rows:
    """What the kernels read of a domain.

    Depth is looked up in memory, since its loop is not unrolled; so are the places of the kept
    columns, so that one compiled kernel serves every layer of a tile.
    """

    inputs: Tensor  # (used, t_d): rows of B^T in depth, of the coordinates that some column has
    outputs: Tensor  # (m_d, used): A^T in depth
    slots: Tensor  # (used, t_h, t_w): which kept column it is, or -1
    input_height: Matrix
    input_width: Matrix
    output_height: Matrix
    output_width: Matrix


@functools.lru_cache(maxsize=256)
def _rows(domain: Domain, device: torch.device) -> _Rows:
    (a_d, b_d), (a_h, b_h), (a_w, b_w) = (transforms(m, domain.points)[:2] for m in domain.tile)
    used = domain.used[0]
    slots = torch.full((len(b_d), len(b_h), len(b_w)), -1, dtype=torch.int32)
    slots.view(-1)[list(domain.columns)] = torch.arange(len(domain.columns), dtype=torch.int32)
    return _Rows(
        torch.tensor(b_d[used].tolist(), dtype=torch.float32, device=device),
        torch.tensor(a_d[:, used].tolist(), dtype=torch.float32, device=device),
        slots[used].to(device),
        *(tuple(map(tuple, matrix.tolist())) for matrix in (b_h, b_w, a_h, a_w)),
    )
