"""What the options of a data set mean where images are translated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.data.base import ImageSet
from tenfold.data.options import DataOptions
from tenfold.data.split import Split
from tenfold.data.translation import (
    TranslationData,
    check_load_size,
    check_size,
    default_load_size,
)
from tenfold.errors import UserError

__all__ = ["TranslationOptions", "translation_options"]


@dataclass(frozen=True)
class TranslationOptions:
    """The options, checked and with their defaults.

    Attributes:
        size: (H, W) of training crops and of held-out images.
        load_size: (H, W) of training images ahead of the crop.
        direction: "AtoB" or "BtoA".
        reference: "train+test" or "test".
        workers: default number of loader processes.
    """

    size: tuple[int, int]
    load_size: tuple[int, int]
    direction: str
    reference: str
    workers: int | None

    def build(
        self, name: str, train: Sequence[ImageSet | Split], test: Sequence[ImageSet | Split]
    ) -> TranslationData:
        """Make the data set from its splits."""
        return TranslationData(
            name=name,
            train=train,
            test=test,
            size=self.size,
            load_size=self.load_size,
            direction=self.direction,
            reference=self.reference,
            workers=self.workers,
        )


def translation_options(
    options: DataOptions, default_size: tuple[int, int] = (256, 256)
) -> TranslationOptions:
    """Take the options of a translation set, ahead of any look at its files.

    Raises:
        UserError: a size that generators don't take, a smaller load_size, or a mean or std.
    """
    for name in ("mean", "std"):
        value = getattr(options, name)
        if value is not None:
            raise UserError(
                f"data.{name} is {list(value)}: expected it only for labelled data; translated "
                "images always go from 0..255 to -1..1, leave it out"
            )
    size = options.size or default_size
    check_size(size)
    load_size = options.load_size or default_load_size(size)
    check_load_size(size, load_size)
    return TranslationOptions(
        size=size,
        load_size=load_size,
        direction=options.direction or "AtoB",
        reference=options.reference or "train+test",
        workers=options.workers,
    )
