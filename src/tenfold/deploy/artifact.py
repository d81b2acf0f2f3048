"""The artifact: a finished model as `model.json` and `weights.safetensors`, nothing else.

Loading one needs neither the training code nor its dependencies, executes nothing that a file
names, and never unpickles. The JSON says which network to build (or that the caller brings it),
which of its weights are stored packed, and how an optimized model differs from it (see `edits`);
its hash covers itself and the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.deploy.edits import EDITS, from_stored, replay, to_stored
from tenfold.deploy.optimized import OptimizedModel, reopen
from tenfold.deploy.plan import OptimizePlan
from tenfold.deploy.quantized_edits import QUANTIZED_EDITS, store_quantized, stored_integers
from tenfold.deploy.semi_structured import SemiStructuredLayer
from tenfold.deploy.winograd_edits import WINOGRAD, winograd_edits
from tenfold.errors import UserError
from tenfold.measure.cells import read_cells, write_cells
from tenfold.nn.blocks import nm_pattern
from tenfold.nn.models import Network, check_name, rebuild
from tenfold.nn.packed import PackedLayer
from tenfold.nn.packing import pack_nm, unpack_nm
from tenfold.nn.supervit import SuperViT

__all__ = ["Artifact", "artifact_bytes", "load", "read", "save"]

FORMAT = 1
STRUCTURE, WEIGHTS = "model.json", "weights.safetensors"
PACKED = "NMPacked"
# Layers that `finalize` leaves behind: they are there before a model is optimized.
_FINALIZED = (WINOGRAD, *QUANTIZED_EDITS)


@dataclass(frozen=True)
class Artifact:
    """What an artifact's JSON says."""

    path: Path
    network: Network
    edits: list[dict[str, Any]]
    preprocessing: dict[str, Any] | None
    classes: list[str] | None
    recipe: dict[str, Any] | None
    plan: dict[str, Any] | None = None

    def model(self, model: nn.Module | None = None) -> nn.Module:
        """Build the network and fill in the weights; see `load`."""
        return _fill(self, model)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name, the packed ones dense again.

        Raises:
            UserError: an optimized model, or one with quantized layers or layers in the Winograd
                domain, whose weights are no longer those of its network.
        """
        if self.plan is not None:
            raise UserError(
                f"{self.path} holds a model that was optimized for one machine: give the artifact "
                "of the model that it was made from"
            )
        changed = [edit["module"] for edit in self.edits if edit.get("type") == WINOGRAD]
        if changed:
            raise UserError(
                f"{self.path}: {changed[0] or 'the model'} was trained or pruned in the Winograd "
                "domain and has no 3x3x3 kernel: load the whole model, or give the artifact of the "
                "model that it was made from"
            )
        if any(edit.get("type") in QUANTIZED_EDITS for edit in self.edits):
            raise UserError(
                f"{self.path} holds a quantized model, whose weights are integers: give the "
                "artifact of the float model that it was trained from"
            )
        _check_edits(self)
        return _unpack(self)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    network: Network | str | Mapping[str, Any] | None = None,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Path:
    """Write a finished model as an artifact.

    Weights whose zeros follow an N:M pattern are stored packed, whoever made the pattern; the
    weights of quantized layers take as many bits as they have.

    Args:
        model: a plain module, such as `finalize` returns, or what `optimize` made of one.
        path: folder to write; made if missing, an older artifact in it is replaced.
        network: how to build the network again: a name such as `timm/resnet18`, a mapping of
            `name` and `arguments`, or None when `load` will be given the module.
        preprocessing: size, mean, std and so on of the input, JSON-able.
        classes: names of the outputs.
        recipe: the recipe that made the model, JSON-able.

    Returns:
        The folder.

    Raises:
        UserError: the model is still in training form or compressed for a GPU, or the path is a
            file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(nn.Linear(4, 2), folder + "/small")
    ...     load(path, model=nn.Linear(4, 2)).weight.shape
    torch.Size([2, 4])
    """
    if any("parametrizations." in name for name in model.state_dict()) or any(
        getattr(module, "training_form", False) is True for module in model.modules()
    ):
        raise UserError(
            "the model is still in training form (it has parametrizations, or layers for training "
            "alone): call the method's finalize(model) first"
        )
    if any(isinstance(module, SemiStructuredLayer) for module in model.modules()):
        raise UserError(
            "the model is compressed for the sparse tensor cores of one GPU: save the model that "
            "was given to optimize, and optimize it again after loading"
        )
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: expected a folder to write the artifact into")
    optimized = model if isinstance(model, OptimizedModel) else None
    tensors, edits = _pack(model if optimized is None else optimized.network)
    named = _as_network(network)
    if named.name is not None:
        check_name(named.name)
    structure: dict[str, Any] = {
        "format": FORMAT,
        "network": None
        if named.name is None
        else {"name": named.name, "arguments": named.arguments},
        "edits": edits if optimized is None else [*optimized.edits, *edits],
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "classes": None if classes is None else list(classes),
        "recipe": None if recipe is None else dict(recipe),
    }
    if optimized is not None:
        structure["plan"] = optimized.plan.to_dict()
    try:
        json.dumps(structure)
    except (TypeError, ValueError) as error:
        raise UserError(f"the artifact's description is not JSON: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    # Both files are complete before either old one is replaced.
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        from safetensors.torch import save_file

        save_file(tensors, staging / WEIGHTS)
        structure["sha256"] = _hash(structure, staging / WEIGHTS)
        (staging / STRUCTURE).write_text(json.dumps(structure, indent=1) + "\n", encoding="utf-8")
        for name in (WEIGHTS, STRUCTURE):
            os.replace(staging / name, folder / name)
        if isinstance(model, SuperViT):  # what is known of its cells
            write_cells(folder, model.table)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load an artifact into a module in evaluation mode.

    Args:
        path: the artifact's folder, or a run's folder that has one in `model/`.
        model: a fresh instance of the network; needed when the artifact names none.

    Returns:
        The network with its weights; `model` itself when that was given. An optimized model comes
        back packed and fused as it was saved, without timing; `model` becomes a part of it.

    Raises:
        UserError: no artifact, another format, a changed file, or names and shapes that differ.
    """
    return read(path).model(model)


