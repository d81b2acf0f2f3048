"""Mean and standard deviation of a set's channels."""

from __future__ import annotations

import numpy as np
import torch

from tenfold.data.split import Split

__all__ = ["channel_statistics"]

SAMPLES = 5000


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Return mean and std per channel of images scaled to 0..1, to four digits.

    Up to 5,000 images are read, evenly spread over the split, the same ones each time.

    Raises:
        BadImage: one of them can't be read.
    """
    count = min(SAMPLES, len(split.ids))
    chosen = split.ids[torch.arange(count) * len(split.ids) // count]
    # Counting the 256 values is exact, and faster than sums over pixels turned into float64.
    counts = np.zeros((1, 256), np.int64)
    for index in chosen.tolist():
        image = split.images.image(index).flatten(1).numpy()
        counts = counts + np.stack([np.bincount(channel, minlength=256) for channel in image])
    shares = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    # A channel of one value would divide by zero; one grey level is as little as there can be.
    std = np.maximum(np.sqrt(variance), 1 / 255)
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]
