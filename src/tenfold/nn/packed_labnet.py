"""LAB-Net in the form that compiled kernels run as a whole, for inference.

`tenfold.optimize` puts it in the place of the network. Its one buffer, `weights`, holds the tensors
of the network's state dict one after the other; the kernels' own layout is made of them at the
first call, and leaves out what is zero where enough of it is.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.kernels.labnet import labnet
from tenfold.kernels.labnet_weights import shapes, size_of
from tenfold.nn.kernel_layer import KernelLayer
from tenfold.nn.labnet import LABNet
from tenfold.nn.ring_attention import ring_of

__all__ = ["PackedLABNet", "unpackable_labnet"]


class PackedLABNet(KernelLayer):
    """A whole LAB-Net, all zeros until it is filled.

    It is for inference: an input that needs a gradient is refused.

    >>> network = LABNet(4, attention_size=16).eval()
    >>> packed = PackedLABNet.from_network(network)
    >>> codes, mask = torch.rand(1, 3, 66, 66), torch.zeros(1, 1, 66, 66)
    >>> with torch.no_grad():
    ...     torch.allclose(packed(codes, mask), network(codes, mask), atol=1e-5)
    True

    Args:
        width: channels inside, even and at least 4.
        attention_size: height and width at which the ring attention works.

    Raises:
        UserError: another width or size.
    """

    weights: Tensor

    def __init__(self, width: int, attention_size: tuple[int, int]) -> None:
        super().__init__()
        with torch.device("meta"):  # it refuses what can't be
            fresh = LABNet(width, attention_size)
        self.width = fresh.width
        self.attention_size = fresh.attention_size
        self.bias = None  # they are among the weights
        self.register_buffer("weights", torch.zeros(size_of(width)))

    @classmethod
    def from_network(cls, network: nn.Module) -> Self:
        """Return the packed form of a LAB-Net, which is not changed.

        Raises:
            UserError: the kernels can't compute it, saying why.
        """
        why = unpackable_labnet(network)
        if why is not None:
            raise UserError(f"{type(network).__name__} can't be packed: {why}")
        assert isinstance(network, LABNet)
        made = cls(network.width, network.attention_size)
        tensors = network.state_dict().values()
        made.weights = torch.cat([tensor.detach().flatten() for tensor in tensors])
        return made.eval()

    @property
    def activation(self) -> str:
        """Return that of its last layer, which is fixed."""
        return "leaky_relu"

    @activation.setter
    def activation(self, name: str) -> None:
        """Stay with it: fusing sets and unsets activations."""

    @property
    def weight(self) -> Tensor:
        """Return all weights as one row."""
        return self.weights.unsqueeze(0)

    def macs(self, output: Tensor) -> int:
        """Return the multiply-adds behind a batch of codes.

        Those of the ring attention, which depend on the mask, come on top.
        """
        images, _, height, width = output.shape
        total = 0
        for name, shape in shapes(self.width).items():
            if not name.endswith("weight"):
                continue
            pixels = height * width
            if "attention.reduce" in name or "attention.expand" in name:
                pixels = 1
            elif "highpass" in name:
                pixels = (height - 2) * (width - 2)
            elif ".query." in name or ".key." in name:
                pixels = math.prod(self.attention_size)
            total += pixels * math.prod(shape)
        return images * total

    def forward(self, lab_codes: Tensor, mask: Tensor, ring: Tensor | None = None) -> Tensor:
        """Map codes of images in shadow to codes without, of the same shape and not clamped.

        Args:
            lab_codes: `(B, 3, H, W)` in [0, 1], with sides of at least 65.
            mask: `(B, 1, H, W)` of zeros and ones, 1 in shadow.
            ring: likewise, 1 where the shadow may look for its colours; without one, five pixels
                around the mask.

        Raises:
            UserError: other shapes, types or values.
            StateError: a gradient is wanted.
        """
        LABNet.check(lab_codes, mask, ring)
        self._check_types(lab_codes, self.weights)
        ring = ring_of(mask) if ring is None else ring
        return labnet(lab_codes, mask, ring, self.weights, self.width, self.attention_size)

    def extra_repr(self) -> str:
        """Return what the printed layer says in brackets."""
        return f"width={self.width}, attention_size={self.attention_size}"


def unpackable_labnet(network: nn.Module) -> str | None:
    """Say why a module is no LAB-Net that the kernels compute, or return None."""
    if type(network) is not LABNet:
        return "it is no LABNet"
    with torch.device("meta"):
        fresh = LABNet(network.width, network.attention_size, network.highpass)
    if str(network) != str(fresh):  # kinds, sizes and dilations of all layers
        return "its layers were changed"
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return "it has hooks"
    if network.training:
        return "it is in training mode"
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return "its weights are not torch.float32"
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "it is not on a CPU"
    return None
