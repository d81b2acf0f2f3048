"""What preparing batches of shadow removal takes, beside a loader written with scikit-image.

    python benchmarks/shadow_batches.py [--photos 24] [--rounds 10] [--workers 2]

From PNG files in ISTD's layout to LAB codes of photo and target and a mask, ready for a network:
decoding every time (nothing is kept in memory), the same flips, turns, rotation, resize and crop
for photo, mask and target, conversion of colours. Both loaders get the same draws of these and the
same number of processes; that both give the same codes, but for the way of interpolating, is
checked.

- loader: torch's DataLoader; for each sample Pillow decodes, numpy flips and turns, scikit-image
  rotates and resizes (`rotate`, `resize` with anti-aliasing for photos, the nearest pixel for
  masks), all in float32, and `rgb2lab` converts the two crops, not the whole photos, as some
  published loaders do.
- ours: `ShadowData.train_loader`, and `lab_codes` on the batch.

Once for files of 640x480 and crops of 256, ISTD's and the paper's sizes, once for 320x212 and crops
of 96. Photos are crops of those inside scikit-image, with rendered shadows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from skimage.color import rgb2lab
from skimage.transform import resize, rotate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import interleave, paired_ratio, save, summary
from tenfold.data import ShadowData, create_shadows, render_shadow
from tenfold.data.shadow_crops import Crops, View
from tenfold.errors import UserError
from tenfold.nn.shadow_codes import lab_codes

SEED = 0
BATCH = 8
CASES = {
    "istd": {"size": (480, 640), "crop": 256, "short_side": (256, 479)},
    "small": {"size": (212, 320), "crop": 96, "short_side": (96, 180)},
}
# Interpolating twice blurs a little more than once does: mean difference of codes.
ALIKE = 0.02

Codes = tuple[Tensor, Tensor, Tensor]


def write_set(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write a set in ISTD's layout: `count` scenes to train on and 1 held out."""
    random = np.random.default_rng(SEED)
    sources = [data.coffee(), data.chelsea(), data.astronaut(), data.retina()]
    for number in range(count + 1):
        split = "train" if number < count else "test"
        source = Image.fromarray(sources[number % len(sources)])
        left, top = (random.uniform(0, 0.3) * side for side in source.size)
        box = (left, top, left + 0.7 * source.width, top + 0.7 * source.height)
        truth = source.resize(size[::-1], Image.Resampling.BICUBIC, box)
        planes = torch.from_numpy(np.array(truth)).permute(2, 0, 1)[None] / 255
        shadowed, mask = render_shadow(planes, [number])
        parts = {
            "A": shadowed[0].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy(),
            "B": mask[0, 0].mul(255).to(torch.uint8).numpy(),
            "C": np.asarray(truth),
        }
        for part, pixels in parts.items():
            folder = root / split / f"{split}_{part}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:04}.png")


class PerSample(Dataset[Any]):
    """What a loader with scikit-image does for each sample."""

    def __init__(self, root: Path, crops: Crops) -> None:
        self.folders = [root / "train" / f"train_{part}" for part in "ABC"]
        self.names = sorted(path.name for path in self.folders[0].iterdir())
        self.crops = crops
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Codes:
        (view,) = self.crops.draw(np.array([self.epoch]), np.array([index]))
        image, mask, target = (
            self.part(folder / self.names[index], view, photo=k != 1)
            for k, folder in enumerate(self.folders)
        )
        return codes_of(image), torch.from_numpy(mask[None] > 0.5).float(), codes_of(target)

    def part(self, path: Path, view: View, photo: bool) -> NDArray[np.float32]:
        with Image.open(path) as file:
            pixels = np.asarray(file, np.float32) / np.float32(255)
        scaled = view.scaled((pixels.shape[0], pixels.shape[1]), self.crops.size)
        for move in view.moves:
            pixels = (pixels, np.fliplr(pixels), np.rot90(pixels))[move]
        order = 1 if photo else 0
        pixels = rotate(pixels, view.angle, order=order, mode="symmetric", preserve_range=True)
        pixels = resize(pixels, scaled, order=order, anti_aliasing=photo, preserve_range=True)
        top, left = view.corner(scaled, self.crops.size)
        height, width = self.crops.size
        pixels = pixels[top : top + height, left : left + width]
        found: NDArray[np.float32] = pixels[:, ::-1] if view.mirrored else pixels
        return found.astype(np.float32)


