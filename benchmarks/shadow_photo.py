"""What it takes to remove the shadow from a photo of 4000x3000, from file to file.

    python benchmarks/shadow_photo.py [--rounds 7] [--threads 2] [--widths 8 32]

A JPEG and a PNG mask are read, the shadow goes, and a JPEG is written: `remove_shadows`, as
`tenfold predict` calls it, with everything included. The network is a LAB-Net of each width, with
fresh weights in an identity start behind the ring guess, which sees a copy with a shorter side of
256. Its time, at that size and inside a remover, is given beside the whole, and so is that of each
other part. `--optimized` adds the whole with the network as `tenfold.optimize` makes it.

The largest memory is that of a process of its own, as the system tells, beside what the process had
taken before the photo, and the bytes of one photo: for each width, and for a network that gives its
input back, as a wide network on its small copy takes more than all of the rest.

`--scenes FOLDER` adds how far automatic masks agree with careful ones: FOLDER holds train_A,
train_B and so on, as in the data set ISTD, in `train` and `test`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from skimage import data

from common import interleave, save, summary
from tenfold.data.photo import read_photo_pixels, write_photo_pixels
from tenfold.data.shadow_mask import automatic_mask, read_mask
from tenfold.deploy.optimize import optimize
from tenfold.deploy.shadow_photo import SMALLEST_SIDE, remove_shadow
from tenfold.nn.labnet import LABNet
from tenfold.nn.shadow_remover import ShadowRemover
from tenfold.tasks.shadow_verbs import remove_shadows

SEED = 0
HEIGHT, WIDTH = 3000, 4000
LEFT = np.array([0.26, 0.30, 0.36])  # of the light, in the shadow
PENUMBRA = 0.004  # of the shorter side
FACTS = {"task": "shadow_removal", "space": "lab", "guess": "ring", "composite": True}


def make_photo(height: int, width: int, folder: Path, seed: int = SEED) -> tuple[Path, Path]:
    """Write a photo of scikit-image, enlarged, with grain and a soft shadow, and its mask."""
    random = np.random.default_rng(seed)
    lit = Image.fromarray(data.coffee()).resize((width, height), Image.Resampling.LANCZOS)
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows / height - 0.5) / 0.35) ** 2 + ((columns / width - 0.45) / 0.3) ** 2 < 1
    mask = Image.fromarray((255 * inside).astype(np.uint8))
    soft = mask.filter(ImageFilter.GaussianBlur(PENUMBRA * min(height, width)))
    matte = np.asarray(soft, np.float32)[..., None] / 255
    pixels = np.asarray(lit, np.float32) / 255
    shaded = pixels * (1 - matte * (1 - LEFT)) ** (1 / 2.2)  # light falls by LEFT, nearly
    noisy = 255 * shaded + random.normal(0, 3, (height, width, 1))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "photo.jpg", quality=92)
    mask.save(folder / "mask.png")
    return folder / "photo.jpg", folder / "mask.png"


def network_of(width: int) -> LABNet:
    torch.manual_seed(SEED)
    network = LABNet(width, 64 if width < 16 else 256)
    network.identity_start()
    return network.eval()


def timed(
    photo: Path, mask: Path, width: int, rounds: int, threads: int, optimized: bool = False
) -> dict[str, Any]:
    """Return the time of the whole, of its parts, and of the network alone."""
    torch.set_num_threads(threads)
    network = network_of(width)
    remover = ShadowRemover(network, guess="ring")
    free = ShadowRemover(lambda codes, by: codes, guess="ring")
    pixels, facts = read_photo_pixels(photo)
    found = read_mask(mask).pixels
    scale = SMALLEST_SIDE / min(facts.size)
    seen = (round(facts.size[0] * scale), round(facts.size[1] * scale))
    small = torch.rand(1, 3, *seen)
    small_mask = torch.zeros(1, 1, *seen)
    small_mask[..., seen[0] // 4 : 3 * seen[0] // 4, seen[1] // 4 : 3 * seen[1] // 4] = 1
    with tempfile.TemporaryDirectory() as folder:

        def whole() -> object:
            return remove_shadows(network, FACTS, [photo], folder, mask=mask, overwrite=True)

        def whole_optimized() -> object:
            return remove_shadows(faster, FACTS, [photo], folder, mask=mask, overwrite=True)

        def write() -> object:
            return write_photo_pixels(Path(folder) / "a.jpg", pixels, facts, overwrite=True)

        parts: dict[str, Callable[[], object]] = {
            "whole": whole,
            "read photo": lambda: read_photo_pixels(photo),
            "read mask": lambda: read_mask(mask),
            "all but the network": lambda: remove_shadow(free, pixels, found),
            "network": lambda: remover(small, small_mask),
            "write": write,
        }
        if optimized:
            faster = optimize(network, (remover.inputs(small, small_mask), small_mask))
            parts["whole, optimized"] = whole_optimized
        times = interleave(parts, rounds, warm_up=1)
    return {"seen": list(seen), **{name: summary(seconds) for name, seconds in times.items()}}


def memory(photo: Path, mask: Path, width: int) -> dict[str, float]:
    """Return the largest memory of a process that does it once, in MB; width 0: no network."""
    command = [sys.executable, __file__, "--once", str(photo), str(mask), str(width)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def once(photo: Path, mask: Path, width: int) -> None:
    network: Any = network_of(width) if width else lambda codes, by: codes
    # What the network takes, on a small photo; the rest is what the large one takes.
    small = torch.zeros(1, 3, SMALLEST_SIDE, SMALLEST_SIDE * 4 // 3, dtype=torch.uint8)
    by = torch.zeros(small.shape[2:], dtype=torch.uint8)
    by[60:200, 60:200] = 1
    remove_shadow(ShadowRemover(network, guess="ring"), small, by)
    before = _largest_mb()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        remove_shadows(network, FACTS, [photo], folder, mask=mask)
        seconds = time.perf_counter() - start
    after = _largest_mb()
    height, wide = read_photo_pixels(photo)[1].size
    print(
        json.dumps(
            {
                "before_mb": round(before, 1),
                "largest_mb": round(after, 1),
                "photo_mb": round(3 * height * wide / 2**20, 1),
                "first_call_s": round(seconds, 2),
            }
        )
    )


def _largest_mb() -> float:
    # Not getrusage, whose figure starts with what the parent had taken.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def automatic(root: Path) -> dict[str, Any]:
    """Return how far automatic masks agree with those of a folder of scenes."""
    overlaps = []
    for part in ("train", "test"):
        for file in sorted((root / part / f"{part}_A").iterdir()):
            pixels, facts = read_photo_pixels(file)
            careful = read_mask(root / part / f"{part}_B" / f"{file.stem}.png", facts.size).pixels
            guess = automatic_mask(pixels).pixels
            overlaps.append(int((careful & guess).sum()) / int((careful | guess).sum()))
    quartiles = statistics.quantiles(overlaps, n=4)
    return {
        "scenes": len(overlaps),
        "mean_iou": round(statistics.mean(overlaps), 3),
        "least_iou": round(min(overlaps), 3),
        "quartiles_iou": [round(value, 3) for value in quartiles],
        "largest_iou": round(max(overlaps), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--size", type=int, nargs=2, default=[HEIGHT, WIDTH])
    parser.add_argument("--scenes", type=Path, help="of masks, to compare automatic ones with")
    parser.add_argument("--optimized", action="store_true", help="time optimized networks, too")
    parser.add_argument("--trial", action="store_true", help="print, write nothing")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        once(Path(options.once[0]), Path(options.once[1]), int(options.once[2]))
        return
    found: dict[str, Any] = {"threads": options.threads, "size": options.size, "widths": {}}
    with tempfile.TemporaryDirectory() as folder:
        photo, mask = make_photo(*options.size, Path(folder))
        found["jpeg_mb"] = round(photo.stat().st_size / 2**20, 2)
        for width in options.widths:
            found["widths"][str(width)] = {
                **timed(photo, mask, width, options.rounds, options.threads, options.optimized),
                "memory": memory(photo, mask, width),
            }
        found["memory_without_network"] = memory(photo, mask, 0)
    if options.scenes is not None:
        found["automatic_mask"] = automatic(options.scenes)
    if options.trial:
        print(json.dumps(found, indent=1))
        return
    further = " --optimized" if options.optimized else ""
    scenes = "" if options.scenes is None else f" --scenes {options.scenes}"
    save(
        "shadow_photo",
        f"python benchmarks/shadow_photo.py --rounds {options.rounds} --threads {options.threads} "
        f"--widths {' '.join(map(str, options.widths))} "
        f"--size {options.size[0]} {options.size[1]}{further}{scenes}",
        SEED,
        found,
    )


if __name__ == "__main__":
    main()
