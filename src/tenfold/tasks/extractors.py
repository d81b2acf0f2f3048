"""Open the networks that perceptual losses and FID/KID are taken with, by name or path.

Both functions run what they open once, on a blank image: whatever is wrong with it shows before
training starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.deploy import artifact
from tenfold.errors import UserError, unknown_name
from tenfold.imports import import_object, is_object_name
from tenfold.measure.image_features import (
    SHOWN,
    FeatureExtractor,
    inception_extractor,
    module_extractor,
    state_hash,
)
from tenfold.nn.stagenet import ImageStages, StageNet
from tenfold.nn.vgg_stages import VggStages, read_state_dict

__all__ = ["PerceptualExtractor", "open_extractor", "open_perceptual"]

_STAGES = 4
_PROBE = 96  # pixels; the smallest crop that DCD trains on
_FILES = (".pth", ".pt", ".safetensors")
_OTHERS = ("PATH of a .pth file", "a run of stagenet-extractor", "file.py:function")


class PerceptualExtractor(nn.Module):
    """A frozen network that returns four maps, with what must be said of it in results.

    Attributes:
        name: as `open_perceptual` was given it, or the network's.
        sha256: of its weights, 64 hexadecimal digits.
    """

    def __init__(self, network: nn.Module, name: str, channels: int = 3):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.name = name
        self.channels = channels
        self.sha256 = state_hash(network)

    def __str__(self) -> str:
        """Return name and hash."""
        return f"{self.name} {self.sha256[:SHOWN]}"

    def train(self, mode: bool = True) -> PerceptualExtractor:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the four maps of images `(B, C, H, W)` in [-1, 1]; grey ones are repeated."""
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        return list(self.network(images))


def open_perceptual(spec: str | Mapping[str, Any], channels: int = 3) -> PerceptualExtractor:
    """Open an extractor of four maps for style and feature losses.

    Args:
        spec: `vgg16`; `{name: vgg16, path: FILE}` or the path of a .pth file with torchvision's
            names; the run or artifact of a `stagenet`; or `file.py:function` (`package:function`),
            which returns a module that maps images in [-1, 1] to four maps.
        channels: of the images that it will be given.

    Returns:
        The network, frozen, with its name and hash.

    Raises:
        UserError: an unknown name, missing weights, or a network that doesn't return four maps.
    """
    name, path = _read(spec, "perceptual extractor", {"vgg16"})
    taken = 3
    network: nn.Module
    if name == "vgg16":
        network, shown = VggStages(path), "vgg16"
    elif is_object_name(name):
        network, shown, taken = _users_own(name, channels), name, channels
    elif Path(name).is_dir():
        network, shown = _stagenet(Path(name)), "stagenet"
        taken = network.channels
    elif name.endswith(_FILES):
        network, shown = VggStages(name), "vgg16"
    else:
        raise unknown_name("perceptual extractor", name, ["vgg16", *_OTHERS])
    _check_channels(shown, taken, channels)
    extractor = PerceptualExtractor(network, shown, taken)
    _check_stages(extractor, channels)
    return extractor


def open_extractor(spec: str | Mapping[str, Any], channels: int = 3) -> FeatureExtractor:
    """Open an extractor of vectors for FID and KID.

    Args:
        spec: `inception` or `vgg16`, or either as `{name: …, path: FILE}`; the path of a .pth file
            of one of them; the run or artifact of a `stagenet`; or `file.py:function`
            (`package:function`), which returns a module that maps images in [-1, 1] to vectors
            `(B, D)` or to maps.
        channels: of the images that it will be given.

    Returns:
        The extractor, with its name and hash.

    Raises:
        UserError: an unknown name, missing weights, or a network that returns something else.
    """
    name, path = _read(spec, "extractor", {"inception", "vgg16"})
    if name.endswith(_FILES) and not is_object_name(name):
        # Inception's names all differ from VGG's: a file says by itself whose weights it holds.
        is_vgg = "features.0.weight" in read_state_dict(name, "the extractor")
        name, path = "vgg16" if is_vgg else "inception", name
    if name == "inception":
        extractor = inception_extractor(path)
    elif name == "vgg16":
        extractor = FeatureExtractor(VggStages(path), "vgg16")
    elif is_object_name(name):
        extractor = module_extractor(_users_own(name, channels), name, channels=channels)
    elif Path(name).is_dir():
        network = _stagenet(Path(name))
        extractor = module_extractor(network, "stagenet", channels=network.channels)
    else:
        raise unknown_name("extractor", name, ["inception", "vgg16", *_OTHERS])
    _check_channels(extractor.name, extractor.channels, channels)
    _check_vectors(extractor, channels)
    return extractor


