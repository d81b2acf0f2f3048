"""Checkpoints of the CycleGAN and pix2pix authors' code, brought to the names of our networks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tenfold.errors import UserError

__all__ = ["adapted", "refuse_misfit"]


def adapted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint of the authors' code to our names.

    Old checkpoints hold running statistics of instance norms, which were never used. Blocks without
    dropout have their second convolution one place earlier. A checkpoint of a wrapped network has a
    prefix.

    Args:
        state: of a generator or discriminator.
        model: that it is for.
    """
    found = {key.removeprefix("module."): value for key, value in state.items()}
    own = set(model.state_dict())
    # Ours have nothing at place 5: a block with weights there has no dropout ahead of it.
    earlier = {
        f"{key.partition('.conv_block.5.')[0]}.conv_block."
        for key in found
        if ".conv_block.5." in key and key not in own
    }
    moved = {}
    for key, value in found.items():
        head, middle, tail = key.partition(".conv_block.")
        place, dot, rest = tail.partition(".")
        if head + middle in earlier and place in ("5", "6"):
            key = f"{head}{middle}{int(place) + 1}{dot}{rest}"
        moved[key] = value
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {
        key: value
        for key, value in moved.items()
        if key in own or key.rpartition(".")[2] not in statistics
    }


def refuse_misfit(state: Mapping[str, Tensor], model: nn.Module, strict: bool = True) -> None:
    """Refuse a checkpoint of another network.

    Args:
        state: with our names.
        model: that it is for.
        strict: whether it has to be complete; sizes have to fit in any case.

    Raises:
        UserError: with the names that are missing, unexpected, or of another size.
    """
    own = model.state_dict()
    counters = "num_batches_tracked"  # PyTorch fills in those that old checkpoints lack
    faults = {
        "missing": [k for k in own if strict and k not in state and not k.endswith(counters)],
        "unexpected": [key for key in state if strict and key not in own],
        "of another size": [
            f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and own[key].shape != value.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{fault}: {', '.join(keys[:12])}" + (f" and {len(keys) - 12} more" * (len(keys) > 12))
            for fault, keys in faults.items()
            if keys
        )
        raise UserError(
            f"the checkpoint doesn't fit {type(model).__name__} ({listed}): expected one of the "
            "same kind, width and norm"
        )
