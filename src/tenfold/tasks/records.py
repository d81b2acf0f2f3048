"""What methods tell about a finished run: `methods.json`, with small pictures of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.data import ImageData, LabelledData
from tenfold.methods import Method
from tenfold.tasks.folder import RunFolder, write_json

__all__ = ["write_records"]

_SIDE = 64  # pixels of a picture's longer side in the report, at least


def write_records(methods: Sequence[Method], data: LabelledData, folder: RunFolder) -> None:
    """Write `methods.json`, if a method has anything to tell."""
    entries = []
    for method in methods:
        record = method.record()
        if record:
            groups = record.get("images", [])
            images = [_pictures(group, data) for group in groups if isinstance(data, ImageData)]
            entries.append({"method": method.key(), **record, "images": images})
    if entries:
        write_json(folder.records, {"format": 1, "methods": entries})


def _pictures(group: dict[str, Any], data: ImageData) -> dict[str, Any]:
    if "pictures" in group:
        items = [
            {"png": png(image), "caption": note}
            for image, note in zip(group["pictures"], group["notes"], strict=True)
        ]
        return {"title": group["title"], "items": items, "wide": True}
    ids = torch.tensor(group["ids"], dtype=torch.int64)
    images, labels = data.train_images(ids), data.train.labels()[ids].tolist()
    items = [
        {
            "png": picture(image),
            "caption": f"{data.train.name(index)}, {data.classes[label]}: {note}",
        }
        for index, image, label, note in zip(
            ids.tolist(), images, labels, group["notes"], strict=True
        )
    ]
    return {"title": group["title"], "items": items}


def png(image: Tensor) -> str:
    """Return a uint8 picture `(3, h, w)` as a PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def picture(image: Tensor) -> str:
    """Return a uint8 image `(C, H, W)` as a PNG in base64, its pixels doubled until it is seen."""
    from PIL import Image

    pixels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    drawn = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, -(-_SIDE // max(drawn.size)))
    if factor > 1:
        size = (drawn.width * factor, drawn.height * factor)
        drawn = drawn.resize(size, Image.Resampling.NEAREST)
    drawn.thumbnail((2 * _SIDE, 2 * _SIDE))
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
