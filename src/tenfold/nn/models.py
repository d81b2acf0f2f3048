"""Networks by name: `timm/…`, `torchvision/…`, our own, or a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tenfold.errors import UserError, unknown_name
from tenfold.imports import import_object, is_object_name
from tenfold.nn.c3d import C3D
from tenfold.nn.cifar_resnet import CifarResNet
from tenfold.nn.digitnet import DigitNet
from tenfold.nn.generators import MobileResNetGenerator, ResNetGenerator, UNetGenerator
from tenfold.nn.hqss_networks import HQSS, HQSSRemover
from tenfold.nn.labnet import LABNet
from tenfold.nn.lvvit import LVViT
from tenfold.nn.pvt import DEPTHS, PyramidVisionTransformer
from tenfold.nn.shadow_unet import ShadowUNet
from tenfold.nn.stagenet import StageNet
from tenfold.nn.supervit import SuperViT
from tenfold.nn.unet3d import UNet3d

__all__ = ["Network", "build", "check_name", "load_pretrained", "names", "rebuild"]

_OWN: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{f"resnet{depth}": (CifarResNet, {"depth": depth}) for depth in (20, 32, 44, 56, 110)},
    "digitnet": (DigitNet, {}),
    "c3d": (C3D, {}),
    "unet3d": (UNet3d, {}),
    **{
        f"pvt_{size}": (PyramidVisionTransformer, {"depths": depths})
        for size, depths in DEPTHS.items()
    },
    "lvvit_small": (LVViT, {}),
    "supervit": (SuperViT, {}),
    "stagenet": (StageNet, {}),
    "resnet_generator": (ResNetGenerator, {}),
    "mobile_resnet_generator": (MobileResNetGenerator, {}),
    "unet_generator": (UNetGenerator, {}),
    "hqss": (HQSS, {}),
    "hqss_remover": (HQSSRemover, {}),
    "labnet": (LABNet, {}),
    "shadow_unet": (ShadowUNet, {}),
}
# What networks of images are for, where it isn't translation.
_TASKS = {
    "hqss": "shadow_synthesis",
    **dict.fromkeys(("hqss_remover", "labnet", "shadow_unet"), "shadow_removal"),
}


def names() -> dict[str, str]:
    """Return the networks that a recipe may name, with a line about each."""
    described = {
        name: (network.__doc__ or "").strip().splitlines()[0] for name, (network, _) in _OWN.items()
    }
    for depth in (20, 32, 44, 56, 110):
        described[f"resnet{depth}"] = f"CIFAR ResNet of {depth} layers (shortcut: A or B)"
    for size, depths in DEPTHS.items():
        described[f"pvt_{size}"] = (
            f"Pyramid Vision Transformer of {sum(depths)} blocks, for images of one square size"
        )
    described["timm/<name>"] = (
        "any model of timm, such as timm/resnet50 or timm/vit_tiny_patch16_224"
    )
    described["torchvision/<name>"] = (
        "any classifier of torchvision, such as torchvision/resnet18; for clips torchvision/r3d_18"
    )
    described["<file.py or package.module>:<function>"] = "your own; called with num_classes"
    return described


@dataclass(frozen=True)
class Network:
    """What is needed to build a network again, with fresh weights.

    Attributes:
        name: `timm/…`, `torchvision/…` or `tenfold/…`; None for the user's own code, which an
            artifact never imports.
        arguments: keyword arguments of its constructor.
    """

    name: str | None
    arguments: dict[str, Any] = field(default_factory=dict)


def build(
    name: str,
    *,
    num_classes: int | None = None,
    channels: int = 3,
    outputs: int | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    task: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Network]:
    """Build a network with fresh weights.

    Args:
        name: as in a recipe's `model`; an artifact's `tenfold/…` works too.
        num_classes: of a classifier.
        channels: input channels.
        outputs: channels of the images that a generator makes.
        size: height and width of the input; given to transformers of timm and to our own networks
            that need it.
        frames: of a clip, likewise; None for images.
        task: shadow_removal or shadow_synthesis, whose networks take more than an image.
        options: further keyword arguments of the constructor.

    Returns:
        The network, and what an artifact stores to build it again.

    Raises:
        UserError: an unknown name, or arguments that the constructor refuses.
    """
    given = dict(options or {})
    if not is_object_name(name):
        _refuse_files(given)
    if is_object_name(name):
        known = {"num_classes": num_classes, "channels": channels, "outputs": outputs}
        return _users_own(name, known, given), Network(None)
    library, slash, model = name.partition("/")
    wanted = "the task translation needs a generator"
    if task is not None:
        own_names = [each for each, served in _TASKS.items() if served == task]
        wanted = f"the task {task} needs one of {', '.join(own_names)}, or a function of yours"
    if library in ("timm", "torchvision") and slash and num_classes is None:
        raise UserError(f"model {name} is a classifier: {wanted}")
    if library == "timm" and slash:
        return _timm(model, {"num_classes": num_classes, "in_chans": channels, **given}, size)
    if library == "torchvision" and slash:
        return _torchvision(model, {"num_classes": num_classes, **given}, channels)
    own = name.removeprefix("tenfold/")
    if own not in _OWN:
        raise unknown_name("model", name, [*_OWN, "timm/<name>", "torchvision/<name>"])
    network, fixed = _OWN[own]
    accepted = inspect.signature(network).parameters
    arguments: dict[str, Any] = {"channels": channels} if "channels" in accepted else {}
    arguments |= given
    served = _TASKS.get(own, "translation")
    if num_classes is not None and "num_classes" not in accepted:
        raise UserError(f"model {name} makes images: it is for the task {served}")
    if outputs is not None and served != "translation":
        raise UserError(
            f"model {name} is for the task {served}: the task translation has generators"
        )
    if channels != 3 and "channels" not in accepted:
        raise UserError(f"model {name} takes 3 channels, and the data has {channels}")
    if num_classes is None and "num_classes" in accepted:
        raise UserError(f"model {name} is a classifier: {wanted}")
    if task is not None and task != served:
        raise UserError(f"model {name} is for the task {served}: {wanted}")
    further = {"num_classes": num_classes, "outputs": outputs, "size": size, "frames": frames}
    for key, value in further.items():
        if key in accepted and value is not None:
            arguments.setdefault(key, list(value) if isinstance(value, tuple) else value)
    return (
        _call(network, {**fixed, **arguments}, name),
        Network(f"tenfold/{own}", arguments),
    )


def rebuild(network: Network) -> nn.Module:
    """Build what an artifact names, from the arguments that it stores.

    Raises:
        UserError: the artifact was written from the user's own code, or the library refuses.
    """
    arguments = dict(network.arguments)
    _refuse_files(arguments)
    library, _, model = (network.name or "").partition("/")
    if library == "timm":
        return _timm(model, arguments, None)[0]
    if library == "torchvision":
        return _torchvision(model, arguments, 3)[0]
    if library == "tenfold" and model in _OWN:
        constructor, fixed = _OWN[model]
        built: nn.Module = _call(constructor, {**fixed, **arguments}, network.name or "")
        return built
    raise unknown_name("network", str(network.name), [f"tenfold/{name}" for name in _OWN])


def load_pretrained(model: nn.Module, network: Network) -> list[str]:
    """Load the library's published weights into a network; downloads them at first use.

    Returns:
        The names of parameters that keep their fresh values, such as a head for other classes.

    Raises:
        UserError: the library has no weights of that name, or they can't be fetched.
    """
    library, _, name = (network.name or "").partition("/")
    try:
        if library == "timm":
            import timm

            arguments = {**network.arguments}
            state = timm.create_model(name, pretrained=True, **arguments).state_dict()
        elif library == "torchvision":
            import torchvision

            weights = torchvision.models.get_model_weights(name).DEFAULT
            state = weights.get_state_dict(check_hash=True)
        else:
            raise UserError(
                f"init: pretrained needs a timm/… or torchvision/… model, got {network.name}"
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the pretrained weights of {network.name} could not be loaded "
            f"({type(error).__name__}: {_first_line(error)}): check the network connection, or "
            "give init a .safetensors or .pth file"
        ) from error
    own = model.state_dict()
    fitting = {
        key: value for key, value in state.items() if key in own and own[key].shape == value.shape
    }
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def check_name(name: str) -> None:
    """Refuse a network's name that an artifact could not be built from again.

    Raises:
        UserError: neither `timm/…` nor `torchvision/…` nor one of `tenfold/…`.
    """
    library, _, model = name.partition("/")
    if library not in ("timm", "torchvision") and (library != "tenfold" or model not in _OWN):
        known = ["timm/<name>", "torchvision/<name>", *(f"tenfold/{own}" for own in _OWN)]
        raise unknown_name("network", name, known)


def _refuse_files(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments by which a library would fetch or open files: loading never does that."""
    for key in arguments:
        if key.startswith("pretrained") or key in ("weights", "checkpoint_path", "cache_dir"):
            raise UserError(f"model argument {key} loads weights: use init: pretrained, or a file")


