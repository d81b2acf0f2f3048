"""Hugging Face data from folders that the test writes; nothing is downloaded."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from tenfold.data import create
from tenfold.data.huggingface import HubStream
from tenfold.errors import UserError
from tests.data.conftest import encoded, noise

pytestmark = pytest.mark.unit
CLASSES = ["ant", "bee", "cow"]
TYPES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
Make = Callable[..., Path]


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(numbers: Sequence[int], types: dict[str, Any], **columns: list[Any]) -> datasets.Dataset:
    made: dict[str, list[Any]] = {
        "image": [{"bytes": encoded(noise(n)), "path": None} for n in numbers],
        "label": [n % 3 for n in numbers],
        **columns,
    }
    picked = {name: made[name] for name in types}
    return datasets.Dataset.from_dict(picked, features=datasets.Features(types))


@pytest.fixture
def parquet(tmp_path: Path) -> Make:
    """Write a folder of parquet files, two for training; `**columns` replace the train columns."""

    def make(
        train: int = 20,
        test: str | None = "test",
        types: dict[str, Any] = TYPES,
        **columns: list[Any],
    ) -> Path:
        root = tmp_path / "parquet"
        root.mkdir()
        whole = table(range(train), types, **columns)
        for k in range(2):
            part = whole.select(range(k * train // 2, (k + 1) * train // 2))
            part.to_parquet(str(root / f"train-{k:05}-of-00002.parquet"))
        if test:
            table(range(900, 907), types).to_parquet(str(root / f"{test}-00000-of-00001.parquet"))
        return root

    return make


def epoch(loader: Any, number: int) -> dict[str, Tensor]:
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("id", "label", "image"))


def pixels(number: int) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(noise(number)).transpose(2, 0, 1).copy())


def test_indexed_set_as_it_should_be(parquet: Make) -> None:
    data = create(f"hf:{parquet()}")
    assert (data.name, data.classes) == ("parquet", CLASSES)
    assert (len(data.train), len(data.test), data.train_size) == (20, 7, 20)
    assert (data.channels, data.size, data.default_augment) == (3, (16, 16), "flip_crop")
    assert data.preprocessing()["resize"] is None
    assert all(0.4 < value < 0.6 for value in data.mean)  # noise: its own, not ImageNet's
    for i in range(20):
        assert torch.equal(data.train.image(i), pixels(i))
        assert data.train.label(i) == i % 3
        assert data.train.name(i) == f"parquet/train[{i}]"
    assert data.train.labels().tolist() == [i % 3 for i in range(20)]


def test_same_batches_with_workers_and_after_a_resume(parquet: Make) -> None:
    root = parquet()

    def loader(workers: int) -> Any:
        return create(f"hf:{root}").train_loader(batch_size=6, seed=5, workers=workers)

    alone, helped = loader(0), loader(2)
    epochs = [epoch(alone, number) for number in range(2)]
    assert all(same(epoch(helped, number), epochs[number]) for number in range(2))
    assert same(epoch(loader(0), 1), epochs[1])


def test_the_table_stays_on_the_disk(parquet: Make) -> None:
    data = create(f"hf:{parquet()}")
    images = data.train._images
    assert images.cache_files
    assert images.dataset_size is None or len(images.data) == 20
    # A worker that isn't forked gets the file's name, not the images.
    sent = pickle.dumps(data.train)
    assert len(sent) < 8000 < sum(len(encoded(noise(n))) for n in range(20))
    assert torch.equal(pickle.loads(sent).image(3), pixels(3))


@pytest.mark.parametrize("kind", ["arrow", "imagefolder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_other_folders(parquet: Make, tmp_path: Path, kind: str, streaming: bool) -> None:
    root = tmp_path / kind
    spec: dict[str, Any] = {"name": "hf", "path": root, "size": 16, "streaming": streaming}
    if kind == "arrow":
        made = {"train": table(range(12), TYPES), "val": table(range(900, 907), TYPES)}
        datasets.DatasetDict(made).save_to_disk(str(root))
    else:
        spec |= {"samples": 12} if streaming else {}
        for split, numbers in (("train", range(12)), ("val", range(900, 907))):
            for n in numbers:
                (root / split / CLASSES[n % 3]).mkdir(parents=True, exist_ok=True)
                file = root / split / CLASSES[n % 3] / f"{n:03}.png"
                file.write_bytes(encoded(noise(n)))
    data = create(spec)
    assert (data.classes, data.train_size) == (CLASSES, 12)
    got = epoch(data.train_loader(batch_size=5, seed=0, augment="none", workers=0), 0)
    assert sorted(got["id"].tolist()) == list(range(12))
    known = {pixels(n).numpy().tobytes(): n % 3 for n in range(12)}
    labels = [known.pop(image.numpy().tobytes()) for image in got["image"]]
    assert labels == got["label"].tolist()
    assert sum(len(b["id"]) for b in data.test_loader(batch_size=5, workers=0)) == 7


def test_streaming_gives_the_same_images(parquet: Make) -> None:
    root = parquet()
    spec = {"name": "hf", "path": root, "streaming": True, "size": 16, "samples": 20, "buffer": 4}
    data = create(spec)
    loader = data.train_loader(batch_size=6, seed=0, augment="none", workers=0)
    epochs = [epoch(loader, number) for number in range(2)]
    for got in epochs:
        assert sorted(got["id"].tolist()) == list(range(20))
        for image, label, position in zip(got["image"], got["label"], got["id"], strict=True):
            row, shard = divmod(int(position), 2)
            stored = shard * 10 + row  # ids take the shards in turn, files one after the other
            assert torch.equal(image, pixels(stored))
            assert int(label) == stored % 3
    assert epochs[0]["id"].tolist() != epochs[1]["id"].tolist()
    held_out = epoch(data.test_loader(batch_size=3, workers=0), 0)
    assert held_out["id"].tolist() == list(range(7))
    assert torch.equal(held_out["image"][6], pixels(906))


def test_streaming_with_workers_and_ranks(parquet: Make) -> None:
    root = parquet()

    def loader(**where: int) -> Any:
        spec = {"name": "hf", "path": root, "streaming": True, "size": 16, "samples": 20}
        return create(spec).train_loader(batch_size=3, seed=0, **where)

    helped = loader(workers=2)
    epochs = [epoch(helped, number) for number in range(2)]
    assert all(sorted(e["id"].tolist()) != e["id"].tolist() for e in epochs)
    assert same(epoch(loader(workers=2), 1), epochs[1])
    shares = [epoch(loader(rank=r, world_size=2, workers=0), 0)["id"].tolist() for r in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(20))
    # Two shards, one for each rank: nothing was read by both.
    assert {i % 2 for i in shares[0]} != {i % 2 for i in shares[1]}


def test_limit_keeps_all_classes(parquet: Make) -> None:
    by_class = sorted(n % 3 for n in range(20))
    root = parquet(label=by_class)
    data = create({"name": "hf", "path": root, "limit": 6})
    assert [data.train.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert data.train.name(2) == "parquet/train[7]"
    spec = {"name": "hf", "path": root, "limit": 6, "streaming": True, "samples": 20}
    assert create(spec).train_size == 6


def test_splits_by_name_and_by_slice(parquet: Make) -> None:
    root = parquet(test=None)
    with pytest.raises(UserError, match=r"the splits train: expected test or validation or val"):
        create(f"hf:{root}")
    assert len(create({"name": "hf", "path": root, "test_split": "train"}).test) == 20
    halves = {"train_split": "train[:75%]", "test_split": "train[75%:]"}
    data = create({"name": "hf", "path": root, **halves})
    assert (len(data.train), len(data.test)) == (15, 5)
    assert torch.equal(data.test.image(0), pixels(15))
    with pytest.raises(UserError, match=r"no split nope: expected one of train; correct d"):
        create({"name": "hf", "path": root, "test_split": "nope"})
    with pytest.raises(UserError, match=r"slices are only for sets that are loaded without"):
        create({"name": "hf", "path": root, "streaming": True, **halves})


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_without_names(parquet: Make, streaming: bool) -> None:
    types = {"image": datasets.Image(), "label": datasets.Value("int64")}
    spec: dict[str, Any] = {"name": "hf", "path": parquet(types=types), "size": 16}
    spec |= {"streaming": True, "samples": 20} if streaming else {}
    with pytest.raises(UserError, match=r"no column of classes among image, label: .*label_column"):
        create(spec)
    spec["label_column"] = "label"
    with pytest.raises(UserError, match=r"label of parquet is int64 .*expected data.classes"):
        create(spec)
    assert create({**spec, "classes": 3}).classes == ["0", "1", "2"]
    assert create({**spec, "classes": CLASSES}).classes == CLASSES
    with pytest.raises(UserError, match=r"image 2 of .* has label 2: expected 0 to 1, for 2 class"):
        list(create({**spec, "classes": 2}).train_loader(batch_size=4, seed=0, workers=0))


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_names(parquet: Make, streaming: bool) -> None:
    types = {"image": datasets.Image(), "label": datasets.Value("string")}
    root = parquet(types=types, test=None, label=[CLASSES[n % 3] for n in range(20)])
    spec: dict[str, Any] = {"name": "hf", "path": root, "label_column": "label", "size": 16}
    spec |= {"test_split": "train"}
    spec |= {"streaming": True, "samples": 20} if streaming else {}
    data = create({**spec, "classes": ["cow", "bee", "ant"]})
    got = epoch(data.test_loader(batch_size=20, workers=0), 0)
    assert got["label"].tolist() == [2 - n % 3 for n in range(20)]
    with pytest.raises(UserError, match=r"has label bee: expected one of the names in classes"):
        list(create({**spec, "classes": ["cow", "ant"]}).test_loader(batch_size=4, workers=0))


def test_columns_by_name(parquet: Make) -> None:
    types = {
        "mask": datasets.Image(),
        "photo": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "coarse": datasets.ClassLabel(names=["x", "y"]),
        "fine": datasets.ClassLabel(names=CLASSES),
        "score": datasets.Value("float32"),
    }
    columns: dict[str, list[Any]] = {
        "mask": [{"bytes": encoded(noise(0)), "path": None}] * 20,
        "photo": [{"bytes": encoded(noise(n)), "path": None} for n in range(20)],
        "coarse": [0] * 20,
        "fine": [n % 3 for n in range(20)],
        "score": [0.5] * 20,
    }
    spec: dict[str, Any] = {"name": "hf", "path": parquet(test=None, types=types, **columns)}
    spec["test_split"] = "train"
    first = create(spec)
    assert first.classes == ["x", "y"]
    assert torch.equal(first.train.image(5), pixels(0))
    named = create({**spec, "image_column": "photo", "label_column": "fine"})
    assert named.classes == CLASSES
    assert torch.equal(named.train.image(5), pixels(5))
    for wrong, text in (
        ({"image_column": "foto"}, "unknown column in data.image_column 'foto': did you mean ph"),
        ({"label_column": "cost"}, "unknown column in data.label_column 'cost'"),
        ({"label_column": "score"}, "score of parquet is float32: expected class numbers or names"),
        ({"image_column": "score"}, "score of parquet can't hold images"),
        ({"classes": 5}, "gives 5 classes and parquet has 2"),
    ):
        with pytest.raises(UserError, match=text) as error:
            create({**spec, **wrong})
        assert "\n" not in str(error.value)


def test_hidden_labels_are_refused(parquet: Make) -> None:
    root = parquet(label=[0, 1, -1] + [0] * 17)
    with pytest.raises(UserError, match=r"image 2 of parquet/train has label -1: .*hidden labels"):
        create(f"hf:{root}")


def test_photos_of_all_sizes_get_imagenets_facts(parquet: Make) -> None:
    images = [{"bytes": encoded(noise(n, (20 + n, 30))), "path": None} for n in range(20)]
    data = create(f"hf:{parquet(image=images)}")
    assert (data.size, data.mean[0], data.default_augment) == ((224, 224), 0.485, "imagenet")
    assert data.preprocessing()["resize"] == 256


def damaged() -> list[dict[str, Any] | None]:
    images: list[Any] = [{"bytes": encoded(noise(n)), "path": None} for n in range(20)]
    images[3] = {"bytes": images[3]["bytes"][:300], "path": None}
    images[7] = {"bytes": b"junk", "path": None}
    return [*images[:11], None, *images[12:]]


def test_bad_images_by_the_policy(parquet: Make) -> None:
    root = parquet(image=damaged())
    with pytest.raises(UserError, match=r"3 of 20 train images can't be read \(parquet/train\[3\]"):
        create(f"hf:{root}")  # met while its size and its mean are looked up
    facts = {"size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    loader = create({"name": "hf", "path": root, **facts}).train_loader(batch_size=4, seed=0)
    with pytest.raises(UserError, match=r"3 of 20 train .*pass --data.skip_bad true") as error:
        list(loader)
    assert "\n" not in str(error.value)
    data = create({"name": "hf", "path": root, "skip_bad": True})
    assert data.skipped == [f"parquet/train[{n}]" for n in (3, 7, 11)]
    assert data.train_size == 17
    got = epoch(data.train_loader(batch_size=4, seed=0, augment="none"), 0)
    assert sorted(got["id"].tolist()) == sorted({*range(20)} - {3, 7, 11})
    assert torch.equal(got["image"][0], pixels(int(got["id"][0])))  # ids haven't shifted


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_in_a_stream(parquet: Make, workers: int) -> None:
    spec = {"name": "hf", "path": parquet(image=damaged()), "streaming": True, "samples": 20}
    spec |= {"size": 16}
    with pytest.raises(UserError, match=r"can't read image train: image \d of shard . of parquet/"):
        list(create(spec).train_loader(batch_size=4, seed=0, workers=workers))
    data = create({**spec, "skip_bad": True})
    got = epoch(data.train_loader(batch_size=4, seed=0, workers=workers), 0)
    assert len(got["id"]) == 20
    assert not {3 * 2, 7 * 2, 1 * 2 + 1} & set(got["id"].tolist())


def test_stream_that_breaks_off(parquet: Make, monkeypatch) -> None:
    spec = {"name": "hf", "path": parquet(), "streaming": True, "samples": 20, "size": 16}
    data = create(spec)

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the line\nwent dead")
        yield

    monkeypatch.setattr(datasets.IterableDataset, "iter", fail)
    with pytest.raises(UserError, match=r"parquet/train can't be read on \(the line went dead\)"):
        list(data.train_loader(batch_size=4, seed=0, workers=0))


def test_stream_of_unknown_length(parquet: Make) -> None:
    spec = {"name": "hf", "path": parquet(), "streaming": True}
    with pytest.raises(UserError, match=r"how many images its split train has.*give data.samples"):
        create(spec)


def test_package_missing(parquet: Make, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"run pip install 'tenfold\[hf\]'"):
        create("hf:cifar10")


def test_no_such_set_and_no_network(monkeypatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub\n(timed out)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"hf data no/such can't be loaded \(Couldn't reach") as e:
        create("hf:no/such")
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"can't be loaded \(.*any data files"):
        create(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: expected a folder"):
        create(f"hf:{tmp_path / 'file'}")


def test_no_such_configuration(parquet: Make) -> None:
    with pytest.raises(UserError, match=r"'blue' not found. .*check the name, data.config"):
        create({"name": "hf", "path": parquet(), "config": "blue"})


def test_splits_must_agree(tmp_path: Path) -> None:
    other = {**TYPES, "label": datasets.ClassLabel(names=["bee", "ant", "cow"])}
    made = {"train": table(range(6), TYPES), "test": table(range(6), other)}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "arrow"))
    with pytest.raises(UserError, match="differ in their columns or classes"):
        create(f"hf:{tmp_path / 'arrow'}")


def test_reading_is_not_divided_among_workers_twice(parquet: Make, monkeypatch) -> None:
    """The package leaves each of DataLoader's workers a part by itself; the whole is ours."""
    spec = {"name": "hf", "path": parquet(), "streaming": True, "samples": 20, "size": 16}
    data = create(spec)
    stream = data._train.stream
    assert isinstance(stream, HubStream)

    class Worker:
        id, num_workers, seed = 1, 2, 0

    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: Worker)
    assert [len(list(stream.rows(shard))) for shard in range(2)] == [10, 10]
