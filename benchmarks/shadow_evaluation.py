"""What evaluating shadow removal takes, beside a loop over images written with scikit-image.

    python benchmarks/shadow_evaluation.py [--images 32] [--rounds 10] [--threads 2]

Both give the same figures of the same photos, which is checked: LAB MAE, LAB RMSE, PSNR and SSIM,
in the shadow, outside, and over all, of every photo.

- figures: from 256x256 images in memory, without decoding. The loop once in float64, as
  scikit-image's own `img_as_float` gives images, and once in float32, which it is quicker in.
- folders: from PNG files of 640x480, ISTD's size, everything included: listing, decoding, resizing
  to 256x256, figures and means. The loop decodes and resizes by Pillow, one file after another.
- colours: the LAB codes that a network is given, of 256x256 images in memory; scikit-image's
  `rgb2lab` image by image in float32, and the conversion of the whole batch.

The loop is what one finds in papers' scripts, put right: the colours of each image are converted
once, and masks aren't applied twice. Photos are crops of those inside scikit-image, with
ellipses for shadows; a result is off by a gain in the shadow and by a smooth error everywhere.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common import interleave, paired_ratio, save, summary
from tenfold.errors import UserError
from tenfold.kernels.lab import lab_of_rgb
from tenfold.measure.shadow_errors import shadow_errors
from tenfold.tasks.shadow_evaluation import evaluate_shadows

SEED = 0
SIDE = 256
ON_DISK = (480, 640)
EQUAL = 1e-3
ROLES = ("results", "truth", "masks")

Pixels = NDArray[np.uint8]
Photo = tuple[Pixels, Pixels, Pixels]


def make_photos(count: int, height: int, width: int, seed: int = SEED) -> list[Photo]:
    """Return results and truths `(H, W, 3)`, and masks `(H, W)` of 0 and 255."""
    random = np.random.default_rng(seed)
    sources = [data.coffee(), data.chelsea(), data.retina(), data.astronaut()]
    rows, columns = np.mgrid[:height, :width]
    made = []
    for index in range(count):
        source = Image.fromarray(sources[index % len(sources)])
        left, top = (random.uniform(0, 0.4) * side for side in source.size)
        box = (left, top, left + 0.6 * source.width, top + 0.6 * source.height)
        truth = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC, box))
        middle = random.uniform(0.3, 0.7, 2) * (height, width)
        radii = random.uniform(0.2, 0.35, 2) * (height, width)
        apart = ((rows - middle[0]) / radii[0]) ** 2 + ((columns - middle[1]) / radii[1]) ** 2
        mask = apart < 1
        gain = np.where(mask, random.uniform(0.8, 1.1), 1.0)[..., None]
        coarse = random.normal(0, 6, (12, 16, 3)).clip(-18, 18) + 128
        error = Image.fromarray(coarse.astype(np.uint8)).resize((width, height))
        result = truth * gain + np.asarray(error, np.float64) - 128
        made.append((result.clip(0, 255).astype(np.uint8), truth, (255 * mask).astype(np.uint8)))
    return made


def write_photos(photos: Sequence[Photo], root: Path) -> None:
    """Write root/{results,truth,masks}/<number>.png."""
    for role in ROLES:
        (root / role).mkdir(parents=True)
    for number, photo in enumerate(photos):
        for role, pixels in zip(ROLES, photo, strict=True):
            Image.fromarray(pixels).save(root / role / f"{number:04}.png")


def loop_figures(photo: Photo, kind: type = np.float64) -> list[list[float]]:
    """Return 3 regions by 4 figures of one photo, by scikit-image."""
    result, truth = (pixels.astype(kind) / kind(255) for pixels in photo[:2])
    mask = photo[2] > 0
    apart = rgb2lab(result) - rgb2lab(truth)
    absolute, squared = np.abs(apart).sum(2), (apart**2).mean(2)
    found = []
    for region in (mask, ~mask, None):
        if region is None:
            a, b, sizes, squares = result, truth, absolute, squared
        else:
            a, b = result * region[..., None], truth * region[..., None]
            sizes, squares = absolute[region], squared[region]
        similarity = structural_similarity(
            b,
            a,
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        psnr = peak_signal_noise_ratio(b, a, data_range=1.0)
        found.append([sizes.mean(), squares.mean() ** 0.5, psnr, similarity])
    return found


def loop_over(photos: Sequence[Photo], kind: type) -> NDArray[np.float64]:
    return np.array([loop_figures(photo, kind) for photo in photos])


def ours_of(batch: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    results, truths, masks = batch
    return shadow_errors(results, truths, masks).per_image().numpy()


def as_batch(photos: Sequence[Photo]) -> list[torch.Tensor]:
    results, truths, masks = (
        torch.from_numpy(np.stack(part)) for part in zip(*photos, strict=True)
    )
    colours = [images.permute(0, 3, 1, 2).contiguous() for images in (results, truths)]
    return [*colours, masks[:, None] > 0]


def loop_over_folders(root: Path, kind: type) -> NDArray[np.float64]:
    found = []
    for path in sorted((root / "results").iterdir()):
        photo = []
        for role in ROLES:
            with Image.open(root / role / path.name) as image:
                resized = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            photo.append(np.asarray(resized))
        found.append(loop_figures((photo[0], photo[1], photo[2]), kind))
    return np.array(found)


def ours_of_folders(root: Path, threads: int) -> NDArray[np.float64]:
    folders = [root / role for role in ROLES]
    return evaluate_shadows(*folders, size=SIDE, workers=threads).errors.per_image().numpy()


def compare(
    contenders: dict[str, Callable[[], NDArray[np.float64]]], images: int, rounds: int
) -> dict[str, Any]:
    """Time `loop`, `loop_float32` and `ours` in turn; refuse figures that aren't the same."""
    values = {name: contender() for name, contender in contenders.items()}
    apart = float(np.abs(values["ours"] - values["loop"]).max())
    if not apart < EQUAL:
        raise UserError(f"figures differ by {apart:.2g}: expected less than {EQUAL}")
    times = interleave(contenders, rounds, warm_up=1)
    found: dict[str, Any] = {"images": images, "largest_difference": apart}
    for name, seconds in times.items():
        found[name] = {**summary(seconds), "median_ms_per_image": 0.0}
        found[name]["median_ms_per_image"] = round(found[name]["median_ms"] / images, 3)
    found["speedup"] = paired_ratio(times["loop"], times["ours"])
    found["speedup_over_float32"] = paired_ratio(times["loop_float32"], times["ours"])
    return found


