"""A 3-D convolution in the Winograd domain, its weight in the order of the compiled kernel.

It is made from a dense 3x3x3 convolution, without loss, or from a `WinogradConv3d` with its kept
columns. Its tensors are buffers:

    packed  what the kernel reads, see `tenfold.kernels.winograd`; not in the state
    kernel  (O, C, 3, 3, 3), of a layer that was made from a convolution: `packed` follows from it
    bias    (O,)  float32, where there is one

The state of a layer with kept columns has `values` `(K, O, C)` instead of the kernel.
`tenfold.optimize` puts such layers in the place of others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.kernels import winograd
from tenfold.kernels.reference import ACTIVATIONS
from tenfold.kernels.winograd_domain import domain_of
from tenfold.kernels.winograd_transforms import POINTS, tile_of
from tenfold.nn.kernel_layer import KernelLayer, finish
from tenfold.nn.winograd import DEFAULT_POINTS, WinogradConv3d
from tenfold.nn.winograd_fit import refuse_unconvertible, zero_padding

__all__ = ["PackedWinogradConv3d"]

NO_SHORT = (False, False, False)


class PackedWinogradConv3d(KernelLayer):
    """A 3x3x3 convolution of stride 1 in the Winograd domain; all zeros until it is filled.

    >>> dense = nn.Conv3d(4, 8, 3, padding=1)
    >>> layer = PackedWinogradConv3d.from_layer(dense, (2, 4, 4))
    >>> x = torch.randn(1, 4, 6, 6, 6)
    >>> with torch.no_grad():
    ...     torch.allclose(layer(x), dense(x), atol=1e-5)
    True

    Args:
        in_channels: C.
        out_channels: O.
        tile: outputs of a tile, 2, 4 or three of them for depth, height and width.
        columns: the kept coordinates of a pruned layer, ascending; None for a dense kernel.
        padding: zeros at both sides, in depth, height and width.
        points: set of the transforms' points.
        short: axes of two positions with padding 1, see `tenfold.kernels.winograd`. For inputs of
            other lengths the convolution is computed directly.
        bias: whether there is one.

    Attributes:
        channels_last: hand on channels-last results; else they lie as the input does.

    Raises:
        UserError: sizes that don't fit, or points that the kernel doesn't take.
    """

    can_pool = True
    packed: Tensor
    kernel: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        tile: int | Sequence[int],
        columns: Sequence[int] | None = None,
        *,
        padding: Sequence[int] = (0, 0, 0),
        points: str = DEFAULT_POINTS,
        short: Sequence[bool] = NO_SHORT,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.tile, self.points = tile_of(tile), points
        self.padding = (int(padding[0]), int(padding[1]), int(padding[2]))
        self.short = (bool(short[0]), bool(short[1]), bool(short[2]))
        if points not in POINTS:
            raise unknown_name("set of points", str(points), POINTS)
        if winograd.kernel_points(points, self.tile) is None:
            raise UserError(f"points={points!r}: the kernel takes pairs of points, a and -a")
        if any(self.short) and columns is not None:
            raise UserError("short axes need all columns: give columns=None")
        if columns is not None:
            domain_of(self.tile, points, tuple(columns))  # refuses what doesn't fit
        self.of_kernel = columns is None
        most = math.prod(winograd.coordinates(self.tile, self.short))
        self.columns = tuple(range(most) if columns is None else (int(j) for j in columns))
        self.channels_last = False
        packed = winograd.empty_packed(len(self.columns), out_channels, in_channels)
        self.register_buffer("packed", packed.zero_(), persistent=False)
        kernel = torch.zeros(out_channels, in_channels, 3, 3, 3) if self.of_kernel else None
        self.register_buffer("kernel", kernel)
        self.register_buffer("bias", torch.zeros(out_channels) if bias else None)

    @classmethod
    def like(
        cls,
        layer: nn.Conv3d | WinogradConv3d,
        tile: int | Sequence[int],
        *,
        columns: Sequence[int] | None = None,
        points: str = DEFAULT_POINTS,
        short: Sequence[bool] = NO_SHORT,
        bias: bool | None = None,
    ) -> Self:
        """Return an unfilled layer of the sizes of another one.

        Raises:
            UserError: the layer can't be computed so.
        """
        if isinstance(layer, nn.Conv3d):
            refuse_unconvertible(layer)
        return cls(
            layer.in_channels,
            layer.out_channels,
            tile,
            columns,
            padding=zero_padding(layer) if isinstance(layer, nn.Conv3d) else layer.padding,
            points=points,
            short=short,
            bias=layer.bias is not None if bias is None else bias,
        )

    @classmethod
    def from_layer(
        cls,
        layer: nn.Conv3d | WinogradConv3d,
        tile: int | Sequence[int] | None = None,
        *,
        short: Sequence[bool] = NO_SHORT,
        name: str | None = None,
    ) -> Self:
        """Return the packed form of a layer.

        Args:
            layer: a convolution, or one in the Winograd domain; is not changed.
            tile: outputs of a tile; a layer in the Winograd domain has its own.
            short: see the class.
            name: of the layer, for errors.

        Raises:
            UserError: the layer can't be computed so.
        """
        if isinstance(layer, WinogradConv3d):
            made = cls.like(layer, layer.tile, columns=layer.kept, points=layer.points)
            made.packed = winograd.pack(layer.values.detach().float())
        else:
            refuse_unconvertible(layer, name)
            made = cls.like(layer, 4 if tile is None else tile, short=short)
            made.kernel = layer.weight.detach().float().contiguous().clone()
            made._pack_kernel()
        if layer.bias is not None:
            made.bias = layer.bias.detach().float().clone()
        return made

    @property
    def weight(self) -> Tensor:
        """Return the kernel `(O, C, 3, 3, 3)`, or the values `(K, O, C)` of kept columns."""
        if self.kernel is not None:
            return self.kernel
        return winograd.unpack(self.packed, self.out_channels)

    def macs(self, output: Tensor) -> int:
        """Return the multiply-adds of the products behind an output, before its maximum."""
        sizes = [n * window for n, window in zip(output.shape[2:], self.pool, strict=True)]
        tiles = math.prod(-(-size // m) for size, m in zip(sizes, self.tile, strict=True))
        pairs = self.in_channels * self.out_channels
        return len(output) * tiles * len(self.columns) * pairs

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map `(N, C, D, H, W)` to maximum(activation(conv3d(x, W) + bias + add)).

        `add` may also be broadcast; it is then added outside the kernel.

        Raises:
            UserError: an input that doesn't fit.
        """
        self._check_types(x, self.bias)
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            raise UserError(
                f"input of shape {tuple(x.shape)}: expected (N, {self.in_channels}, D, H, W)"
            )
        if any(s and n != 2 for s, n in zip(self.short, x.shape[2:], strict=True)):
            return self._direct(x, add)
        sizes = [n + 2 * p - 2 for n, p in zip(x.shape[2:], self.padding, strict=True)]
        shape = (len(x), self.out_channels, *sizes)
        inside = add is None or (tuple(add.shape) == shape and add.dtype == x.dtype)

        def run(add: Tensor | None, activation: str) -> Tensor:
            return winograd.conv3d(
                x, self.packed, self.bias, add, self.columns, self.out_channels, self.tile,
                self.padding, self.points, activation, self.pool if inside else (1, 1, 1),
                self.short, self.channels_last,
            )  # fmt: skip

        y = finish(run, x, add, shape, self.activation)
        return y if inside else self._maximum(y)

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        most = math.prod(winograd.coordinates(self.tile, self.short))
        parts = [f"{self.in_channels}, {self.out_channels}, tile={self.tile}"]
        parts += [f"columns={len(self.columns)} of {most}", f"padding={self.padding}"]
        parts += [f"short={self.short}"] if any(self.short) else []
        parts += [f"points={self.points}"] if self.points != DEFAULT_POINTS else []
        parts += ["bias=False"] if self.bias is None else []
        parts += [f"activation={self.activation}"] if self.activation != "none" else []
        parts += [f"pool={self.pool}"] if max(self.pool) > 1 else []
        return ", ".join(parts)

    def _direct(self, x: Tensor, add: Tensor | None) -> Tensor:
        y = F.conv3d(x, self.weight, self.bias, padding=self.padding)
        return self._maximum(ACTIVATIONS[self.activation](y if add is None else y + add))

    def _maximum(self, y: Tensor) -> Tensor:
        return F.max_pool3d(y, self.pool) if max(self.pool) > 1 else y

    def _pack_kernel(self) -> None:
        assert self.kernel is not None
        values = winograd.domain_weight(self.kernel, self.tile, self.short, self.points)
        self.packed = winograd.pack(values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Nobody writes into the weights, which may have hundreds of megabytes: copies share them.
        for shared in (self.packed, self.kernel):
            memo[id(shared)] = shared
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.of_kernel:
            destination[f"{prefix}values"] = self.weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state, name = dict(state_dict), f"{prefix}values"
        values = None if self.of_kernel else state.pop(name, None)
        missing: list[str] = args[2]
        if self.kernel is not None:
            self.kernel = torch.zeros_like(self.kernel)  # copies of the layer keep theirs
        super()._load_from_state_dict(state, prefix, *args, **kwargs)
        if self.of_kernel:
            if self.kernel is not None and self.kernel.device.type != "meta":
                self._pack_kernel()
        elif values is None:
            missing.append(name)
        else:
            expected = (len(self.columns), self.out_channels, self.in_channels)
            if tuple(values.shape) != expected:
                raise UserError(f"{name} has shape {tuple(values.shape)}: expected {expected}")
            self.packed = winograd.pack(values)
