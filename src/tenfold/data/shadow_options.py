"""What the options of a data set mean where its photos have shadows."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.data.options import DataOptions
from tenfold.data.shadow_set import ShadowSet
from tenfold.data.shadows import ShadowData, check_sides, default_short_side
from tenfold.data.split import SampleSplit
from tenfold.errors import UserError

__all__ = ["ShadowOptions", "shadow_options"]

Size = tuple[int, int]


@dataclass(frozen=True)
class ShadowOptions:
    """The options, checked and with their defaults.

    Attributes:
        size: (H, W) of training crops.
        short_side: least and most of a photo's shorter side ahead of the crop; None: the set's own.
        test_size_px: (H, W) of held-out photos; None: their own.
        mask_above: share of white from which on a mask's level is shadow.
        targets: whether training sees targets.
        workers: default number of loader processes.
    """

    size: Size
    short_side: tuple[int, int] | None
    test_size_px: Size | None
    mask_above: float
    targets: bool
    workers: int | None

    def build(
        self,
        name: str,
        train: ShadowSet | SampleSplit,
        test: ShadowSet | SampleSplit,
        short_side: tuple[int, int] | None = None,
    ) -> ShadowData:
        """Make the data set from its splits; `short_side` holds where none is given."""
        return ShadowData(
            name=name,
            train=train,
            test=test,
            size=self.size,
            short_side=self.short_side or short_side,
            test_size_px=self.test_size_px,
            mask_above=self.mask_above,
            targets=self.targets,
            workers=self.workers,
        )


def shadow_options(
    options: DataOptions, default_size: Size = (256, 256), default_test_size: Size = (256, 256)
) -> ShadowOptions:
    """Take the options of a set of photos with shadows, ahead of any look at its files.

    Raises:
        UserError: a range of sides that no crop fits, or a mean or std.
    """
    for name in ("mean", "std"):
        value = getattr(options, name)
        if value is not None:
            raise UserError(
                f"data.{name} is {list(value)}: expected it only for labelled data; photos with "
                "shadows always go from 0..255 to 0..1, leave it out"
            )
    size = options.size or default_size
    check_sides(size, options.short_side or default_short_side(size))
    test_size: Size | None = default_test_size
    if options.test_size is not None:
        test_size = None if options.test_size == "native" else options.test_size
    return ShadowOptions(
        size=size,
        short_side=options.short_side,
        test_size_px=test_size,
        mask_above=0.5 if options.mask_above is None else options.mask_above,
        targets=options.targets is not False,
        workers=options.workers,
    )
