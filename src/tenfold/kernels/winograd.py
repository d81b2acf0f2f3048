"""3-D convolutions over the kept columns of their Winograd domain: an operator for inference.

    y = maximum(activation(conv3d(x, W) + bias + add))

W is given by its values at the kept columns, packed in the order in which the kernel reads them:

    weight (K, ceil(O / 32), C, 32)   from values (K, O, C), zeros behind the last output

Along an axis of two inputs, padded by one at both ends, the outer inputs of its one tile are zeros.
Three products do there instead of the four of F(2,3):

    y0 = m0 + m1, y1 = m0 + m2     m0 = g1 (d1 + d2), m1 = (g2 - g1) d2, m2 = (g0 - g1) d1

Such an axis is called short. It has 3 coordinates, and all columns must be kept.

The operator is a custom one of PyTorch with shapes for tracing, so `torch.compile` and
`torch.export` keep it. Inside, channels are last: inputs that aren't are converted, and the result
back, unless `channels_last` says to leave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.errors import UserError
from tenfold.kernels import native, native3d, winograd_reference
from tenfold.kernels.reference import ACTIVATIONS
from tenfold.kernels.winograd_transforms import POINTS, transforms

__all__ = [
    "conv3d",
    "coordinates",
    "domain_weight",
    "empty_packed",
    "kernel_points",
    "pack",
    "short_to_two",
    "unpack",
]

Sizes = Sequence[int]
PANELS = 32  # outputs that lie side by side in a packed weight
# G of a short axis, and the coordinates of F(2,3) from those of a short axis.
_SHORT = ((0.0, 1.0, 0.0), (0.0, -1.0, 1.0), (1.0, -1.0, 0.0))
_TWO_FROM_SHORT = ((1.0, 0.0, 1.0), (1.5, 0.5, 0.5), (0.5, 0.5, 0.5), (1.0, 1.0, 0.0))


def coordinates(tile: Sizes, short: Sequence[bool]) -> tuple[int, int, int]:
    """Return the coordinates of each axis, (t_d, t_h, t_w)."""
    depth, height, width = (3 if s else m + 2 for m, s in zip(tile, short, strict=True))
    return depth, height, width


def kernel_points(points: str, tile: Sizes) -> tuple[float, float] | None:
    """Return a and b of points 0, a, -a, b, -b, or None where the compiled kernel can't take them.

    >>> kernel_points("standard", (2, 4, 4))
    (1.0, 2.0)
    """
    if max(tile) == 2:
        return 1.0, 2.0  # not used
    zero, a, minus_a, b, minus_b = (float(point) for point in POINTS[points][4])
    return (a, b) if (zero, minus_a, minus_b) == (0.0, -a, -b) else None


def domain_weight(weight: Tensor, tile: Sizes, short: Sequence[bool], points: str) -> Tensor:
    """Return a 3x3x3 weight `(O, C, 3, 3, 3)` at all columns, `(K, O, C)`, in its type.

    Computed in double precision.

    >>> domain_weight(torch.ones(1, 1, 3, 3, 3), (2, 2, 2), (True, False, False), "standard").shape
    torch.Size([48, 1, 1])
    """
    found = weight.detach().double().permute(2, 3, 4, 0, 1)
    for axis, (m, is_short) in enumerate(zip(tile, short, strict=True)):
        g = (
            torch.tensor(_SHORT).double()
            if is_short
            else torch.from_numpy(transforms(m, points)[2])
        )
        found = torch.tensordot(g.to(found.device), found, dims=([1], [axis])).movedim(0, axis)
    return found.flatten(0, 2).to(weight.dtype)


def pack(values: Tensor) -> Tensor:
    """Return values `(K, O, C)` in the kernel's order, `(K, ceil(O / 32), C, 32)`, in large pages.

    >>> pack(torch.ones(64, 40, 8)).shape
    torch.Size([64, 2, 8, 32])
    """
    columns, outputs, channels = values.shape
    whole = outputs // PANELS * PANELS
    packed = empty_packed(columns, outputs, channels)
    packed[:, : whole // PANELS] = _paired(values[:, :whole])
    if whole < outputs:
        packed[:, -1] = 0
        packed[:, -1, :, : outputs - whole] = values[:, whole:].transpose(1, 2)
    return packed


def empty_packed(columns: int, outputs: int, channels: int) -> Tensor:
    """Return an unfilled packed weight."""
    return native3d.empty_in_large_pages(columns, -(-outputs // PANELS), channels, PANELS)


def unpack(weight: Tensor, outputs: int) -> Tensor:
    """Undo `pack`: return the values `(K, O, C)`."""
    columns, _, channels, _ = weight.shape
    return weight.transpose(2, 3).reshape(columns, -1, channels)[:, :outputs]


def short_to_two(values: Tensor, tile: Sizes, short: Sequence[bool]) -> Tensor:
    """Return the values at all columns of F(2,3) along the short axes, from those of short ones."""
    sizes = coordinates(tile, short)
    found = values.reshape(*sizes, *values.shape[1:])
    for axis in (axis for axis in range(3) if short[axis]):
        matrix = torch.tensor(_TWO_FROM_SHORT).to(values)
        found = torch.tensordot(matrix, found, dims=([1], [axis])).movedim(0, axis)
    return found.flatten(0, 2)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    columns: Sizes,
    outputs: int,
    tile: Sizes,
    padding: Sizes,
    points: str,
    activation: str = "none",
    pool: Sizes = (1, 1, 1),
    short: Sequence[bool] = (False, False, False),
    channels_last: bool = False,
) -> Tensor:
    """Return maximum(activation(conv3d(x, W) + bias + add)), `(N, O, D', H', W')`.

    Args:
        x: `(N, C, D, H, W)`, float32; contiguous, channels-last or any strides.
        weight: packed values, see the module.
        bias: `(O,)`.
        add: of the convolution's output size, such as a residual.
        columns: the kept coordinates, ascending.
        outputs: O.
        tile: outputs of a tile, 2 or 4, in depth, height and width.
        padding: zeros at both sides.
        points: of the transforms, see `transforms`.
        activation: one of `tenfold.kernels.reference.ACTIVATIONS`.
        pool: windows of a maximum without overlap, 1 or 2; what doesn't fill one is dropped.
        short: axes of 3 coordinates, see the module.
        channels_last: return the result channels-last; else it lies as x does.

    Raises:
        UserError: sizes that don't fit.
    """
    if native.usable(x) and kernel_points(points, tile) is not None:
        return _native(
            x, weight, bias, add, columns, outputs, tile, padding, points, activation, pool, short,
            channels_last,
        )  # fmt: skip
    result: Tensor = torch.ops.tenfold.winograd_conv3d(
        x, weight, bias, add, columns, outputs, tile, padding, points, activation, pool, short,
        channels_last,
    )  # fmt: skip
    return result


def _native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    columns: Sizes,
    outputs: int,
    tile: Sizes,
    padding: Sizes,
    points: str,
    activation: str,
    pool: Sizes,
    short: Sequence[bool],
    channels_last: bool,
) -> Tensor:
    _check(x, weight, columns, outputs, tile, padding, pool, short)
    found = kernel_points(points, tile)
    assert found is not None
    as_before = not channels_last and not _lies_last(x)
    y = native3d.winograd_conv3d(
        native3d.channels_last(x), weight, bias, add, columns, outputs, tile, padding, found,
        activation, pool, short,
    )  # fmt: skip
    return native3d.channels_first(y) if as_before else y


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    columns: Sizes,
    outputs: int,
    tile: Sizes,
    padding: Sizes,
    points: str,
    activation: str,
    pool: Sizes,
    short: Sequence[bool],
    channels_last: bool,
) -> Tensor:
    _check(x, weight, columns, outputs, tile, padding, pool, short)
    last = channels_last or _lies_last(x)
    values = unpack(weight, outputs)
    if any(short):
        values = short_to_two(values, tile, short)
        columns = range(len(values))
    y = winograd_reference.conv3d(x, values, columns, bias, tile, padding, points)
    y = ACTIVATIONS[activation](y if add is None else y + add)
    if math.prod(pool) > 1:
        y = torch.nn.functional.max_pool3d(y, tuple(pool))
    return y.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


@torch.library.custom_op("tenfold::winograd_conv3d", mutates_args=())
def _conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    columns: Sequence[int],
    outputs: int,
    tile: Sequence[int],
    padding: Sequence[int],
    points: str,
    activation: str,
    pool: Sequence[int],
    short: Sequence[bool],
    channels_last: bool,
) -> Tensor:
    compiled = native.fits(x) and kernel_points(points, tile) is not None
    run = _native if compiled else _reference
    return run(
        x, weight, bias, add, columns, outputs, tile, padding, points, activation, pool, short,
        channels_last,
    )  # fmt: skip


@_conv3d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    columns: Sequence[int],
    outputs: int,
    tile: Sequence[int],
    padding: Sequence[int],
    points: str,
    activation: str,
    pool: Sequence[int],
    short: Sequence[bool],
    channels_last: bool,
) -> Tensor:
    sizes = [
        (size + 2 * p - 2) // window
        for size, p, window in zip(x.shape[2:], padding, pool, strict=True)
    ]
    y = x.new_empty(x.shape[0], outputs, *sizes)
    last = channels_last or _lies_last(x)
    return y.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def _lies_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)


def _check(
    x: Tensor,
    weight: Tensor,
    columns: Sizes,
    outputs: int,
    tile: Sizes,
    padding: Sizes,
    pool: Sizes,
    short: Sequence[bool],
) -> None:
    channels = weight.shape[2] if weight.dim() == 4 else -1
    if x.dim() != 5 or x.shape[1] != channels:
        raise UserError(f"input of shape {tuple(x.shape)}: expected (N, {channels}, D, H, W)")
    sizes = coordinates(tile, short)
    most = math.prod(sizes)
    fits = (
        tuple(weight.shape) == (len(columns), -(-outputs // PANELS), channels, PANELS)
        and all(m in (2, 4) for m in tile)
        and all(window in (1, 2) for window in pool)
        and min(padding) >= 0
        and 0 <= columns[0] <= columns[-1] < most
        and all(columns[i] < columns[i + 1] for i in range(len(columns) - 1))
    )
    if not fits:
        raise UserError(
            f"a packed weight of shape {tuple(weight.shape)}, {len(columns)} columns, "
            f"{outputs} outputs, padding {tuple(padding)} and windows {tuple(pool)} don't fit a "
            f"convolution in tiles of {tuple(tile)} with {most} columns"
        )
    if min(size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True)) < 3:
        raise UserError(
            f"input of shape {tuple(x.shape)} with padding {tuple(padding)}: expected at least 3 "
            "positions in depth, height and width, the length of the kernel"
        )
    for axis in (axis for axis in range(3) if short[axis]):
        if (tile[axis], x.shape[2 + axis], padding[axis]) != (2, 2, 1) or len(columns) != most:
            raise UserError(
                f"axis {axis} of the input {tuple(x.shape)} with padding {tuple(padding)} is no "
                "short one: expected tiles of 2, two positions, padding 1 and all columns"
            )


def _paired(values: Tensor) -> Tensor:
    columns, outputs, channels = values.shape
    return values.reshape(columns, outputs // PANELS, PANELS, channels).transpose(2, 3)
