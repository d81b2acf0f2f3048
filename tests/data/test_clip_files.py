"""Clips from folders of frames, video files and packed files."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.data import create, load_clip
from tenfold.data import video as video_module
from tenfold.data.video import count_frames, read_video
from tenfold.errors import UserError
from tests.data.conftest import moving, pack_clips, write_video

pytestmark = pytest.mark.unit


def pictures(number: int, frames: int) -> torch.Tensor:
    """What `moving` gives, as a clip: (C, T, H, W)."""
    return torch.from_numpy(moving(number, frames)).permute(3, 0, 1, 2)


# -- folders of frames -----------------------------------------------------------------------------


def test_frames_as_they_should_be(frame_folders) -> None:
    root: Path = frame_folders()
    (root / "train/run/clip0/notes.txt").write_text("no frame")
    (root / "train/run/clip0/._1.png").write_bytes(b"left by a file system")
    (root / "train/run/empty").mkdir()
    shutil.copytree(root / "train/run/clip1", root / "train/run/more/clip9")
    data = create(f"frames:{root}")
    assert data.classes == ["run", "walk"]
    assert (len(data.train), len(data.test)) == (7, 4)
    assert (data.shape, data.default_augment) == ((3, 16, 112, 112), "imagenet")
    assert data.preprocessing()["resize"] == 128
    assert [data.train.name(i) for i in range(7)] == [
        "train/run/clip0", "train/walk/clip0", "train/run/clip1", "train/walk/clip1",
        "train/run/clip2", "train/walk/clip2", "train/run/more/clip9",
    ]  # fmt: skip
    assert data.train.labels().tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert data.train.labels().tolist() == [data.train.label(i) for i in range(7)]
    assert data.train.length(0) == 12
    # Frame 2 comes ahead of frame 10, and the third clip is the one written third.
    assert torch.equal(data.train.clip(3, [2, 2, 9, 10]), pictures(11, 12)[:, [2, 2, 9, 10]])


def test_limit_takes_from_every_class(frame_folders) -> None:
    data = create({"name": "frames", "path": frame_folders(), "limit": 4, "frames": 4, "size": 8})
    assert data.train.labels().tolist() == [0, 1, 0, 1]
    assert len(data.test) == 4
    batch = next(iter(data.train_loader(batch_size=4, seed=0, workers=0)))
    assert batch["clip"].shape == (4, 3, 4, 8, 8)


def test_frames_of_two_sizes(frame_folders) -> None:
    root: Path = frame_folders()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "train/run/clip0/5.png")
    with pytest.raises(UserError, match=r"clip0: 5.png is 9x9, and 4.png 32x40"):
        create(f"frames:{root}").train.clip(0, [4, 5])


def broken(root: Path, what: str) -> str:
    if what == "frames beside clips":
        shutil.copy(root / "train/run/clip0/0.png", root / "train/run/0.png")
        return r"train/run has images beside the clips' folders: expected .*train/run/<clip>"
    if what == "empty class":
        for clip in (root / "train/walk").iterdir():
            shutil.rmtree(clip)
        return r"train/walk has no clips: expected folders of files ending in .jpg"
    if what == "unknown class":
        shutil.move(root / "val/walk", root / "val/swim")
        return r"val/swim is a class that .*train doesn't have"
    shutil.rmtree(root / what)
    return rf"{root} has no folder {what}"


@pytest.mark.parametrize("what", ["frames beside clips", "empty class", "unknown class", "train"])
def test_broken_folders(frame_folders, what: str) -> None:
    root: Path = frame_folders(train=1, val=1, frames=2)
    text = broken(root, what)
    with pytest.raises(UserError, match=text) as error:
        create(f"frames:{root}")
    assert "\n" not in str(error.value)


# -- video files -----------------------------------------------------------------------------------


def closest(clip: torch.Tensor, originals: torch.Tensor) -> list[int]:
    """Which of the original frames each decoded one is."""
    off = (clip[:, :, None].float() - originals[:, None].float()).square().mean((0, 3, 4))
    assert float(off.min(1).values.max()) < 200  # lossy, and still the picture
    return off.argmin(1).tolist()


@pytest.mark.parametrize(
    ("ending", "codec"), [(".mp4", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx-vp9")]
)
def test_the_frames_that_were_asked_for(tmp_path: Path, ending: str, codec: str) -> None:
    file = write_video(tmp_path / f"a{ending}", moving(0, 30), codec)
    assert count_frames(file, "a") == 30
    for frames in ([0, 1, 2, 3], [7, 14, 21, 28], [29], [5, 5, 6], list(range(30))):
        clip = read_video(file, frames, "a")
        assert clip.shape == (3, len(frames), 32, 40)
        assert clip.dtype == torch.uint8
        assert closest(clip, pictures(0, 30)) == frames
    assert closest(read_video(file, [28, 29, 34], "a"), pictures(0, 30)) == [28, 29, 29]


def test_videos_as_they_should_be(videos) -> None:
    root: Path = videos()
    (root / "train/run/readme.txt").write_text("no video")
    data = create({"name": "video", "path": root, "frames": 4, "stride": 3, "size": 16})
    assert [data.train.name(i) for i in range(3)] == [
        "train/run/0.mp4", "train/walk/0.mp4", "train/run/1.avi",
    ]  # fmt: skip
    assert data.train.labels().tolist() == [0, 1, 0, 1, 0, 1]
    assert (data.train.length(0), data.shape) == (12, (3, 4, 16, 16))
    assert closest(data.train.clip(3, [1, 4, 7]), pictures(11, 12)) == [1, 4, 7]
    batch = next(iter(data.test_loader(batch_size=4, workers=0)))
    assert batch["clip"].shape == (4, 3, 4, 16, 16)
    loaded = load_clip(root / "val/run/0.mp4", data.preprocessing())
    assert torch.equal(loaded, batch["clip"][0])


def test_damaged_videos(videos, tmp_path: Path) -> None:
    root: Path = videos(train=2, val=1)
    (root / "train/run/0.mp4").write_bytes(b"junk" * 100)
    (root / "train/walk/1.avi").write_bytes(b"")
    whole = (root / "train/run/1.avi").read_bytes()
    (root / "train/run/1.avi").write_bytes(whole[: len(whole) // 2])
    data = create(f"video:{root}")
    with pytest.raises(UserError) as error:
        list(data.train_loader(batch_size=1, seed=0, workers=0))
    assert "3 of 4 train clips can't be read" in str(error.value)
    data = create({"name": "video", "path": root, "skip_bad": True})
    assert sorted(data.skipped) == ["train/run/0.mp4", "train/run/1.avi", "train/walk/1.avi"]
    sound = pytest.importorskip("av")
    with sound.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = sound.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="it has no picture"):
        count_frames(tmp_path / "sound.mp4", "sound")


def test_a_telephones_video_is_upright(tmp_path: Path) -> None:
    """The display matrix in the file's header is a quarter turn."""
    file = write_video(tmp_path / "a.mp4", moving(0, 3))
    content = bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # version 0 of the box: its matrix is at 40
    one = 1 << 16
    quarter = [0, one, 0, -one, 0, 0, 32 * one, 0, 1 << 30]  # x' = 32 - y, y' = x
    content[matrix : matrix + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in quarter)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(content)
    clip = read_video(turned, [0, 1, 2], "turned")
    assert clip.shape == (3, 3, 40, 32)
    clockwise = torch.rot90(pictures(0, 3), -1, (2, 3))
    assert closest(clip, clockwise) == [0, 1, 2]


