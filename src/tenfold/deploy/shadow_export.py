"""Export a shadow remover: codes and a mask go in, codes come out, at any height and width.

Masks decide how much the ring attention of a LAB-Net works, so the file is checked with masks that
differ from the traced one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.deploy.onnx import ExportResult, export
from tenfold.measure.onnx_write import Signature
from tenfold.nn.labnet import LEAST_SIDE, LABNet

__all__ = ["export_remover"]

# Of the attention; beyond, the form with fixed shapes multiplies too many pairs of pixels.
MASKED_SIDE = 64
HEIGHT, WIDTH = 72, 80


def export_remover(
    network: nn.Module,
    path: str | Path,
    to: str = "onnx",
    metadata: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Write a remover network with the inputs `codes` and `mask` and the output `result`.

    The file takes any height and width from 65 to 4095, in multiples of the network's `multiple`.
    It takes any batch, but for LAB-Nets whose attention is larger than 64 x 64, which take one
    image at a time. A file as a callable is a network for `ShadowRemover`.

    Args:
        network: LABNet, or another that maps codes `(B, 3, H, W)` and a mask `(B, 1, H, W)` to
            codes.
        path: a file or a folder, as for `export`.
        to: onnx, openvino or torch.
        metadata: JSON-able facts; `preprocessing` with task, space, guess and composite lets the
            command line use the file.

    Raises:
        UserError: see `export`.
    """
    multiple = int(getattr(network, "multiple", 1))
    batch = None
    form = None
    if isinstance(network, LABNet):
        form = network.attention1.exported
        large = max(network.attention_size) > MASKED_SIDE
        network.export_attention("gathered" if large else "masked")
        batch = 1 if large else None
    signature = Signature(
        inputs=("codes", "mask"),
        outputs=("result",),
        least_side=LEAST_SIDE,
        batch=batch,
        draw=_drawn,
    )
    height, width = (side + -side % multiple for side in (HEIGHT, WIDTH))
    example = torch.zeros(1, 3, height, width), torch.zeros(1, 1, height, width)
    told = {"least_side": LEAST_SIDE, "multiple": multiple, **(metadata or {})}
    try:
        return export(
            network,
            path,
            _drawn(example, 1, 0),
            to=to,
            metadata=told,
            dynamic_size=multiple,
            signature=signature,
        )
    finally:
        if form is not None and isinstance(network, LABNet):
            network.export_attention(form)


def _drawn(inputs: tuple[Tensor, ...], batch: int, seed: int) -> tuple[Tensor, ...]:
    """Draw codes in [0, 1] and masks of a rectangle each, of the inputs' height and width."""
    height, width = inputs[0].shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(batch, 3, height, width, generator=generator)
    mask = torch.zeros(batch, 1, height, width)
    for item in range(batch):
        top, left = (
            int(torch.randint(0, side // 2, (1,), generator=generator)) for side in (height, width)
        )
        mask[item, :, top : top + height // 3, left : left + width // 3] = 1
    return codes, mask
