"""Put a trained network into the Winograd domain in one go, without training."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import UserError
from tenfold.kernels import winograd_reference
from tenfold.kernels.winograd_transforms import column_count, tile_of, winograd_weight
from tenfold.methods.winograd_columns import compensation, eliminate, error_matrix, scales_of
from tenfold.methods.winograd_layer import replace_module
from tenfold.nn.winograd import DEFAULT_POINTS, WinogradConv3d
from tenfold.nn.winograd_fit import unconvertible, zero_padding

__all__ = ["convert"]


def convert(
    model: nn.Module,
    tile: int | Sequence[int],
    keep_ratio: float = 1.0,
    calibration: Iterable[Any] | None = None,
    min_channels: int = 16,
    *,
    points: str = DEFAULT_POINTS,
) -> nn.Module:
    """Return a copy of a network whose 3x3x3 convolutions work in the Winograd domain.

    With `keep_ratio=1` it computes the same, up to rounding. With less, each layer loses the
    columns whose loss costs its output the least, one by one, and the others take over in closed
    form, by the second moment of the layer's inputs (see `error_matrix`).

    Args:
        model: any network; is not changed.
        tile: outputs of a tile, 2, 4 or three of them for depth, height and width.
        keep_ratio: share of the columns to keep, in (0, 1].
        calibration: batches to measure the inputs' second moments with, a few hundred clips:
            tensors `(N, C, D, H, W)`, or tuples and mappings that begin with one. Without it
            inputs are taken for white noise, which real ones are far from. Not read with
            `keep_ratio=1`.
        min_channels: convolutions with fewer input channels stay as they are.
        points: set of the transforms' points.

    Raises:
        UserError: a value is out of range, or no layer can be converted: the reasons are listed.

    >>> model = nn.Sequential(nn.Conv3d(16, 8, 3, padding=1), nn.ReLU())
    >>> convert(model, tile=(2, 4, 4))[0]
    WinogradConv3d(16, 8, tile=(2, 4, 4), columns=144 of 144, padding=(1, 1, 1))
    """
    sizes = tile_of(tile)
    final = _final_columns(sizes, keep_ratio)
    made = copy.deepcopy(model)
    layers = _eligible(made, min_channels)
    moments: dict[str, Tensor] = {}
    if final < column_count(sizes):
        if calibration is None:
            warnings.warn(
                "convert got no calibration, and takes the layers' inputs for white noise: give "
                "it a few hundred clips to lose less",
                stacklevel=2,
            )
        else:
            moments = _moments(made, layers, calibration, sizes, points)
    for name, layer in layers.items():
        converted = _converted(layer, name, sizes, final, moments.get(name), points)
        made = replace_module(made, layer, converted)
    return made


def _final_columns(sizes: tuple[int, int, int], keep_ratio: float) -> int:
    if isinstance(keep_ratio, bool) or not 0 < keep_ratio <= 1:
        raise UserError(f"keep_ratio={keep_ratio!r}: expected a share in (0, 1]")
    every, outputs = column_count(sizes), math.prod(sizes)
    final = round(keep_ratio * every)
    if final < 1:
        raise UserError(f"keep_ratio={keep_ratio} keeps none of {every} columns: keep more")
    if final < outputs:
        warnings.warn(
            f"keep_ratio={keep_ratio} keeps {final} columns, fewer than the {outputs} outputs of a "
            f"tile {sizes}: its outputs will depend on each other; keep at least "
            f"{outputs / every:.3f}",
            stacklevel=3,
        )
    return final


def _eligible(model: nn.Module, min_channels: int) -> dict[str, nn.Conv3d]:
    found, reasons = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            continue
        reason = unconvertible(module)
        if reason is None and module.in_channels < min_channels:
            reason = f"{module.in_channels} input channels, fewer than min_channels={min_channels}"
        if reason is None and isinstance(module, nn.Conv3d):
            found[name] = module
        else:
            reasons.append(f"{name or 'the model'}: {reason}")
    if not found:
        listed = "; ".join(reasons[:4]) or "the model has no 3-D convolution"
        raise UserError(
            f"no layer can be put into the Winograd domain ({listed}): expected a 3x3x3 "
            "convolution with stride 1 among them"
        )
    return found


def _moments(
    model: nn.Module,
    layers: Mapping[str, nn.Conv3d],
    calibration: Iterable[Any],
    sizes: tuple[int, int, int],
    points: str,
) -> dict[str, Tensor]:
    """Run the network on all batches and return E[v v^T] of every layer's inputs."""
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def watch(name: str, layer: nn.Conv3d) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...]) -> None:
            total, count = winograd_reference.second_moment(
                args[0], sizes, zero_padding(layer), points
            )
            totals[name] = total if name not in totals else totals[name] + total
            counts[name] += count

        return layer.register_forward_pre_hook(observe)

    modes = {module: module.training for module in model.modules()}
    handles = [watch(name, layer) for name, layer in layers.items()]
    parameter = next(model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            for batch in calibration:
                model(_clips(batch).to(parameter.device, parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    unseen = [name for name in layers if not counts[name]]
    if unseen:
        raise UserError(
            f"layer {unseen[0]} saw no input while calibrating: expected at least one batch, and a "
            "network that calls it"
        )
    return {name: total / counts[name] for name, total in totals.items()}


def _clips(batch: object) -> Tensor:
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping) and batch:
            batch = next(iter(batch.values()))
        elif isinstance(batch, tuple | list) and batch:
            batch = batch[0]
        else:
            raise UserError(
                f"calibration gave a {type(batch).__name__}: expected tensors (N, C, D, H, W), or "
                "tuples and mappings that begin with one"
            )
    return batch


def _converted(
    layer: nn.Conv3d,
    name: str,
    sizes: tuple[int, int, int],
    final: int,
    moment: Tensor | None,
    points: str,
) -> WinogradConv3d:
    every = range(column_count(sizes))
    if final == len(every):
        return WinogradConv3d.from_dense(layer, sizes, points=points, name=name)
    weight = winograd_weight(layer.weight.detach().double(), sizes, points).flatten(2)
    scales = scales_of(sizes, points)
    scaled = weight.permute(2, 0, 1).cpu() * scales[:, None, None]  # (t^3, O, C)
    gamma = error_matrix(sizes, moment, points)
    removed = eliminate(gamma, scaled.flatten(1), every, len(every) - final)
    kept = sorted(set(every) - set(removed))
    moved = compensation(gamma, kept, removed)
    values = scaled[kept] + torch.einsum("rk,roc->koc", moved, scaled[removed])
    made = WinogradConv3d.like(layer, sizes, kept, points=points, name=name)
    values = values / scales[kept][:, None, None]
    return made.fill(values, None if layer.bias is None else layer.bias.detach())
