from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.data import DataOptions, create, names
from tenfold.errors import UserError

pytestmark = pytest.mark.unit


def test_every_form_of_a_spec() -> None:
    assert DataOptions.parse("digits") == DataOptions(name="digits")
    expected = DataOptions(name="npz", path=Path("a:b"))
    assert DataOptions.parse("npz:a:b") == expected
    assert DataOptions.parse({"name": "npz", "path": "a:b"}) == expected
    assert DataOptions.parse({"name": "npz:a:b"}) == expected
    full = DataOptions.parse({"name": "npz", "path": Path("a"), "size": 8, "mean": [0, 0.5, 1]})
    assert full.size == (8, 8)
    assert full.mean == (0.0, 0.5, 1.0)
    assert DataOptions.parse({"name": "npz", "size": [8, 12]}).size == (8, 12)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("digit", "unknown data set 'digit': did you mean digits"),
        ("imagnet", "unknown data set 'imagnet'"),
        ({"path": "x"}, "data.name is None"),
        ({"name": ""}, "data.name is ''"),
        (17, "data is 17"),
        ({"name": "digits", "skipbad": True}, "option of data 'skipbad': did you mean skip_bad"),
        ({"name": "digits", "skip_bad": 1}, "data.skip_bad is 1: expected true or false"),
        ({"name": "digits", "limit": 0}, "data.limit is 0"),
        ({"name": "digits", "limit": True}, "data.limit is True"),
        ({"name": "digits", "limit": 2.0}, "data.limit is 2.0"),
        ({"name": "digits", "workers": -1}, "data.workers is -1"),
        ({"name": "digits", "size": "8"}, "data.size is '8'"),
        ({"name": "digits", "size": [8, 8, 8]}, "data.size is"),
        ({"name": "digits", "size": [8, 0]}, "data.size is"),
        ({"name": "digits", "mean": 0.5}, "data.mean is 0.5: expected a list"),
        ({"name": "digits", "mean": []}, "data.mean is"),
        ({"name": "digits", "std": [0.0]}, "numbers above 0"),
        ({"name": "digits", "std": ["x"]}, "data.std is"),
        ({"name": "digits", "mean": [0.5, 0.5]}, "expected 1 numbers"),
        ({"name": "digits", "path": "somewhere"}, "digits comes with the package"),
        ({"name": "npz", "path": 3}, "data.path is 3"),
        ({"name": "npz:a", "path": "b"}, "the path once"),
        ("npz", "npz has no path: expected its folder; give npz:PATH"),
        ("npz:", "data.path is ''"),
        ({"name": "npz", "streaming": True}, "data.streaming is True: expected it only for hf"),
        ({"name": "digits", "classes": 3}, "data.classes is .*only for hf data, not for digits"),
        ({"name": "hf", "samples": 3}, "data.samples is 3: expected it only beside streaming"),
        ({"name": "hf", "streaming": "yes"}, "data.streaming is 'yes': expected true or false"),
        ({"name": "hf", "classes": 0}, "data.classes is 0: expected how many"),
        ({"name": "hf", "classes": ["a", "a"]}, "data.classes is .*each once"),
        ({"name": "hf", "config": 3}, "data.config is 3: expected a name"),
        ({"name": "hf", "streaming": True, "buffer": 0}, "data.buffer is 0"),
        ("hf", "hf has no path: expected a name on the Hub or a folder"),
        ("hf:no/such/folder", "no/such/folder doesn't exist"),
        ("hf:/nosuch", "/nosuch doesn't exist"),
        ("hf:../nosuch", "nosuch doesn't exist"),
        ("imagefolder:nowhere/at/all", "nowhere/at/all doesn't exist"),
    ],
)
def test_wrong_specs(given: object, text: str) -> None:
    with pytest.raises(UserError, match=text) as error:
        create(given)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.npz").touch()
    with pytest.raises(UserError, match="is a file: expected a folder"):
        create(f"npz:{tmp_path / 'train.npz'}")


def test_names_are_described() -> None:
    images = {"digits", "cifar10", "cifar100", "imagefolder", "npz", "hf"}
    clips = {"motions", "frames", "video", "clips_npz"}
    shadows = {"triplets", "rendered_shadows", "shadow_frames"}
    assert set(names()) == images | clips | {"pairs", "unpaired", "edges2photo"} | shadows
    assert all(names().values())


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, tenfold.data; print([m for m in ('torchvision', 'PIL', 'sklearn', 'timm', "
        "'lightning', 'scipy', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