def read(path: str | os.PathLike[str]) -> Artifact:
    """Read and check an artifact's description without building the network.

    Raises:
        UserError: no artifact there, another format, or a file that was changed.
    """
    folder = Path(path)
    if not (folder / STRUCTURE).is_file() and (folder / "model" / STRUCTURE).is_file():
        folder = folder / "model"
    for name in (STRUCTURE, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no artifact: it has no {name}")
    try:
        structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / STRUCTURE} is not valid JSON: {error}") from error
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        given = structure.get("format") if isinstance(structure, dict) else None
        raise UserError(
            f"{folder} has artifact format {given!r}: this version of tenfold reads format "
            f"{FORMAT}; load it with the version that wrote it"
        )
    if structure.get("sha256") != _hash(structure, folder / WEIGHTS):
        raise UserError(
            f"{folder} was changed after it was written (its sha256 differs): save it again"
        )
    network = structure["network"] or {"name": None, "arguments": {}}
    return Artifact(
        path=folder,
        network=Network(network["name"], network["arguments"]),
        edits=structure["edits"],
        preprocessing=structure["preprocessing"],
        classes=structure["classes"],
        recipe=structure["recipe"],
        plan=structure.get("plan"),
    )


def artifact_bytes(path: str | os.PathLike[str]) -> int:
    """Return what an artifact takes on disk, in bytes."""
    folder = read(path).path
    return sum((folder / name).stat().st_size for name in (STRUCTURE, WEIGHTS))


def _as_network(network: Network | str | Mapping[str, Any] | None) -> Network:
    if network is None:
        return Network(None)
    if isinstance(network, Network):
        return network
    if isinstance(network, str):
        return Network(network)
    if set(network) - {"name", "arguments"} or not isinstance(network.get("name"), str):
        raise UserError(f"network={dict(network)!r}: expected a name and arguments")
    return Network(str(network["name"]), dict(network.get("arguments") or {}))


