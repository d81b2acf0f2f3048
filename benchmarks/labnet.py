"""LAB-Net: how long a photo without its shadow takes, everything included, in every engine.

    python benchmarks/labnet.py                          # 256x256 and 480x640: 8 and 40 minutes
    python benchmarks/labnet.py --sizes 256x256 --networks c32 --seconds 20
    python benchmarks/labnet.py --engines naive pytorch tenfold --output labnet_short

Networks: the paper's, C=32 with an attention of 256; C=8 and C=16 with 64; and C=16 with one of
four weights kept (1:4, as LBC leaves them). Each is timed from a float RGB image and a mask to an
RGB image: codes, ring, network, colours and blend with the photo. The mask is a disc of a fifth of
the area; what the attention takes depends on it. Weights are random: they don't change the time,
but for zeros.

- naive: the loop form of the released code. One image after the other, colours by scikit-image,
  convolutions and padding in contiguous order, `std` over two axes, queries and keys gathered by
  booleans and written back in place. It gives the same image, which is checked.
- pytorch: tenfold's LABNet as it is, called by its ShadowRemover, channels-last.
- torch.compile: the same, compiled; on request, as compiling takes minutes.
- onnxruntime, openvino: its export with an attention that gathers (C=32) or masks, of fixed sizes,
  which suits them; in float32.
- tenfold: what `tenfold.optimize` makes of it.

All that is given runs in turn in one process. The share of the limit is the network's
multiply-adds, those of the attention included, over what this processor could do in the same time:
the most multiply-adds a second of one thread with all operands in registers, measured in the same
run, times the number of threads. Multiply-adds with weights that are zero count, where nobody
leaves them out and where somebody does.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from skimage.color import lab2rgb, rgb2lab
from torch import Tensor, nn

import tenfold
from common import save
from resumable import command_of
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.measure.cost import count_cost
from tenfold.measure.quiet import quiet
from tenfold.measure.runners import OnnxModel, OpenVinoModel
from tenfold.measure.timing import interleave, paired_ratio
from tenfold.nn.labnet import LABNet
from tenfold.nn.labnet_blocks import EdgeChannelAttention
from tenfold.nn.ring_attention import RingAttention
from tenfold.nn.shadow_codes import lab_codes
from tenfold.nn.shadow_gain import soft_mask
from tenfold.nn.shadow_remover import ShadowRemover

NETWORKS = {"c32": (32, 256, 1), "c8": (8, 64, 1), "c16": (16, 64, 1), "c16_1:4": (16, 64, 4)}
ENGINES = ("naive", "pytorch", "torch.compile", "onnxruntime", "openvino", "tenfold")
ON_REQUEST = ("torch.compile",)
SHADOW = 0.2  # of the area
CHANGE = 0.3  # of codes, at most
# Wide attention would multiply too many pairs under a mask.
MASKED_SIDE = 64
PEAKS = 5  # measurements of the limit, before and after
# Of a network's codes, relative to the largest, and of images; scikit-image's colours are in double
# precision.
MOST_DIFFERENT, MOST_DIFFERENT_IMAGE = 1e-4, 1e-3

Run = Callable[[], Tensor]


class NaiveRingAttention(nn.Module):
    """Image by image, with gathers by booleans and writing in place."""

    def __init__(self, given: RingAttention) -> None:
        super().__init__()
        self.size, self.query, self.key, self.merge = (
            given.size,
            given.query,
            given.key,
            given.merge,
        )

    def forward(self, features: Tensor, mask: Tensor, ring: Tensor) -> Tensor:
        small, inside, around = (F.interpolate(x, self.size) for x in (features, mask, ring))
        queries, keys = self.query(small), self.key(small)
        for item in range(len(features)):
            shadow, lit = inside[item, 0] == 1, around[item, 0] == 1
            asked, known = queries[item][:, shadow], keys[item][:, lit]
            shares = torch.softmax(asked.T @ known / known.shape[0] ** 0.5, 1)
            keys[item][:, shadow] = (shares @ known.T).T
        return self.merge(torch.cat([features, F.interpolate(keys, features.shape[2:])], 1))


class NaiveEdgeChannelAttention(nn.Module):
    """With PyTorch's own deviation over two axes."""

    def __init__(self, given: EdgeChannelAttention) -> None:
        super().__init__()
        self.reduce, self.expand, self.highpass = given.reduce, given.expand, given.highpass

    def forward(self, x: Tensor) -> Tensor:
        deviations = self.highpass(x).std(dim=(2, 3))
        gate = self.expand(F.leaky_relu(self.reduce(deviations), 0.2)).sigmoid()
        return x * gate[:, :, None, None]