def _users_own(name: str, known: Mapping[str, Any], given: dict[str, Any]) -> nn.Module:
    function = import_object(name, "model")
    if not callable(function):
        raise UserError(f"model {name!r} is not callable: expected a function or class")
    accepted = inspect.signature(function).parameters
    for key, value in known.items():
        if key in accepted and key not in given and value is not None:
            given[key] = value
    model = _call(function, given, name)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} returned {type(model).__name__}: expected an nn.Module")
    return model


def _timm(
    name: str, arguments: dict[str, Any], size: tuple[int, int] | None
) -> tuple[nn.Module, Network]:
    import timm

    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    if size is not None and "img_size" not in arguments:
        # Transformers are built for one size; convolutional networks refuse the argument.
        sized = {**arguments, "img_size": list(size)}
        try:
            return timm.create_model(name, **sized), Network(f"timm/{name}", sized)
        except TypeError:
            pass
        except Exception as error:
            raise UserError(
                f"timm/{name} can't take images of {size[0]}x{size[1]}: {_first_line(error)}"
            ) from error
    return _call(timm.create_model, {"model_name": name, **arguments}, f"timm/{name}"), Network(
        f"timm/{name}", arguments
    )


def _torchvision(name: str, arguments: dict[str, Any], channels: int) -> tuple[nn.Module, Network]:
    import torchvision

    known = [
        model
        for module in (torchvision.models, torchvision.models.video)
        for model in torchvision.models.list_models(module=module)
    ]
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    if channels != 3:
        raise UserError(
            f"torchvision/{name} takes 3 channels, and the data has {channels}: choose a timm "
            "model, which adapts its first layer, or one of our own"
        )
    if name in ("googlenet", "inception_v3"):  # whose training output is no tensor otherwise
        arguments = {"aux_logits": False, **arguments}
    model = _call(torchvision.models.get_model, {"name": name, **arguments}, f"torchvision/{name}")
    return model, Network(f"torchvision/{name}", arguments)


def _call(function: Any, arguments: dict[str, Any], name: str) -> Any:
    try:
        return function(**arguments)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(
            f"model {name} can't be built with {shown}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