def _read(spec: str | Mapping[str, Any], kind: str, with_files: set[str]) -> tuple[str, str | None]:
    """Return name and path of an extractor as a recipe gives it."""
    if isinstance(spec, str):
        return spec, None
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise UserError(f"{kind} {spec!r}: expected a name, a path, or a mapping of name and path")
    name, path = spec["name"], spec.get("path")
    if unknown := sorted(set(spec) - {"name", "path"}):
        raise unknown_name(f"key of the {kind}", str(unknown[0]), ["name", "path"])
    if path is not None and name not in with_files:
        raise UserError(
            f"{kind} {name!r} takes no path: expected one with {' or '.join(sorted(with_files))}; "
            "give a run's or a file's path as the name"
        )
    return name, None if path is None else str(path)


def _stagenet(path: Path) -> ImageStages:
    found = artifact.read(path)
    if found.network.name != "tenfold/stagenet":
        raise UserError(
            f"{path} holds {found.network.name or 'a network of your own code'}: expected a "
            "stagenet; train one by the recipe stagenet-extractor"
        )
    network = found.model()
    if not isinstance(network, StageNet) or found.preprocessing is None:
        raise UserError(
            f"{path} is optimized, or doesn't say how its images were normalised: expected the "
            "artifact that `tenfold train stagenet-extractor` writes"
        )
    return ImageStages(network, found.preprocessing["mean"], found.preprocessing["std"])


def _users_own(name: str, channels: int) -> nn.Module:
    function = import_object(name, "extractor")
    if not callable(function):
        raise UserError(f"extractor {name!r} is not callable: expected a function or class")
    network = _explained(
        name, lambda: function(**({"channels": channels} if _takes_channels(function) else {}))
    )
    if not isinstance(network, nn.Module):
        raise UserError(
            f"extractor {name!r} returned {type(network).__name__}: expected an nn.Module"
        )
    return network


def _takes_channels(function: Callable[..., Any]) -> bool:
    try:
        return "channels" in inspect.signature(function).parameters
    except ValueError:  # of a built-in
        return False


def _check_channels(name: str, taken: int, channels: int) -> None:
    if channels not in (taken, 1):
        raise UserError(
            f"the extractor {name} takes images of {taken} channels, and the data has {channels}: "
            "give another extractor"
        )


def _check_stages(extractor: PerceptualExtractor, channels: int) -> None:
    # The probe asks for gradients: maps that were detached would train nothing, and say nothing.
    image = torch.zeros(1, channels, _PROBE, _PROBE, requires_grad=True)
    with torch.enable_grad():
        maps = _explained(extractor.name, lambda: extractor(image))
    wrong = next(
        (
            f"an element of type {type(each).__name__}"
            if not isinstance(each, Tensor)
            else f"a tensor {tuple(each.shape)}"
            for each in maps
            if not isinstance(each, Tensor) or each.ndim != 4
        ),
        None,
    )
    if len(maps) != _STAGES or wrong is not None:
        raise UserError(
            f"the perceptual extractor {extractor.name} returned {wrong or f'{len(maps)} maps'}: "
            f"expected {_STAGES} maps (B, C, H, W)"
        )
    _refuse_not_finite(extractor.name, maps)
    if not all(each.requires_grad for each in maps):
        raise UserError(
            f"the perceptual extractor {extractor.name} lets no gradient through to the images: "
            "take detach() and no_grad() out of its forward"
        )


def _check_vectors(extractor: FeatureExtractor, channels: int) -> None:
    images = torch.zeros(2, channels, _PROBE, _PROBE, dtype=torch.uint8)
    vectors = _explained(extractor.name, lambda: extractor(images))
    if vectors.ndim != 2 or len(vectors) != 2:
        raise UserError(
            f"the extractor {extractor.name} returned {tuple(vectors.shape)} for 2 images: "
            "expected (2, D)"
        )
    _refuse_not_finite(extractor.name, [vectors])


def _refuse_not_finite(name: str, tensors: list[Tensor]) -> None:
    if not all(bool(torch.isfinite(each).all()) for each in tensors):
        raise UserError(f"the extractor {name} returns values that are not finite: check weights")


def _explained(name: str, call: Callable[[], Any]) -> Any:
    """Run what an extractor's author wrote; say whose fault an exception is."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the extractor {name} failed on a blank image of {_PROBE}x{_PROBE} "
            f"({type(error).__name__}: {reason}): correct its code"
        ) from error
