"""SMMix by recipe: records and pictures, resuming, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tenfold
from tenfold.errors import UserError
from tenfold.report import write_report
from tenfold.tasks.run import train
from tests import nets
from tests.tasks.conftest import NETS, recipe

pytestmark = pytest.mark.path


def mixed(**changes: Any) -> dict[str, Any]:
    """A run of seconds: 255 digits, so that the last batch is odd, and three epochs."""
    smmix = changes.pop("smmix", {})
    changes["train"] = {"optimizer": "adamw", "lr": 0.004, **changes.get("train", {})}
    values = {"data": {"name": "digits", "limit": 255}, "model": f"{NETS}:vit", **changes}
    return recipe(methods={"smmix": smmix}, **values)


def test_a_run_tells_what_was_mixed():
    run = train(mixed(smmix={"token_head": "own"}), run_dir="runs/a")
    assert run is not None
    assert list(run.model.state_dict()) == list(nets.vit(10).state_dict())
    (record,) = json.loads(Path("runs/a/methods.json").read_text())["methods"]
    (count, head) = (text for _, text in record["facts"])
    done, _, all_of_them = count.partition(" of ")
    assert 0 < int(done) < int(all_of_them) == 12
    assert head == "own head"
    (group,) = record["images"]
    assert group["wide"] is True
    assert len(group["items"]) == 4
    for item in group["items"]:
        picture = Image.open(io.BytesIO(base64.b64decode(item["png"])))
        assert picture.size == (3 * 96 + 2 * 4, 96)
        assert item["caption"].startswith("epoch ")
    page = write_report(run.path).read_text()
    assert "What smmix did" in page
    assert '<ul class="pictures large">' in page
    assert page.count("data:image/png;base64,") == 4


@pytest.mark.parametrize("token_head", ["shared", "own"])
def test_resume_equals_the_unbroken_run(token_head, monkeypatch):
    import tenfold.tasks.progress as progress

    values = mixed(smmix={"token_head": token_head})
    whole = train(values, run_dir="runs/whole")
    begin = progress.MetricsFile.on_train_epoch_start

    def stop(self, trainer, module):
        if trainer.current_epoch == 2:
            raise RuntimeError("pulled the plug")
        begin(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(progress.MetricsFile, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(values, run_dir="runs/broken")
    resumed = train(values, run_dir="runs/broken", resume=True)
    assert whole is not None
    assert resumed is not None
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    ours, theirs = (json.loads(Path(f"runs/{n}/methods.json").read_text()) for n in
                    ("whole", "broken"))  # fmt: skip
    assert ours == theirs


def test_the_last_image_of_an_odd_batch_sits_out(monkeypatch):
    """Alone in its batch it is learned from unmixed."""
    from tenfold.methods import SMMix

    seen = []
    loss = SMMix.loss
    monkeypatch.setattr(
        SMMix, "loss", lambda self, m, x, y: (seen.append(len(x)), loss(self, m, x, y))[1]
    )
    data = {"name": "digits", "limit": 65}
    for token_head in ("shared", "own"):
        run = train(
            mixed(data=data, smmix={"token_head": token_head}, train={"epochs": 1}),
            run_dir=f"runs/{token_head}",
        )
        assert run is not None
    train(mixed(data=data, train={"epochs": 1, "batch_size": 33}), run_dir="runs/odd")
    assert seen == [64, 64, 32, 32]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": f"{NETS}:small"}, r"smmix: .*can't read the attention of Sequential"),
        ({"train": {"label_smoothing": 0.1}}, r"smmix smooths labels itself"),
        ({"train": {"mixup": 0.2}}, "smmix replaces the batch's loss"),
        ({"smmix": {"least_side": 0.9}}, r"methods\.smmix: .*least_side"),
        ({"smmix": {"score": "head"}}, "score"),
        ({"smmix": {"side": 3}}, r"methods\.smmix\.side"),
    ],
)
def test_what_is_refused_before_anything_starts(changes, text):
    with pytest.raises(UserError, match=text):
        tenfold.train(mixed(**changes), run_dir="runs/refused")
    assert not Path("runs").exists()