def _pack(model: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    edits = winograd_edits(model)
    layers = {
        f"{name}." if name else "": module
        for name, module in model.named_modules()
        if isinstance(module, PackedLayer)
    }
    for prefix, layer in layers.items():
        tensors[f"{prefix}values"], tensors[f"{prefix}index"] = to_stored(layer)
    quantized, replaced, changes = store_quantized(model)
    tensors |= quantized
    edits += changes
    for key, value in model.state_dict().items():
        if key in tensors or key in replaced:
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"the model's state has {key}, which is no tensor: it can't be saved")
        module, _, attribute = key.rpartition(".")
        pattern = nm_pattern(value) if attribute == "weight" and value.is_floating_point() else None
        if pattern is None:
            # a copy of its own: tied tensors are refused by the format
            tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            continue
        n, m = pattern
        tensors[f"{key}.values"], tensors[f"{key}.index"] = pack_nm(value.cpu(), n, m)
        edits.append(
            {
                "module": module,
                "type": PACKED,
                "arguments": {"n": n, "m": m, "shape": list(value.shape)},
            }
        )
    return tensors, edits


def _fill(artifact: Artifact, model: nn.Module | None) -> nn.Module:
    if model is None:
        if artifact.network.name is None:
            raise UserError(
                f"{artifact.path} holds a network of your own code: pass a fresh instance, "
                "tenfold.load(path, model=…)"
            )
        model = rebuild(artifact.network)
    _check_edits(artifact)
    model, _ = replay(model, [edit for edit in artifact.edits if edit["type"] in _FINALIZED])
    changes = [edit for edit in artifact.edits if edit["type"] not in (PACKED, *_FINALIZED)]
    model, epilogues = replay(model, changes)
    state = _unpack(artifact)
    expected = model.state_dict()
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(set(expected) & set(state))
        if state[key].shape != expected[key].shape
    ]
    if missing or unknown or shapes:
        found = [f"missing {key}" for key in missing] + [f"unknown {key}" for key in unknown]
        found += shapes
        raise UserError(
            f"{artifact.path} doesn't fit the network: {'; '.join(found[:5])}"
            f"{f' and {len(found) - 5} more' if len(found) > 5 else ''}"
        )
    with torch.no_grad():
        for key, target in expected.items():
            if target.dtype != state[key].dtype:  # keep the artifact's precision
                owner = model.get_submodule(key.rpartition(".")[0])
                name = key.rpartition(".")[2]
                tensor = getattr(owner, name)
                tensor.data = tensor.data.to(state[key].dtype)
    model.load_state_dict(state)
    if isinstance(model, SuperViT) and (cells := read_cells(artifact.path)) is not None:
        model.table.take(cells)
    if artifact.plan is None:
        return model.eval()
    return reopen(model, OptimizePlan.from_dict(artifact.plan), changes, epilogues)


def _check_edits(artifact: Artifact) -> None:
    """Refuse edits that this version doesn't know, or that only an optimized model has."""
    for edit in artifact.edits:
        kind = edit.get("type")
        known = (PACKED, *(_FINALIZED if artifact.plan is None else EDITS))
        if kind not in known:
            raise UserError(
                f"{artifact.path} has an edit of type {kind!r}: this version of tenfold knows "
                f"{', '.join((PACKED, *EDITS))}; load it with the version that wrote it"
            )


def _unpack(artifact: Artifact) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(artifact.path / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{artifact.path / WEIGHTS} can't be read: {error}") from error
    for edit in artifact.edits:
        kind = edit.get("type")
        prefix = f"{edit['module']}." if edit["module"] else ""
        if kind in QUANTIZED_EDITS:
            stored_integers(state, prefix, edit["arguments"])
            continue
        if kind != PACKED:
            _unpack_layer(state, prefix, edit["arguments"])
            continue
        key = f"{prefix}weight"
        arguments = edit["arguments"]
        try:
            values, index = state.pop(f"{key}.values"), state.pop(f"{key}.index")
        except KeyError as error:
            raise UserError(f"{artifact.path} lacks the packed weight {key}") from error
        state[key] = unpack_nm(values, index, arguments["n"], arguments["m"], arguments["shape"])
    return state


def _unpack_layer(state: dict[str, Tensor], prefix: str, arguments: Mapping[str, Any]) -> None:
    """Bring the weight of a packed layer into the kernels' layout; other edits store nothing."""
    if "n" not in arguments:
        return
    names = f"{prefix}values", f"{prefix}index"
    if missing := [name for name in names if name not in state]:
        raise UserError(f"the artifact lacks the packed weight {missing[0]}")
    values, index = from_stored(state[names[0]], state[names[1]], arguments)
    state[names[0]], state[names[1]] = values, index


def _hash(structure: Mapping[str, Any], weights: Path) -> str:
    described = {key: value for key, value in structure.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    with weights.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
