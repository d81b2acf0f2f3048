"""Shadows removed from a user's own files, from Python and from the command line."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tenfold.cli import main
from tenfold.data.shadow_mask import read_mask
from tenfold.deploy.artifact import save
from tenfold.deploy.shadow_detector import open_detector
from tenfold.errors import UserError
from tenfold.nn.labnet import LABNet
from tenfold.tasks.shadow_verbs import open_exported, remove_shadows, remover_of
from tenfold.tasks.verbs import predict

pytestmark = pytest.mark.unit

FACTS = {
    "task": "shadow_removal", "space": "lab", "guess": "ring", "composite": True,
    "size": [64, 64], "channels": 3,
}  # fmt: skip
HEIGHT, WIDTH = 80, 96


def same(codes, mask):
    return codes


def shadow():
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[25:55, 30:70] = True
    return inside


def lit():
    generator = np.random.default_rng(0)
    return generator.normal(170, 6, (HEIGHT, WIDTH, 3)).clip(0, 255)


def shaded():
    pixels = lit()
    pixels[shadow()] *= 0.55
    return pixels.round().astype(np.uint8)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(shaded()).save(tmp_path / "street.png")
    return tmp_path / "street.png"


@pytest.fixture
def mask(tmp_path):
    (tmp_path / "masks").mkdir()
    Image.fromarray((shadow() * 255).astype(np.uint8)).save(tmp_path / "masks" / "street.png")
    return tmp_path / "masks" / "street.png"


def level(path, where=None):
    where = shadow() if where is None else where
    return np.asarray(Image.open(path).convert("RGB"), np.float64)[where].mean()


def core():
    inside = np.zeros_like(shadow())
    inside[32:48, 37:63] = True
    return inside


# -- files ----------------------------------------------------------------------------------------


def test_a_photo_is_written_under_its_name_without_its_shadow(photo, mask, tmp_path):
    out = tmp_path / "out"
    (found,) = remove_shadows(same, FACTS, [photo], out, mask=mask)
    assert (found.file, found.output) == (str(photo), str(out / "street.png"))
    assert (found.mask, found.notes) == (str(mask), ())
    assert os.listdir(out) == ["street.png"]
    assert level(photo, core()) < 100
    assert abs(level(found.output, core()) - 170) < 4
    far = np.zeros_like(shadow())
    far[:10] = True
    before, after = (np.asarray(Image.open(path))[far] for path in (photo, found.output))
    assert np.array_equal(before, after)


def test_existing_files_and_sources_stay(photo, mask, tmp_path):
    out = tmp_path / "out"
    remove_shadows(same, FACTS, [photo], out, mask=mask)
    with pytest.raises(UserError, match=r"street\.png exists: pass --overwrite"):
        remove_shadows(same, FACTS, [photo], out, mask=mask)
    remove_shadows(same, FACTS, [photo], out, mask=mask, overwrite=True)
    # Not even then are the user's own files replaced.
    before = photo.read_bytes(), mask.read_bytes()
    for folder in (photo.parent, mask.parent):
        with pytest.raises(UserError, match="is a file that is read"):
            remove_shadows(same, FACTS, [photo], folder, mask=mask, overwrite=True)
    assert (photo.read_bytes(), mask.read_bytes()) == before


def test_kinds_of_photos(mask, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colours = Image.fromarray(shaded())
    wide = np.asarray(colours.convert("L")).astype(np.uint16) * 257
    opaque = colours.copy()
    opaque.putalpha(255)
    kinds = {
        "street.jpg": (colours, {"icc_profile": profile, "quality": 95}, ()),
        "street.png": (opaque, {}, ("its opaque alpha channel was dropped",)),
        "street.tif": (colours.convert("CMYK"), {}, ("CMYK pixels became 8-bit RGB",)),
        "street.gif": (colours.quantize(64), {}, ("P pixels became 8-bit RGB",)),
        "street.tiff": (
            Image.fromarray(wide), {}, ("grey: its one channel stands for red, green and blue",)
        ),
    }  # fmt: skip
    for name, (picture, options, notes) in kinds.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        picture.save(folder / name, **options)
        (found,) = remove_shadows(same, FACTS, [folder / name], folder / "out", mask=mask)
        assert found.notes == notes, name
        assert found.output.endswith("street.png" if name.endswith("gif") else name)
        made = Image.open(found.output)
        assert (made.mode, made.size) == ("RGB", (WIDTH, HEIGHT))
        assert abs(level(found.output, core()) - 170) < 6, name
        assert made.info.get("icc_profile") == options.get("icc_profile")


def test_photos_are_upright_and_masks_with_them(mask, tmp_path):
    turned = Image.fromarray(shaded()).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    (found,) = remove_shadows(same, FACTS, [tmp_path / "turned.png"], tmp_path / "out", mask=mask)
    assert Image.open(found.output).size == (WIDTH, HEIGHT)
    assert abs(level(found.output, core()) - 170) < 4
    sideways = tmp_path / "sideways.png"
    Image.open(mask).transpose(Image.Transpose.ROTATE_90).save(sideways)
    with pytest.raises(UserError, match=r"sideways.png is 96x80, and .*turned.png 80x96 .*turned"):
        remove_shadows(same, FACTS, [tmp_path / "turned.png"], tmp_path / "o2", mask=sideways)


def test_transparent_photos_need_a_background(mask, tmp_path):
    opacity = np.full((HEIGHT, WIDTH), 255, np.uint8)
    opacity[:5] = 0
    picture = Image.fromarray(shaded())
    picture.putalpha(Image.fromarray(opacity))
    picture.save(tmp_path / "street.png")
    with pytest.raises(UserError, match=r"transparent in 6\.2% of its pixels.*--background"):
        remove_shadows(same, FACTS, [tmp_path / "street.png"], tmp_path / "out", mask=mask)
    assert not (tmp_path / "out").exists()
    (found,) = remove_shadows(
        same, FACTS, [tmp_path / "street.png"], tmp_path / "out", mask=mask, background="black"
    )
    assert found.notes == ("put on black",)
    assert np.asarray(Image.open(found.output))[:5].max() == 0


# -- ways to a mask -------------------------------------------------------------------------------


def test_an_automatic_mask_is_written_and_warned_of(photo, tmp_path):
    out = tmp_path / "out"
    (found,) = remove_shadows(same, FACTS, [photo], out, auto_mask=True)
    assert found.mask == str(out / "street_mask.png")
    assert any("often fails: look at it" in note for note in found.notes)
    made = read_mask(found.mask, (HEIGHT, WIDTH)).pixels.numpy() > 0
    assert (made & shadow()).sum() / (made | shadow()).sum() > 0.85
    assert abs(level(found.output, core()) - 170) < 6
    # Corrected, it is a mask like any other.
    again = remove_shadows(same, FACTS, [photo], tmp_path / "again", mask=found.mask)
    assert again[0].notes == ()
    with pytest.raises(UserError, match=r"street.*\.png exists"):
        remove_shadows(same, FACTS, [photo], out, auto_mask=True)


def test_masks_in_a_folder_go_by_the_photos_names(photo, mask, tmp_path):
    Image.fromarray(255 - shaded()).save(tmp_path / "other.png")
    inverse = Image.fromarray((~shadow() * 255).astype(np.uint8))
    inverse.save(mask.parent / "other.jpg", quality=98)
    files = [photo, tmp_path / "other.png"]
    found = remove_shadows(same, FACTS, files, tmp_path / "out", mask=mask.parent)
    assert [each.mask for each in found] == [str(mask), str(mask.parent / "other.jpg")]
    with pytest.raises(UserError, match=r"2 photos and one mask, .*: give a folder of masks"):
        remove_shadows(same, FACTS, files, tmp_path / "o2", mask=mask)
    with pytest.raises(UserError, match=r"street\.png is given as its own mask: expected another"):
        remove_shadows(same, FACTS, [photo], tmp_path / "o2", mask=photo.parent)
    mask.unlink()
    with pytest.raises(UserError, match=r"has no mask for .*street\.png: expected files of the"):
        remove_shadows(same, FACTS, files, tmp_path / "o2", mask=mask.parent)
    with pytest.raises(UserError, match="does not exist: give a file"):
        remove_shadows(same, FACTS, files, tmp_path / "o2", mask=tmp_path / "none")


def test_one_way_to_a_mask(photo, mask, tmp_path):
    with pytest.raises(UserError, match="0 ways to the shadow's mask: expected one of --mask"):
        remove_shadows(same, FACTS, [photo], tmp_path / "out")
    with pytest.raises(UserError, match="2 ways"):
        remove_shadows(same, FACTS, [photo], tmp_path / "out", mask=mask, auto_mask=True)


def test_names_that_meet(photo, mask, tmp_path):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "street.png"
    other.write_bytes(photo.read_bytes())
    with pytest.raises(UserError, match="two of the files would be written to"):
        remove_shadows(same, FACTS, [photo, other], tmp_path / "out", mask=mask.parent)


def test_bad_files_are_named_and_skipped_on_request(photo, mask, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:2000])
    (mask.parent / "cut.png").write_bytes(mask.read_bytes())
    for files in ([cut, photo], [tmp_path / "none.png", photo]):
        (mask.parent / "none.png").write_bytes(mask.read_bytes())
        name = files[0].name
        with pytest.raises(UserError, match=f"can't read image .*{name}"):
            remove_shadows(same, FACTS, files, tmp_path / "a", mask=mask.parent)
        out = tmp_path / f"skipped_{files[0].stem}"
        found = remove_shadows(same, FACTS, files, out, mask=mask.parent, skip_bad=True)
        assert found[0].output is None
        assert name in found[0].notes[0]
        assert os.listdir(out) == ["street.png"]


# -- detectors ------------------------------------------------------------------------------------

DETECTOR = """
import sys
import numpy as np
from PIL import Image

