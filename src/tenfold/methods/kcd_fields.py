"""The fields of KCD, checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tenfold.errors import UserError, unknown_name
from tenfold.methods.distillers import DISTILLERS
from tenfold.methods.feature_loss import check_layers
from tenfold.methods.preparation import loss_weights

if TYPE_CHECKING:
    from tenfold.methods.kcd import KCD

__all__ = ["check_fields"]

_CHOICES = {
    "drop_window": ("step", "all"),
    "mix_source": ("current", "original"),
    "unseen": ("refuse", "keep"),
    "teacher_precision": ("same", "float32", "bfloat16"),
}


def check_fields(kcd: KCD) -> None:
    """Refuse fields out of range, and combinations that make no sense.

    Raises:
        UserError: what was given, and what is expected.
    """
    if not isinstance(kcd.teacher, str | dict | nn.Module) or kcd.teacher in ("", {}):
        raise UserError(
            f"teacher={kcd.teacher!r}: expected a network, or in a recipe a run, an artifact, or "
            "the name of a model, such as resnet56"
        )
    if not 0 < kcd.keep_ratio <= 1:
        raise UserError(f"keep_ratio={kcd.keep_ratio}: expected a share in (0, 1], such as 0.7")
    for name in ("stages", "negatives"):
        value = getattr(kcd, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}={value!r}: expected an int of at least 1")
    for name in ("temperature", "cache_limit_gib"):
        if not getattr(kcd, name) > 0:
            raise UserError(f"{name}={getattr(kcd, name)}: expected more than 0")
    if kcd.visit_power < 0:
        raise UserError(f"visit_power={kcd.visit_power}: expected at least 0")
    if not 0 <= kcd.augment_max < 1:
        raise UserError(f"augment_max={kcd.augment_max}: expected a share in [0, 1), such as 0.3")
    for name, known in _CHOICES.items():
        if getattr(kcd, name) not in known:
            raise UserError(f"{name}={getattr(kcd, name)!r}: expected {' or '.join(known)}")
    _check_distiller(kcd)
    _check_cache(kcd)


def _check_distiller(kcd: KCD) -> None:
    if kcd.distiller not in DISTILLERS:
        raise unknown_name("distiller", str(kcd.distiller), DISTILLERS)
    for name in ("layers", "teacher_layers"):
        given = getattr(kcd, name)
        if given is not None and (
            isinstance(given, str) or not all(isinstance(layer, str) for layer in given)
        ):
            raise UserError(f"{name}={given!r}: expected a list of module names")
    check_layers(kcd.distiller, kcd.layers, kcd.teacher_layers)
    weights = {
        name: getattr(kcd, name) for name in ("label_weight", "logit_weight", "feature_weight")
    }
    for name, weight in weights.items():
        if weight is not None and weight < 0:
            raise UserError(f"{name}={weight}: expected at least 0")
    chosen = loss_weights(kcd)
    if not any((chosen.label, chosen.logit, chosen.feature)):
        raise UserError("all weights of the loss are 0: nothing would be learned; give one of them")
    if kcd.distiller == "kd" and kcd.feature_weight:
        raise UserError(
            f"feature_weight={kcd.feature_weight} with distiller kd, which compares no features: "
            "leave it out, or choose a feature distiller"
        )


def _check_cache(kcd: KCD) -> None:
    if not isinstance(kcd.teacher_cache, str) or not kcd.teacher_cache:
        raise UserError(
            f"teacher_cache={kcd.teacher_cache!r}: expected off, memory or the path of a folder"
        )
    if kcd.teacher_cache == "off":
        return
    if kcd.distiller != "kd":
        raise UserError(
            f"teacher_cache keeps logits, and distiller {kcd.distiller} needs the teacher's "
            "features of every batch: use teacher_cache: off, or distiller: kd"
        )
    if kcd.teacher_cache != "memory" and Path(kcd.teacher_cache).is_file():
        raise UserError(f"teacher_cache={kcd.teacher_cache!r} is a file: give a folder")
