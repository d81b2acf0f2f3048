"""The methods: one file a paper. `from tenfold.methods import LBC` is all that a loop needs.

A method is found from its file: the module `lbc` holds the class whose lower-case name is `lbc`,
and that is its name in recipes and on the command line too. The other public names of a method's
module (its pure functions) can be imported from here as well.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from tenfold.errors import UserError, unknown_name
from tenfold.imports import import_object, is_object_name
from tenfold.methods.base import Kind, LayerPlan, Method, Stage, in_order
from tenfold.methods.training_set import Mixing, Requests, TrainingSet

if TYPE_CHECKING:  # for completion and type checkers only; at run time names are found from files
    from tenfold.methods.crd import CRD as CRD
    from tenfold.methods.crd import column_strips as column_strips
    from tenfold.methods.crd import pairwise_distance_angle_loss as pairwise_distance_angle_loss
    from tenfold.methods.crd import patches as patches
    from tenfold.methods.crd import row_strips as row_strips
    from tenfold.methods.dcd import DCD as DCD
    from tenfold.methods.hqss import HQSS as HQSS
    from tenfold.methods.hqss import HQSSRemover as HQSSRemover
    from tenfold.methods.hqss import HQSSTraining as HQSSTraining
    from tenfold.methods.hqss import RefinementNetwork as RefinementNetwork
    from tenfold.methods.hqss import Regions as Regions
    from tenfold.methods.hqss import RemovalNetwork as RemovalNetwork
    from tenfold.methods.hqss import ShadowDiscriminator as ShadowDiscriminator
    from tenfold.methods.hqss import ShadowEncoder as ShadowEncoder
    from tenfold.methods.hqss import ShadowGenerator as ShadowGenerator
    from tenfold.methods.hqss import Synthesis as Synthesis
    from tenfold.methods.hqss import area_loss as area_loss
    from tenfold.methods.hqss import colour_loss as colour_loss
    from tenfold.methods.hqss import discriminator_losses as discriminator_losses
    from tenfold.methods.hqss import frozen as frozen
    from tenfold.methods.hqss import generator_losses as generator_losses
    from tenfold.methods.hqss import light_loss as light_loss
    from tenfold.methods.hqss import paint as paint
    from tenfold.methods.hqss import regions_of as regions_of
    from tenfold.methods.hqss import removal_losses as removal_losses
    from tenfold.methods.hqss import synthesize as synthesize
    from tenfold.methods.kcd import KCD as KCD
    from tenfold.methods.kcd import ContrastLoss as ContrastLoss
    from tenfold.methods.kcd import VariationalLoss as VariationalLoss
    from tenfold.methods.kcd import attention_loss as attention_loss
    from tenfold.methods.kcd import condense as condense
    from tenfold.methods.kcd import condensed_sizes as condensed_sizes
    from tenfold.methods.kcd import distillation_loss as distillation_loss
    from tenfold.methods.kcd import mix_images as mix_images
    from tenfold.methods.kcd import neighbour_loss as neighbour_loss
    from tenfold.methods.kcd import prediction_entropy as prediction_entropy
    from tenfold.methods.kcd import relation_loss as relation_loss
    from tenfold.methods.kcd import similarity_loss as similarity_loss
    from tenfold.methods.labnet import LabLoss as LabLoss
    from tenfold.methods.labnet import LABNet as LABNet
    from tenfold.methods.labnet import LABNetTraining as LABNetTraining
    from tenfold.methods.labnet import RemovalLoss as RemovalLoss
    from tenfold.methods.labnet import lab_loss as lab_loss
    from tenfold.methods.labnet import removal_loss as removal_loss
    from tenfold.methods.lbc import LBC as LBC
    from tenfold.methods.lbc import candidates as candidates
    from tenfold.methods.lbc import from_blocks as from_blocks
    from tenfold.methods.lbc import removed_candidates as removed_candidates
    from tenfold.methods.lbc import to_blocks as to_blocks
    from tenfold.methods.lts import LTS as LTS
    from tenfold.methods.lts import default_momentum as default_momentum
    from tenfold.methods.lts import freeze_threshold as freeze_threshold
    from tenfold.methods.lts import quantize_input as quantize_input
    from tenfold.methods.lts import quantize_weight as quantize_weight
    from tenfold.methods.omgd import OMGD as OMGD
    from tenfold.methods.smmix import SMMix as SMMix
    from tenfold.methods.smmix import Windows as Windows
    from tenfold.methods.smmix import extreme_windows as extreme_windows
    from tenfold.methods.smmix import paste_windows as paste_windows
    from tenfold.methods.smmix import region_means as region_means
    from tenfold.methods.smmix import smmix_loss as smmix_loss
    from tenfold.methods.smmix import smooth_labels as smooth_labels
    from tenfold.methods.smmix import window_mask as window_mask
    from tenfold.methods.supervit import Box as Box
    from tenfold.methods.supervit import SuperViT as SuperViT
    from tenfold.methods.supervit import SuperViTCell as SuperViTCell
    from tenfold.methods.supervit import SuperViTTraining as SuperViTTraining
    from tenfold.methods.supervit import distilled as distilled
    from tenfold.methods.supervit import draw_box as draw_box
    from tenfold.methods.supervit import kept_patches as kept_patches
    from tenfold.methods.winograd3d import Winograd3d as Winograd3d
    from tenfold.methods.winograd3d import convert as convert
    from tenfold.methods.winograd3d import gain_scales as gain_scales
    from tenfold.methods.winograd3d import transforms as transforms
    from tenfold.methods.winograd3d import winograd_weight as winograd_weight

__all__ = [
    "Kind",
    "LayerPlan",
    "Method",
    "Mixing",
    "Requests",
    "Stage",
    "TrainingSet",
    "find",
    "in_order",
    "registry",
]


def registry() -> dict[str, type[Method]]:
    """Return every method of the package by its key, in alphabetical order."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Method)
                and value.__module__ == module.__name__
                and value.key() == entry.name
            ):
                found[entry.name] = value
    return dict(sorted(found.items()))


def find(key: str) -> type[Method]:
    """Return a method's class by its key, or one's own by `package.module:Class`.

    Raises:
        UserError: there is none of that name, or it is no method.
    """
    if is_object_name(key):
        value = import_object(key, "method")
        if not (isinstance(value, type) and issubclass(value, Method)):
            raise UserError(f"method {key!r} is not a subclass of tenfold.methods.Method")
        return value
    known = registry()
    if key not in known:
        raise unknown_name("method", key, known)
    return known[key]


def __getattr__(name: str) -> Any:
    for key, method in registry().items():
        module = importlib.import_module(f"{__name__}.{key}")
        if name == method.__name__ or name in getattr(module, "__all__", ()):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
