"""`rendered_shadows`: shadows rendered into photos that come with scikit-image and scikit-learn.

Nothing is downloaded. A training sample is a new crop with a new shadow in each epoch, so that no
two are alike; held-out ones are fixed, and of other photos. Photos are few and their shadows a
model's: what a network learns here shows that it learns, and is a start for real photos.

The photos of scikit-learn, which are held out, are under CC BY 2.0; see its images' README.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenfold.data.decode import decode
from tenfold.data.options import DataOptions
from tenfold.data.randomness import mix
from tenfold.data.shadow_crops import Crops, crop
from tenfold.data.shadow_light import rendered
from tenfold.data.shadow_options import shadow_options
from tenfold.data.shadow_set import Pixels, ShadowSet, Triplet
from tenfold.data.shadows import ShadowData
from tenfold.errors import UserError

__all__ = ["TEST_PHOTOS", "TRAIN_PHOTOS", "RenderedShadows", "rendered_shadows"]

Size = tuple[int, int]

# (package, folder in it, file); what scikit-image fetches on first use is not among them.
_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
TRAIN_PHOTOS = tuple(
    (*_SKIMAGE, file)
    for file in (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "brick.png",
        "grass.png",
        "gravel.png",
    )
)
TEST_PHOTOS = ((*_SKLEARN, "china.jpg"), (*_SKLEARN, "flower.jpg"))

SIZE = (96, 96)
SAMPLES, HELD_OUT = 400, 32
WIDEST, LARGEST = 3, 400  # a photo's shorter side: in crops, and in pixels, which photos have
_FIXED = 2025  # seed of what doesn't change from run to run


class RenderedShadows(ShadowSet):
    """Crops of photos, each with a rendered shadow, and without it as target.

    `triplet` gives a fixed crop with a fixed shadow; training cuts and renders anew.

    Args:
        photos: uint8 `(H, W, 3)`, free of shadows as far as may be; sample i is of photo i modulo
            their number.
        count: how many samples there are.
        size: (H, W) of a crop.
        short_side: least and most of a photo's shorter side ahead of the crop.
        names: of the photos.
    """

    renders = True
    in_memory = True

    def __init__(
        self,
        photos: list[Pixels],
        count: int,
        size: Size,
        short_side: tuple[int, int],
        names: list[str],
    ) -> None:
        self._photos = photos
        self._count = count
        self._crops = Crops(size, short_side, _FIXED)
        self._names = names

    def __len__(self) -> int:
        return self._count

    def triplet(self, index: int) -> Triplet:  # noqa: D102
        place: NDArray[np.int64] = np.array([index], np.int64)
        (view,) = self._crops.draw(np.zeros_like(place), place)
        target = crop(self.training(index), view, self._crops.size).image
        numbers = mix(_FIXED, place).view(np.int64)
        images, masks = rendered(target.transpose(2, 0, 1)[None], numbers)
        image = np.ascontiguousarray(images[0].transpose(1, 2, 0))
        return Triplet(image, masks[0, 0] * np.uint8(255), target)

    def training(self, index: int) -> Triplet:  # noqa: D102
        photo = self._photos[index % len(self._photos)]
        return Triplet(photo, np.zeros(photo.shape[:2], np.uint8))

    def name(self, index: int) -> str:  # noqa: D102
        turn, photo = divmod(index, len(self._photos))
        return f"{self._names[photo]}[{turn}]"


def rendered_shadows(options: DataOptions) -> ShadowData:
    """Build the set: 400 samples an epoch of eight photos, and 32 held out of two others.

    Raises:
        UserError: a path is given, sides that don't fit, or the photos aren't there.
    """
    if options.path is not None:
        raise UserError(
            f"data path {options.path}: rendered_shadows comes with scikit-image and "
            "scikit-learn; leave it out"
        )
    size = options.size or SIZE
    chosen = shadow_options(options, SIZE, size)
    side = max(size)
    short_side = chosen.short_side or (side, max(side, min(WIDEST * side, LARGEST)))
    count = min(options.samples or SAMPLES, options.limit or options.samples or SAMPLES)
    sets = [
        RenderedShadows(
            [_photo(*place) for place in places],
            samples,
            size,
            short_side,
            [Path(file).stem for _, _, file in places],
        )
        for places, samples in ((TRAIN_PHOTOS, count), (TEST_PHOTOS, HELD_OUT))
    ]
    return chosen.build("rendered_shadows", sets[0], sets[1], short_side)


def _photo(package: str, folder: str, file: str) -> Pixels:
    """Read a photo: `(H, W, 3)`."""
    spec = importlib.util.find_spec(package)  # importing it takes a second
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    path = Path(roots[0], folder, file) if roots else Path(file)
    if not path.is_file():
        title = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise UserError(
            f"{title} has no {file} in {path.parent}: expected the photos that come with the "
            f"package; install {title} anew"
        )
    return np.ascontiguousarray(decode(path, 3, file).numpy().transpose(1, 2, 0))
