"""What SMMix does to images, tokens and logits, as functions; its equations are in `smmix.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Windows",
    "cross_entropy",
    "extreme_windows",
    "paste_windows",
    "region_means",
    "smmix_loss",
    "smooth_labels",
    "window_mask",
]


class Windows(NamedTuple):
    """Top left token of one window an image, `(B,)` each, int64."""

    row: Tensor
    column: Tensor


def extreme_windows(scores: Tensor, side: int) -> tuple[Windows, Windows]:
    """Find each image's least attended window, and its pair's most attended one.

    Args:
        scores: of S x S tokens, `(B, S, S)`.
        side: of the square windows, in tokens, 1 to S.

    Returns:
        Where image b is pasted over, and what of image B-1-b is pasted there. Of equal windows, the
        first by rows.
    """
    sums = functional.avg_pool2d(scores.unsqueeze(1), side, stride=1)[:, 0]  # mean = sum / side**2
    width = sums.shape[-1]
    flat = sums.flatten(1)
    least, most = flat.argmin(dim=1), flat.argmax(dim=1).flip(0)
    return tuple(  # type: ignore[return-value]
        Windows(at.div(width, rounding_mode="floor"), at % width) for at in (least, most)
    )


def paste_windows(
    images: Tensor, target: Windows, source: Windows, side: int, pixels: int = 1
) -> Tensor:
    """Paste the source window of image B-1-b over the target window of image b.

    All windows are read from the unmixed batch.

    Args:
        images: `(B, C, H, W)`.
        target: windows to paste over, by image.
        source: windows to take, of the other image of each pair.
        side: of the windows, in tokens.
        pixels: of a token's side.
    """
    corners = torch.stack([*target, *source], dim=1) * pixels
    # On a CPU slices are copied by lines, indices pixel by pixel; a GPU would wait for the corners.
    paste = _by_slices if images.device.type == "cpu" else _by_index
    return paste(images, corners, side * pixels)


def _by_slices(images: Tensor, corners: Tensor, length: int) -> Tensor:
    mixed, last = images.clone(), len(images) - 1
    for b, (i, j, k, m) in enumerate(corners.tolist()):
        mixed[b, :, i : i + length, j : j + length] = images[
            last - b, :, k : k + length, m : m + length
        ]
    return mixed


def _by_index(images: Tensor, corners: Tensor, length: int) -> Tensor:
    span = torch.arange(length, device=images.device)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    lines = corners[:, :, None] + span  # (B, 4, length)
    i, k = lines[:, 0, :, None], lines[:, 2, :, None]
    j, m = lines[:, 1, None], lines[:, 3, None]
    mixed = images.clone()
    mixed[image, :, i, j] = images[len(images) - 1 - image, :, k, m]
    return mixed


def window_mask(windows: Windows, side: int, tokens: int) -> Tensor:
    """Return which of `tokens` x `tokens` tokens lie in each image's window, `(B, N)`, bool."""
    span = torch.arange(tokens, device=windows.row.device)
    rows = (span >= windows.row[:, None]) & (span < windows.row[:, None] + side)
    columns = (span >= windows.column[:, None]) & (span < windows.column[:, None] + side)
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def region_means(tokens: Tensor, source: Tensor) -> Tensor:
    """Average tokens over the target's region and over the pasted one.

    Args:
        tokens: `(B, N, C)`.
        source: which tokens are pasted ones, `(B, N)`, bool.

    Returns:
        `(B, 2, C)`: the target's mean, then the source's.
    """
    masks = torch.stack([~source, source], dim=1)
    # Sums are divided, instead of tokens weighted: bfloat16 has no exact share.
    sums = masks.to(tokens.dtype) @ tokens
    return sums / masks.sum(dim=2, keepdim=True).to(sums.dtype)


def smooth_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return one-hot targets `(B, K)` of which a share is spread over all classes."""
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    inside = labels.long().clamp(0, classes - 1)[:, None]  # what is outside is refused with a name
    return targets.scatter_(1, inside, 1 - smoothing + off)


def smmix_loss(
    output: Tensor,
    target_output: Tensor,
    source_output: Tensor,
    targets: Tensor,
    unmixed: Tensor,
    lam: float,
) -> Tensor:
    """Return L_cls + L_fine + L_con.

    Args:
        output: logits of the mixed images, `(B, K)`.
        target_output: logits of the targets' regions.
        source_output: logits of the pasted regions.
        targets: of the unmixed images, each row a distribution, `(B, K)`.
        unmixed: logits of the unmixed images; no gradient flows into them.
        lam: the target's share of the area.
    """
    log_probabilities = output.float().log_softmax(dim=1)  # once, for both terms
    others = targets.flip(0)
    mixed = lam * targets + (1 - lam) * others
    l_cls = -(mixed * log_probabilities).sum(dim=1).mean()
    l_fine = 0.5 * (cross_entropy(target_output, targets) + cross_entropy(source_output, others))
    unmixed = unmixed.detach().float()
    teacher = (lam * unmixed + (1 - lam) * unmixed.flip(0)).softmax(dim=1)  # logits are mixed
    l_con = functional.kl_div(log_probabilities, teacher, reduction="batchmean")
    return l_cls + l_fine + l_con


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits and targets that are distributions."""
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1).mean()
