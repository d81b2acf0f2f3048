"""Where training starts: a recipe's `init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.nn.models import Network, load_pretrained

__all__ = ["initialize", "read_weights"]


def initialize(model: nn.Module, network: Network, init: str) -> list[str]:
    """Load weights into a fresh network.

    Args:
        model: the network, filled in place.
        network: how it was built.
        init: `pretrained`, a run, an artifact, or a `.safetensors` or `.pth` file.

    Returns:
        Names of the parameters that keep their fresh values, such as a head for other classes.

    Raises:
        UserError: nothing of that name, a file that can't be read, or weights of another network.
    """
    if init == "pretrained":
        return load_pretrained(model, network)
    state = read_weights(Path(init))
    adapt: Any = getattr(model, "adapt_state_dict", None)  # SuperViT's tables of positions
    if adapt is not None:
        state = adapt(state)
    own = model.state_dict()
    fitting = {
        key: value for key, value in state.items() if key in own and own[key].shape == value.shape
    }
    weights = {name for name, _ in model.named_parameters()}
    fresh = sorted(weights - set(fitting))
    if len(fresh) > len(weights) / 2:
        raise UserError(
            f"init {init} holds another network: {len(fresh)} of {len(weights)} parameters have "
            f"no match, such as {', '.join(fresh[:3])}; give the same model"
        )
    model.load_state_dict(fitting, strict=False)
    return fresh


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read weights by name, from a run, an artifact or a file.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if path.is_dir():
        return artifact.read(path).state_dict()
    if not path.is_file():
        raise UserError(
            f"init {path} does not exist: give pretrained, a run, an artifact, or a "
            ".safetensors or .pth file"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"init {path} can't be read: {error}") from error
    try:
        # tensors and plain values only: a file of weights must not run code
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"init {path} can't be read as weights: {str(error).splitlines()[0]}; save the "
            "state_dict alone, torch.save(model.state_dict(), …)"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"init {path} holds no state_dict: expected tensors by name")
    return {
        key.removeprefix("module."): value
        for key, value in loaded.items()
        if isinstance(value, Tensor)
    }
