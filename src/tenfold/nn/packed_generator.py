"""A ResNet or mobile ResNet generator in the form that one compiled kernel runs as a whole.

`tenfold.optimize` puts it in the place of the network. Its one buffer, `weights`, holds all weights
in the kernel's order; the state dict has it as it is, with the program beside it in the artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.kernels.generator import generator
from tenfold.kernels.generator_program import (
    IMAGE,
    NOTHING,
    Activation,
    Norm,
    Op,
    Step,
    as_program,
    macs,
    pack_bias,
    pack_weight,
    steps_of,
    weights_needed,
)
from tenfold.nn.generators import MobileResNetGenerator, ResidualBlock, ResNetGenerator, Separable
from tenfold.nn.instance_norm import InstanceNorm2d
from tenfold.nn.kernel_layer import KernelLayer

__all__ = ["PackedGenerator", "unpackable_generator"]

# Maps: what convolutions write in turn, and the residual stream, old and new.
WRITTEN, STREAM = (0, 1), (2, 3)


class PackedGenerator(KernelLayer):
    """A whole generator, all zeros until it is filled.

    It is for inference: an input that needs a gradient is refused. It ends with a hyperbolic
    tangent, and takes in nothing that follows.

    >>> network = MobileResNetGenerator(8, blocks=2).eval()
    >>> packed = PackedGenerator.from_network(network)
    >>> x = torch.rand(1, 3, 32, 32) * 2 - 1
    >>> with torch.no_grad():
    ...     torch.allclose(packed(x), network(x), atol=1e-5)
    True

    Args:
        program: what the kernel does, see `tenfold.kernels.generator`.
        size: how many numbers the weights are.
        epsilon: of the instance norms.
        multiple: what both sides of an image must be a multiple of.

    Raises:
        UserError: a program that can't be.
    """

    weights: Tensor

    def __init__(
        self, program: Sequence[int], size: int, epsilon: float = 1e-5, multiple: int = 4
    ) -> None:
        super().__init__()
        needed = weights_needed(program)
        if needed > size:
            raise UserError(f"a generator's program needs {needed} weights, and {size} are given")
        self.program = tuple(program)
        self.epsilon = epsilon
        self.multiple = multiple
        self.bias = None  # they are among the weights
        self.register_buffer("weights", torch.zeros(size))

    @classmethod
    def from_network(cls, network: nn.Module) -> Self:
        """Return the packed form of a generator, which is not changed.

        Raises:
            UserError: the kernel can't compute it, saying why.
        """
        why = unpackable_generator(network)
        if why is not None:
            raise UserError(f"{type(network).__name__} can't be packed: {why}")
        assert isinstance(network, ResNetGenerator)
        builder = _Builder(network)
        weights = torch.cat(builder.parts)
        epsilon = next((m.eps for m in network.modules() if isinstance(m, InstanceNorm2d)), 1e-5)
        made = cls(as_program(builder.steps), len(weights), epsilon, multiple=network.multiple)
        made.weights = weights
        return made.eval()

    @property
    def activation(self) -> str:
        """Return the fixed one."""
        return "tanh"

    @activation.setter
    def activation(self, name: str) -> None:
        """Stay with it: fusing sets and unsets activations."""

    @property
    def weight(self) -> Tensor:
        """Return all weights, in the kernel's order, as one row."""
        return self.weights.unsqueeze(0)

    @property
    def steps(self) -> list[Step]:
        """Return the program's steps."""
        return steps_of(self.program)

    def macs(self, output: Tensor) -> int:
        """Return the multiply-adds behind a batch of images, which are of the output's size."""
        return len(output) * macs(self.program, output.shape[2], output.shape[3])

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to images of the same size, in [-1, 1].

        Raises:
            UserError: sides, channels or a type that don't fit.
            StateError: a gradient is wanted.
        """
        self._check_types(x)
        return generator(x, self.weights, self.program, self.epsilon)

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        steps = self.steps
        return (
            f"{steps[0].channels}, {steps[-1].outputs}, width={steps[0].outputs}, "
            f"steps={len(steps)}"
        )


def unpackable_generator(network: nn.Module) -> str | None:
    """Say why a module is no generator that the kernel computes, or return None."""
    if type(network) not in (ResNetGenerator, MobileResNetGenerator):
        return "it is no ResNetGenerator or MobileResNetGenerator"
    assert isinstance(network, ResNetGenerator)
    fresh = _skeleton(network)
    if fresh is None or [(n, type(m)) for n, m in network.named_modules()] != fresh:
        return "its layers were changed"
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has hooks"
        if isinstance(module, InstanceNorm2d) and module.frozen is not None:
            return "its instance norms are frozen"
    if network.training:
        return "it is in training mode"
    norms = [module for module in network.modules() if isinstance(module, InstanceNorm2d)]
    if len({norm.eps for norm in norms}) > 1:
        return "its instance norms have several epsilons"
    tensors = [*network.parameters(), *network.buffers()]
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
        return "its weights are not torch.float32"
    if any(t.device.type != "cpu" for t in tensors):
        return "it is not on a CPU"
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    if len({id(m.weight) for m in convolutions}) != len(convolutions):
        return "layers share a weight"
    return None


def _skeleton(network: ResNetGenerator) -> list[tuple[str, type]] | None:
    """Return names and types of the modules that the network had when it was built."""
    blocks = sum(isinstance(module, ResidualBlock) for module in network.modules())
    if blocks < 1:
        return None
    with torch.device("meta"):
        fresh = type(network)(network.ngf, network.channels, network.outputs, network.norm, blocks)
    return [(name, type(module)) for name, module in fresh.named_modules()]


class _Builder:
    """Writes a network's program and weights down, from the image on.

    Attributes:
        steps: so far.
        parts: of the weights, so far.
    """

    def __init__(self, network: ResNetGenerator) -> None:
        self.steps: list[Step] = []
        self.parts: list[Tensor] = []
        self._size = 0
        self._map = IMAGE  # what was written last
        self._norm: nn.Module | None = None  # of it
        self._bias: Tensor | None = None
        self._activation = Activation.CLAMP if network.clamps else Activation.NONE
        self._add = self._stream = NOTHING
        layers = list(network.model)
        begin = next(i for i, layer in enumerate(layers) if isinstance(layer, ResidualBlock))
        end = begin + sum(isinstance(layer, ResidualBlock) for layer in layers)
        for layer in layers[:begin]:
            self._take(layer)
        for block in layers[begin:end]:
            assert isinstance(block, ResidualBlock)
            self._residual(block)
        for layer in layers[end:]:
            self._take(layer)
        self.steps[-1] = replace(self.steps[-1], writes=IMAGE)
        if self._bias is not None:
            self.steps[-1] = replace(self.steps[-1], bias=self._put(pack_bias(self._bias)))

    def _take(self, layer: nn.Module) -> None:
        """Take in a layer of the sequence; borders follow from the convolution."""
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            self._convolve(layer)
        elif isinstance(layer, InstanceNorm2d | nn.BatchNorm2d):
            self._norm = layer
            measured = isinstance(layer, InstanceNorm2d)
            self.steps[-1] = replace(self.steps[-1], measured=measured)
        elif isinstance(layer, nn.ReLU):
            self._activation = Activation.RELU
        elif isinstance(layer, Separable):
            for each in layer.conv:
                self._take(each)

    def _residual(self, block: ResidualBlock) -> None:
        """Keep the block's input, of which its first convolution makes its rows."""
        fresh = STREAM[0] if self._stream != STREAM[0] else STREAM[1]
        for index, layer in enumerate(block.conv_block):
            self._take(layer)
            if index == 1:  # the first convolution, or separable pair
                first = len(self.steps) - (2 if isinstance(layer, Separable) else 1)
                self.steps[first] = replace(self.steps[first], keep=fresh)
        self._add = self._stream = fresh

    def _convolve(self, layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
        op = _op(layer)
        norm, norms = self._norms()
        weight = layer.weight.detach()
        outputs = layer.out_channels
        writes = WRITTEN[0] if self._map != WRITTEN[0] else WRITTEN[1]
        self.steps.append(
            Step(
                op,
                layer.in_channels,
                outputs,
                layer.kernel_size[0],
                self._map,
                writes,
                norm,
                self._activation,
                self._add,
                NOTHING,
                self._put(pack_weight(op, weight)),
                norms=norms,
            )
        )
        self._map, self._norm, self._activation, self._add = writes, None, Activation.NONE, NOTHING
        # An instance norm takes a bias away again; a batch norm takes it into its shift.
        self._bias = None if layer.bias is None else layer.bias.detach()

    def _norms(self) -> tuple[Norm, int]:
        """Return the norm of what was written last, and where its scales and shifts are."""
        norm = self._norm
        if norm is None:
            return Norm.NONE, NOTHING
        if isinstance(norm, InstanceNorm2d):
            return Norm.INSTANCE, NOTHING
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        mean = norm.running_mean.double() - (0 if self._bias is None else self._bias.double())
        shift = norm.bias.detach().double() - mean * scale
        return Norm.GIVEN, self._put(torch.cat([scale, shift]).float())

    def _put(self, values: Tensor) -> int:
        """Append to the weights, and return where."""
        begin = self._size
        room = -len(values) % 16  # whole lines of the cache
        self.parts += [values, values.new_zeros(room)]
        self._size += len(values) + room
        return begin


def _op(layer: nn.Conv2d | nn.ConvTranspose2d) -> Op:
    if isinstance(layer, nn.ConvTranspose2d):
        return Op.UP
    if layer.stride[0] == 2:
        return Op.DOWN
    if layer.groups > 1 or (layer.kernel_size[0] == 3 and layer.weight.shape[1] == 1):
        return Op.DEPTHWISE
    return Op.POINTWISE if layer.kernel_size[0] == 1 else Op.CONVOLUTION