def figures(images: int, rounds: int) -> dict[str, Any]:
    photos = make_photos(images, SIDE, SIDE)
    contenders = {
        "loop": functools.partial(loop_over, photos, np.float64),
        "loop_float32": functools.partial(loop_over, photos, np.float32),
        "ours": functools.partial(ours_of, as_batch(photos)),
    }
    return compare(contenders, images, rounds)


def folders(images: int, rounds: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_photos(make_photos(images, *ON_DISK), root)
        contenders = {
            "loop": functools.partial(loop_over_folders, root, np.float64),
            "loop_float32": functools.partial(loop_over_folders, root, np.float32),
            "ours": functools.partial(ours_of_folders, root, threads),
        }
        return {**compare(contenders, images, rounds), "files": "PNG 640x480"}


def loop_codes(photos: Sequence[Photo]) -> NDArray[np.float64]:
    shift, scale = np.array([0, 128, 128], np.float32), np.array([100, 255, 255], np.float32)
    return np.stack([(rgb2lab(np.float32(one[1]) / 255) + shift) / scale for one in photos])


def colours(images: int, rounds: int) -> dict[str, Any]:
    photos = make_photos(images, SIDE, SIDE)
    truths = as_batch(photos)[1]
    contenders: dict[str, Callable[[], Any]] = {
        "loop": functools.partial(loop_codes, photos),
        "ours": functools.partial(lab_of_rgb, truths, codes=True),
    }
    apart = np.abs(loop_codes(photos).transpose(0, 3, 1, 2) - contenders["ours"]().numpy()).max()
    if not apart < EQUAL:
        raise UserError(f"codes differ by {apart:.2g}: expected less than {EQUAL}")
    times = interleave(contenders, rounds, warm_up=1)
    return {
        "images": images,
        "largest_difference": float(apart),
        **{name: summary(seconds) for name, seconds in times.items()},
        "speedup": paired_ratio(times["loop"], times["ours"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trial", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {
        "threads": options.threads,
        "side": SIDE,
        "figures": figures(options.images, options.rounds),
        "folders": folders(options.images, options.rounds, options.threads),
        "colours": colours(options.images, options.rounds),
    }
    if options.trial:
        print(found)
        return
    save(
        "shadow_evaluation",
        f"python benchmarks/shadow_evaluation.py --images {options.images} "
        f"--rounds {options.rounds} --threads {options.threads}",
        SEED,
        found,
    )


if __name__ == "__main__":
    main()
