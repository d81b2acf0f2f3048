"""The first four stages of VGG16, the usual space of style and feature losses.

Karen Simonyan and Andrew Zisserman, "Very deep convolutional networks for large-scale image
recognition", 2015, configuration D. The maps are those after relu1_2, relu2_2, relu3_3 and relu4_3.
Images go in scaled to [0, 1] without ImageNet's mean and deviation, as in the losses of OMGD and
DCD: other scales would need other weights of the losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import UserError

__all__ = ["VggStages", "read_state_dict"]
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512))


class VggStages(nn.Module):
    """VGG16 up to relu4_3, frozen, with four maps as its output.

    Args:
        weights: a .pth or .safetensors file with the names of torchvision's `vgg16`, of which those
            of `features.0` to `features.21` are read; None takes torchvision's ImageNet weights
            from PyTorch's cache, or downloads them.

    Raises:
        UserError: no weights there, or those of another network.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        inputs = 3
        for widths in _WIDTHS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for outputs in widths:
                # In place: of a convolution and a ReLU, only the latter's output is kept then.
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.channels = 3
        given = _download() if weights is None else read_state_dict(weights, "vgg16")
        self._fill(given, "the downloaded file" if weights is None else str(weights))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of images in [-1, 1].

        Args:
            images: `(B, 3, H, W)`, or `(B, 1, H, W)`, which is repeated for the three channels.

        Returns:
            `(B, 64, H, W)`, `(B, 128, H/2, W/2)`, `(B, 256, H/4, W/4)` and `(B, 512, H/8, W/8)`.
        """
        x = (images + 1) / 2
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                maps.append(x)
        return maps

    def _fill(self, given: dict[str, Tensor], source: str) -> None:
        own = self.state_dict()
        wrong = [
            key for key, value in own.items() if key not in given or given[key].shape != value.shape
        ]
        if wrong:
            raise UserError(
                f"{source} has not the weights of VGG16: {', '.join(wrong[:3])}"
                f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''} are missing or of "
                "another shape; expected the names of torchvision's vgg16, such as "
                "features.0.weight"
            )
        self.load_state_dict({key: given[key] for key in own})


def _download() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # no network, a proxy's refusal, a file cut short, a full disk …
        expected = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        raise UserError(
            f"VGG16's weights are neither at {expected} nor could they be downloaded from {url} "
            f"({type(error).__name__}: {error}): put the file there, give its path "
            "({name: vgg16, path: FILE}), or give another extractor: a run of the recipe "
            "stagenet-extractor, or file.py:function that returns a module with four maps"
        ) from error
    return state


def read_state_dict(path: str | Path, what: str) -> dict[str, Tensor]:
    """Read tensors by name from a .safetensors file, or a .pth file that holds nothing else.

    Args:
        path: the file.
        what: whose weights they are, for errors.

    Raises:
        UserError: no such file, or one that can't be read as weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the weights of {what}: {path} does not exist; give a .pth file's path")
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            # tensors and plain values only: a file of weights must not run code
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the weights of {what}: {path} can't be read ({reason}); expected a state_dict, as "
            "torch.save(model.state_dict(), …) writes it"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(
            f"the weights of {what}: {path} holds no state_dict: expected tensors by name"
        )
    return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
