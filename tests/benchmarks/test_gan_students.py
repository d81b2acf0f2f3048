"""The comparison of five students: one teacher is exact for all, in one go and in pieces."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
import gan_students
import gan_students_training
import gan_tables
import published
import resumable
from tenfold.deploy import artifact
from tenfold.errors import UserError
from tenfold.nn import models

pytestmark = pytest.mark.path

SMALL = (
    "--size 96 --teacher 4 --student 2 --ndf 4 --batch_size 2 --pairs_epochs 2 --unpaired_epochs 2 "
    "--round_epochs 1 --pictures 2 --data sets --extractor stagenet --seeds 0"
)


def image(random, width):
    coarse = random.integers(0, 256, (12, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, 96), Image.Resampling.BICUBIC)


def write_archive(folder, name, parts, width):
    random = np.random.default_rng(0)
    for part, count in parts.items():
        (folder / name / part).mkdir(parents=True)
        for number in range(count):
            image(random, width).save(folder / name / part / f"{number}.png")
    target = folder / "sets" / f"i2i_{name}" / f"{name}.tar"
    target.parent.mkdir(parents=True)
    with tarfile.open(target, "w") as archive:
        archive.add(folder / name, name)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (common, gan_students, gan_tables, published, resumable):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    write_archive(tmp_path, "edges2clothes", {"train": 4, "test": 3}, 192)
    domains = {"trainA": 4, "trainB": 3, "testA": 3, "testB": 2}
    write_archive(tmp_path, "lemon2orange", domains, 96)
    torch.manual_seed(0)
    network, described = models.build("stagenet", num_classes=3, channels=3, options={"width": 2})
    described_by = {"channels": 3, "size": [96, 96], "mean": [0.5] * 3, "std": [0.5] * 3}
    artifact.save(
        network.eval(), tmp_path / "stagenet", network=described,
        preprocessing={**described_by, "interpolation": "bilinear"},
    )  # fmt: skip


def command(*more: str) -> list[str]:
    return [*SMALL.split(), *more]


def result() -> dict:
    return json.loads((common.RESULTS / "gan_students.json").read_text())


def open_sides(name: str):
    given = gan_students.arguments(command())
    values = {key: getattr(given, key) for key in gan_students.SMALL}
    settings = gan_students_training.Settings(**values, extractor="-")
    folder = common.Path("unpacked")
    data = gan_students.open_set(name, settings, common.Path("sets"), folder)
    run = gan_students_training.Run(0, name)
    return gan_students_training.SideBySide(run, settings, data, "stagenet", common.Path("none.pt"))


def test_in_one_go_and_in_pieces(monkeypatch, capsys):
    assert "Not measured yet" in gan_tables.gan_students()
    assert gan_students.main(command()) == 0
    assert "all done" in capsys.readouterr().out
    whole = result()
    assert set(whole["runs"]) == {"edges2clothes-seed0", "lemon2orange-seed0"}
    assert set(whole["figures"]["edges2clothes"]["dcd"]) == {"kid", "fid", "l1", "ssim"}
    assert set(whole["figures"]["lemon2orange"]["dcd"]) == {"kid", "fid"}
    run = whole["runs"]["lemon2orange-seed0"]
    assert run["steps"] == {"teacher": 4, "students": 4}
    assert run["reference_images"] == 2, "held-out images alone"
    assert run["weights"]["plain"] == {"adversarial": 1.0, "reconstruction": 10.0}
    assert run["weights"]["crd"] == {"adversarial": 1.0, "style": 1e4, "feature": 10.0}
    assert len({str(run["figures"][name]) for name in gan_students.STUDENTS}) == 5
    assert set(run["losses"]["dcd+crd"]) == {"adversarial", "style", "feature", "dcd", "relations"}
    shown = sorted(path.name for path in common.RESULTS.glob("*.jpg"))
    assert shown == ["gan_students_edges2clothes.jpg"], "the others' licence is not known"
    with Image.open(common.RESULTS / shown[0]) as grid:
        assert grid.size == (8 * 96, 2 * 96 + gan_students.TITLE)

    table = gan_tables.gan_students()
    assert "| lemon2orange | the input, untouched |" in table
    assert "one seed, no interval" in table
    assert "figures of N=3 held-out images against 2 real ones" in table
    assert "| edges2clothes | the input" in gan_tables.gan_students_targets()
    assert "lemon2orange |" not in gan_tables.gan_students_targets()

    (common.RESULTS / "gan_students.json").unlink()
    allowed = iter([True, False, True, True, True, False] + [True] * 99)
    monkeypatch.setattr(gan_students.Clock, "allows_an_epoch", lambda self: next(allowed))
    for _ in range(3):
        assert gan_students.main(command("--minutes", "8")) == 0
    assert "not all done" in capsys.readouterr().out
    for name, run in result()["runs"].items():
        for key in ("figures", "losses"):
            assert run[key] == whole["runs"][name][key], (name, key)
    assert "--minutes" not in result()["command"]
    with pytest.raises(UserError, match="ndf 4, now 8"):
        gan_students.main(command("--ndf", "8"))


@pytest.mark.parametrize("name", ["edges2clothes", "lemon2orange"])
def test_students_and_their_teacher_are_what_they_are_alone(name, monkeypatch):
    together = open_sides(name)
    first = [s.network.state_dict()["model.1.weight"] for s in together.students.values()]
    assert all(torch.equal(first[0], other) for other in first)
    while not together.finished:
        together.epoch()
    monkeypatch.setattr(gan_students_training, "STUDENTS", ("dcd",))
    alone = open_sides(name)
    while not alone.finished:
        alone.epoch()
    mine, same = alone.students["dcd"].network, together.students["dcd"].network
    for one, other in ((alone.teacher, together.teacher), (mine, same)):
        state = other.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


def test_a_missing_archive_is_named():
    with pytest.raises(UserError, match=r"lemon2orange\.tar does not exist: give the folder"):
        gan_students.main(command("--data", "elsewhere", "--sets", "lemon2orange"))
