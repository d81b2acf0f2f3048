"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tenfold.data.cifar import cifar10, cifar100
from tenfold.data.clips_npz import clips_npz
from tenfold.data.digits import digits
from tenfold.data.edges2photo import edges2photo
from tenfold.data.folder import imagefolder
from tenfold.data.frames import frames
from tenfold.data.huggingface import huggingface
from tenfold.data.labelled import LabelledData
from tenfold.data.motions import motions
from tenfold.data.npz import npz
from tenfold.data.options import DataOptions
from tenfold.data.rendered_shadows import rendered_shadows
from tenfold.data.shadow_folders import triplets
from tenfold.data.shadow_frames import shadow_frames
from tenfold.data.shadows import ShadowData
from tenfold.data.translation import TranslationData
from tenfold.data.translation_folders import pairs, unpaired
from tenfold.data.video import video
from tenfold.errors import UserError, unknown_name

__all__ = ["create", "create_shadows", "create_translation", "names"]

_SETS: dict[str, tuple[str, Callable[[DataOptions], LabelledData]]] = {
    "digits": ("1,797 handwritten digits, 8x8, 10 classes; comes with scikit-learn", digits),
    "cifar10": ("60,000 photos, 32x32, 10 classes; downloaded on first use", cifar10),
    "cifar100": ("60,000 photos, 32x32, 100 classes; downloaded on first use", cifar100),
    "imagefolder": ("your image files: imagefolder:PATH with {train,val}/<class>/*", imagefolder),
    "npz": ("your images packed: npz:PATH with train.npz and test.npz", npz),
    "hf": ("Hugging Face datasets: hf:NAME on the Hub, or hf:PATH of parquet files", huggingface),
    "frames": ("your clips as folders: frames:PATH with {train,val}/<class>/<clip>/*", frames),
    "video": ("your video files: video:PATH with {train,val}/<class>/*; extra video", video),
    "clips_npz": ("your clips packed: clips_npz:PATH with train.npz and test.npz", clips_npz),
    "motions": ("clips made of scikit-image's photos, 8 x 32x32, 8 classes of motion", motions),
}

_TRANSLATION: dict[str, tuple[str, Callable[[DataOptions], TranslationData]]] = {
    "pairs": (
        "your images in pairs: pairs:PATH with {train,test}/*, A and B side by side, or "
        "{trainA,trainB,testA,testB}/* of the same names",
        pairs,
    ),
    "unpaired": (
        "your images of two domains: unpaired:PATH with {trainA,trainB,testA,testB}/*",
        unpaired,
    ),
    "edges2photo": (
        "edge maps and patches of scikit-image's photos, 480 pairs, 96x96",
        edges2photo,
    ),
}

_SHADOWS: dict[str, tuple[str, Callable[[DataOptions], ShadowData]]] = {
    "triplets": (
        "your photos with shadows, masks and shadow-free photos: triplets:PATH as ISTD, AISTD or "
        "SRD",
        triplets,
    ),
    "rendered_shadows": (
        "shadows rendered into scikit-image's photos, 400 samples an epoch, 96x96",
        rendered_shadows,
    ),
    "shadow_frames": (
        "your clips of moving shadows: shadow_frames:PATH with <clip>/* and masks/<clip>/*",
        shadow_frames,
    ),
}


def names() -> dict[str, str]:
    """Return the names of all data sets, each with one line that describes it."""
    return {name: text for name, (text, _) in _all().items()}


def create(spec: str | Mapping[str, object]) -> LabelledData:
    """Build a data set of labelled images or clips.

    Args:
        spec: a name, `name:PATH`, or a mapping with `name` and the fields of `DataOptions`.

    Raises:
        UserError: an unknown name or option, a wrong value, data that isn't as it should be, or a
            set without labels.

    Example:
        >>> data = create("digits")
        >>> data.num_classes, data.channels, data.size
        (10, 1, (8, 8))
    """
    options = DataOptions.parse(spec)
    if options.name in _TRANSLATION:
        raise UserError(
            f"data {options.name} serves task translation: expected labelled data, such as "
            f"{', '.join(list(_SETS)[:4])}; choose one of them, or write task: translation"
        )
    if options.name in _SHADOWS:
        raise UserError(
            f"data {options.name} serves tasks shadow_removal and shadow_synthesis: expected "
            f"labelled data, such as {', '.join(list(_SETS)[:4])}; choose one of them, or another "
            "task"
        )
    if options.name not in _SETS:
        raise unknown_name("data set", options.name, names())
    _, build = _SETS[options.name]
    return build(options)


def create_translation(spec: str | Mapping[str, object]) -> TranslationData:
    """Build a data set of images of two domains.

    Args:
        spec: as for `create`.

    Raises:
        UserError: an unknown name or option, a wrong value, data that isn't as it should be, or a
            set of labelled data.
    """
    options = DataOptions.parse(spec)
    if options.name in _SETS:
        raise UserError(
            f"data {options.name} has labels and one domain: expected {', '.join(_TRANSLATION)} "
            "for task translation; choose one of them, or another task"
        )
    if options.name in _SHADOWS:
        raise UserError(
            f"data {options.name} has photos with shadows: expected {', '.join(_TRANSLATION)} for "
            "task translation; choose one of them, or another task"
        )
    if options.name not in _TRANSLATION:
        raise unknown_name("data set", options.name, names())
    _, build = _TRANSLATION[options.name]
    return build(options)


def create_shadows(spec: str | Mapping[str, object]) -> ShadowData:
    """Build a data set of photos with shadows.

    Args:
        spec: as for `create`.

    Raises:
        UserError: an unknown name or option, a wrong value, data that isn't as it should be, or a
            set without shadows.

    Example:
        >>> data = create_shadows({"name": "rendered_shadows", "size": 64})
        >>> data.train_size, data.test_size, data.shape
        (400, 32, (3, 64, 64))
    """
    options = DataOptions.parse(spec)
    if options.name in _SETS or options.name in _TRANSLATION:
        raise UserError(
            f"data {options.name} has no photos with shadows: expected {', '.join(_SHADOWS)} for "
            "tasks shadow_removal and shadow_synthesis; choose one of them, or another task"
        )
    if options.name not in _SHADOWS:
        raise unknown_name("data set", options.name, names())
    _, build = _SHADOWS[options.name]
    return build(options)


def _all() -> dict[str, tuple[str, object]]:
    return {**_SETS, **_TRANSLATION, **_SHADOWS}
