"""Networks that turn stored images into vectors, with the name and hash of each.

Fréchet and kernel distances mean something only together with the space that they are taken in, so
an extractor carries what must stand beside every figure.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.nn.vgg_stages import read_state_dict

__all__ = [
    "SHOWN",
    "FeatureExtractor",
    "inception_extractor",
    "module_extractor",
    "state_hash",
    "to_uint8",
]

SHOWN = 12  # hexadecimal digits of a hash

# Layers between the image and pool3, in order.
_INCEPTION = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


class FeatureExtractor:
    """A frozen network that turns stored images into vectors.

    Attributes:
        name: what stands beside every figure.
        sha256: of the weights, 64 hexadecimal digits.
        channels: of the images that the network takes.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        *,
        channels: int = 3,
        features: Callable[[Tensor], Any] | None = None,
    ):
        self.network = network.requires_grad_(False).eval()
        self.name = name
        self.sha256 = state_hash(network)
        self.channels = channels
        self._features = network if features is None else features

    def __str__(self) -> str:
        """Return name and hash."""
        return f"{self.name} {self.sha256[:SHOWN]}"

    def to(self, device: torch.device | str) -> FeatureExtractor:
        """Move the network to a device; images are moved there as they come."""
        self.network.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Return the vectors of images.

        Args:
            images: uint8 `(B, C, H, W)`; grey ones are repeated for a network of three channels.

        Returns:
            float32 `(B, D)`, on the network's device. The output of a network that returns maps
            is averaged over pixels; several maps are then put side by side.

        Raises:
            UserError: images of another kind, or a network that returns neither vectors nor maps.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(
                f"images are {images.dtype} {tuple(images.shape)}: expected torch.uint8 "
                "(B, C, H, W); convert images in [-1, 1] by to_uint8"
            )
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.channels:
            raise UserError(
                f"images have {images.shape[1]} channels: the extractor {self} takes "
                f"{self.channels}"
            )
        weight = next(self.network.parameters(), None)
        device = images.device if weight is None else weight.device
        self.network.eval()
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            found = self._features(images.to(device).float() / 127.5 - 1)
            maps = list(found) if isinstance(found, (list, tuple)) else [found]
            if not all(isinstance(each, Tensor) and each.ndim in (2, 4) for each in maps):
                raise UserError(
                    f"the extractor {self} returned {_described(maps)}: expected vectors (B, D), "
                    "maps (B, C, H, W), or a list of those"
                )
            flat = [each.mean(dim=(2, 3)) if each.ndim == 4 else each for each in maps]
            return torch.cat(flat, dim=1).float()


def to_uint8(images: Tensor) -> Tensor:
    """Turn images in [-1, 1] into stored ones: (y + 1) 127.5, clipped to 0..255 and truncated.

    As the published figures of the field do. Reference images that are stored as uint8 go in as
    they are: on the way to float and back, truncation may lower a value by one.

    Raises:
        UserError: not of floating point, or values that are not finite.

    >>> to_uint8(torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0]))
    tensor([  0,   0, 127, 254, 255], dtype=torch.uint8)
    """
    if not images.is_floating_point():
        raise UserError(f"images are {images.dtype}: expected floating point in [-1, 1]")
    if not bool(torch.isfinite(images).all()):
        raise UserError("images have values that are not finite: the generator has diverged")
    return ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def state_hash(module: nn.Module) -> str:
    """Return the sha256 of a module's weights and buffers, whatever device they are on.

    Names, kinds, shapes and values count; the order and the file's format don't.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def module_extractor(module: nn.Module, name: str, *, channels: int = 3) -> FeatureExtractor:
    """Make an extractor of any network that takes images in [-1, 1].

    Args:
        module: maps float `(B, C, H, W)` to vectors `(B, D)`, to a map, or to a list of maps; its
            method `features` is taken instead where it has one, unless that is a module. Frozen
            in place.
        name: for what is reported.
        channels: of the images that it takes.
    """
    features = getattr(module, "features", None)
    own = callable(features) and not isinstance(features, nn.Module)
    return FeatureExtractor(module, name, channels=channels, features=features if own else None)


def inception_extractor(path: str | Path | None = None) -> FeatureExtractor:
    """Open the Inception v3 of published FID figures, its 2048 values after pool3.

    The network is torch-fidelity's, with the weights that were converted from TensorFlow. Images
    are resized to 299x299 bilinearly without antialiasing, as in pytorch-fid.

    Args:
        path: the file of weights; None takes it from PyTorch's cache, or downloads it.

    Raises:
        UserError: torch-fidelity or the weights are missing, or those are of another network.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise UserError(
            "the extractor inception needs the package torch-fidelity: pip install 'tenfold[fid]', "
            "or give another extractor"
        ) from error
    if path is None:
        state, source = _downloaded(URL_INCEPTION_V3), "the downloaded file"
    else:
        state, source = read_state_dict(path, "inception"), str(path)
    # The constructor unpickles what it is given, so it gets tensors that were read without that.
    tensors = io.BytesIO()
    torch.save(state, tensors)
    tensors.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors
        )
    except RuntimeError as error:
        raise UserError(
            f"{source} has not the weights of FID's Inception v3 "
            f"({' '.join(str(error).split())[:160]} …): expected the names of pytorch-fid and "
            "torch-fidelity, which aren't those of torchvision's inception_v3"
        ) from error
    return FeatureExtractor(_Pool3(network), "inception")


class _Pool3(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        layers = [network.get_submodule(name) for name in _INCEPTION]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        images = functional.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        vectors: Tensor = self.layers(images).flatten(1)
        return vectors


def _downloaded(url: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # no network, a proxy's refusal, a file cut short, a full disk …
        expected = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        raise UserError(
            f"Inception's weights are neither at {expected} nor could they be downloaded from "
            f"{url} ({type(error).__name__}: {error}): put the file there, give its path "
            "({name: inception, path: FILE}), or give another extractor: a run of the recipe "
            "stagenet-extractor, or file.py:function that returns a module"
        ) from error
    return state


def _described(maps: list[Any]) -> str:
    return ", ".join(
        f"a tensor {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
        for each in maps
    )