def test_without_pyav(videos, monkeypatch) -> None:
    root: Path = videos(train=1, val=1, frames=2)
    real = builtins.__import__

    def missing(name: str, *arguments: object, **named: object) -> object:
        if name == "av":
            raise ImportError(name)
        return real(name, *arguments, **named)

    video_module._av.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"run pip install 'tenfold\[video\]'"):
        create(f"video:{root}")


# -- packed clips ----------------------------------------------------------------------------------


def test_packed_clips_as_they_should_be(tmp_path: Path) -> None:
    pack_clips(tmp_path / "packed/train.npz", [5, 9, 4])
    pack_clips(tmp_path / "packed/test.npz", [6, 3])
    data = create({"name": "clips_npz", "path": tmp_path / "packed", "frames": 4, "size": 24})
    assert (data.name, data.classes) == ("packed", ["run", "walk"])
    assert [data.train.length(i) for i in range(3)] == [5, 9, 4]
    assert data.train.name(1) == "packed/train.npz[1]"
    assert torch.equal(data.train.clip(1, [0, 3, 8]), pictures(1, 9)[:, [0, 3, 8]])
    batch = next(iter(data.test_loader(batch_size=2, workers=0)))
    assert batch["clip"].shape == (2, 3, 4, 24, 24)
    assert batch["label"].tolist() == [0, 1]