def dark(photo):
    assert photo.dtype == np.uint8 and photo.ndim == 3
    return photo.mean(2) < 130

def broken(photo):
    raise RuntimeError("no weights")

if __name__ == "__main__":
    found = dark(np.asarray(Image.open(sys.argv[1]).convert("RGB")))
    picture = Image.fromarray((found * 255).astype(np.uint8))
    picture.resize((picture.width // 2, picture.height // 2)).save(sys.argv[2])
"""


@pytest.fixture
def detector(tmp_path):
    (tmp_path / "find shadows.py").write_text(DETECTOR)
    return tmp_path / "find shadows.py"


@pytest.mark.parametrize("kind", ["function", "command", "callable"])
def test_a_detector_finds_the_mask(photo, detector, tmp_path, kind):
    given = {
        "function": f"{detector}:dark",
        "command": f"{sys.executable} '{detector}' {{photo}} {{mask}}",
        "callable": lambda pixels: pixels.mean(2) < 130,
    }[kind]
    (found,) = remove_shadows(same, FACTS, [photo], tmp_path / "out", detector=given)
    assert found.mask == str(tmp_path / "out" / "street_mask.png")
    made = read_mask(found.mask, (HEIGHT, WIDTH)).pixels.numpy() > 0
    overlap = (made & shadow()).sum() / (made | shadow()).sum()
    assert overlap > (0.9 if kind == "command" else 0.99)
    assert abs(level(found.output, core()) - 170) < 4


class Darkness(torch.nn.Module):
    """Logits: above 0 where the mean of red, green and blue is below a half."""

    def forward(self, image):
        return 20 * (0.5 - image.mean(1, keepdim=True))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_detector_in_a_file(photo, tmp_path, dynamic):
    path = tmp_path / "detector.onnx"
    sides = {2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
    torch.onnx.export(
        Darkness().eval(), (torch.zeros(1, 3, 32, 48),), path, dynamo=True, verbose=False,
        dynamic_shapes=(sides,) if dynamic else None,
    )  # fmt: skip
    found = open_detector(str(path))(photo, torch.from_numpy(shaded()).permute(2, 0, 1)[None])
    made = found.pixels.numpy() > 0
    assert made.shape == (HEIGHT, WIDTH)
    assert (made & shadow()).sum() / (made | shadow()).sum() > 0.85


def test_detectors_that_are_refused(photo, detector, tmp_path):
    pixels = torch.from_numpy(shaded()).permute(2, 0, 1)[None]
    for given, text in (
        ("sheet", "detector 'sheet': expected an .onnx file, file.py:function"),
        (f"{detector}:darkk", "did you mean dark"),
        (f"{tmp_path}/none.py:dark", "does not exist"),
        (f"{tmp_path}/none.onnx", "does not exist"),
        ("find '{photo} {mask}", "No closing quotation"),
    ):
        with pytest.raises(UserError, match=text):
            open_detector(given)
    for given, text in (
        (f"{detector}:broken", r"broken fails on .*street\.png: RuntimeError: no weights"),
        ("no-such-program {photo} {mask}", "can't be started: No such file"),
        (
            f"{sys.executable} -c 'raise SystemExit(\"sad\")' {{photo}} {{mask}}",
            r"ended with 1.*sad",
        ),
        (f"{sys.executable} -c '' {{photo}} {{mask}}", "wrote no mask"),
    ):
        with pytest.raises(UserError, match=text):
            open_detector(given)(photo, pixels)


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    network = LABNet(4, 16)
    network.identity_start()
    named = {"name": "tenfold/labnet", "arguments": {"width": 4, "attention_size": 16}}
    path = tmp_path_factory.mktemp("run") / "model"
    return save(network, path, named, preprocessing=FACTS, recipe={"task": "shadow_removal"})


def test_predict_removes_a_shadow(artifact, photo, mask, tmp_path, capsys):
    command = ["predict", str(artifact), str(photo), "--mask", str(mask)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{photo}  {tmp_path / 'out' / 'street.png'}  mask: {mask}" in said
    assert abs(level(tmp_path / "out" / "street.png", core()) - 170) < 6
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "exists: pass --overwrite" in capsys.readouterr().err
    automatic = ["predict", str(artifact), str(photo), "--auto_mask", "--out", str(tmp_path / "b")]
    assert main(automatic) == 0
    assert "often fails: look at it" in capsys.readouterr().out
    assert main(["predict", str(artifact), str(photo)]) == 2
    assert "expected one of --mask FILE" in capsys.readouterr().err
    assert main([*command, "--tile", "512"]) == 2
    assert "tile: not for a network that removes shadows" in capsys.readouterr().err


def test_options_of_shadows_are_refused_elsewhere(tmp_path, photo):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 2))
    facts = {
        "channels": 3, "size": [64, 64], "mean": [0.0] * 3, "std": [1.0] * 3,
        "interpolation": "bilinear",
    }  # fmt: skip
    path = save(network, tmp_path / "net", preprocessing=facts)
    with pytest.raises(UserError, match="auto_mask: not for a network that removes no shadows"):
        predict(path, [photo], model=network, auto_mask=True)


def test_what_an_artifact_says_of_a_remover_comes_back():
    facts = {**FACTS, "space": "rgb", "guess": "none", "composite": False, "multiple": 4}
    remover = remover_of(same, facts)
    assert (remover.space, remover.guess, remover.composite, remover.multiple) == (
        "rgb", "none", False, 4,
    )  # fmt: skip


@pytest.mark.path
def test_an_exported_file_predicts_the_same(artifact, photo, mask, tmp_path, capsys):
    assert main(["export", str(artifact)]) == 0
    assert "onnxruntime, batch 3: outputs equal within" in capsys.readouterr().out
    file = artifact.parent / "export" / "model.onnx"
    if not file.is_file():
        file = artifact / "export" / "model.onnx"
    assert open_exported(file)[1] == FACTS
    assert open_exported(artifact) is None
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert (
        main(["predict", str(artifact), str(photo), "--mask", str(mask), "--out", str(ours)]) == 0
    )
    assert main(["predict", str(file), str(photo), "--mask", str(mask), "--out", str(theirs)]) == 0
    a, b = (np.asarray(Image.open(folder / "street.png"), int) for folder in (ours, theirs))
    assert np.abs(a - b).max() <= 1
