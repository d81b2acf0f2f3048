"""HQSS: paint real shadows onto lit regions, and learn from these pictures to remove shadows.

"Shadow Removal by High-Quality Shadow Synthesis", arXiv 2212.04108, and its released code. It takes
photos with shadows and their masks, and no photo without shadow. m_S is a photo's shadow, m_N a lit
region in the shape of another photo's shadow; S and N are the photo with all else black, in signed
LAB codes. E, G, D_S and D_N are those of `HQSS` (in `tenfold.nn.hqss_networks`).

Stage 1 learns to paint (task shadow_synthesis). f_S = E(S), f_N = E(N); S' = G(f_S, S),
N' = G(f_N, N); P = G(f_S, N) is the pseudo shadow, Q = G(f_N, S) the shadow taken off.

    self-reconstruction   |S' - S| + |N' - N| + FFL(S', S) + FFL(N', N)
    inter-reconstruction  0.05 [(D_S(P) - 1)^2 + (D_N(Q) - 1)^2]
                          + 0.01 [mean over m_N of |P - N| + over m_S of |Q - S|], a plus b
    cycle-reconstruction  0.1 [|G'(f_N, P) - N| + |G'(f_S, Q) - S| + FFL of both]
                          + 0.01 [|E'(P) - f_S| + |E'(Q) - f_N|]

E' and G' are E and G with weights that get no gradient. The discriminators then minimise
(D_S(S) - 1)^2 + D_S(P)^2 + (D_N(N) - 1)^2 + D_N(Q)^2, with P and Q from pools of older ones.

Stage 2 (task shadow_removal) learns to undo it: the input is a photo with P in m_N, the target that
photo as it is, real shadow included. Any remover can learn from such pairs (`pseudo_pairs`). HQSS's
own has three losses, with m+ for m_N grown by a diamond:

    |R(P) - N| + |F(...) - photo| + |F(...) - photo| in m+, all else black

What differs from the released code, and why: regions are means of each sample (the release reads
the first of a batch's masks alone; the same at batch 1); E' and G' are calls with detached weights,
not copies made in every step; the diamond is measured on the crops that are trained on, not on
photos ahead of their resize. In short runs painted shadows turn black or fade. `light`, which isn't
the paper's, ties their mean L to the gain between the photo's own shadow and its surroundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tenfold.errors import StateError, UserError
from tenfold.methods.base import Kind, Method, Stage
from tenfold.methods.hqss_terms import (
    Regions,
    Synthesis,
    area_loss,
    colour_loss,
    discriminator_losses,
    frozen,
    generator_losses,
    light_loss,
    paint,
    regions_of,
    removal_losses,
    synthesize,
    unit_images,
)
from tenfold.nn.hqss_networks import (
    HQSS,
    HQSSRemover,
    RefinementNetwork,
    RemovalNetwork,
    ShadowDiscriminator,
    ShadowEncoder,
    ShadowGenerator,
)
from tenfold.nn.shadow_regions import signed_codes

__all__ = [
    "HQSS",
    "HQSSRemover",
    "HQSSTraining",
    "RefinementNetwork",
    "Regions",
    "RemovalNetwork",
    "ShadowDiscriminator",
    "ShadowEncoder",
    "ShadowGenerator",
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
]

SYNTHESIZER = "synthesizer"


@dataclass(kw_only=True, eq=False)
class HQSSTraining(Method):
    """Learn to paint shadows from photos and masks alone, and to remove them from what is painted.

    In a recipe of the task shadow_synthesis it trains `HQSS`; in one of shadow_removal, given such
    a run as `synthesizer`, it makes the pairs that any remover learns from.

    Args:
        synthesizer: shadow_removal only: the run that paints the shadows.
        self_reconstruction: weight of painting a region with its own features.
        adversarial: weight of the discriminators' opinion.
        colour: weight of keeping a and b.
        cycle: weight of painting there and back.
        feature_cycle: weight of finding the features again in what was painted.
        frequency: weight of the focal frequency loss, as a share of the distance's that it goes
            with.
        light: weight of the mean L that a painted region should have, by the photo's own shadow and
            its surroundings. Not the paper's, and off by default; it keeps short runs from painting
            shadows that are far too dark or fade.
        pool: painted regions of each kind that the discriminators are shown again; 0: none.
        removal: HQSS's own remover only: weight of the region.
        refinement: likewise, of the whole photo.
        area: likewise, of the surroundings of the region.
        area_reach: how far these go, in pixels.

    Example:
        ```python
        network = HQSS()
        training = HQSSTraining()
        network = training.attach(network, total_steps=epochs * len(loader))
        for batch in loader:  # of photos, their masks, and lit regions
            regions = regions_of(batch["image"], batch["mask"], batch["lit"])
            losses, made = training.generator_step(regions)
            sum(losses.values()).backward()
            generators.step()
            generators.zero_grad()
            losses = training.discriminator_step(regions, made.pseudo_shadow, made.pseudo_lit)
            sum(losses.values()).backward()
            discriminators.step()
            discriminators.zero_grad()
            training.step()
        network = training.finalize(network)
        ```
    """

    kind: ClassVar[Kind] = Kind.NETWORK
    stage: ClassVar[Stage] = Stage.NETWORK
    tasks: ClassVar[frozenset[str]] = frozenset({"shadow_synthesis", "shadow_removal"})

    synthesizer: str | None = None
    self_reconstruction: float = 1.0
    adversarial: float = 0.05
    colour: float = 0.01
    cycle: float = 0.1
    feature_cycle: float = 0.01
    frequency: float = 1.0
    light: float = 0.0
    pool: int = 200
    removal: float = 1.0
    refinement: float = 1.0
    area: float = 1.0
    area_reach: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self._synthesizer: HQSS | None = None

    @classmethod
    def key(cls) -> str:
        """Return the name of the recipe's section."""
        return "hqss"

    def validate(self) -> None:
        """Check the fields."""
        for name in (
            "self_reconstruction", "adversarial", "colour", "cycle", "feature_cycle", "frequency",
            "light", "pool", "removal", "refinement", "area", "area_reach",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 0")
        if not self.self_reconstruction and not self.cycle:
            raise UserError(
                "self_reconstruction and cycle are both 0, and nothing keeps the photo: expected "
                "one of them above 0"
            )

    # -- the contract ---------------------------------------------------------------------------

    def networks(self) -> dict[str, Any]:
        """Ask for the network that paints the shadows, where there is one."""
        return {} if self.synthesizer is None else {SYNTHESIZER: self.synthesizer}

    def use_network(self, role: str, network: nn.Module) -> None:
        """Take the network that paints the shadows, and freeze it.

        Raises:
            UserError: another role, or no HQSS.
        """
        if role != SYNTHESIZER or not isinstance(network, HQSS):
            raise UserError(
                f"{role} is {type(network).__name__}: expected the {SYNTHESIZER}, an HQSS that was "
                "trained by the task shadow_synthesis"
            )
        self._synthesizer = network.eval().requires_grad_(False)

    def on_attach(self, model: nn.Module) -> nn.Module:
        """See that it is an HQSS to train, or that there is one to learn from.

        Raises:
            UserError: it is not.
        """
        if self._synthesizer is not None:
            return model
        if not isinstance(model, HQSS):
            raise UserError(
                f"HQSSTraining got {type(model).__name__}: expected an HQSS to train, or the run "
                "of one as synthesizer, which makes the pairs for a remover"
            )
        if model.shadow_discriminator is None or model.lit_discriminator is None:
            raise UserError("this HQSS has no discriminators: build it with discriminators=True")
        return model

    def on_finalize(self, model: nn.Module) -> nn.Module:
        """Leave encoder and generator: the discriminators have nothing more to judge."""
        if isinstance(model, HQSS):
            model.shadow_discriminator = model.lit_discriminator = None
        return model

    # -- stage 1 --------------------------------------------------------------------------------

    def generator_step(self, regions: Regions) -> tuple[dict[str, Tensor], Synthesis]:
        """Return the weighted losses of E and G by name, and what they are of.

        Gradients pass through the discriminators, and reach the weights of E and G alone.

        Args:
            regions: of a batch, at least one photo.

        Raises:
            StateError: not attached to an HQSS.
        """
        network = self._network()
        made = paint(network, regions)
        found = generator_losses(network, regions, made)
        weights = {
            "self_reconstruction": self.self_reconstruction,
            "self_frequency": self.self_reconstruction * self.frequency,
            "adversarial": self.adversarial,
            "colour": self.colour,
            "cycle": self.cycle,
            "cycle_frequency": self.cycle * self.frequency,
            "feature_cycle": self.feature_cycle,
        }
        losses = {name: weights[name] * loss for name, loss in found.items()}
        if self.light:
            losses["light"] = self.light * light_loss(made, regions)
        return losses, made

    def discriminator_step(
        self, regions: Regions, pseudo_shadow: Tensor, pseudo_lit: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of D_S and D_N by name.

        Args:
            regions: real ones.
            pseudo_shadow: P, or older ones from a pool, `(B, 3, H, W)`; their graphs are left.
            pseudo_lit: Q, likewise.

        Raises:
            StateError: not attached to an HQSS.
        """
        return discriminator_losses(self._network(), regions, pseudo_shadow, pseudo_lit)

    # -- stage 2 --------------------------------------------------------------------------------

    def pseudo_pairs(self, images: Tensor, mask: Tensor, lit: Tensor) -> tuple[Tensor, Tensor]:
        """Return photos with a shadow painted onto a lit region, and the photos: input and target.

        No gradients; the synthesizer stays as it is. The remover's mask of the pair is `lit`.

        Args:
            images: photos with shadows, uint8 or float in [0, 1], `(B, 3, H, W)`.
            mask: their shadows, `(B, 1, H, W)` of zeros and ones of any type.
            lit: where to paint, likewise.

        Returns:
            Both float RGB in [0, 1], `(B, 3, H, W)`.

        Raises:
            StateError: no synthesizer was given.
            UserError: other shapes.
        """
        if self._synthesizer is None:
            raise StateError(
                "HQSSTraining has no synthesizer: set synthesizer to a run of the task "
                "shadow_synthesis, and in a loop of your own call use_network('synthesizer', hqss)"
            )
        network = self._synthesizer.to(images.device)
        return synthesize(network, images, mask, lit), unit_images(images)

    def removal_losses(
        self, remover: HQSSRemover, pseudo: Tensor, target: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted losses of HQSS's own remover by name.

        Args:
            remover: R and F.
            pseudo: LAB codes of its input, `(B, 3, H, W)`.
            target: LAB codes of what it should give.
            mask: where the shadow is, `(B, 1, H, W)` of zeros and ones.
        """
        removed, refined = remover.both(pseudo, mask)
        found = removal_losses(removed, refined, signed_codes(target), mask, self.area_reach)
        weights = {"removal": self.removal, "refinement": self.refinement, "area": self.area}
        return {name: weights[name] * loss for name, loss in found.items()}

    def _network(self) -> HQSS:
        model = self._attached_model()
        if not isinstance(model, HQSS):
            raise StateError(
                f"HQSSTraining is attached to {type(model).__name__}: attach it to the HQSS"
            )
        return model
