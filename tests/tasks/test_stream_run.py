"""Whole runs on streamed data: its length is that of the schedule, and resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch

from tenfold.data import ImageData, ImageStream, StreamSplit
from tenfold.data.preprocessing import Preprocessing
from tenfold.tasks.run import evaluate, train
from tests.data.conftest import encoded, noise
from tests.tasks.conftest import recipe

pytestmark = pytest.mark.path


class Noise(ImageStream):
    """Three shards of noise, of unequal length."""

    shards = 3

    def rows(self, shard: int) -> Iterator[tuple[bytes, int]]:
        for row in range(40 + 10 * shard):
            number = row * 3 + shard
            yield encoded(noise(number, (8, 8))), number % 4


def streamed(workers: int) -> ImageData:
    return ImageData(
        name="streamed",
        classes=["a", "b", "c", "d"],
        train=StreamSplit("train", Noise(), samples=150, buffer=20),
        test=StreamSplit("test", Noise()),  # of unknown length
        preprocessing=Preprocessing(3, (8, 8), (0.5,) * 3, (0.3,) * 3),
        default_augment="flip_crop",
        workers=workers,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_on_a_stream_equals_the_unbroken_run(monkeypatch, workers: int) -> None:
    values = recipe(train={"epochs": 4, "batch_size": 32})
    whole = train(values, data=streamed(workers), run_dir="whole")

    import tenfold.tasks.progress as progress

    write = progress.MetricsFile.on_train_epoch_start

    def stop(self, trainer, module):
        if trainer.current_epoch == 2:
            raise RuntimeError("pulled the plug")
        write(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(progress.MetricsFile, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(values, data=streamed(workers), run_dir="broken")
    resumed = train(values, data=streamed(workers), run_dir="broken", resume=True)
    assert whole is not None
    assert resumed is not None
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert whole.evaluation == resumed.evaluation
    assert whole.evaluation.images == 150


@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_on_hugging_face_data(tmp_path: Path, monkeypatch, streaming: bool) -> None:
    """Train by recipe, then evaluate the finished run, which makes the data again by itself."""
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "cache"))
    types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    made = {}
    for split, count in (("train", 60), ("test", 24)):
        images = [{"bytes": encoded(noise(n, (8, 8))), "path": None} for n in range(count)]
        columns = {"image": images, "label": [n % 4 for n in range(count)]}
        made[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "arrow"))
    data = {"name": "hf", "path": str(tmp_path / "arrow"), "size": 8, "streaming": streaming}
    run = train(recipe(data=data, train={"epochs": 2, "batch_size": 16}), run_dir="run")
    assert run is not None
    assert run.evaluation.images == 24
    assert evaluate("run") == run.evaluation
