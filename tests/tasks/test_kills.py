"""Runs that are ended at random moments, and disks that fill up: nothing good is ever lost."""

from __future__ import annotations

import contextlib
import csv
import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import yaml

import tenfold
from tenfold.errors import UserError
from tenfold.tasks.checkpoints import SafeCheckpoints, newest
from tenfold.tasks.run import train
from tests import nets
from tests.tasks.conftest import recipe

pytestmark = pytest.mark.path


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def train_quietly() -> None:
    try:
        with (
            open("child.log", "w") as log,
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            faulthandler.dump_traceback_later(240, file=log)
            train("recipe.yaml", run_dir="killed", resume=Path("killed").exists())
            faulthandler.cancel_dump_traceback_later()
    except BaseException:
        Path("child.log").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def test_ten_kills_at_random_moments_and_the_end_is_bit_equal():
    """One run, killed at least ten times (-9) wherever it happens to be, and resumed each time.

    A process trains and is killed after a random delay, between prune events, in the middle of an
    epoch, while checkpoints and metrics are written. What it ends with equals an unbroken run.
    """
    values = recipe(
        data={"name": "digits", "limit": 128},
        methods={"lbc": {"n": 2, "m": 4, "end": 20}},
        train={"epochs": 30, "batch_size": 32, "ema": 0.95},
    )
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    whole = train("recipe.yaml", run_dir="whole")
    assert whole is not None

    # Forks of a process that has all imports done and has trained nothing: many kills in little
    # time, whatever other tests did here before.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tenfold.tasks.run", "lightning.pytorch"])
    chance = random.Random(0)
    kills = 0
    for _ in range(30):
        child = forks.Process(target=train_quietly)
        child.start()
        child.join(chance.uniform(0.3, 1.5) if kills < 10 else 300)
        if child.exitcode is None:
            child.kill()
            child.join()
            assert kills < 10, "stuck:\n" + Path("child.log").read_text()
            kills += 1
            continue
        assert child.exitcode == 0, Path("child.log").read_text()
        if kills == 10:
            break
        # finished before ten kills came together: once more from its middle
        os.remove("killed/run.json")
        newest_one = newest(Path("killed/checkpoints"))
        assert newest_one is not None
        newest_one.unlink()
    assert kills == 10
    resumed = tenfold.load("killed", model=nets.small(10))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert rows(Path("killed")) == rows(Path("whole"))


def test_a_folder_in_any_state_of_being_made_or_thrown_away_is_no_obstacle():
    """What a kill leaves at the very start: an empty folder, half a recipe, an epoch half done."""
    values = recipe(train={"epochs": 1})
    for leftover in ((), ("recipe.yaml.writing",), ("recipe.yaml", "checkpoints/.e.ckpt.writing")):
        shutil.rmtree("run", ignore_errors=True)
        Path("run").mkdir()
        for name in leftover:
            Path("run", name).parent.mkdir(exist_ok=True)
            Path("run", name).write_text("")
        assert train(values, run_dir="run", resume=True) is not None
    Path(".run.thrown-away/model").mkdir(parents=True)
    assert train(values, run_dir="run", overwrite=True) is not None
    assert not Path(".run.thrown-away").exists()


def test_scores_and_masks_resume_too():
    """Not only the end: after a resume the method's state equals the unbroken run's."""
    values = recipe(train={"epochs": 4}, methods={"lbc": {"n": 2, "m": 4, "end": 4}})

    def checkpoint(name: str, *stops: int) -> dict:
        train(values, run_dir=name)
        states = {}
        for file in Path(name, "checkpoints").glob("*.ckpt"):
            states[file.name] = torch.load(file, weights_only=True)
        return states["epoch=3.ckpt"]

    whole = checkpoint("whole")
    train(values, run_dir="again")
    os.remove("again/run.json")
    os.remove("again/checkpoints/epoch=3.ckpt")
    train(values, run_dir="again", resume=True)
    resumed = torch.load("again/checkpoints/epoch=3.ckpt", weights_only=True)
    key = next(key for key in whole["callbacks"] if "MethodCallback" in key)
    a, b = whole["callbacks"][key]["lbc"], resumed["callbacks"][key]["lbc"]
    assert a["removed"] == b["removed"]
    for name, alive in a["alive"].items():
        assert torch.equal(alive, b["alive"][name])
    for name, scores in a["scores"].items():
        assert torch.equal(scores["value"], b["scores"][name]["value"])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB, where the system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk, capsys):
    from tenfold.cli import main

    values = recipe(model={"name": "digitnet", "width": 8}, train={"epochs": 3})
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    whole = train(values, run_dir="whole")
    assert whole is not None
    size = max(file.stat().st_size for file in Path("whole/checkpoints").glob("*.ckpt"))
    assert 4 * size < 2**22
    run = small_disk / "run"
    command = ["train", "recipe.yaml", "--no_bench", "--run_dir", str(run)]
    # room for one checkpoint and half of the second
    (small_disk / "ballast").write_bytes(bytes(2**22 - 3 * size // 2 - 40_000))
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err or "could not be written" in err
    assert err.count("\n") == 1
    kept = newest(run / "checkpoints")
    assert kept is not None
    assert not list((run / "checkpoints").glob(".*"))
    (small_disk / "ballast").unlink()
    assert main([*command, "--resume"]) == 0
    for key, value in tenfold.load(run).state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[key]), key


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    writer = SafeCheckpoints()
    for epoch in (1, 2, 10):
        writer.save_checkpoint({"epoch": torch.tensor(epoch)}, tmp_path / f"epoch={epoch}.ckpt")
    assert newest(tmp_path) == tmp_path / "epoch=10.ckpt"
    last = tmp_path / "epoch=10.ckpt"
    last.write_bytes(last.read_bytes()[:-40])
    assert newest(tmp_path) == tmp_path / "epoch=2.ckpt"
    middle = tmp_path / "epoch=2.ckpt"
    data = bytearray(middle.read_bytes())
    place = data.find(b"\x02\x00\x00\x00\x00\x00\x00\x00")  # the tensor's own bytes
    data[place] ^= 0xFF
    middle.write_bytes(bytes(data))
    assert newest(tmp_path) == tmp_path / "epoch=1.ckpt"
    (tmp_path / "epoch=1.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        newest(tmp_path)
    assert newest(tmp_path / "nowhere") is None


def test_the_newest_is_found_by_its_number(tmp_path):
    for name in ("epoch=9", "epoch=10", "epoch=10-v1", "epoch=2-v3"):
        SafeCheckpoints().save_checkpoint({}, tmp_path / f"{name}.ckpt")
    assert newest(tmp_path) == tmp_path / "epoch=10-v1.ckpt"


def test_ctrl_c_says_how_to_go_on():
    values = recipe(train={"epochs": 2000})
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "tenfold.cli", "train", "recipe.yaml", "--run_dir", "run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a parent in the background of a shell hands down that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 120
    while not list(Path("run/checkpoints").glob("*.ckpt")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
