"""A frozen network that answers: logits, features of named layers, and how often it was asked."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.methods.features import Taps

__all__ = ["Teacher", "at_least_float32"]


class Teacher:
    """A teacher in evaluation mode, without gradients.

    Args:
        network: in evaluation mode, with frozen parameters.
        layers: names of the modules whose outputs are features.
        precision: of its products: `same` as the student's, `float32` or `bfloat16`.

    Raises:
        UserError: the network trains, its parameters want gradients, or a layer isn't there.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str] = (),
        precision: Literal["same", "float32", "bfloat16"] = "same",
    ):
        self.network = network
        self.precision = precision
        self.check()
        self._taps = Taps(network, layers, "teacher")
        self._device: torch.device | None = None
        self._digest: int | None = None

    @property
    def device(self) -> torch.device:
        """Where it is at present."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    def check(self) -> None:
        """Refuse a teacher that would learn.

        Raises:
            UserError: training mode, or parameters with gradients.
        """
        if any(module.training for module in self.network.modules()):
            raise UserError(
                "the teacher is in training mode, so its answers depend on the batch: call "
                "teacher.eval() first"
            )
        if any(parameter.requires_grad for parameter in self.network.parameters()):
            raise UserError(
                "the teacher's parameters want gradients: call teacher.requires_grad_(False) first"
            )

    def answer(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits `(B, C)` in float32, and the features of the layers.

        Raises:
            UserError: the network has begun to train, or doesn't return logits.
        """
        if self.network.training:
            self.check()
        if images.device != self._device:
            self.network.to(images.device)
            self._device = images.device
        weight = next(self.network.parameters(), None)
        with torch.no_grad(), self._products(images.device.type):
            logits = self.network(images if weight is None else images.to(weight.dtype))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"the teacher returns {given} for {len(images)} images: expected logits (B, C)"
            )
        features = [at_least_float32(feature) for feature in self._taps.take()]
        return at_least_float32(logits), features

    def _products(self, device: str) -> contextlib.AbstractContextManager[object]:
        if self.precision == "same":
            return contextlib.nullcontext()
        if self.precision == "float32":
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, torch.bfloat16)

    def digest(self) -> int:
        """Return a checksum of its weights and buffers, as they were when first asked."""
        if self._digest is not None:
            return self._digest
        found = 0
        for value in self.network.state_dict().values():
            if isinstance(value, Tensor):
                data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                found = zlib.crc32(data.numpy().tobytes(), found)
        self._digest = found
        return found

    def remove(self) -> None:
        """Take the hooks away."""
        self._taps.remove()


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values as float32, and others as they are."""
    return values if values.dtype == torch.float64 else values.float()
