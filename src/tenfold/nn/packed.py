"""Convolutions and linear layers whose N:M weights are kept without their zeros, for inference.

They compute `activation(W x + bias + add)` with the operators of `tenfold.kernels.nm`, in whose
layout `values` and `index` are. All tensors are buffers, since such a layer isn't trained:

    values  float32, bfloat16 or int8     scale (O,)  float32, with int8 alone
    index   where each value belongs      bias  (O,)  float32, where there is one

`tenfold.optimize` puts them in the place of dense layers.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from tenfold.errors import UserError, unknown_name
from tenfold.kernels import native, nm, reference
from tenfold.nn.kernel_layer import KernelLayer, finish
from tenfold.nn.packable import fixed_padding, pair, refuse_unpackable

__all__ = ["PRECISIONS", "NMConv2d", "NMLinear", "PackedLayer"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


MOST_CALLS = 16  # shapes of inputs that a layer remembers


class _Calls(dict[tuple[torch.Size, str], native.Prepared]):
    """Calls that are ready, by the input's shape and the activation; a copied layer starts anew."""

    def __reduce__(self) -> tuple[type[_Calls], tuple[()]]:
        return _Calls, ()

    def __deepcopy__(self, memo: object) -> _Calls:
        return _Calls()


class PackedLayer(KernelLayer):
    """What `NMConv2d` and `NMLinear` have in common: the packed weight and what follows it.

    Args:
        shape: of the dense weight.
        n: weights kept in a block.
        m: block length along the input channels.
        bias: whether there is one.
        precision: "float32", "bfloat16" or "int8", of the values.

    Raises:
        UserError: sizes that don't fit the pattern or the kernels, or an unknown precision.
    """

    values: Tensor
    index: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], n: int, m: int, bias: bool, precision: str) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        values, index = nm.pack(torch.zeros(shape), n, m)
        self.shape = shape
        self.n, self.m, self.k = n, m, math.prod(shape[1:])
        self.precision = precision
        self.register_buffer("values", values.to(PRECISIONS[precision]))
        self.register_buffer("index", index)
        self.register_buffer("scale", torch.ones(shape[0]) if precision == "int8" else None)
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self._calls = _Calls()

    def _prepared(self, x: Tensor, add: Tensor | None) -> native.Prepared | None:
        """Return what is ready for such inputs: checks would outlast a small layer."""
        if not native.usable(x):
            return None
        call = self._calls.get((x.shape, self.activation))
        if call is None or not x.is_contiguous() or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if add is not None and not (
            native.usable(add) and add.shape == call.out_shape and add.is_contiguous()
        ):
            return None
        tensors = self._buffers
        if not call.reads((tensors["values"], tensors["index"], tensors["scale"], tensors["bias"])):
            self._calls.clear()
            return None
        return call

    def _remember(self, x: Tensor) -> None:
        if native.usable(x):
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            self._calls[x.shape, self.activation] = self._prepare(x.shape)

    def _prepare(self, shape: torch.Size) -> native.Prepared:
        raise NotImplementedError

    @property
    def pattern(self) -> str:
        """Return N:M as text."""
        return f"{self.n}:{self.m}"

    @property
    def weight(self) -> Tensor:
        """Return the dense weight in its layer's shape, computed anew at each reading."""
        weight = self.stored_weight()
        if self.scale is None:
            return weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight.to(self.scale.dtype) * self.scale.reshape(-1, *[1] * (weight.dim() - 1))

    def stored_weight(self) -> Tensor:
        """Return the dense weight in the type of the values: of int8, before its scale."""
        rows = reference.dense_rows(self.values, self.index, None, (self.n, self.m), self.k)
        return reference.untiled(rows, self.shape[1], self.shape[2:], self.m).reshape(self.shape)

    def macs(self, output: Tensor) -> int:
        """Return the multiply-adds of the dense layer behind an output."""
        return output.numel() * self.k

    def _fill(self, layer: nn.Conv2d | nn.Linear, name: str | None) -> Self:
        weight = layer.weight.detach().float()
        if self.scale is not None:
            # Symmetric, one scale an output; a row of zeros keeps the scale 1.
            largest = weight.flatten(1).abs().amax(dim=1) / 127
            self.scale = torch.where(largest > 0, largest, torch.ones_like(largest))
            scale = self.scale.reshape(-1, *[1] * (weight.dim() - 1))
            weight = (weight / scale).round().clamp(-127, 127)
        try:
            # The weight itself is checked, since rounding to int8 may make zeros.
            values, index = nm.pack(layer.weight.detach().float(), self.n, self.m)
            if self.scale is not None:
                values, index = nm.pack(weight, self.n, self.m)
        except UserError as error:
            raise UserError(f"{name or type(layer).__name__}: {error}") from error
        self.values = values.to(PRECISIONS[self.precision])
        self.index = index
        if layer.bias is not None:
            self.bias = layer.bias.detach().float().clone()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.values.device.type == "meta":
            return
        nm.check_packed(self.values.cpu(), self.index.cpu(), self.n, self.m, self.k)
        for name, given, expected in (
            ("values", self.values, PRECISIONS[self.precision]),
            ("scale", self.scale, torch.float32),
            ("bias", self.bias, torch.float32),
        ):
            if given is not None and given.dtype != expected:
                raise UserError(f"a packed layer's {name} are {given.dtype}: expected {expected}")

    def _described(self) -> str:
        parts = ["" if self.bias is not None else ", bias=False"]
        parts += [f", precision={self.precision}" if self.precision != "float32" else ""]
        parts += [f", activation={self.activation}" if self.activation != "none" else ""]
        return f"pattern={self.pattern}{''.join(parts)}"


