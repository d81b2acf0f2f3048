"""HQSS's regions, what its networks make of them, and its losses; equations are those of `hqss`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.nn.focal_frequency import focal_frequency_loss
from tenfold.nn.hqss_networks import HQSS, LEAST_SIDE, MULTIPLE
from tenfold.nn.shadow_codes import lab_codes, rgb_of_codes
from tenfold.nn.shadow_gain import apply_gains, ring_gains
from tenfold.nn.shadow_regions import codes_of, dilated, masked, signed_codes

__all__ = [
    "Regions",
    "Synthesis",
    "area_loss",
    "colour_loss",
    "discriminator_losses",
    "frozen",
    "generator_losses",
    "light_loss",
    "paint",
    "regions_of",
    "removal_losses",
    "synthesize",
    "unit_images",
]


@dataclass(frozen=True)
class Regions:
    """What of photos is in shadow, and what is lit and gets a shadow's shape.

    Attributes:
        shadow: S, signed codes `(B, 3, H, W)`, all else black.
        lit: N, likewise.
        shadow_mask: m_S, `(B, 1, H, W)` of zeros and ones.
        lit_mask: m_N, likewise.
        photos: RGB in [0, 1], `(B, 3, H, W)`.
    """

    shadow: Tensor
    lit: Tensor
    shadow_mask: Tensor
    lit_mask: Tensor
    photos: Tensor


@dataclass(frozen=True)
class Synthesis:
    """What stage 1 makes of regions, with their graphs.

    Attributes:
        shadow_features: f_S.
        lit_features: f_N.
        shadow_again: S' = G(f_S, S).
        lit_again: N' = G(f_N, N).
        pseudo_shadow: P = G(f_S, N).
        pseudo_lit: Q = G(f_N, S).
    """

    shadow_features: Tensor
    lit_features: Tensor
    shadow_again: Tensor
    lit_again: Tensor
    pseudo_shadow: Tensor
    pseudo_lit: Tensor


def regions_of(images: Tensor, mask: Tensor, lit: Tensor) -> Regions:
    """Return the shadow and the lit region of photos.

    Args:
        images: uint8 or float in [0, 1], `(B, 3, H, W)`.
        mask: m_S, `(B, 1, H, W)` of zeros and ones of any type.
        lit: m_N, likewise.

    Raises:
        UserError: other shapes.
    """
    signed = signed_codes(lab_codes(images))
    wanted = (images.shape[0], 1, *images.shape[2:])
    for name, each in (("mask", mask), ("lit region", lit)):
        if tuple(each.shape) != wanted:
            raise UserError(
                f"the {name} has shape {tuple(each.shape)}: expected {wanted}, one channel of the "
                "images' size"
            )
    mask, lit = mask.to(signed.dtype), lit.to(signed.dtype)
    photos = unit_images(images)
    return Regions(masked(signed, mask), masked(signed, lit), mask, lit, photos)


def paint(network: HQSS, regions: Regions) -> Synthesis:
    """Return all that E and G make of regions.

    Pairs of images go through the networks as one batch: instance norms keep them apart.
    """
    both = torch.cat([regions.shadow, regions.lit])
    features = network.encoder(both)
    own = network.generator(features, both)
    shadow_features, lit_features = features.chunk(2)
    across = network.generator(features, torch.cat([regions.lit, regions.shadow]))
    return Synthesis(shadow_features, lit_features, *own.chunk(2), *across.chunk(2))


def generator_losses(network: HQSS, regions: Regions, made: Synthesis) -> dict[str, Tensor]:
    """Return the losses of E and G, without weights: see the module's equations.

    Args:
        network: the discriminators' weights get no gradient from here, nor do those of E and G by
            the way back.
        regions: real ones.
        made: of these, by `paint`.
    """
    real = torch.cat([regions.shadow, regions.lit])
    own = torch.cat([made.shadow_again, made.lit_again])
    painted = torch.cat([made.pseudo_lit, made.pseudo_shadow])  # of S and of N
    features = torch.cat([made.shadow_features, made.lit_features])
    back = frozen(network.generator, features, painted)  # G'(f_S, Q), G'(f_N, P)
    found = frozen(network.encoder, torch.cat([made.pseudo_shadow, made.pseudo_lit]))
    judged = [
        (frozen(judge, region) - 1).square().mean()
        for judge, region in (
            (network.shadow_discriminator, made.pseudo_shadow),
            (network.lit_discriminator, made.pseudo_lit),
        )
    ]
    return {
        # Means over both halves: twice these are the sums of the two terms.
        "self_reconstruction": 2 * (own - real).abs().mean(),
        "self_frequency": 2 * focal_frequency_loss(own, real),
        "adversarial": judged[0] + judged[1],
        "colour": colour_loss(made.pseudo_shadow, regions.lit, regions.lit_mask)
        + colour_loss(made.pseudo_lit, regions.shadow, regions.shadow_mask),
        "cycle": 2 * (back - real).abs().mean(),
        "cycle_frequency": 2 * focal_frequency_loss(back, real),
        "feature_cycle": 2 * (found - features).abs().mean(),
    }


def discriminator_losses(
    network: HQSS, regions: Regions, pseudo_shadow: Tensor, pseudo_lit: Tensor
) -> dict[str, Tensor]:
    """Return the losses of D_S and D_N, least squares, without the usual half.

    Args:
        network: has discriminators.
        regions: real ones.
        pseudo_shadow: painted ones, `(B, 3, H, W)`; their graphs are left.
        pseudo_lit: likewise.
    """
    losses = {}
    for name, judge, real, painted in (
        ("shadow_discriminator", network.shadow_discriminator, regions.shadow, pseudo_shadow),
        ("lit_discriminator", network.lit_discriminator, regions.lit, pseudo_lit),
    ):
        assert judge is not None
        judged: Tensor = judge(torch.cat([real, painted.detach()]))
        of_real, of_painted = judged[: len(real)], judged[len(real) :]
        losses[name] = (of_real - 1).square().mean() + of_painted.square().mean()
    return losses


def colour_loss(painted: Tensor, region: Tensor, mask: Tensor) -> Tensor:
    """Return how far a and b of a region have moved: means over its pixels, of a plus of b.

    Args:
        painted: signed codes `(B, 3, H, W)`.
        region: likewise.
        mask: `(B, 1, H, W)`, of the region; a sample without any counts as unmoved.
    """
    moved = (painted[:, 1:] - region[:, 1:]).abs().sum(1, keepdim=True) * mask
    return (moved.sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)).mean()


def light_loss(made: Synthesis, regions: Regions) -> Tensor:
    """Return how far the mean L of painted regions is from what the photos' own shadows tell.

    A shadow takes a share of the light of its surroundings: P should have that share of N's, and Q
    get it back from S. Photos whose shadow has no lit surroundings don't count.

    Args:
        made: of the regions, by `paint`.
        regions: real ones.
    """
    with torch.no_grad():
        gains = ring_gains(regions.photos, regions.shadow_mask)
        known = (gains != 1).any(1).to(gains.dtype)
    found = []
    for painted, mask, change in (
        (made.pseudo_shadow, regions.lit_mask, 1 / gains),
        (made.pseudo_lit, regions.shadow_mask, gains),
    ):
        with torch.no_grad():
            wanted = signed_codes(lab_codes(apply_gains(regions.photos, change, mask)))[:, :1]
        missing = ((painted[:, :1] - wanted) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(1)
        found.append((missing.abs() * known).mean())
    return found[0] + found[1]


def removal_losses(
    removed: Tensor, refined: Tensor, target: Tensor, mask: Tensor, reach: int
) -> dict[str, Tensor]:
    """Return the losses of stage 2, without weights.

    Args:
        removed: R's, signed codes `(B, 3, H, W)`.
        refined: F's, likewise.
        target: the photo, likewise.
        mask: m_N, `(B, 1, H, W)`.
        reach: of its surroundings, in pixels.
    """
    return {
        "removal": (removed - masked(target, mask)).abs().mean(),
        "refinement": (refined - target).abs().mean(),
        "area": area_loss(refined, target, mask, reach),
    }


def area_loss(refined: Tensor, target: Tensor, mask: Tensor, reach: int) -> Tensor:
    """Return the distance in a region and its surroundings, as a mean over the whole image."""
    near = dilated(mask, reach)
    return (masked(refined, near) - masked(target, near)).abs().mean()


@torch.no_grad()
def synthesize(network: HQSS, images: Tensor, mask: Tensor, lit: Tensor) -> Tensor:
    """Return photos with their own shadow painted onto a lit region, too, RGB in [0, 1].

    Outside the lit region they are the photos, to the last bit.

    Args:
        network: trained.
        images: uint8 or float in [0, 1], `(B, 3, H, W)`; sides are brought to multiples of 4 by
            black, which is what surrounds regions anyway.
        mask: m_S, `(B, 1, H, W)` of zeros and ones of any type.
        lit: m_N, likewise.

    Raises:
        UserError: other shapes.
    """
    regions = regions_of(*(_padded(each) for each in (images, mask, lit)))
    painted = network(regions.shadow, regions.lit)[..., : images.shape[2], : images.shape[3]]
    return torch.where(lit > 0, rgb_of_codes(codes_of(painted.float())), unit_images(images))


def frozen(network: nn.Module | None, *inputs: Tensor) -> Tensor:
    """Run a network whose weights get no gradient; its inputs do."""
    assert network is not None
    weights: Mapping[str, Tensor] = {k: v.detach() for k, v in network.named_parameters()}
    result: Tensor = torch.func.functional_call(network, dict(weights), inputs)
    return result


def _padded(image: Tensor) -> Tensor:
    """Add zeros below and on the right, up to sides that the networks take."""
    amounts = [max(LEAST_SIDE, side + -side % MULTIPLE) - side for side in image.shape[-2:]]
    return functional.pad(image, [0, amounts[1], 0, amounts[0]]) if any(amounts) else image


def unit_images(images: Tensor) -> Tensor:
    """Return uint8 images as floats in [0, 1], and floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images
