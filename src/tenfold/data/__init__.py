"""Labelled images to train on and to evaluate on, from `create("digits")` or `create("npz:PATH")`.

Everything random about a batch is a pure function of (seed, epoch, id): the order of an epoch and
each sample's augmentation are the same with any number of workers, and after a resume.
"""

from tenfold.data.base import ArraySet, ImageSet
from tenfold.data.images import ImageData
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import load_image, normalize
from tenfold.data.registry import create, names
from tenfold.data.sampler import EpochSampler
from tenfold.data.stream import ImageStream, StreamSplit
from tenfold.data.transforms import augmentations

__all__ = [
    "ArraySet",
    "DataOptions",
    "EpochSampler",
    "ImageData",
    "ImageSet",
    "ImageStream",
    "StreamSplit",
    "augmentations",
    "create",
    "load_image",
    "names",
    "normalize",
]