def test_one_file_is_divided(tmp_path: Path) -> None:
    pack_clips(tmp_path / "clips.npz", [2] * 22)
    data = create(f"clips_npz:{tmp_path}")
    assert [data.test.name(i) for i in range(4)] == [
        f"{tmp_path.name}/clips.npz[{i}]" for i in (8, 9, 18, 19)
    ]
    names = {data.train.name(i) for i in range(len(data.train))}
    assert len(names) == 18
    assert not names & {data.test.name(i) for i in range(4)}
    assert data.test.labels().tolist() == [0, 1, 0, 1]
    assert len(create({"name": "clips_npz", "path": tmp_path, "limit": 5}).train) == 5
    pack_clips(tmp_path / "clips.npz", [2] * 8)
    with pytest.raises(UserError, match="fewer than 5 clips of any class"):
        create(f"clips_npz:{tmp_path}")


WRONG = {
    "missing key": ({"clip_start": None}, "has no clip_start: expected the keys bytes"),
    "outside": ({"clip_start": np.array([0, 2, 9])}, "clip_start of .* go from 0 to 9"),
    "falling": ({"clip_start": np.array([0, 4, 2])}, "clip_start of .* fall from 4 to 2 at clip 1"),
    "empty clip": ({"clip_start": np.array([0, 0, 4])}, "clip 0 of .* has no frames"),
    "too few": ({"clip_start": np.array([0, 4])}, "2 labels and 2 clip_start"),
    "label": ({"labels": np.array([0, 2])}, "clip 1 of .* has label 2: expected 0 to 1"),
    "offsets": ({"offsets": np.arange(5) * 10**6}, "offsets of .* go from 0 to 4000000"),
    "kind": ({"clip_start": np.array([0.0, 2, 4])}, "clip_start of .* is float64"),
    "classes": ({"classes": np.array(["run", "swim"])}, "the classes of .*test.npz aren't those"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files(tmp_path: Path, what: str) -> None:
    arrays, text = WRONG[what]
    pack_clips(tmp_path / "train.npz", [2, 2], **arrays)
    pack_clips(tmp_path / "test.npz", [2, 2])
    with pytest.raises(UserError, match=text) as error:
        create(f"clips_npz:{tmp_path}")
    assert "\n" not in str(error.value)


def test_nothing_packed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither train.npz and test.npz nor clips.npz"):
        create(f"clips_npz:{tmp_path}")


# -- one clip for predict --------------------------------------------------------------------------


def test_load_clip_is_what_evaluation_sees(frame_folders, tmp_path: Path) -> None:
    root: Path = frame_folders()
    data = create({"name": "frames", "path": root, "frames": 4, "stride": 2, "size": 16})
    batch = next(iter(data.test_loader(batch_size=1, workers=0)))
    assert torch.equal(load_clip(root / "val/run/clip0", data.preprocessing()), batch["clip"][0])
    (tmp_path / "nothing").mkdir()
    for path, text in (
        (tmp_path / "nothing", "the folder has no files ending in .jpg"),
        (tmp_path / "gone.mp4", "can't read clip .*gone.mp4: No such file"),
        (root / "val/run/clip0/1.txt", "can't read clip"),
    ):
        with pytest.raises(UserError, match=text):
            load_clip(path, data.preprocessing())
    images = {**data.preprocessing(), "frames": None}
    with pytest.raises(UserError, match="is one for images: expected frames"):
        load_clip(root / "val/run/clip0", images)