class NMLinear(PackedLayer):
    """A linear layer with a packed N:M weight; all zeros until it is filled.

    >>> layer = nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    >>> NMLinear.from_dense(layer, 2, 4)(torch.tensor([[1.0, 5.0, 5.0, 1.0]]))
    tensor([[3.]])

    Args:
        in_features: I.
        out_features: O.
        n: weights kept in a block.
        m: block length; divides I.
        bias: whether there is one.
        precision: "float32", "bfloat16" or "int8", of the values.

    Raises:
        UserError: sizes that don't fit the pattern, or an unknown precision.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        m: int,
        *,
        bias: bool = True,
        precision: str = "float32",
    ) -> None:
        super().__init__((out_features, in_features), n, m, bias, precision)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(
        cls, layer: nn.Linear, n: int, m: int, precision: str = "float32", bias: bool | None = None
    ) -> Self:
        """Return an unfilled layer of the sizes of a dense one."""
        has_bias = layer.bias is not None if bias is None else bias
        return cls(layer.in_features, layer.out_features, n, m, bias=has_bias, precision=precision)

    @classmethod
    def from_dense(
        cls, layer: nn.Linear, n: int, m: int, precision: str = "float32", name: str | None = None
    ) -> Self:
        """Pack a dense layer whose every block of `m` weights has at most `n` that are not zero.

        Args:
            layer: is not changed.
            n: weights kept in a block.
            m: block length.
            precision: of the values.
            name: of the layer, for errors.

        Raises:
            UserError: a weight that isn't N:M; the layer and its first offending block are named.
        """
        refuse_unpackable(layer, name)
        return cls.like(layer, n, m, precision)._fill(layer, name)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map `(..., I)` to activation(x W^T + bias + add), `(..., O)`.

        `add` may also be broadcast; it is then added outside the kernel.
        """
        call = self._prepared(x, add)
        if call is not None:
            return call(x, add)
        self._check_types(x, self.bias, self.scale)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise UserError(
                f"input of shape {tuple(x.shape)}: expected (..., {self.in_features}) features"
            )

        def run(add: Tensor | None, activation: str) -> Tensor:
            return nm.linear(
                x, self.values, self.index, self.scale, self.bias, add, (self.n, self.m), activation
            )

        y = finish(run, x, add, (*x.shape[:-1], self.out_features), self.activation)
        self._remember(x)
        return y

    def _prepare(self, shape: torch.Size) -> native.Prepared:
        return native.prepare_linear(
            shape, self.values, self.index, self.scale, self.bias, (self.n, self.m), self.activation
        )

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        return f"{self.in_features}, {self.out_features}, {self._described()}"