def codes_of(colours: NDArray[np.float32]) -> Tensor:
    lab = rgb2lab(colours)
    codes = (lab + np.array([0, 128, 128])) / np.array([100, 255, 255])
    return torch.from_numpy(codes.astype(np.float32).transpose(2, 0, 1).copy())


class Loop:
    """The loader written with scikit-image; `epoch()` goes through all photos once."""

    def __init__(self, root: Path, crops: Crops, workers: int) -> None:
        self.dataset = PerSample(root, crops)
        self.loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def epoch(self) -> Iterable[Codes]:
        return self.loader


class Ours:
    """`ShadowData` with nothing kept in memory, and the conversion of a batch."""

    def __init__(self, root: Path, crops: Crops, workers: int) -> None:
        self.data: ShadowData = create_shadows(
            {
                "name": "triplets",
                "path": root,
                "size": crops.size,
                "short_side": crops.short_side,
            }
        )
        self.data._train.kept, self.data._train._store = False, None
        self.loader = self.data.train_loader(batch_size=BATCH, seed=crops.seed, workers=workers)

    def epoch(self) -> Iterable[Codes]:
        for batch in self.loader:
            codes = lab_codes(batch["image"]), lab_codes(batch["target"])
            yield codes[0], batch["mask"].float(), codes[1]


def through(contender: Loop | Ours) -> int:
    return sum(len(codes) for codes, _, _ in contender.epoch())


def difference(root: Path, crops: Crops) -> dict[str, float]:
    """Return how far the codes of both loaders are apart; refuse ones that aren't alike."""
    ours = Ours(root, crops, 0)
    ids = [int(i) for batch in ours.loader for i in batch["id"]]
    stacked = [torch.cat(part) for part in zip(*ours.epoch(), strict=True)]
    dataset = PerSample(root, crops)
    theirs = [torch.stack(part) for part in zip(*(dataset[i] for i in ids), strict=True)]
    apart = [float((a - b).abs().mean()) for a, b in zip(stacked, theirs, strict=True)]
    found = {"photo": apart[0], "mask": apart[1], "target": apart[2]}
    if max(apart) > ALIKE:
        raise UserError(f"codes differ by {found}: expected less than {ALIKE} on average")
    return {name: round(value, 5) for name, value in found.items()}


def compare(name: str, photos: int, rounds: int, workers: int) -> dict[str, Any]:
    case = CASES[name]
    crop = case["crop"]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_set(root, photos, case["size"])
        crops = Crops((crop, crop), case["short_side"], SEED)
        apart = difference(root, crops)
        contenders = {"loader": Loop(root, crops, workers), "ours": Ours(root, crops, workers)}
        times = interleave(
            {
                name: lambda contender=contender: through(contender)
                for name, contender in contenders.items()
            },
            rounds,
            warm_up=1,
        )
    found: dict[str, Any] = {
        "files": f"PNG {case['size'][1]}x{case['size'][0]}",
        "crop": crop,
        "photos": photos,
        "mean_difference_of_codes": apart,
    }
    for contender, seconds in times.items():
        found[contender] = summary(seconds)
        median = found[contender]["median_ms"]
        found[contender]["median_ms_per_photo"] = round(median / photos, 3)
    found["speedup"] = paired_ratio(times["loader"], times["ours"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trial", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {
        "workers": options.workers,
        "threads": options.threads,
        "batch_size": BATCH,
        **{name: compare(name, options.photos, options.rounds, options.workers) for name in CASES},
    }
    if options.trial:
        print(found)
        return
    save(
        "shadow_batches",
        f"python benchmarks/shadow_batches.py --photos {options.photos} "
        f"--rounds {options.rounds} --workers {options.workers} --threads {options.threads}",
        SEED,
        found,
    )


if __name__ == "__main__":
    main()
