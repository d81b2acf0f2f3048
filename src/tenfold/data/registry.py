"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tenfold.data.cifar import cifar10, cifar100
from tenfold.data.clips_npz import clips_npz
from tenfold.data.digits import digits
from tenfold.data.folder import imagefolder
from tenfold.data.frames import frames
from tenfold.data.huggingface import huggingface
from tenfold.data.labelled import LabelledData
from tenfold.data.motions import motions
from tenfold.data.npz import npz
from tenfold.data.options import DataOptions
from tenfold.data.video import video
from tenfold.errors import unknown_name

__all__ = ["create", "names"]

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


def names() -> dict[str, str]:
    """Return the names that `create` takes, each with one line that describes it."""
    return {name: description for name, (description, _) in _SETS.items()}


def create(spec: str | Mapping[str, object]) -> LabelledData:
    """Build a data set.

    Args:
        spec: a name, `name:PATH`, or a mapping with `name` and the fields of `DataOptions`.

    Raises:
        UserError: an unknown name or option, a wrong value, or data that isn't as it should be.

    Example:
        >>> data = create("digits")
        >>> data.num_classes, data.channels, data.size
        (10, 1, (8, 8))
    """
    options = DataOptions.parse(spec)
    if options.name not in _SETS:
        raise unknown_name("data set", options.name, _SETS)
    _, build = _SETS[options.name]
    return build(options)