class NMConv2d(PackedLayer):
    """A 2-D convolution with a packed N:M weight; all zeros until it is filled.

    Blocks run along the input channels of a group, at one output and kernel position.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: `(kH, kW)`.
        n: weights kept in a block.
        m: block length; divides C / groups.
        stride: of the convolution.
        padding: zeros at every side.
        dilation: of the kernel.
        groups: of the channels.
        bias: whether there is one.
        precision: "float32", "bfloat16" or "int8", of the values.

    Raises:
        UserError: sizes that don't fit the pattern, or an unknown precision.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        n: int,
        m: int,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        precision: str = "float32",
    ) -> None:
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(shape, n, m, bias, precision)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.groups = padding, groups

    @classmethod
    def like(
        cls, layer: nn.Conv2d, n: int, m: int, precision: str = "float32", bias: bool | None = None
    ) -> Self:
        """Return an unfilled layer of the sizes of a dense one.

        Raises:
            UserError: padding that a packed layer doesn't have.
        """
        return cls(
            layer.in_channels,
            layer.out_channels,
            pair(layer.kernel_size),
            n,
            m,
            stride=pair(layer.stride),
            padding=fixed_padding(layer),
            dilation=pair(layer.dilation),
            groups=layer.groups,
            bias=layer.bias is not None if bias is None else bias,
            precision=precision,
        )

    @classmethod
    def from_dense(
        cls, layer: nn.Conv2d, n: int, m: int, precision: str = "float32", name: str | None = None
    ) -> Self:
        """Pack a dense layer whose every block of `m` weights has at most `n` that are not zero.

        Args:
            layer: is not changed.
            n: weights kept in a block.
            m: block length.
            precision: of the values.
            name: of the layer, for errors.

        Raises:
            UserError: a weight that isn't N:M (the layer and its first offending block are named),
                or padding that a packed layer doesn't have.
        """
        refuse_unpackable(layer, name)
        return cls.like(layer, n, m, precision)._fill(layer, name)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map `(B, C, H, W)` to activation(conv2d(x, W) + bias + add), `(B, O, OH, OW)`.

        `add` may also be broadcast; it is then added outside the kernel.
        """
        call = self._prepared(x, add)
        if call is not None:
            return call(x, add)
        self._check_types(x, self.bias, self.scale)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise UserError(
                f"input of shape {tuple(x.shape)}: expected (B, {self.in_channels}, H, W)"
            )

        def run(add: Tensor | None, activation: str) -> Tensor:
            return nm.conv2d(
                x, self.values, self.index, self.scale, self.bias, add, (self.n, self.m),
                self.kernel_size, self.stride, self.padding, self.dilation, self.groups, activation,
            )  # fmt: skip

        height, width = (
            (
                x.shape[2 + i]
                + 2 * self.padding[i]
                - self.dilation[i] * (self.kernel_size[i] - 1)
                - 1
            )
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        shape = (x.shape[0], self.out_channels, height, width)
        y = finish(run, x, add, shape, self.activation)
        self._remember(x)
        return y

    def _prepare(self, shape: torch.Size) -> native.Prepared:
        return native.prepare_conv2d(
            shape, self.values, self.index, self.scale, self.bias, (self.n, self.m),
            self.kernel_size, self.stride, self.padding, self.dilation, self.groups,
            self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        for name, usual in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join([*parts, self._described()])