def naive(network: LABNet) -> nn.Module:
    """Return the network with the released code's attentions."""
    made = copy.deepcopy(network)
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RingAttention):
                setattr(module, name, NaiveRingAttention(child))
            elif isinstance(child, EdgeChannelAttention):
                setattr(module, name, NaiveEdgeChannelAttention(child))
    return made


def naive_remover(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what removes shadows of one image after the other, with colours by scikit-image."""
    scale, shift = np.array([100, 255, 255]), np.array([0, 128, 128])

    def remove(images: Tensor, masks: Tensor) -> Tensor:
        found = []
        for image, mask in zip(images, masks, strict=True):
            codes = (rgb2lab(image.permute(1, 2, 0).numpy()) + shift) / scale
            given = torch.from_numpy(codes).float().permute(2, 0, 1)[None].contiguous()
            result = network(given, mask[None])[0].permute(1, 2, 0).numpy()
            made = lab2rgb(result.astype(np.float64) * scale - shift)
            found.append(torch.from_numpy(made).float().permute(2, 0, 1))
        return torch.lerp(images, torch.stack(found), soft_mask(masks))

    return remove


def make_network(name: str, codes: Tensor, mask: Tensor) -> LABNet:
    """Return a network that changes these codes by as much as a shadow does."""
    width, size, spare = NETWORKS[name]
    torch.manual_seed(0)
    network = LABNet(width, size).eval().requires_grad_(False)
    nn.init.dirac_(network.last.conv.weight)
    if spare > 1:
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.weight.shape[1] % spare == 0:
                kept = one_of(module.weight.data, spare)
                module.weight.data = kept * (module.weight.norm() / kept.norm())
    change = (network(codes, mask) - codes).abs().max()
    for block in (network.block7, network.block8):
        for parameter in block.out.parameters():  # the result is linear in these
            parameter.mul_(CHANGE / change)
    return network


def one_of(weight: Tensor, many: int) -> Tensor:
    """Keep the largest of each `many` weights along the input channels."""
    innermost = weight.movedim(1, -1)
    blocks = innermost.reshape(-1, many)
    kept = torch.zeros_like(blocks).scatter(1, blocks.abs().argmax(1, True), 1.0)
    return (blocks * kept).reshape(innermost.shape).movedim(-1, 1).contiguous()


def make_input(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return a photo with a dark disc, and the disc."""
    photo = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    photo = F.interpolate(photo, (height, width), mode="bilinear", antialias=True)
    rows, columns = (torch.arange(side) - (side - 1) / 2 for side in (height, width))
    inside = rows[:, None] ** 2 + columns**2 < SHADOW * height * width / torch.pi
    mask = inside.float()[None, None]
    return photo * (1 - 0.6 * mask), mask


def make_file(network: LABNet, inputs: tuple[Tensor, Tensor], path: Path) -> Path:
    """Write the network's plain export, of one size."""
    network.export_attention("masked" if max(network.attention_size) <= MASKED_SIDE else "gathered")
    with quiet():
        torch.onnx.export(network, inputs, str(path), dynamo=True)
    return path


def prepare(
    engine: str, network: LABNet, inputs: tuple[Tensor, Tensor], threads: int, path: Path
) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]:
    """Return what maps codes and mask to codes in an engine, and what is to be told about it."""
    if engine == "naive":
        return naive(network), {}
    if engine == "pytorch":
        return copy.deepcopy(network).to(memory_format=torch.channels_last), {}
    if engine == "torch.compile":
        reordered = copy.deepcopy(network).to(memory_format=torch.channels_last)
        return torch.compile(reordered, dynamic=False), {}
    if engine == "tenfold":
        fast = tenfold.optimize(network, inputs)
        return fast, {"plan_ms": fast.plan.network_ms, "plan_difference": fast.plan.difference}
    if not path.exists():
        make_file(network, inputs, path)
    runner = OnnxModel if engine == "onnxruntime" else OpenVinoModel
    return runner(path, threads=threads, batch=1), {}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def measure(
    size: tuple[int, int],
    names: Sequence[str],
    engines: Sequence[str],
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """Time every network in every engine at one size."""
    torch.set_num_threads(threads)
    images, mask = make_input(*size)
    limit = peak()
    calls: dict[str, Callable[[], object]] = {}
    cells: dict[str, dict[str, Any]] = {}
    macs: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in names:
            given = lab_codes(images), mask
            network = make_network(name, *given)
            expected = network(*given)
            expected_image = ShadowRemover(network)(images, mask)
            macs[name] = count_cost(network, given).macs, network.attention_macs(mask)
            cells[name] = {}
            for engine in engines:
                cell: dict[str, Any] = {}
                cells[name][engine] = cell
                path = Path(folder) / f"{NETWORKS[name]}.onnx"
                try:
                    run, told = prepare(engine, network, given, threads, path)
                    found = run(*given)
                except Exception as error:  # an engine that can't is no end
                    cell["skipped"] = f"{type(error).__name__}: {error}"[:300]
                    continue
                remover = naive_remover(run) if engine == "naive" else ShadowRemover(run)
                call = bound(remover, images, mask)
                cell |= told
                cell["difference"] = relative(found, expected)
                cell["image_difference"] = float((call() - expected_image).abs().max())
                wrong = cell["difference"] > MOST_DIFFERENT
                if wrong or cell["image_difference"] > MOST_DIFFERENT_IMAGE:
                    cell["skipped"] = "its result differs"
                else:
                    calls[f"{name} {engine}"] = call
                print(name, engine, cell, flush=True)
        samples = interleave(calls, seconds * len(calls))
    limit = threads * max(limit, peak())
    for key, times in samples.items():
        name, _, engine = key.partition(" ")
        median, least = statistics.median(times), min(times)
        cells[name][engine] |= {
            "median_ms": round(median, 3),
            "min_ms": round(least, 3),
            "images_a_second": round(1000 / median, 3),
            "share_of_limit": round(sum(macs[name]) / (least / 1000) / limit, 4) if limit else None,
        }
        print(name, engine, cells[name][engine], flush=True)
    return {
        "size": list(size),
        "threads": threads,
        "instruction_set": native.instruction_set(),
        "limit_gmacs_a_second": round(limit / 1e9, 2),
        "rounds": len(next(iter(samples.values()), [])),
        "networks": {
            name: {
                "width": NETWORKS[name][0],
                "attention_size": NETWORKS[name][1],
                "gmacs": round(macs[name][0] / 1e9, 3),
                "attention_gmacs": round(macs[name][1] / 1e9, 3),
                "engines": cells[name],
                "times_faster": {
                    engine: ratio(samples[f"{name} {engine}"], samples[f"{name} tenfold"])
                    for engine in engines
                    if engine != "tenfold"
                    and {f"{name} {engine}", f"{name} tenfold"} <= set(samples)
                },
            }
            for name in names
        },
    }


def bound(remover: Callable[[Tensor, Tensor], Tensor], images: Tensor, mask: Tensor) -> Run:
    return lambda: remover(images, mask)


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    found = paired_ratio(of, to)
    return {
        "median": round(found.median, 3),
        "low": round(found.low, 3),
        "high": round(found.high, 3),
        "of_minima": round(min(of) / min(to), 3),
    }


def peak() -> float:
    """Return the most multiply-adds a second of one thread; 0 without compiled kernels."""
    found = [value[0] for _ in range(PEAKS) if (value := native.peak()) is not None]
    return max(found, default=0.0)


def size_of(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: expected height x width, such as 480x640")
    return int(height), int(width)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[(256, 256), (480, 640)])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    usual = [engine for engine in ENGINES if engine not in ON_REQUEST]
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=usual)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="a network in an engine")
    parser.add_argument("--output", default="labnet", help="name in benchmarks/results")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    given = arguments(words)
    # scikit-image tells of each colour that no screen shows.
    warnings.filterwarnings("ignore", message="Conversion from CIE-LAB")
    found: dict[str, Any] = {}
    for height, width in given.sizes:
        found[f"{height}x{width}"] = measure(
            (height, width), given.networks, given.engines, given.threads, given.seconds
        )
        save(
            given.output, command_of("labnet", words), 0, {"sizes": found}
        )  # large sizes take long
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"labnet: {error}")
