"""Labelled images and clips to train on and to evaluate on, from `create("digits")` and the like.

Images of two domains, to translate one into the other, come from `create_translation`, and photos
with shadows from `create_shadows`.

Everything random about a batch is a pure function of (seed, epoch, id): the order of an epoch and
each sample's augmentation are the same with any number of workers, and after a resume.
"""

from tenfold.data.base import ArrayClips, ArraySet, ClipSet, ImageSet
from tenfold.data.clips import ClipData
from tenfold.data.images import ImageData
from tenfold.data.labelled import LabelledData
from tenfold.data.load import load_clip
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import load_image, normalize
from tenfold.data.registry import create, create_shadows, create_translation, names
from tenfold.data.sampler import EpochSampler
from tenfold.data.shadow_rendering import render_shadow
from tenfold.data.shadow_set import ArrayTriplets, ShadowSet, Triplet
from tenfold.data.shadows import ShadowData, shadow_augmentations
from tenfold.data.stream import ImageStream, StreamSplit
from tenfold.data.transforms import augmentations
from tenfold.data.translation import TranslationData, translation_augmentations

__all__ = [
    "ArrayClips",
    "ArraySet",
    "ArrayTriplets",
    "ClipData",
    "ClipSet",
    "DataOptions",
    "EpochSampler",
    "ImageData",
    "ImageSet",
    "ImageStream",
    "LabelledData",
    "ShadowData",
    "ShadowSet",
    "StreamSplit",
    "TranslationData",
    "Triplet",
    "augmentations",
    "create",
    "create_shadows",
    "create_translation",
    "load_clip",
    "load_image",
    "names",
    "normalize",
    "render_shadow",
    "shadow_augmentations",
    "translation_augmentations",
]
