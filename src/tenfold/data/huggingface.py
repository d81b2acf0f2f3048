"""Data sets of the Hugging Face Hub, and folders that its package `datasets` reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tenfold.data.cache import cache_folder, remembered
from tenfold.data.columns import Columns, encoded_image, find_columns
from tenfold.data.images import ImageData
from tenfold.data.options import DataOptions
from tenfold.data.preprocessing import Preprocessing
from tenfold.data.split import Split
from tenfold.data.statistics import channel_statistics
from tenfold.data.stream import BUFFER, ImageStream, StreamSplit
from tenfold.data.table import TableSet
from tenfold.errors import UserError

__all__ = ["HubStream", "huggingface"]

_HELD_OUT = ("test", "validation", "val")

# ImageNet's constants and size, for photos of all sizes; see `imagefolder`.
_PHOTOS: Mapping[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_SIZE = (224, 224)
_SMALL = 64

_SIZES_TO_LOOK_AT = 256
_SHARDS_OF_A_TABLE = 16


class HubStream(ImageStream):
    """A split that is read while training.

    Args:
        source: a `datasets.IterableDataset` whose image column isn't decoded.
        columns: where images and labels are.
        split: the split's name.
    """

    def __init__(self, source: Any, columns: Columns, split: str) -> None:
        self._source = source
        self._columns = columns
        self._title = f"{columns.title}/{split}"
        self.shards = int(source.num_shards)

    def rows(self, shard: int) -> Iterator[tuple[bytes | Path, int]]:  # noqa: D102
        columns = self._columns
        where = self._title if self.shards == 1 else f"shard {shard} of {self._title}"
        source = self._source.shard(num_shards=self.shards, index=shard)
        # By `iter`, which reads what it is told to; plain iteration would leave a part to each of
        # DataLoader's workers, and not the same one with every number of them.
        batches = _told(source.iter(batch_size=32), where)
        for batch in batches:
            numbers = columns.numbers(batch[columns.label], where)
            yield from zip(
                _told(map(encoded_image, batch[columns.image]), where),
                numbers.tolist(),
                strict=True,
            )

    def name(self, position: int) -> str:  # noqa: D102
        return f"{super().name(position)} of {self._title}"


def huggingface(options: DataOptions) -> ImageData:
    """Build a data set that `datasets` reads: of the Hub, or a folder of parquet, arrow or images.

    Raises:
        UserError: the package is missing, there is no such set, configuration, split or column, the
            network fails, or a label is not one of the classes.
    """
    try:
        from datasets import Image
    except ImportError:  # also where a folder of that name lies here and stands in its way
        raise UserError(
            "hf data needs the package datasets, which can't be imported: expected tenfold with "
            "its extra hf; run pip install 'tenfold[hf]'"
        ) from None

    where = _where(options)
    title = Path(where).name or where
    found = _load(where, options, None)
    names = {
        "train": options.train_split or "train",
        "test": options.test_split or next((n for n in _HELD_OUT if n in found), None),
    }
    sources = {part: _split(found, name, part, where, options) for part, name in names.items()}
    columns = find_columns(sources["train"].features, options, title)
    for part, source in sources.items():
        own = find_columns(source.features, options, title)
        if own != columns:
            raise UserError(
                f"the splits {names['train']} and {names['test']} of {title} differ in their "
                "columns or classes: expected the same in both; choose others"
            )
        try:
            sources[part] = source.cast_column(columns.image, Image(decode=False))
        except Exception as error:  # whatever arrow says of types that don't fit
            raise UserError(
                f"column {columns.image} of {title} can't hold images ({_line(error)}): expected "
                "image files' bytes; choose another by data.image_column"
            ) from None
    if options.streaming:
        return _streamed(sources, columns, names, options)
    return _indexed(sources, columns, names, options)


def _indexed(
    sources: Mapping[str, Any], columns: Columns, names: Mapping[str, Any], options: DataOptions
) -> ImageData:
    images = TableSet(sources["train"], columns, names["train"], options.limit)
    train = Split("train", images, options.skip_bad)
    with train.explaining():
        common = None if options.size else _common_size(images, train)
        size = options.size or common or _SIZE
        facts = _PHOTOS
        if max(size) <= _SMALL and not (options.mean and options.std):
            facts = remembered(
                "mean-std",
                f"{images.fingerprint()} without {train.skipped}",
                lambda: dict(zip(("mean", "std"), channel_statistics(train), strict=True)),
            )
    held_out = Split("test", TableSet(sources["test"], columns, names["test"]), options.skip_bad)
    return _data(train, held_out, columns, options, size, facts, fits=size == common)


def _streamed(
    sources: Mapping[str, Any], columns: Columns, names: Mapping[str, Any], options: DataOptions
) -> ImageData:
    splits = []
    for part, source in sources.items():
        known = (source.info.splits or {}).get(names[part])
        count = known.num_examples or None if known is not None else None  # 0 is "not known"
        if not hasattr(source, "num_shards"):  # a table, mapped into memory
            count = len(source)
            source = source.to_iterable_dataset(min(count, _SHARDS_OF_A_TABLE))
        if part == "train":
            count = options.samples or count
        if count is None and part == "train":
            raise UserError(
                f"{columns.title} doesn't say how many images its split {names[part]} has: "
                "expected a number, for the schedules; give data.samples"
            )
        splits.append(
            StreamSplit(
                part,
                HubStream(source, columns, names[part]),
                samples=count,
                limit=options.limit if part == "train" else None,
                buffer=options.buffer or BUFFER,
                skip_bad=options.skip_bad,
            )
        )
    size = options.size or _SIZE
    return _data(splits[0], splits[1], columns, options, size, _PHOTOS, fits=False)


def _data(
    train: Split | StreamSplit,
    test: Split | StreamSplit,
    columns: Columns,
    options: DataOptions,
    size: tuple[int, int],
    facts: Mapping[str, Any],
    *,
    fits: bool,
) -> ImageData:
    small = max(size) <= _SMALL
    return ImageData(
        name=columns.title,
        classes=columns.classes,
        train=train,
        test=test,
        preprocessing=Preprocessing(
            channels=3,
            size=size,
            mean=options.mean or tuple(facts["mean"]),
            std=options.std or tuple(facts["std"]),
            resize=None if small or fits else round(min(size) * 256 / 224),
        ),
        default_augment="flip_crop" if small else "imagenet",
        workers=options.workers,
    )


def _where(options: DataOptions) -> str:
    if options.path is None:
        raise UserError(
            "data hf has no path: expected a name on the Hub or a folder; give hf:NAME or hf:PATH"
        )
    given = options.path.as_posix()
    if options.path.exists():
        return str(options.folder().resolve())
    if options.path.is_absolute() or given.startswith(".") or given.count("/") > 1:
        options.folder()  # says that it doesn't exist
    return given


def _load(where: str, options: DataOptions, split: str | None) -> Any:
    """Return the splits by name, or one split."""
    import datasets

    try:
        if (Path(where) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(where)
        # The package's own cache, which other tools share, unless a place of our own is given.
        cache = str(cache_folder() / "huggingface") if os.environ.get("TENFOLD_DATA") else None
        return datasets.load_dataset(
            where, options.config, split=split, streaming=options.streaming, cache_dir=cache
        )
    except Exception as error:  # the network, the Hub and arrow fail in many ways
        raise UserError(
            f"hf data {where} can't be loaded ({_line(error)}): expected a name on the Hub, or a "
            "folder of parquet, arrow or image files; check the name, data.config and the network"
        ) from None


def _split(found: Any, name: str | None, part: str, where: str, options: DataOptions) -> Any:
    known = ", ".join(found)
    if name is None:
        raise UserError(
            f"hf data {where} has the splits {known}: expected {' or '.join(_HELD_OUT)} to "
            "evaluate on; name one by data.test_split, or cut one in two by data.train_split "
            "train[:90%] and data.test_split train[90%:]"
        )
    if name in found:
        return found[name]
    sliced = name.endswith("]") and name.partition("[")[0] in found
    if sliced and not options.streaming and not (Path(where) / "dataset_dict.json").is_file():
        return _load(where, options, name)
    reason = "; slices are only for sets that are loaded without streaming" if sliced else ""
    raise UserError(
        f"hf data {where} has no split {name}: expected one of {known}{reason}; "
        f"correct data.{part}_split"
    )


def _common_size(images: TableSet, train: Split) -> tuple[int, int] | None:
    """Return the size that all of a sample have in common, if it is one for small images."""
    step = max(1, len(train.ids) // _SIZES_TO_LOOK_AT)
    sizes = {images.image_size(index) for index in train.ids[::step].tolist()}
    size = next(iter(sizes))
    return size if len(sizes) == 1 and max(size) <= max(_SIZE) else None


def _told(values: Iterator[Any], where: str) -> Iterator[Any]:
    """Pass on what comes; turn whatever fails while reading into an error of one line."""
    try:
        yield from values
    except Exception as error:  # the network, fsspec and arrow fail in many ways
        raise UserError(
            f"{where} can't be read on ({_line(error)}): expected to read it to its end; check the "
            "network or the disk, and go on with --resume"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
